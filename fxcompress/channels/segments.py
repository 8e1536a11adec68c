"""Who feeds each entry of each tensor: the third domain, run over the tape of the first.

A **segment** is the stretch of one channel from where it is made. Contractions make a new segment for each output, and
lookups in tables one for each column;
batch norm, activations, pooling and data movement carry it on; where two meet (a sum, a gate), they join to a new
segment with both as its sources. The objectives need it (whose bits feed layer l, the l' of equation 5), and so does
the rule that a channel dies when its bits and *its* biases are zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fxcompress.channels.interpret import Trail
from fxcompress.channels.layers import along, pad_rank, vector
from fxcompress.channels.rules.movement import PAD
from fxcompress.channels.rules.products import BATCHED, product_of
from fxcompress.channels.rules.recurrent import RECURRENT_STEPS, UPDATE
from fxcompress.channels.rules.reductions import reduced_dims, squeeze
from fxcompress.channels.rules.registry import Known
from fxcompress.channels.rules.scatter import INDEX_ADD, scatter_of
from fxcompress.channels.rules.sums import summed_products
from fxcompress.channels.segment_dims import REDUCTIONS, SegmentDims
from fxcompress.channels.sites import Maker, PlainAtoms, SiteAtoms
from fxcompress.channels.values import Step, Value, find

_MOVING = {"movement", "reshape", "permute", "cat", "index", "same values", "restride"}


@dataclass(slots=True)
class Segments:
    """The segments of one graph.

    Attributes:
        maps: for each value, the segment of its entries, by the value's key; a map as in :class:`Known`, NaN = none.
        sources: for each segment, what is made behind it: (maker, row) pairs.
        dims: along which they lie.
    """

    maps: dict[int, Tensor] = field(default_factory=dict)
    sources: list[tuple[tuple[int, int], ...]] = field(default_factory=lambda: [()])
    dims: SegmentDims = field(default_factory=SegmentDims)

    def along(self, value: Value, dim: int) -> np.ndarray:
        """The segment of each entry along ``dim``, 0 where there is none or where it varies otherwise; (size,)."""
        size = value.shape[dim]
        found = self.maps.get(value.key)
        if found is None or any(n > 1 for d, n in enumerate(found.shape) if d != dim):
            return np.zeros(size, dtype=np.int64)
        return found.reshape(-1).expand(size).nan_to_num().to(torch.int64).numpy()


def trace_segments(trail: Trail, makers: Sequence[Maker]) -> Segments:
    """Find the segments of a graph.

    Args:
        trail: its interpretation.
        makers: its contractions, its lookups, and what is read as it is; ``sources`` refers to them by position.
    """
    result = Segments()
    known = Known(result.maps, training=False)
    positions = {id(maker.call): position for position, maker in enumerate(makers)}
    products = summed_products(trail.tape)
    for step in trail.tape:
        position = positions.get(id(step.call))
        if position is not None:
            _make(step, makers[position], position, result)
            continue
        summed = products.get(id(step))
        carried = _carried(step, known, result) if summed is None else [_contracted(step, summed, known, result)]
        for value, found in zip(step.outputs, carried, strict=True):
            # A map without entries is of a tensor that has none on the example inputs, and says nothing of others.
            if found is not None and found.numel() and (found.numel() != 1 or not bool(found.isnan())):
                result.maps[value.key] = found
                result.dims.follow(step, value, found)
    return result


def _make(step: Step, maker: Maker, position: int, result: Segments) -> None:
    """New segments for the outputs of a contraction, the columns of a table, or the channels of a plain parameter."""
    out, first, rows = step.outputs[0], len(result.sources), len(maker.rows)
    result.sources += [((position, row),) for row in range(rows)]
    ids = torch.arange(first, first + rows, dtype=torch.float64, device="cpu")
    if isinstance(maker, PlainAtoms):
        dims = frozenset(maker.dims)
        found = ids.reshape([n if d in dims else 1 for d, n in enumerate(out.shape)])
    else:
        dims = frozenset({maker.site.out_dim if isinstance(maker, SiteAtoms) else out.rank - 1})
        found = vector(ids, out.rank, *dims)
    result.maps[out.key] = found
    result.dims.make(out, found, dims)


def _carried(step: Step, known: Known, result: Segments) -> list[Tensor | None]:
    if step.op.name in _MOVING:
        return list(step.op.constants(step, known))
    if step.op.name == "quantize" or step.op in RECURRENT_STEPS - {UPDATE}:
        return [None]
    if step.op in _JOINING:
        return [_JOINING[step.op](step, known, result)]
    if step.op.name in REDUCTIONS:
        return [_reduced(step, out, known, result) for out in step.outputs]
    values = find(Value, (step.call.args, step.call.kwargs))
    if step.op.name.startswith(("pointwise", "multiply", "divide")):
        joined = _join([pad_rank(known.of(v), step.outputs[0].rank) for v in values], result)
        return [joined] * len(step.outputs)
    return [_fit(known.of(values[0]), values[0], out) if values else None for out in step.outputs]


def _multiplied(step: Step, known: Known, result: Segments) -> Tensor | None:
    """A batched product passes on the segments of the dims that it keeps: those of the values, in an attention."""
    product = product_of(step.call)
    if product is None:
        return None
    operands = ((product.left, 2), (product.right, 1))
    kept = [known.of(value) for value, dim in operands if dim not in result.dims.of(value)]
    return _join(kept, result) if kept else None


def _contracted(step: Step, product: Step, known: Known, result: Segments) -> Tensor | None:
    """A product that is summed passes on the segments of the dims that are left, as :func:`_multiplied` does."""
    dims, rank = reduced_dims(step.call), product.outputs[0].rank
    kept = [
        squeeze(pad_rank(known.of(value), rank), dims, step.outputs[0].rank)
        for value in find(Value, product.call.args)
        if not any(d + rank - value.rank in dims for d in result.dims.of(value))
    ]
    return _join(kept, result) if kept else None


def _reduced(step: Step, out: Value, known: Known, result: Segments) -> Tensor | None:
    """The map of a reduction over dims along which no segments lie."""
    source: Value = step.call.args[0]
    dims = reduced_dims(step.call)
    return None if dims & result.dims.of(source) else squeeze(known.of(source), dims, out.rank)


def _updated(step: Step, known: Known, result: Segments) -> Tensor | None:
    """A unit of a recurrent layer is fed by the products of its candidate: without them it is zero."""
    kind, left, right, *_ = step.call.args
    maps = [known.of(value) for value in (left, right)]
    if any(found.shape[0] != 1 for found in maps):
        return None
    return _join([kind.of(found.expand(1, left.shape[1])[0])[None] for found in maps], result)


def _scattered(step: Step, known: Known, result: Segments) -> Tensor | None:
    """What is added joins what it is added to, and no other entry."""
    scatter = scatter_of(step.call)
    if scatter is None:
        return None
    whole, source = known.of(scatter.whole), known.of(scatter.source)
    dim, index = scatter.dim, scatter.index
    size = [scatter.whole.shape[dim] if d == dim else n for d, n in enumerate(source.shape)]
    there = source.expand([len(index) if d == dim else n for d, n in enumerate(source.shape)])
    turns = (index[:, None] == index).tril(-1).sum(1)  # an entry may be added to several times
    maps = [whole]
    for turn in turns.unique().tolist():
        chosen = (turns == turn).nonzero().flatten()
        empty = torch.full(size, torch.nan, dtype=torch.float64, device="cpu")
        maps.append(empty.index_copy(dim, index[chosen], there.index_select(dim, chosen)))
    return _join(maps, result)


def _padded(step: Step, known: Known, _result: Segments) -> Tensor | None:
    found = step.op.constants(step, known)[0]
    source = known.of(step.call.args[0])
    return source if found.shape == source.shape else found


_JOINING = {BATCHED: _multiplied, INDEX_ADD: _scattered, PAD: _padded, UPDATE: _updated}
"""Ops that join the segments of what they read in a way of their own."""


def _fit(found: Tensor, source: Value, out: Value) -> Tensor | None:
    """The map of a window or norm's output: dims that it does not vary along may change at will."""
    if found.ndim == out.rank:
        same = all(n in (1, m) for n, m in zip(found.shape, out.shape, strict=True))
        return found if same else None
    dims = [d for d, n in enumerate(found.shape) if n > 1]
    if len(dims) != 1:
        return None
    there = _followed(source, dims[0], out)
    return None if there is None else vector(found.reshape(-1), out.rank, there)


def _followed(source: Value, dim: int, out: Value) -> int | None:
    """The dim of ``out`` with the labels of a dim of ``source``; without labels, the same dim if its size fits."""
    labels = along(source.layers, dim)
    if labels is not None:
        for d in range(out.rank):
            found = along(out.layers, d)
            if found is not None and torch.equal(found.reshape(-1), labels.reshape(-1)):
                return d
    return dim if dim < out.rank and out.shape[dim] == source.shape[dim] else None


def _join(maps: list[Tensor], result: Segments) -> Tensor:
    """One segment where one operand has one, or all have the same; a new one where different segments meet."""
    some = list({id(found): found for found in maps if found.numel() != 1 or not bool(found.isnan())}.values())
    if len(some) < 2:
        return some[0] if some else maps[0]
    together = torch.stack(torch.broadcast_tensors(*some)).nan_to_num()
    columns, inverse = _columns(together.reshape(len(some), -1).to(torch.int64).numpy(), len(result.sources))
    found = columns.max(axis=0)
    ids = found.astype(np.float64)
    for column in np.flatnonzero(((columns != 0) & (columns != found)).any(axis=0)).tolist():
        ids[column] = _joined(set(columns[:, column].tolist()) - {0}, result)
    values = torch.from_numpy(ids[inverse]).reshape(together.shape[1:])
    return torch.where(values == 0, torch.nan, values)


def _columns(flat: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The different columns of numbers below ``count``, in order, and which of them each column is."""
    if count ** len(flat) >= 1 << 63:
        columns, inverse = np.unique(flat, axis=1, return_inverse=True)
        return columns, inverse.reshape(-1)
    key = flat[0]
    for row in flat[1:]:
        key = key * count + row
    _, first, inverse = np.unique(key, return_index=True, return_inverse=True)  # of numbers, much quicker
    return flat[:, first], inverse


def _joined(segments: set[int], result: Segments) -> int:
    """A new segment where several meet."""
    result.sources.append(tuple(dict.fromkeys(s for segment in sorted(segments) for s in result.sources[segment])))
    return len(result.sources) - 1
