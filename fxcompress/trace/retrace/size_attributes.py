"""Which sizes in a graph are attributes of the model's modules: ``self.heads`` in ``x.view(n, t, self.heads, -1)``.

Where the model's code is to stay, such a size can still become another one, as the attribute can. It is found by
tracing a copy of the model whose numbers know where they are from. One that something is computed from, or decided by,
is left alone: it stands for more than the size. Of layers of torch, whose attributes say what their tensors are, it is
noted as well which of them the model's code reads.
"""

import json
import operator
from collections.abc import Sequence
from typing import Any

from torch import fx, nn

from fxcompress.errors import FxCompressError
from fxcompress.trace.basics.modules import modules_in
from fxcompress.trace.fingerprint import fingerprint
from fxcompress.trace.graph.attribute_number import Origin, OwnNumber, ranges_tell
from fxcompress.trace.graph.described import place_of_node
from fxcompress.trace.inputs import ExampleInputs
from fxcompress.trace.model.skeleton import skeleton
from fxcompress.trace.traced import TracedModule
from fxcompress.trace.tracer import trace

_KEY = "fxcompress_own_numbers"
_READ_KEY = "fxcompress_read_numbers"
_VIEWS = frozenset({"view", "reshape", "expand"})
_FIRST = {
    **dict.fromkeys(("zeros", "ones", "empty"), 0), **dict.fromkeys((*_VIEWS, "new_zeros", "new_ones", "new_empty"), 1)
}  # fmt: skip
"""Where the sizes begin that a function takes as a tuple or one by one."""


def note_own_numbers(traced: TracedModule, model: nn.Module, inputs: ExampleInputs) -> None:
    """Tell the nodes of a traced model which of their sizes are attributes; none where that cannot be found out.

    Args:
        traced: the model as it was traced, without plain weights.
        model: stays as it is.
        inputs: that it was traced on.
    """
    computed: set[Origin] = set()
    twin = _twin(traced, model, inputs, computed) or _twin(traced, model, inputs, computed, layers=True)
    if twin is None:
        return
    for graph in twin.graphs.values():
        for node in graph.nodes:
            computed |= _elsewhere(node, twin)
    for mode, graph in traced.graphs.items():
        for node, other in zip(graph.nodes, twin.graphs[mode].nodes, strict=False):
            sizes = sizes_in(other.target, other.args) if node.name == other.name else None
            found = {i - len(sizes): n.origin for i, n in enumerate(sizes) if isinstance(n, OwnNumber)} if sizes else {}
            found = {i: origin for i, origin in found.items() if origin not in computed}
            if found:
                node.meta[_KEY] = json.dumps([[i, *origin] for i, origin in found.items()])
        graph.output_node().meta[_READ_KEY] = json.dumps(sorted(computed))


def _twin(
    traced: TracedModule, model: nn.Module, inputs: ExampleInputs, computed: set[Origin], *, layers: bool = False
) -> TracedModule | None:
    """The same trace of a copy whose numbers tell; None where its code takes these for something else than numbers."""
    try:
        with ranges_tell():
            twin = trace(_marked(model, computed, layers=layers), inputs, plain=False)
    except FxCompressError:
        return None
    return twin if fingerprint(twin) == fingerprint(traced) and twin.graphs.keys() == traced.graphs.keys() else None


def _elsewhere(node: fx.Node, twin: TracedModule) -> set[Origin]:
    """The attributes that a node is given as something else than a size, but by the layer of torch that has them."""
    if _is_join(node) and node.users and all(_joined(user) is node for user in node.users):
        return set()
    found: list[OwnNumber] = []

    def leaf(value: object) -> None:
        if isinstance(value, OwnNumber):
            found.append(value)

    fx.node.map_aggregate((node.args, node.kwargs), leaf)
    sizes = sizes_in(node.target, node.args) or []
    others = [number for number in found if not any(number is size for size in sizes)]
    return {n.origin for n in others if not (n.of_layer and _is_of(node, n.origin[0], twin))}


def _is_join(node: fx.Node) -> bool:
    """Whether a node may put numbers behind the sizes of a tensor."""
    return node.target is operator.add and isinstance(node.args[1], tuple | list)


def _is_of(node: fx.Node, path: str, twin: TracedModule) -> bool:
    """Whether the code of the layer at ``path`` has made a node."""
    return twin.get_submodule(place_of_node(node).module) is twin.get_submodule(path)


def own_numbers(node: fx.Node) -> dict[int, Origin]:
    """Of the sizes in a node those that are attributes, by their positions, counted from the end: -1 for the last."""
    return {i: (path, name) for i, path, name in json.loads(node.meta.get(_KEY, "[]"))}


def read_numbers(traced: TracedModule) -> set[Origin]:
    """The attributes that the model's code uses for something else than a size, as far as that is known."""
    metas = [graph.output_node().meta for graph in traced.graphs.values()]
    return {(path, name) for meta in metas for path, name in json.loads(meta.get(_READ_KEY, "[]"))}


def hold_numbers(traced: TracedModule) -> None:
    """Let no attribute that is a size change from now on, in place: the code makes more of one than can be seen."""
    nodes = [node for graph in traced.graphs.values() for node in graph.nodes]
    held = read_numbers(traced) | {origin for node in nodes for origin in own_numbers(node).values()}
    for graph in traced.graphs.values():
        graph.output_node().meta[_READ_KEY] = json.dumps(sorted(held))


def is_of_torch(module: nn.Module) -> bool:
    """Whether a module is a layer of torch, whose attributes say what its tensors are."""
    return type(module).__module__.startswith("torch.nn.") and not isinstance(module, nn.MultiheadAttention)


def sizes_in(target: object, args: Sequence[Any]) -> list[Any] | None:
    """The sizes that a view, ``unflatten``, ``split`` or ``zeros`` is given, in whatever form; None for other nodes.

    Of ``x.view(x.size()[:-1] + (3, 4))`` these are the numbers, behind an Ellipsis for any number of others.

    >>> sizes_in("view", ("x", 2, 3)), sizes_in("reshape", ("x", (2, 3))), sizes_in("split", ("x", 4, 1))
    ([2, 3], [2, 3], [4])
    """
    name = _name(target)
    if name in _FIRST:
        given = list(args[_FIRST[name] :])
        if len(given) == 1 and isinstance(given[0], fx.Node) and given[0].target is operator.add:
            last = given[0].args[1]
            return [..., *last] if isinstance(last, tuple | list) else given
        return list(given[0]) if len(given) == 1 and isinstance(given[0], tuple | list) else given
    position = {"unflatten": 2, "split": 1}.get(name)
    if position is None or position >= len(args):
        return None
    sizes = args[position]
    return list(sizes) if isinstance(sizes, tuple | list) else [sizes]


def _name(target: object) -> str:
    """What a function of torch or a method is called; "" for other functions."""
    if isinstance(target, str):
        return target
    own = (getattr(target, "__module__", None) or "torch").partition(".")[0] == "torch"
    return str(getattr(target, "__name__", "")) if own else ""


def _joined(node: fx.Node) -> object:
    """The node that joins the sizes of a view, where these are all that it is given."""
    start = _FIRST.get(_name(node.target))
    return node.args[start] if start is not None and len(node.args) == start + 1 else None


def set_own_numbers(module: nn.Module, traced: TracedModule) -> None:
    """Give the modules of a model the attributes that the sizes in its rewritten graphs stand for, in place."""
    for graph in traced.graphs.values():
        for node in graph.nodes:
            sizes = sizes_in(node.target, node.args) or []
            for i, (path, name) in own_numbers(node).items():
                if -i <= len(sizes) and type(sizes[i]) is int:
                    vars(module.get_submodule(path))[name] = sizes[i]


def _marked(model: nn.Module, computed: set[Origin], *, layers: bool) -> nn.Module:
    """A copy of a model whose own numbers know where they are from; those of torch's ``layers`` alone, perhaps."""
    copy = skeleton(model)
    paths = {id(module): path for path, module in copy.named_modules()}
    for module in modules_in(copy):
        torchs = is_of_torch(module)
        for name, value in list(vars(module).items()):
            if type(value) is int and value > 1 and (torchs or not layers):
                vars(module)[name] = OwnNumber(value, (paths[id(module)], name), computed, of_layer=torchs)
    return copy
