"""Ops that only move entries: run the same op on the labels, and on the maps of constants."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxcompress.channels.computed_numbers import Computed
from fxcompress.channels.layers import (
    Layers,
    compress,
    expand,
    move,
    overlapping,
    reshape,
    support,
    vector,
    zeros_like_dim,
)  # fmt: skip
from fxcompress.channels.rules.pointwise import couple_aligned
from fxcompress.channels.rules.registry import Known, OpClass, nothing_known, register
from fxcompress.channels.space import Space
from fxcompress.channels.values import Call, Step, Value, replace


def settle(moved: list[Tensor], call: Call, space: Space) -> Layers:
    """Keep the layers that still vary; pin those that collapsed to one entry.

    Of those that now cross each other the first is kept, and the others are pinned.
    """
    result: list[Tensor] = []
    crossing = {id(layer) for layer in overlapping(moved)} if len(moved) > 1 else set()
    taken: set[int] = set()
    for layer in moved:
        if id(layer) in crossing and support(layer) & taken:
            space.pin(layer, "crossing", f"{call.name} mixes two of its labelled dims")
        elif layer.numel() <= 1:
            space.pin(layer, "single-entry", f"{call.name} picks out this one entry")
        else:
            result.append(layer)
            taken |= support(layer)
    return tuple(result)


def moved_labels(call: Call, space: Space) -> tuple[Layers, ...]:
    """The label rule of an op that moves entries of its first argument."""
    source: Value = call.args[0]
    run = on_labels(call)
    moved: list[list[Tensor]] = [[] for _ in call.metas]
    for layer in source.layers:
        for i, out in enumerate(move(run, layer, source.shape)):
            moved[i].append(out)
    return tuple(settle(layers, call, space) for layers in moved)


def on_labels(call: Call) -> Callable[[Tensor], Any]:
    """The op of a call as a function of its first argument."""
    args, kwargs = replace(lambda index: index.cpu(), Tensor, (call.args[1:], call.kwargs))  # labels are there
    return lambda labels: call.func(labels, *args, **kwargs)


def moved_constants(step: Step, known: Known) -> list[Tensor]:
    """The constant rule of the same."""
    source: Value = step.call.args[0]
    bits = known.bits(source)
    if bits.numel() == 1:
        return [bits.reshape((1,) * out.rank).view(torch.float64) for out in step.outputs]
    return [out.view(torch.float64) for out in move(on_labels(step.call), bits, source.shape)]


def _diagonal_labels(call: Call, space: Space) -> tuple[Layers, ...]:
    """Entries of one dim meet those of another, as in a sum of two tensors; what meets none shifts those that do."""
    source: Value = call.args[0]
    out = call.metas[0]
    offset = call.arg(1, "offset", 0)
    pair = [call.arg(1 + i, f"dim{i}", i - 1) % source.rank for i in (1, 2)]
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    rest: list[Tensor] = []
    for layer in source.layers:
        varying = [i for i in (0, 1) if layer.shape[pair[i]] > 1]
        if len(varying) == 2:
            space.pin(layer, "crossing", "a diagonal mixes two of its labelled dims")
            continue
        for i in varying:
            _pin_beside(layer, pair[i], max(0, offset if i else -offset), out.shape[-1], space)
        (moved,) = move(on_labels(call), layer, source.shape)
        (sides[varying[0]] if varying else rest).append(moved)
    kept: Layers = ()
    if any(sides):
        kept = couple_aligned([(_covered(out.shape, side), tuple(side)) for side in sides], out.ndim, space)
    return (settle([*kept, *rest], call, space),)


def _pin_beside(layer: Tensor, dim: int, start: int, size: int, space: Space) -> None:
    """Pin what lies along ``dim`` before and behind the entries that a diagonal reads."""
    for beside in (layer.narrow(dim, 0, start), layer.narrow(dim, start + size, layer.shape[dim] - start - size)):
        space.pin(beside, "crossing", "it lies beside the entries of a diagonal, which would be shifted")


def _covered(shape: torch.Size, layers: list[Tensor]) -> torch.Size:
    """A shape that has entries along its last dim, and along others where the layers have labels."""
    last = len(shape) - 1
    return torch.Size([n if d == last or any(x.shape[d] > 1 for x in layers) else 1 for d, n in enumerate(shape)])


def _reshape_labels(call: Call, space: Space) -> tuple[Layers, ...]:
    """Of dims that become one, the outermost keeps its labels: channels lie there, and positions of a kernel inside."""
    source: Value = call.args[0]
    layers = source.layers
    if len(layers) > 1:
        layers = tuple(sorted(layers, key=lambda layer: min(support(layer), default=0)))
    return (settle([reshape(layer, source.shape, call.metas[0].shape) for layer in layers], call, space),)


def _reshape_constants(step: Step, known: Known) -> list[Tensor]:
    source: Value = step.call.args[0]
    bits = known.bits(source)
    return [reshape(bits, source.shape, step.outputs[0].shape).view(torch.float64)]


def _retyped_labels(call: Call, space: Space) -> tuple[Layers, ...]:
    """The same for numbers of as many bytes; others lie in one dim with their neighbours."""
    source: Value = call.args[0]
    if call.metas[0].shape == source.shape:
        return (source.layers,)
    for layer in source.layers:
        space.pin(layer, "crossing", "its numbers are seen as ones of fewer or of more bytes")
    return ((),)


def _retyped_constants(step: Step, known: Known) -> list[Tensor]:
    source: Value = step.call.args[0]
    same = step.outputs[0].meta.dtype is source.meta.dtype
    return [known.of(source)] if same else nothing_known(step, known)


def _cat_labels(call: Call, space: Space) -> tuple[Layers, ...]:
    parts = _parts(call.args[0], call.metas[0])
    rank = call.metas[0].ndim
    dim = call.arg(1, "dim", 0) % rank
    here = [[layer for layer in layers if layer.shape[dim] > 1] for _, layers in parts]
    dims = frozenset().union(*(support(layer) for layers in here for layer in layers))
    rest: list[tuple[torch.Size, Layers]] = []
    for (shape, layers), mine in zip(parts, here, strict=True):
        others = [layer for layer in layers if layer.shape[dim] == 1]
        for layer in [o for o in others if support(o) & dims]:
            space.pin(layer, "crossing", "cat joins it with labels of another shape")
        kept = tuple(o for o in others if not support(o) & dims)
        rest.append((torch.Size([1 if d == dim else n for d, n in enumerate(shape)]), kept))
        if len(mine) > 1:
            raise AssertionError("two layers vary along one dim")
    shared = couple_aligned(rest, rank, space)
    if not dims:
        for layer in shared if _ragged(parts, shared) else ():
            space.pin(layer, "fixed-operand", "cat joins it with a tensor whose size is fixed")
        return (shared,)
    pieces = [_piece(shape, mine, dim, dims) for (shape, _), mine in zip(parts, here, strict=True)]
    joined = compress(torch.cat(pieces, dim))
    return ((*settle([joined], call, space), *shared),)


def _ragged(parts: list[tuple[torch.Size, Layers]], shared: Layers) -> bool:
    """Whether some part has no labels where the others have."""
    return any(
        shape[d] > 1 and not any(layer.shape[d] > 1 for layer in layers)
        for out in shared
        for d in support(out)
        for shape, layers in parts
    )


def _piece(shape: torch.Size, mine: list[Tensor], dim: int, dims: frozenset[int]) -> Tensor:
    size = [n if d in dims else 1 for d, n in enumerate(shape)]
    if not mine:
        return expand(zeros_like_dim(shape[dim], len(shape), dim), size)
    return expand(mine[0], size)


def _parts(tensors: Any, out: Tensor) -> list[tuple[torch.Size, Layers]]:  # noqa: ANN401
    """Shape and layers of what is joined; the empty 1-d tensors that cat ignores are left out."""
    pairs = [(t.shape, t.layers if isinstance(t, Value) else ()) for t in tensors]
    return [(shape, layers) for shape, layers in pairs if len(shape) == out.ndim]


def _cat_constants(step: Step, known: Known) -> list[Tensor]:
    out = step.outputs[0]
    dim = step.call.arg(1, "dim", 0) % out.rank
    # A tensor from outside, made of sizes or positions: other inputs give it other entries. So may one without entries.
    parts = [t if isinstance(t, Value) else Value(t) for t in step.call.args[0]]
    parts = [t for t in parts if t.rank == out.rank]
    maps = [known.of(t).double() for t in parts]
    full = [max(m.shape[d] for m in maps) for d in range(out.rank)]
    shapes = [[t.shape[dim] if d == dim else n for d, n in enumerate(full)] for t in parts]
    pieces = [own.expand(shape) for own, shape in zip(maps, shapes, strict=True)]
    joined = torch.cat(pieces, dim)
    for own in (m for m, t in zip(maps, parts, strict=True) if t.shape[dim] == 0 and m.numel()):
        joined = torch.where(joined == own, joined, torch.nan)
    return [compress(joined.view(torch.int64)).view(torch.float64)]


def _pad_labels(call: Call, space: Space) -> tuple[Layers, ...]:
    source: Value = call.args[0]
    moved = [_pad(layer, call.args[1], 0) for layer in source.layers]
    return (settle(moved, call, space),)


def _pad(layer: Tensor, amounts: list[int], value: float) -> Tensor:
    """Pad along the dims that vary, and only those."""
    own = [amount if layer.shape[layer.ndim - 1 - i // 2] > 1 else 0 for i, amount in enumerate(amounts)]
    return torch.constant_pad_nd(layer, own, value)


def _has_labels(value: Value, dim: int) -> bool:
    return any(layer.shape[dim] > 1 for layer in value.layers)


def _pad_constants(step: Step, known: Known) -> list[Tensor]:
    source: Value = step.call.args[0]
    amounts, number = step.call.args[1], step.call.arg(2, "value", 0)
    value = torch.nan if isinstance(number, Computed) else float(number)
    channels = known.of(source)
    padding = {source.rank - 1 - i // 2 for i, n in enumerate(amounts) if n}
    whole = [n if d in padding and _has_labels(source, d) else -1 for d, n in enumerate(source.shape)]
    channels = channels.expand(whole)  # what is put beside channels is known, though these are not
    padded = _pad(channels, amounts, value)
    border = any(n and channels.shape[channels.ndim - 1 - i // 2] == 1 for i, n in enumerate(amounts))
    return [torch.where(padded == value, padded, torch.nan) if border else padded]


def _same_shape_labels(call: Call, space: Space) -> tuple[Layers, ...]:
    """Ops that work as well on dims of size 1: run on the compact layer."""
    source: Value = call.args[0]
    return (settle([on_labels(call)(layer) for layer in source.layers], call, space),)


def _same_shape_constants(step: Step, known: Known) -> list[Tensor]:
    source: Value = step.call.args[0]
    result: Tensor = on_labels(step.call)(known.of(source))
    return [result]


def _embedding_labels(call: Call, space: Space) -> tuple[Layers, ...]:
    """A table whose rows are looked up: they stay, its columns are channels."""
    table: Value = call.args[0]
    kept = []
    for layer in table.layers:
        held = space.hold(layer, {0}, "computed-index", "its rows are looked up") if layer.shape[0] > 1 else layer
        kept += [] if held is None else [vector(held.reshape(-1), call.metas[0].ndim, call.metas[0].ndim - 1)]
    return (tuple(kept),)


def _looked_up_labels(call: Call, space: Space) -> tuple[Layers, ...]:
    """The same; and each index leaves a row where it lies."""
    (columns,) = _embedding_labels(call, space)
    indices = call.args[1]
    own = indices.layers if isinstance(indices, Value) else ()
    return ((*columns, *(layer.unsqueeze(-1) for layer in own)),)


def _embedding_constants(step: Step, known: Known) -> list[Tensor]:
    table = known.held(step.call.args[0])
    same = (table == table[:1]).all(0, keepdim=True).cpu()
    same = torch.where(same, table[:1].cpu(), torch.nan)
    rank = step.outputs[0].rank
    return [same.reshape((1,) * (rank - 1) + (-1,))]


def _bag_labels(call: Call, space: Space) -> tuple[Layers, ...]:
    """Sums of looked-up rows; beside them come indices and counts."""
    for value in (v for v in (*call.args[1:], *call.kwargs.values()) if isinstance(v, Value)):
        for layer in value.layers:
            space.pin(layer, "computed-index", "it says which rows of a table are summed")
    return (*_embedding_labels(call, space), *(() for _ in call.metas[1:]))


def _bag_constants(step: Step, known: Known) -> list[Tensor]:
    """A sum, mean or maximum of zeros is zero, that of no rows as well."""
    (same,) = _embedding_constants(step, known)
    return [torch.where(same == 0, 0.0, torch.nan), *nothing_known(step, known)[1:]]


def _restride_labels(call: Call, space: Space) -> tuple[Layers, ...]:
    """A new memory layout for the same entries, as channels-last pooling asks for."""
    source: Value = call.args[0]
    if _moves_nothing(call):
        return (source.layers,)
    for layer in source.layers:
        space.pin(layer, "aliased-write", f"{call.name} reads memory in another order")
    return ((),)


def _moves_nothing(call: Call) -> bool:
    """Whether each entry stays where it was: the same shape, and the same stride along each dim that has entries."""
    source: Value = call.args[0]
    strides = zip(source.shape, source.meta.stride(), call.args[2], strict=False)
    same = all(n == 1 or old == new for n, old, new in strides)
    return tuple(call.args[1]) == tuple(source.shape) and same and not call.arg(3, "storage_offset")


def _restride_constants(step: Step, known: Known) -> list[Tensor]:
    return [known.of(step.call.args[0])] if _moves_nothing(step.call) else nothing_known(step, known)


MOVEMENT = register(
    OpClass("movement", moved_labels, moved_constants),
    [
        "select", "slice", "split", "split_with_sizes", "chunk", "unbind", "narrow", "expand", "repeat", "unfold",
         "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "tile", "repeat_interleave",
    ],
)  # fmt: skip
DIAGONAL = register(OpClass("diagonal", _diagonal_labels, moved_constants), ["diagonal"])
RESHAPE = register(
    OpClass("reshape", _reshape_labels, _reshape_constants),
    ["view", "_unsafe_view", "reshape", "squeeze", "unsqueeze", "flatten", "unflatten", "_reshape_alias", "view_as"],
)
PERMUTE = register(
    OpClass("permute", _same_shape_labels, _same_shape_constants),
    ["permute", "transpose", "t", "flip", "roll", "movedim", "numpy_T"],
)
RETYPED = OpClass("other type", _retyped_labels, _retyped_constants)
"""``h.view(torch.int64)``, an overload of ``view``: of bits nothing is known, as those of zero say its sign."""
CAT = register(OpClass("cat", _cat_labels, _cat_constants), ["cat", "concat"])
PAD = register(OpClass("pad", _pad_labels, _pad_constants), ["constant_pad_nd"])
EMBEDDING_BAG = register(
    OpClass("embedding bag", _bag_labels, _bag_constants), ["_embedding_bag", "_embedding_bag_forward_only"]
)
EMBEDDING = register(OpClass("embedding", _looked_up_labels, _embedding_constants), ["embedding"])
LOOKUPS = frozenset({EMBEDDING, EMBEDDING_BAG})
"""Ops that look up rows of a table, their first argument: what they make has its columns as channels."""
RESTRIDE = register(OpClass("restride", _restride_labels, _restride_constants), ["as_strided"])
