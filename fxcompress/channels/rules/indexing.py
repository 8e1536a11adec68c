"""Ops that pick entries at places that a tensor says, and those that write along one dim: index, gather, scatter.

By a constant index entries move, and labels with them. Where the network computes the index, the size of the dims that
are indexed must stay; the channels along other dims are picked or written alike, and may go::

    x[edges]    (nodes, C) -> (edges, C)        zeros.index_add(0, target, messages)        y.gather(1, best)
"""

from typing import Any

import torch
from torch import Tensor

from fxcompress.channels.computed_numbers import is_written
from fxcompress.channels.layers import Layers, compress, move, support
from fxcompress.channels.rules.movement import moved_constants, moved_labels, settle
from fxcompress.channels.rules.pointwise import Operand, couple_aligned, unexpanded
from fxcompress.channels.rules.reductions import pass_others
from fxcompress.channels.rules.registry import Known, OpClass, equal_along, nothing_known, register
from fxcompress.channels.space import Space
from fxcompress.channels.values import Call, Step, Value, find, replace

_CODE, _TEXT = "computed-index", "it is indexed by a tensor that the network computes"


def hold_along(layers: Layers, dims: frozenset[int], space: Space, code: str = _CODE, text: str = _TEXT) -> Layers:
    """The layers, with one label for each slice where they vary along indexed ``dims``."""
    held = [space.hold(x, mixed, code, text) if (mixed := support(x) & dims) else x for x in layers]
    return tuple(layer for layer in held if layer is not None)


def pin_layers(values: list[Value], space: Space, text: str = _TEXT) -> None:
    """All labels of some values stay."""
    for value in values:
        for layer in value.layers:
            space.pin(layer, _CODE, text)


# Picking: index, index_select.


def _indices(call: Call) -> dict[int, Any]:
    """The indices of the call by the dim of the source at which they start; a mask takes as many as it has dims."""
    if call.func.overloadpacket is torch.ops.aten.index_select:
        return {call.args[1] % call.args[0].rank: call.args[2]}
    found, dim = {}, 0
    for index in call.args[1]:
        if index is not None:
            found[dim] = index
        dim += _rank(index) if _is_mask(index) else 1
    return found


def _meta(index: Any) -> Tensor:  # noqa: ANN401 - a Value or a Tensor
    return index.meta if isinstance(index, Value) else index


def _rank(index: Any) -> int:  # noqa: ANN401
    return _meta(index).ndim


def _is_mask(index: Any) -> bool:  # noqa: ANN401
    return index is not None and _meta(index).dtype in {torch.bool, torch.uint8}


def indexed_dims(call: Call) -> frozenset[int]:
    """The dims of the source that are indexed."""
    found = _indices(call).items()
    return frozenset(d for start, i in found for d in range(start, start + (_rank(i) if _is_mask(i) else 1)))


def picked_dims(step: Step) -> frozenset[int]:
    """The dims of a tensor along which a step picks entries at places that the network computes."""
    computed = step.op is INDEX and isinstance(step.call.args[0], Value) and find(Value, step.call.args[1:])
    return indexed_dims(step.call) if computed else frozenset()


def _index_labels(call: Call, space: Space) -> tuple[Layers, ...]:
    source, computed = call.args[0], find(Value, call.args[1:])
    if not isinstance(source, Value) or any(map(_is_mask, computed)):
        pin_layers(find(Value, (call.args, call.kwargs)), space)
        return ((),)
    if not computed:
        return moved_labels(call, space)
    pin_layers(computed, space)
    moved: list[Tensor] = []
    for layer in hold_along(source.layers, indexed_dims(call), space):
        moved += _at_first(call, layer)
    return (settle(moved, call, space),)


def _at_first(call: Call, layer: Tensor) -> list[Tensor]:
    """What a call makes of a layer that does not vary along the indexed dims: any entry there will do."""
    args = replace(lambda index: torch.zeros(index.shape, dtype=torch.int64, device="cpu"), Value, call.args[1:])
    return move(lambda labels: call.func(labels, *args, **call.kwargs), layer, call.args[0].shape)


def _index_constants(step: Step, known: Known) -> list[Tensor]:
    call, computed = step.call, find(Value, step.call.args[1:])
    if not isinstance(call.args[0], Value) or any(map(_is_mask, computed)):
        return nothing_known(step, known)
    if not computed:
        return moved_constants(step, known)
    equal = equal_along(known.of(call.args[0]), indexed_dims(call))
    return [out.view(torch.float64) for out in _at_first(call, equal.view(torch.int64))]


# Along one dim: gather and scatter, whose index has as many dims as the tensor.


def _aligned(values: list[Value], dim: int, space: Space) -> Layers:
    """Couple the labels of tensors that meet entry by entry along all dims but ``dim``.

    Along a dim where they have different sizes only the first entries are used; then the size must stay.
    """
    rank = values[0].rank
    dims = frozenset({dim, *(d for d in range(rank) if len({value.shape[d] for value in values}) > 1)})
    operands: list[Operand] = []
    for value in values:
        shape = torch.Size([1 if d in dims else n for d, n in enumerate(unexpanded(value))])
        operands.append((shape, hold_along(value.layers, dims, space)))
    return couple_aligned(operands, rank, space)


def _along(call: Call) -> tuple[list[Value], int] | None:
    """The tensors of a gather or scatter, and its dim; None where one of them is no labelled tensor."""
    whole, dim, index, *rest = call.args
    tensors = [as_value(t) for t in (whole, index, *rest) if isinstance(t, Value | Tensor)]
    if not tensors[0].rank or len({value.rank for value in tensors}) > 1:
        return None
    return tensors, dim % tensors[0].rank


def as_value(tensor: Value | Tensor) -> Value:
    """A tensor without labels as a Value, expanded as it was."""
    if isinstance(tensor, Value):
        return tensor
    return Value(torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta"))


def _along_labels(call: Call, space: Space) -> tuple[Layers, ...]:
    found = _along(call)
    if found is None:
        pin_layers(find(Value, call.args), space)
        return ((),)
    return (_aligned(*found, space),)


def _gather_constants(step: Step, known: Known) -> list[Tensor]:
    source, dim = step.call.args[:2]
    if not isinstance(source, Value) or not source.rank:
        return nothing_known(step, known)
    channels = equal_along(known.of(source), frozenset({dim % source.rank}))
    (out,) = step.outputs
    for d, n in enumerate(channels.shape):
        channels = channels.narrow(d, 0, min(n, out.shape[d]))
    return [compress(channels.view(torch.int64)).view(torch.float64)]


def _scatter_constants(step: Step, known: Known) -> list[Tensor]:
    """Where zeros are written among zeros, whichever way they are put together, there are zeros."""
    found, (whole, _, _, written) = _along(step.call), step.call.args[:4]
    if found is None or not isinstance(whole, Value):
        return nothing_known(step, known)
    zero = zeros_along(known.of(whole), frozenset({found[1]}))
    if isinstance(written, Value):
        own = zeros_along(known.of(written), frozenset({found[1]}))
        uneven = any(n not in {1, size} for n, size in zip(own.shape, whole.shape, strict=True))
        zero = zero & (own.all() if uneven else own)
    else:
        zero = zero & (is_written(written) and written == 0)
    return [torch.where(zero, 0.0, torch.nan).double()]


def zeros_along(channels: Tensor, dims: frozenset[int]) -> Tensor:
    """Where a map is zero everywhere along ``dims``: bool, of size 1 along these."""
    zero = channels == 0
    for dim in dims:
        zero = zero.all(dim, keepdim=True)
    return zero


# In order: topk.


def _top_labels(call: Call, space: Space) -> tuple[Layers, ...]:
    """The largest values, and where they stood."""
    source: Value = call.args[0]
    dims = frozenset({call.arg(2, "dim", -1) % max(source.rank, 1)})
    layers = pass_others(call, space, dims, "reduction")
    return tuple(layers for _ in call.metas)


def _top_constants(step: Step, known: Known) -> list[Tensor]:
    source: Value = step.call.args[0]
    dims = frozenset({step.call.arg(2, "dim", -1) % max(source.rank, 1)})
    return [equal_along(known.of(source), dims), *nothing_known(step, known)[1:]]


INDEX = register(OpClass("index", _index_labels, _index_constants), ["index", "index_select", "_unsafe_index"])
register(OpClass("gather", _along_labels, _gather_constants), ["gather"])
register(OpClass("scatter", _along_labels, _scatter_constants), ["scatter", "scatter_add", "scatter_reduce"])
register(OpClass("largest", _top_labels, _top_constants), ["topk"])
