"""How a network computes one of its weights from tensors that it holds, as a program of its own.

The program says what the weight is, whether it is the same in every run, and whether a channel could be cut out of what
it is made from.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcompress.trace.basics.equality import same_values
from fxcompress.trace.basics.op_watch import OpWatch
from fxcompress.trace.basics.precision import without_gradient
from fxcompress.trace.effects.randomness import same_randomness
from fxcompress.trace.graph import names
from fxcompress.trace.graph.pickling import pack, unpack
from fxcompress.trace.traced import copy_graph

_ROUNDING = frozenset({"round", "sign", "sgn", "floor", "ceil", "trunc", "frac", "heaviside"})
_MOVING = frozenset(
    {"clone", "_to_copy", "copy", "flip", "roll", "cat", "stack", "_unsafe_view", "contiguous", "index"}
)
_HALVES = frozenset({torch.float16, torch.bfloat16})


@dataclass(frozen=True, eq=False)
class Program:
    """The steps that lead to a weight, in order; a placeholder stands for each tensor that they read."""

    graph: fx.Graph

    def __call__(self, tensors: Sequence[Tensor]) -> Any:  # noqa: ANN401 - of whatever type
        """The weight that these tensors make."""
        return fx.Interpreter(nn.Module(), graph=self.graph).run(*tensors)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Program":
        return self  # nothing changes it

    def __reduce__(self) -> Any:  # noqa: ANN401
        return _unpacked, (pack(self.graph),)


def _unpacked(packed: Any) -> Program:  # noqa: ANN401
    return Program(unpack(packed))


@dataclass(frozen=True, slots=True, eq=False)
class Computed:
    """A node of a graph that computes a weight.

    Attributes:
        root: the node.
        nodes: it and all that it is made from, in the order of the graph.
        tensors: of these, the first one that stands for each tensor of the network.
        program: what the nodes do.
        key: the same for the same steps on the same tensors.
    """

    root: fx.Node
    nodes: tuple[fx.Node, ...]
    tensors: tuple[fx.Node, ...]
    program: Program
    key: str


def held_in(module: nn.Module, graph: fx.Graph) -> dict[fx.Node, Tensor]:
    """Each node that stands for a tensor of a network, with the tensor."""
    found = {}
    for node in graph.find_nodes(op="get_attr"):
        value = names.fetch_attr(module, str(node.target))
        if isinstance(value, Tensor):
            found[node] = value
    return found


def computed(root: fx.Node, held: Mapping[fx.Node, Tensor]) -> Computed | None:
    """How ``root`` is computed; None where anything but tensors of the network takes part.

    Args:
        root: the node of a weight.
        held: see :func:`held_in`.
    """
    behind = _behind(root, held)
    if behind is None:
        return None
    nodes = tuple(node for node in root.graph.nodes if node in behind)
    steps = [node for node in nodes if node not in held]
    # In the order in which the steps use them. That in which they are read depends on who else reads them.
    first: dict[int, fx.Node] = {}
    for node in (used for step in steps for used in step.all_input_nodes if used in held):
        first.setdefault(id(held[node]), node)
    graph = fx.Graph()
    inputs = {key: graph.placeholder(f"tensor{i}") for i, key in enumerate(first)}
    made = {node: inputs[id(held[node])] for node in nodes if node in held}
    for step in steps:
        args, kwargs = fx.node.map_arg((step.args, step.kwargs), made.__getitem__)
        made[step] = graph.create_node(step.op, step.target, args, kwargs)
    graph.output(made[root])
    key = repr((list(first), [(n.op, n.target, n.args, n.kwargs) for n in graph.nodes]))
    return Computed(root, nodes, tuple(first.values()), Program(graph), key)


def _behind(root: fx.Node, held: Mapping[fx.Node, Tensor]) -> set[fx.Node] | None:
    """All that a node is made from, itself included; None where that is not tensors of the network and functions."""
    found, open_ = {root}, [root]
    while open_:
        node = open_.pop()
        if node not in held and node.op not in {"call_function", "call_method"}:
            return None
        fresh = [used for used in node.all_input_nodes if used not in found]
        found.update(fresh)
        open_ += fresh
    return found


class _NotFixedError(Exception):
    """What a program computes may be another value next time, or jumps."""


class _Watch(OpWatch):
    """Raises before a random number is drawn, or a value is rounded: that is to be done anew in each run.

    Attributes:
        moves_only: until now no op could make one entry from several of the same tensor.
    """

    moves_only = True

    def before(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ANN401 - an op
        """Look at an op.

        Raises:
            _NotFixedError: it is one of those.
        """
        name = func._schema.name.partition("::")[2].rstrip("_")
        if torch.Tag.nondeterministic_seeded in func.tags or name in _ROUNDING or "quantize" in name:
            raise _NotFixedError(name)
        self.moves_only &= func.is_view or torch.Tag.pointwise in func.tags or name in _MOVING


def may_matter(program: Program, tensors: Sequence[Tensor], elements: int) -> bool:
    """Whether a look at the values of a weight can be worth it, which takes time and memory: by its ops and its size.

    Args:
        program: that makes the weight.
        tensors: that it is made from.
        elements: that the weight may have.
    """
    watch = _Watch()
    try:
        with torch.no_grad(), same_randomness(), watch:
            weight = program([tensor.to("meta") for tensor in tensors])
    except _NotFixedError:
        return False
    except Exception:  # noqa: BLE001 - it needs values
        return True
    return isinstance(weight, Tensor) and weight.numel() <= elements and not watch.moves_only


def fixed_value(program: Program, tensors: Sequence[Tensor]) -> nn.Parameter | None:
    """The weight as a parameter, which needs a gradient where the weight has one; the tensors are left alone.

    None where it is no finite matrix or kernel of floats, or where computing it draws random numbers, rounds, writes
    to a tensor of the network, or ends in another value the second time.
    """
    own = [tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in tensors]
    watch = _Watch()
    try:
        with torch.enable_grad(), same_randomness(), watch:
            weight, again = program(own), program(own)
    except Exception:  # noqa: BLE001 - whatever fails here is left to the network
        return None
    if not isinstance(weight, Tensor) or weight.ndim < 2 or not weight.is_floating_point():
        return None
    if not all(map(same_values, (weight, *own), (again, *tensors))) or not bool(torch.isfinite(weight).all()):
        return None
    return nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)


def mixes(program: Program, tensors: Sequence[Tensor], sources: Sequence[bool]) -> bool:
    """Whether a dim of the weight cannot be cut by cutting the tensors that it is made from.

    Of the tensors behind a weight that was scaled, masked, turned or multiplied, some entries belong to its channel 0
    alone, and go with it. Where a mean or a length has been taken over channels, all entries of a tensor that channel 0
    is made from make the other channels too. Gradients at random values tell, of the channels 0, 1 and the last one.

    Args:
        program: that makes the weight.
        tensors: that it is made from.
        sources: which of them are parameters.
    """
    generator = torch.Generator(device="cpu").manual_seed(0)
    probes = [_probe(t, generator) if s else t.detach() for t, s in zip(tensors, sources, strict=True)]
    graph = copy_graph(program.graph)
    for node in graph.nodes:
        if node.target is without_gradient or (node.op == "call_method" and node.target == "detach"):
            node.replace_all_uses_with(node.args[0])  # what is read without a gradient is read all the same
    with torch.enable_grad(), suppress(RuntimeError):  # some steps in place have no gradient
        weight = Program(graph)(probes)
        factors = torch.rand(weight.shape, generator=generator, device="cpu").to(weight) + 0.1
        parts = [probe for probe in probes if probe.requires_grad]
        return any(_mixed(weight * factors, parts, dim) for dim in range(weight.ndim) if weight.shape[dim] > 1)
    return False


def _probe(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Random values between 0.1 and 0.9, of which most functions are defined and few are cut off."""
    kind = torch.float32 if tensor.dtype in _HALVES else tensor.dtype
    values = torch.rand(tensor.shape, generator=generator, device="cpu") * 0.8 + 0.1
    return values.to(device=tensor.device, dtype=kind).requires_grad_(tensor.is_floating_point())


def _mixed(weight: Tensor, parts: list[Tensor], dim: int) -> bool:
    """Whether some tensor makes all channels along a dim at once; beside it there may be a factor for each channel."""
    first = _made_from(weight.select(dim, 0), parts)
    others = [_made_from(weight.select(dim, i), parts) for i in sorted({1, weight.shape[dim] - 1})]
    shared = [all(_within(one, other[i]) for other in others) for i, one in enumerate(first)]
    own = [part for part, known in zip(parts, shared, strict=True) if not known]
    used = any(known and bool(one.any()) for known, one in zip(shared, first, strict=True))
    return used and all(part.numel() <= weight.shape[dim] for part in own)


def _made_from(part: Tensor, parts: list[Tensor]) -> list[Tensor]:
    """Which entries of each tensor change a part of the weight."""
    gradients = torch.autograd.grad(part.sum(), parts, retain_graph=True, materialize_grads=True)
    return [gradient != 0 for gradient in gradients]


def _within(first: Tensor, other: Tensor) -> bool:
    """Whether most of what is in the first is in the other; a gradient may be zero by chance."""
    return bool((first & ~other).sum() * 2 <= first.sum())
