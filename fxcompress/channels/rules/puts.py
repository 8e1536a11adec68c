"""``x[index] = values``: entries that are written to, or added to, at places that a tensor says.

By a constant index along one dim, ``x[:, [0, 2]] = values``, entry k of the values meets entry ``index[k]`` of ``x``,
and goes with it. The values take the place of what was there: where they are zero, so is the result, whatever ``x``
held.

Of any other index the first dims stay, if these are the ones that are indexed; the values meet the other dims of ``x``.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fxcompress.channels.layers import Layers, pad_rank, vector
from fxcompress.channels.rules.contraction import meet, take
from fxcompress.channels.rules.indexing import as_value, hold_along, indexed_dims, pin_layers, zeros_along
from fxcompress.channels.rules.pointwise import couple_aligned, unexpanded
from fxcompress.channels.rules.registry import Known, OpClass, nothing_known, register
from fxcompress.channels.space import Space
from fxcompress.channels.survivors import Survivors, has_own_labels
from fxcompress.channels.values import Call, Step, Value, find, leaves

_WRITTEN = "it is written to at an index"


@dataclass(frozen=True, slots=True)
class Put:
    """One call with a constant index along one dim, along which each entry has a label of its own.

    Attributes:
        whole: what is written to.
        dim: along which.
        index: the entries that are written to, each once; int64 (K,).
        values: what is written, of the rank of ``whole``.
        repeats: they have no entries along the dim: each place gets the same.
        adds: they are added to what is there.
    """

    whole: Value
    dim: int
    index: np.ndarray
    values: Value
    repeats: bool
    adds: bool


def put_of(call: Call) -> Put | None:
    """What a call writes where; None for another form, or where nobody can tell the entries apart."""
    whole, indices, values = call.args[:3]
    given = [(d, index) for d, index in enumerate(indices) if index is not None]
    if not isinstance(whole, Value) or len(given) != 1:
        return None
    (dim, index), values = given[0], as_value(values)
    if not isinstance(index, Tensor) or index.ndim != 1 or index.dtype is torch.bool or index.dtype is torch.uint8:
        return None
    places = index.detach().cpu().long().numpy() % max(whole.shape[dim], 1)
    if not has_own_labels(whole, dim) or len(np.unique(places)) < len(places):
        return None
    repeats = values.rank < whole.rank - dim
    if not repeats and values.shape[dim - whole.rank] != len(places):
        return None  # one entry for all, of which there may be more in the next run
    return Put(
        whole, dim, places, _of_rank(values, whole.rank), repeats, bool(call.arg(3, "accumulate", default=False))
    )


def _of_rank(value: Value, rank: int) -> Value:
    """The same with dims of one entry at its front."""
    if value.rank >= rank:
        return value
    meta = value.meta.expand((1,) * (rank - value.rank) + tuple(value.shape))
    return Value(meta, tuple(pad_rank(layer, rank) for layer in value.layers))


def _put_labels(call: Call, space: Space) -> tuple[Layers, ...]:
    put = put_of(call)
    if put is None:
        return _leading_labels(call, space)
    dim, rank = put.dim, put.whole.rank
    own = take(put.whole, dim, space)
    assert own is not None  # each entry has a label
    if not put.repeats:
        meet(own[torch.from_numpy(put.index)], take(put.values, dim, space), space)
    others = [
        (
            torch.Size([1 if d == dim else n for d, n in enumerate(unexpanded(value))]),
            tuple(layer for layer in value.layers if layer.shape[dim] == 1),
        )
        for value in (put.whole, put.values)
    ]
    return ((*couple_aligned(others, rank, space), vector(own, rank, dim)),)


def _put_constants(step: Step, known: Known) -> list[Tensor]:
    """Entries that are not named are as they were; the others are what is written, or the sum of both."""
    put, (out,) = put_of(step.call), step.outputs
    if put is None or put.dim in step.anywhere or not out.meta.is_floating_point():
        return _leading_constants(step, known)
    whole = known.of(put.whole).double()
    written = known.of(as_value(step.call.args[2])).double()
    written = pad_rank(written, whole.ndim)
    sizes = [max(a, b) for a, b in zip(whole.shape, written.shape, strict=True)]
    before = whole.expand([put.whole.shape[put.dim] if d == put.dim else n for d, n in enumerate(sizes)])
    there = written.expand([len(put.index) if d == put.dim else n for d, n in enumerate(sizes)])
    index = torch.from_numpy(put.index)
    return [before.index_add(put.dim, index, there) if put.adds else before.index_copy(put.dim, index, there)]


def same_puts(before: Call, after: Call, left: Survivors) -> bool:
    """Whether what is left of the values is written to the entries that it was written to before a cut."""
    old, new = put_of(before), put_of(after)
    if old is None:
        tensors = [[x for x in leaves(call.args[1]) if isinstance(x, Tensor)] for call in (before, after)]
        return len(tensors[0]) == len(tensors[1]) and all(map(torch.equal, *tensors))
    whole = left.masks(old.whole).get(old.dim, np.ones(old.whole.shape[old.dim], dtype=bool))
    kept = whole[old.index]
    if not old.repeats and not np.array_equal(left.masks(old.values).get(old.dim, np.ones_like(kept)), kept):
        return False
    if new is None:
        return False
    expected = (np.cumsum(whole) - 1)[old.index[kept]]
    return (old.dim, old.repeats, old.adds) == (new.dim, new.repeats, new.adds) and np.array_equal(expected, new.index)


# Any other index.


def _leading_labels(call: Call, space: Space) -> tuple[Layers, ...]:
    """``x[index] = values``, where the first dims are indexed: the values meet the other dims of ``x``."""
    place = _leading(call)
    if place is None:
        pin_layers(find(Value, call.args), space, _WRITTEN)
        return ((),)
    whole, values, count = place
    pin_layers(find(Value, call.args[1]), space)
    own = hold_along(whole.layers, frozenset(range(count)), space, text=_WRITTEN)
    before = torch.Size((1,) * count + tuple(unexpanded(whole))[count:])
    shape = (1,) * whole.rank + tuple(unexpanded(values))
    held = hold_along(values.layers, _leading_dims(values, whole, count), space, text=_WRITTEN)
    written = [_trailing(layer, whole.rank, count) for layer in held]
    after = torch.Size((1,) * count + shape[len(shape) - whole.rank + count :])
    return (couple_aligned([(before, own), (after, tuple(written))], whole.rank, space),)


def _leading_dims(values: Value, whole: Value, count: int) -> frozenset[int]:
    """The dims of the values that the index makes: those before the ones of ``whole`` that are not indexed."""
    return frozenset(range(values.rank - (whole.rank - count)))


def _trailing(written: Tensor, rank: int, count: int) -> Tensor:
    """A layer or map of the values, of size 1 along the dims that the index makes, as one of the whole tensor."""
    shape = (1,) * rank + tuple(written.shape)
    return written.reshape((1,) * count + shape[len(shape) - rank + count :])


def _leading(call: Call) -> tuple[Value, Value, int] | None:
    """The tensor, what is written to it, and how many dims at its front are indexed; None for another form."""
    whole, _, values = call.args[:3]
    if not isinstance(whole, Value | Tensor) or not isinstance(values, Value | Tensor):
        return None
    whole, values, dims = as_value(whole), as_value(values), indexed_dims(call)
    return (whole, values, len(dims)) if dims == frozenset(range(len(dims))) else None


def _leading_constants(step: Step, known: Known) -> list[Tensor]:
    """Where zeros are written among zeros, or added to them, there are zeros."""
    place = _leading(step.call)
    if place is None:
        return nothing_known(step, known)
    whole, values, count = place
    written = zeros_along(known.of(values), _leading_dims(values, whole, count))
    zero = zeros_along(known.of(whole), frozenset(range(count))) & _trailing(written, whole.rank, count)
    return [torch.where(zero, 0.0, torch.nan).double()]


INDEX_PUT = register(OpClass("index put", _put_labels, _put_constants), ["index_put", "_unsafe_index_put"])
