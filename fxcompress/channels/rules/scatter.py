"""Ops that add the entries of one tensor to some entries of another: ``x.index_add(dim, index, source)``.

Entry k of the source meets entry ``index[k]`` of the other one, and goes with it. Entries that the index does not name
are as they were. Of those that take a mean or an extreme (``index_reduce``), what lies along the dim stays.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxcompress.channels.computed_numbers import is_written
from fxcompress.channels.layers import Layers, vector
from fxcompress.channels.rules.contraction import meet, take
from fxcompress.channels.rules.pointwise import Operand, couple_aligned, unexpanded
from fxcompress.channels.rules.registry import Known, OpClass, nothing_known, register
from fxcompress.channels.space import Space
from fxcompress.channels.survivors import has_own_labels
from fxcompress.channels.values import Call, Step, Value


@dataclass(frozen=True, slots=True)
class Scatter:
    """One call of ``index_add`` whose index is constant.

    Attributes:
        whole: what is added to.
        dim: along which, from the left.
        index: the entries that are added to, int64 (K,) on the CPU.
        source: what is added, K entries along ``dim``.
        alpha: what it is multiplied by.
    """

    whole: Value
    dim: int
    index: Tensor
    source: Value
    alpha: float


def scatter_of(call: Call) -> Scatter | None:
    """What a call adds where; None where the index is computed by the network, or a tensor has no labels at all."""
    whole, dim, index, source = _arguments(call)
    if not isinstance(whole, Value) or not isinstance(source, Value) or not isinstance(index, Tensor):
        return None
    alpha = call.arg(4, "alpha", 1)
    if not whole.rank or whole.rank != source.rank or not is_written(alpha):
        return None
    return Scatter(whole, dim % whole.rank, index.detach().cpu().long().reshape(-1), source, alpha)


def _arguments(call: Call) -> list[Any]:
    return [call.arg(i, name) for i, name in enumerate(("self", "dim", "index", "source"))]


def _labels(call: Call, space: Space) -> tuple[Layers, ...]:
    scatter = scatter_of(call)
    if scatter is None:
        return _computed_labels(call, space)
    dim, rank = scatter.dim, scatter.whole.rank
    own, added = take(scatter.whole, dim, space), take(scatter.source, dim, space)
    meet(None if own is None else own[scatter.index], added, space)
    others = [(_without(v.shape, dim), _across(v.layers, dim)) for v in (scatter.whole, scatter.source)]
    rest = couple_aligned(others, rank, space)
    return ((*rest, *([] if own is None else [vector(own, rank, dim)])),)


def _computed_labels(call: Call, space: Space) -> tuple[Layers, ...]:
    """What lies along ``dim`` stays: the network computes the index, or a tensor has no labels, or it is no sum."""
    whole, dim, index, source = _arguments(call)
    text = "it is added to, or added, by an index that the network computes"
    for layer in index.layers if isinstance(index, Value) else ():
        space.pin(layer, "computed-index", text)
    operands: list[Operand] = []
    dim = dim % max(1, len(call.metas[0].shape))
    for operand in (whole, source):
        layers = operand.layers if isinstance(operand, Value) else ()
        held = [space.hold(x, {dim}, "computed-index", text) if x.shape[dim] > 1 else x for x in layers]
        shape = unexpanded(operand) if isinstance(operand, Value) else operand.shape
        operands.append((_without(shape, dim), tuple(layer for layer in held if layer is not None)))
    return (couple_aligned(operands, call.metas[0].ndim, space),)


def _without(shape: torch.Size, dim: int) -> torch.Size:
    return torch.Size([1 if d == dim else n for d, n in enumerate(shape)])


def _across(layers: Layers, dim: int) -> Layers:
    """The layers that do not vary along a dim."""
    return tuple(layer for layer in layers if layer.shape[dim] == 1)


def _constants(step: Step, known: Known) -> list[Tensor]:
    """Where something is added both must be known; elsewhere the entries are as they were."""
    scatter = scatter_of(step.call)
    if not step.outputs[0].meta.is_floating_point():
        return nothing_known(step, known)
    if scatter is None or scatter.dim in step.anywhere or not has_own_labels(scatter.whole, scatter.dim):
        return _computed_constants(step, known)  # an entry by its number may be another one for inputs of another size
    dim = scatter.dim
    whole, source = (known.of(value).double() for value in (scatter.whole, scatter.source))
    sizes = [max(a, b) for a, b in zip(whole.shape, source.shape, strict=True)]
    there = source.expand([len(scatter.index) if d == dim else n for d, n in enumerate(sizes)])
    before = whole.expand([scatter.whole.shape[dim] if d == dim else n for d, n in enumerate(sizes)])
    return [before.index_add(dim, scatter.index, there, alpha=scatter.alpha)]


def _computed_constants(step: Step, known: Known) -> list[Tensor]:
    """Zeros that are added to zeros are zeros."""
    whole, dim, _, source = _arguments(step.call)
    if not isinstance(whole, Value) or not isinstance(source, Value) or not whole.rank == source.rank > 0:
        return nothing_known(step, known)
    zeros = [(known.of(value) == 0).all(dim % whole.rank, keepdim=True) for value in (whole, source)]
    return [torch.where(zeros[0] & zeros[1], 0.0, torch.nan).double()]


INDEX_ADD = register(OpClass("index add", _labels, _constants), ["index_add"])
register(OpClass("index reduce", _computed_labels, _computed_constants), ["index_reduce"])
