"""Entries that are read at places which depend on the size of the inputs: any of them may be read in the next run.

``table[n - 1]`` is another row for other inputs, ``h.split(n, 1)`` cuts in other places, and so does whatever picks
entries of ``cat([tokens, h], 1)``. The labels along such a dim stay, and what is constant there must be so everywhere.
"""

import math
from collections.abc import Callable, Collection
from collections.abc import Set as AbstractSet

import torch
from torch import Tensor, fx

from fxcompress.channels.layers import Layers, along
from fxcompress.channels.rules.indexing import hold_along
from fxcompress.channels.rules.registry import Known, OpClass, equal_along
from fxcompress.channels.space import Space
from fxcompress.channels.survivors import has_own_labels
from fxcompress.channels.values import Call, Met, Step, Value, leaves
from fxcompress.trace.graph.calls import function_name

_TEXT = "which of its entries are read depends on the size of the input"


def _labels(call: Call, space: Space) -> tuple[Layers, ...]:
    source, dims, _ = call.args
    return (hold_along(source.layers, dims, space, "input-size", _TEXT),)


def _constants(step: Step, known: Known) -> list[Tensor]:
    source, dims, beside = step.call.args
    found = equal_along(known.of(source), dims)
    return [found if beside is None else torch.where(found == beside, found, torch.nan)]


ANYWHERE = OpClass("anywhere", _labels, _constants)
"""Arguments: a tensor, the dims along which the next op may read other entries than on the example inputs, and what it
may put beside them, or None."""


_END = 2**63 - 1
_Dims = Callable[[Call, Met], list[int]]


def _along_one(dim: int, *numbers: int, trivial: Collection[object] = ()) -> _Dims:
    """Of an op that takes a dim at one position, and numbers at others."""

    def dims(call: Call, met: Met) -> list[int]:
        at = [call.arg(i, call.func._schema.arguments[i].name) for i in numbers]
        return [call.arg(dim, "dim", 0)] if met.may_change(at, trivial) else []

    return dims


def _repeated(call: Call, met: Met) -> list[int]:
    counts = call.args[1]
    return [i - len(counts) for i, n in enumerate(counts) if met.may_change(n)][-call.args[0].rank :]


def _rolled(call: Call, met: Met) -> list[int]:
    shifts, dims = call.args[1], call.arg(2, "dims", [])
    if met.may_change(shifts, {0}):
        return list(dims) or list(range(call.args[0].rank))
    return []


def _padded(call: Call, met: Met) -> list[int]:
    return [-1 - i // 2 for i, n in enumerate(call.args[1]) if met.may_change(n, {0})]


def _diagonal(call: Call, met: Met) -> list[int]:
    if met.may_change(call.arg(1, "offset", 0), {0}):
        return [call.arg(2, "dim1", 0), call.arg(3, "dim2", 1)]
    return []


_DIMS: dict[str, _Dims] = {
    "slice": _along_one(1, 2, 3, 4, trivial={0, 1, _END}),
    "select": _along_one(1, 2),
    "narrow": _along_one(1, 2, 3),
    "split": _along_one(2, 1),
    "split_with_sizes": _along_one(2, 1),
    "chunk": _along_one(2, 1),
    "unfold": _along_one(1, 2, 3),
    "repeat": _repeated,
    "tile": _repeated,
    "roll": _rolled,
    "constant_pad_nd": _padded,
    "diagonal": _diagonal,
}


def moving_dims(call: Call, met: Met) -> frozenset[int]:
    """The dims of the first argument of a call of which a number that comes from a size says what is read."""
    dims = _DIMS.get(call.func.overloadpacket.__name__)
    source = call.args[0] if call.args else None
    if dims is None or not isinstance(source, Value):
        return frozenset()
    return frozenset(d % source.rank for d in dims(call, met))


Moves = Callable[[object], bool]
"""Whether an argument of a node is a number or an index that comes from a size."""


def dims_of_node(node: fx.Node, rank: int, moves: Moves) -> frozenset[int] | None:
    """The same as it stands in the graph, where a number is one and no other that is as large.

    Args:
        node: of a torch function.
        rank: of its first argument.
        moves: see :data:`Moves`.

    Returns:
        the dims; None for a node that may call any ops.
    """
    name = function_name(node)
    given = [*node.args[1:], *(value for key, value in node.kwargs.items() if key not in {"dim", "dims"})]
    if name in {"getitem", "setitem"}:
        return _indexed(node.args[1], rank, moves)
    if name in {"repeat", "tile"}:
        counts = given[0] if len(given) == 1 and isinstance(given[0], tuple | list) else given
        return frozenset(rank - 1 - i for i, n in enumerate(reversed(counts)) if moves(n) and i < rank)
    if name == "pad" and isinstance(given[0], tuple | list):
        return frozenset(rank - 1 - i // 2 for i, n in enumerate(given[0]) if moves(n))
    if name not in _DIM_AT:
        return None
    position = _DIM_AT[name]
    dim = node.args[position] if len(node.args) > position else node.kwargs.get("dim", node.kwargs.get("dims"))
    numbers = [n for i, n in enumerate(given) if i + 1 != position]
    if not any(moves(n) for n in leaves(numbers)):
        return frozenset()
    dim = 0 if dim is None and name in _FIRST else dim
    return frozenset({dim % rank}) if isinstance(dim, int) else frozenset(range(rank))


def picked_by(node: fx.Node, rank: int) -> frozenset[int]:
    """The dims along which ``x[...]`` picks or writes entries by their places; that these may be all, is not seen.

    Torch leaves out a slice of as many entries as there are, which there need not be in the next run.
    """
    picks = function_name(node) in {"getitem", "setitem"}
    return _indexed(node.args[1], rank, lambda bound: bound is not None) if picks else frozenset()


def written_sizes(node: fx.Node) -> frozenset[int]:
    """The sizes that stand in the graph, where a node reshapes a tensor."""
    name = function_name(node)
    if name not in {"view", "reshape", "unflatten"}:
        return frozenset()
    first = 2 if name == "unflatten" else 1  # behind the dim that becomes several
    given = (node.args[first:], [value for key, value in node.kwargs.items() if key != "dim"])
    return frozenset(n for n in leaves(given) if type(n) is int)


def put_beside(node: fx.Node) -> float | None:
    """What a node that pads puts beside the entries, NaN for a number that is computed; None for another node."""
    name = function_name(node)
    if name != "pad" or (node.args[2] if len(node.args) > 2 else node.kwargs.get("mode", "constant")) != "constant":
        return None
    value = node.args[3] if len(node.args) > 3 else node.kwargs.get("value")
    return float(value or 0) if isinstance(value, int | float | None) else math.nan


_DIM_AT = {
    "narrow": 1, "select": 1, "unfold": 1, "split": 2, "split_with_sizes": 2, "chunk": 2, "tensor_split": 2,
    "repeat_interleave": 2, "roll": 2,
}  # fmt: skip
"""Where these take a dim."""
_FIRST = frozenset({"split", "split_with_sizes", "chunk", "tensor_split"})


def _indexed(index: object, rank: int, moves: Moves) -> frozenset[int]:
    """The dims along which ``x[n:]`` picks entries at places that move; the op need not be there, if these are all."""
    items = list(index) if isinstance(index, tuple | list) else [index]
    place = next((i for i, item in enumerate(items) if item is Ellipsis), None)
    if place is not None:
        items[place : place + 1] = [slice(None)] * (rank - sum(item is not None for item in items) + 1)
    picked = [item for item in items if item is not None][:rank]
    return frozenset(d for d, item in enumerate(picked) if any(map(moves, _bounds(item))))


def _bounds(item: object) -> tuple[object, ...]:
    return (item.start, item.stop, item.step) if isinstance(item, slice) else (item,)


def floats(call: Call, made: AbstractSet[int], filled: AbstractSet[int], stacked: Collection[int]) -> bool:
    """Whether the places of what a ``cat`` joins depend on the size of the inputs, such as words behind a token.

    Channels that the network makes and that lie beside others, say those of an input, do not: their number is as it is.

    Args:
        call: of ``cat``.
        made: keys of the values that are made of parameters alone.
        filled: keys of the values that are made out of nothing.
        stacked: keys of the values that are one entry of a stack.
    """
    rank = call.metas[0].ndim
    dim = call.arg(1, "dim", 0) % rank
    parts = [part for part in map(_as_value, call.args[0]) if part.rank == rank]
    others = [part for part in parts if not has_own_labels(part, dim) and part.key not in stacked]
    own = [part.key for part in parts if along(part.layers, dim) is not None and part.key not in made]
    if not others or any(key not in filled for key in own):
        return False
    return not own or any(part.layers for part in others)


def _as_value(part: Value | Tensor) -> Value:
    return part if isinstance(part, Value) else Value(torch.empty(part.shape, device="meta"))
