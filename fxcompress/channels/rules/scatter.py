"""Ops that add the entries of one tensor to some entries of another: ``x.index_add(dim, index, source)``.

Entry k of the source meets entry ``index[k]`` of the other one, and goes with it. Entries that the index does not name
are as they were.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fxcompress.channels.layers import Layers, vector
from fxcompress.channels.rules.contraction import meet, take
from fxcompress.channels.rules.pointwise import couple_aligned
from fxcompress.channels.rules.registry import Known, OpClass, nothing_known, register
from fxcompress.channels.space import Space
from fxcompress.channels.values import Call, Step, Value, find


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
    whole, dim, index, source = (call.arg(i, name) for i, name in enumerate(("self", "dim", "index", "source")))
    if not isinstance(whole, Value) or not isinstance(source, Value) or not isinstance(index, Tensor):
        return None
    alpha = call.arg(4, "alpha", 1)
    if not whole.rank or whole.rank != source.rank or not isinstance(alpha, int | float):
        return None
    return Scatter(whole, dim % whole.rank, index.detach().cpu().long().reshape(-1), source, alpha)


def _labels(call: Call, space: Space) -> tuple[Layers, ...]:
    scatter = scatter_of(call)
    if scatter is None:
        for value in find(Value, (call.args, call.kwargs)):
            for layer in value.layers:
                space.pin(layer, "computed-index", "it is added to, or added, by an index that the network computes")
        return ((),)
    dim, rank = scatter.dim, scatter.whole.rank
    own, added = take(scatter.whole, dim, space), take(scatter.source, dim, space)
    meet(None if own is None else own[scatter.index], added, space)
    others = [(_without(v.shape, dim), _across(v.layers, dim)) for v in (scatter.whole, scatter.source)]
    rest = couple_aligned(others, rank, space)
    return ((*rest, *([] if own is None else [vector(own, rank, dim)])),)


def _without(shape: torch.Size, dim: int) -> torch.Size:
    return torch.Size([1 if d == dim else n for d, n in enumerate(shape)])


def _across(layers: Layers, dim: int) -> Layers:
    """The layers that do not vary along a dim."""
    return tuple(layer for layer in layers if layer.shape[dim] == 1)


def _constants(step: Step, known: Known) -> list[Tensor]:
    """Where something is added both must be known; elsewhere the entries are as they were."""
    scatter = scatter_of(step.call)
    if scatter is None or not step.outputs[0].meta.is_floating_point():
        return nothing_known(step, known)
    dim = scatter.dim
    whole, source = (known.of(value).double().cpu() for value in (scatter.whole, scatter.source))
    sizes = [max(a, b) for a, b in zip(whole.shape, source.shape, strict=True)]
    there = source.expand([len(scatter.index) if d == dim else n for d, n in enumerate(sizes)])
    before = whole.expand([scatter.whole.shape[dim] if d == dim else n for d, n in enumerate(sizes)])
    return [before.index_add(dim, scatter.index, there, alpha=scatter.alpha)]


INDEX_ADD = register(OpClass("index add", _labels, _constants), ["index_add"])
