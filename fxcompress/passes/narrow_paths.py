"""Paths into a sum that could be narrower than the sum: which of their channels are zero where the sum is alive."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from fxcompress.channels.analysis import Analysis
from fxcompress.channels.interpret import Trail
from fxcompress.channels.layers import support
from fxcompress.channels.rules.registry import Known
from fxcompress.channels.survivors import has_own_labels
from fxcompress.channels.values import Value
from fxcompress.passes.branches import written_operand_is_read
from fxcompress.passes.broadcasts import DIFFERENCES, IN_PLACE, SUMS, has_shape_of_sum
from fxcompress.passes.join import Join, join_at
from fxcompress.trace.graph.described import OP_KEY, place_of_node
from fxcompress.trace.traced import TracedModule


@dataclass(frozen=True, slots=True)
class NarrowPath:
    """One operand of a sum, and the channels of it that must stay.

    Attributes:
        place: ``"mode:node"``, the node that adds.
        operand: 0 or 1.
        dim: of the channels, from the left.
        rank: how many dims the sum has.
        index: the channels that stay, of those that the path has now, in order.
        size: how many it has now.
        name: what makes its channels, for people.
        tensor: the parameter or buffer that does; "" for none.
    """

    place: str
    operand: int
    dim: int
    rank: int
    index: tuple[int, ...]
    size: int
    name: str
    tensor: str = ""

    @property
    def mode(self) -> str:
        """Which graph."""
        return self.place.partition(":")[0]

    @property
    def node(self) -> str:
        """The name of the node that adds."""
        return self.place.partition(":")[2]


def find_paths(
    analysis: Analysis, knowns: dict[str, list[Known]]
) -> tuple[dict[str, tuple[NarrowPath, ...]], dict[NarrowPath, str]]:
    """The sums that have a path with channels which are always zero.

    Args:
        analysis: of the network.
        knowns: what is known in each graph, in each mode that can run it.

    Returns:
        for each such sum, by its place, the paths that could be narrowed, the one with the most zeros first; and for
        paths with zeros that cannot be narrowed, the reason.
    """
    found: dict[str, tuple[NarrowPath, ...]] = {}
    refused: dict[NarrowPath, str] = {}
    for mode, graph in analysis.module.graphs.items():
        for node in graph.nodes:
            paths = [path for i in _operands(analysis.module, node) if (path := _path(analysis, knowns, mode, node, i))]
            reasons = [_refusal(analysis, node, path) for path in paths]
            refused |= {path: reason for path, reason in zip(paths, reasons, strict=True) if reason}
            good = [path for path, reason in zip(paths, reasons, strict=True) if not reason]
            if good:
                found[f"{mode}:{node.name}"] = tuple(sorted(good, key=lambda path: len(path.index)))
    return found, refused


def _operands(module: TracedModule, node: fx.Node) -> tuple[int, ...]:
    """The operands that could be narrowed, if they are zero in places: () for a node that is no sum of two tensors."""
    if join_at(module, node) is not None:
        calls = [n for g in module.graphs.values() for n in g.find_nodes(op="call_module", target=node.target)]
        return (1,) if calls == [node] else ()
    sums, differences = node.target in SUMS, node.target in DIFFERENCES
    plain = node.op in {"call_function", "call_method"} and len(node.args) == 2 and set(node.kwargs) <= {"alpha"}
    if not plain or not (sums or differences) or not all(isinstance(a, fx.Node) for a in node.args):
        return ()
    if node.args[0] is node.args[1] or type(node.kwargs.get("alpha", 1)) not in {int, float}:
        return ()
    return (1, 0) if sums and node.kwargs.get("alpha", 1) == 1 else (1,)


def _path(
    analysis: Analysis, knowns: dict[str, list[Known]], mode: str, node: fx.Node, operand: int
) -> NarrowPath | None:
    """The path with its zeros along the dim that has most of them; None where it has none."""
    value = analysis.trails[mode].args[node.name][operand]
    if not isinstance(value, Value):
        return None
    join = join_at(analysis.module, node)
    dims = {min(support(layer)) for layer in value.layers if len(support(layer)) == 1}
    options = {d: _zeros(value, d, knowns[mode]) for d in sorted(dims) if join is None or d == join.dim}
    if not options or not any(zeros.any() for zeros in options.values()):
        return None
    dim = max(options, key=lambda d: int(options[d].sum()))
    index = np.flatnonzero(~options[dim])
    tensor = _maker(analysis, value, dim)
    name = tensor.removesuffix(".weight") or str(node.args[operand])
    place, left = f"{mode}:{node.name}", tuple(index.tolist())
    return NarrowPath(place, operand, dim, value.rank, left, value.shape[dim], name, tensor)


def _zeros(value: Value, dim: int, knowns: list[Known]) -> np.ndarray:
    """Which entries along a dim are zero everywhere, in each mode; bool (size,)."""
    zero = np.ones(value.shape[dim], dtype=bool)
    for known in knowns:
        may = (known.of(value) != 0).movedim(dim, 0)
        zero &= ~may.reshape(may.shape[0], -1).any(dim=1).numpy()
    return zero


def _maker(analysis: Analysis, value: Value, dim: int) -> str:
    """The tensor whose entries are the channels of a value; "" where several are, or none."""
    layer = next(layer for layer in value.layers if support(layer) == {dim})
    names = {analysis.space.where(atom)[0] for atom in layer.reshape(-1).tolist()}
    return names.pop() if len(names) == 1 else ""


def _refusal(analysis: Analysis, node: fx.Node, path: NarrowPath) -> str:
    """Why a path with zeros cannot be narrowed; "" if it can."""
    trail = analysis.trails[path.mode]
    if not path.index:
        return "all of it is zero, and it is left for another reason"
    if join_at(analysis.module, node) is not None:
        return ""
    if node.target in IN_PLACE and (written_operand_is_read(node, trail) or _outlives(node, trail)):
        return "the sum is written to memory that something else reads"
    part, full = (trail.args[node.name][i] for i in (path.operand, 1 - path.operand))
    if why := _difference(part, full, trail.values[node.name], path.dim):
        return why
    if not has_own_labels(full, path.dim) and not has_shape_of_sum(analysis, path.mode, node, 1 - path.operand):
        return "for inputs of other sizes the sum repeats its other operand along the channels"
    return ""


def _difference(part: Value, full: object, out: object, dim: int) -> str:
    """What sets the operands of a sum apart, and its result; "" where they are alike but for dims of no channels."""
    if not isinstance(full, Value) or not isinstance(out, Value):
        return "it is added to something that is no tensor of the graph"
    if not full.rank == part.rank == out.rank or full.shape[dim] != part.shape[dim]:
        return "the sum repeats one of its operands along the channels"
    if not full.meta.dtype == part.meta.dtype == out.meta.dtype or not out.meta.is_floating_point():
        return "its operands have different types"
    return ""


def _outlives(node: fx.Node, trail: Trail) -> bool:
    """Whether an in-place sum writes to memory of the caller's, or of the network's."""
    memory = trail.storages[node.all_input_nodes[0].name]
    owned = (other for other in node.graph.nodes if other.op in {"placeholder", "get_attr"})
    return any(trail.storages[other.name] & memory for other in owned)


def open_joins(module: TracedModule, paths: list[NarrowPath]) -> None:
    """Let each sum take from a path only the channels that stay, in place; all of the path is still computed.

    Raises:
        KeyError: the graph has no such node.
        ValueError: the node is no sum.
    """
    for path in paths:
        graph = module.graphs.get(path.mode)
        node = next((n for n in graph.nodes if n.name == path.node), None) if graph is not None else None
        if node is None:
            raise KeyError(path.place)
        if path.operand not in _operands(module, node):
            raise ValueError(f"{path.place} is no sum")
        _open(module, node, path)
    module.recompile()


def _open(module: TracedModule, node: fx.Node, path: NarrowPath) -> None:
    tensors = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    known = tensors.get(path.tensor, next(iter(tensors.values()), torch.empty(0, device="cpu")))
    taken = torch.tensor(path.index, dtype=torch.int64, device=known.device)
    join = join_at(module, node)
    if join is not None:
        index = join.index[taken.to(join.index.device)]
        owner, _, leaf = str(node.target).rpartition(".")
        setattr(module.get_submodule(owner), leaf, Join(join.dim, join.rank, index, join.alpha, taken))
        return
    name = _free_name(module, node if path.mode == "eval" else f"{path.mode}_{node}")
    module.add_module(name, Join(path.dim, path.rank, taken, _alpha(node), taken.clone()))
    full, part = node.args[1 - path.operand], node.args[path.operand]
    node.meta[OP_KEY] = place_of_node(node).kind
    node.op, node.target, node.args, node.kwargs = "call_module", name, (full, part), {}


def _alpha(node: fx.Node) -> Any:  # noqa: ANN401 - a number
    alpha = node.kwargs.get("alpha", 1)
    return -alpha if node.target in DIFFERENCES else alpha  # type: ignore[operator]


def _free_name(module: nn.Module, node: object) -> str:
    name = f"{node}_join"
    while hasattr(module, name):
        name = f"{name}_"
    return name


def close_joins(module: TracedModule) -> None:
    """Where a path has lost all channels that its sum does not take, the sum takes the path as it is; in place."""
    for child in module.modules():
        if isinstance(child, Join) and child.taken is not None:
            assert torch.equal(child.taken, torch.arange(len(child.taken), device=child.taken.device))
            child.taken = None


def grown(path: NarrowPath, stays: np.ndarray) -> NarrowPath:
    """The path with those channels too that stay anyway; ``stays`` is bool (size,)."""
    index = np.union1d(np.array(path.index, dtype=np.int64), np.flatnonzero(stays))
    return replace(path, index=tuple(index.tolist()))
