"""Tables that a model makes of sizes when it first needs them, and keeps for the next run.

    if self.table.shape[0] != length:
        self.table = positions(length)          # of sizes and constants alone

A graph cannot keep anything, and makes the table anew in each run. That is the same as long as nothing else goes into
it: no value of an input, no parameter, and nothing that a run has left behind.
"""

from torch import Tensor, fx, nn

from fxcompress.trace.concrete.recorded_nodes import is_number
from fxcompress.trace.concrete.sizes import Number
from fxcompress.trace.concrete.writer import Writer
from fxcompress.trace.graph.calls import function_name, writes_in_place

_PLAIN = (bool, str, type(None))
_LIKE = frozenset(
    {"new_zeros", "new_ones", "new_empty", "new_full", "zeros_like", "ones_like", "empty_like", "full_like"}
)
_CASTS = frozenset({"type_as", "to"})


def are_tables(changed: frozenset[str], model: nn.Module, writer: Writer) -> bool:
    """Whether all that a run has set is made of sizes, constants and buffers that it leaves alone.

    Args:
        changed: the names of the attributes that it has set.
        model: that has run.
        writer: of the graph of the run.
    """
    found = [leaf for name in changed for leaf in _leaves(_attribute(model, name))]
    tensors = [value for value in found if isinstance(value, Tensor)]
    others = [value for value in found if not isinstance(value, Tensor)]
    if not tensors or not all(type(value) in _PLAIN or isinstance(value, Number) for value in others):
        return False
    if not all(writer.knows(tensor) for tensor in tensors):
        return False
    made = {writer.node_of(tensor) for tensor in tensors}
    return made.isdisjoint(_of_values(writer.graph, changed | {name for name, _ in model.named_parameters()}))


def _leaves(value: object) -> list[object]:
    """What is in nested containers: cosines and sines, say, or the numbers of a shape."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else None
    return [value] if inside is None else [leaf for item in inside for leaf in _leaves(item)]


def _attribute(model: nn.Module, name: str) -> object:
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    return next((t[key] for t in (module._parameters, module._buffers, vars(module)) if key in t), None)


def _of_values(graph: fx.Graph, names: frozenset[str] | set[str]) -> set[fx.Node]:
    """The nodes that depend on the values of inputs, or of the named attributes."""
    found = {n for n in graph.nodes if n.op == "placeholder" or (n.op == "get_attr" and str(n.target) in names)}
    while True:
        before = len(found)
        for node in graph.nodes:
            if not is_number(node) and (node.op == "call_module" or not found.isdisjoint(_read_by(node))):
                found.add(node)
                if writes_in_place(node):  # to what it is given, and so to all that shares memory with that
                    _add_sources(node, found)
        if len(found) == before:
            return found


def _read_by(node: fx.Node) -> list[fx.Node]:
    """The arguments of a node but for one that is only looked at for its shape, dtype and device."""
    name = function_name(node)
    position = 0 if name in _LIKE else 1 if name in _CASTS and node.op == "call_method" else len(node.args)
    found: list[fx.Node] = []
    fx.map_arg((node.args[:position], node.args[position + 1 :], node.kwargs), found.append)
    return found


def _add_sources(node: fx.Node, found: set[fx.Node]) -> None:
    left = list(node.all_input_nodes)
    while left:
        source = left.pop()
        if source not in found and not is_number(source):
            found.add(source)
            left += source.all_input_nodes
