"""Ops that mix all entries along some dims: what is labelled there stays. Sums and norms of vectors: sums.py."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fxcompress.channels.layers import Layers, support
from fxcompress.channels.rules.registry import Known, OpClass, equal_along, nothing_known, register, zero_where
from fxcompress.channels.space import Space
from fxcompress.channels.values import Call, Step, Value

Dims = Callable[[Call], frozenset[int]]


def pass_others(call: Call, space: Space, dims: frozenset[int], code: str) -> Layers:
    """The layers of the result of an op that mixes all entries along ``dims``, whose size must stay."""
    source: Value = call.args[0]
    text = f"{call.name} mixes all entries of this dim"
    held = [space.hold(x, mixed, code, text) if (mixed := support(x) & dims) else x for x in source.layers]
    return tuple(layer for layer in held if layer is not None)


def reduced_dims(call: Call) -> frozenset[int]:
    """The dims of ``mean(x, dim, keepdim)`` and its like."""
    source: Value = call.args[0]
    packet = call.func.overloadpacket
    dim = call.arg(2 if packet in _SECOND else 1, "dim", -1 if packet in _LAST else None)
    return reduced(dim, source.rank)


_AT = torch.ops.aten
_SECOND = frozenset({_AT.linalg_vector_norm, _AT.kthvalue})
"""Ops that take something else before their dims."""
_LAST = frozenset({_AT.mode, _AT.kthvalue})
"""Ops that are about the last dim where none is given."""


def reduced(dim: object, rank: int) -> frozenset[int]:
    """The dims that ``dim`` names: a number, or some; all dims where it is none of these, or empty."""
    dims = [dim] if isinstance(dim, int) and not isinstance(dim, bool) else dim
    if not dims or not isinstance(dims, list | tuple):
        return frozenset(range(rank))
    return frozenset(d % max(rank, 1) for d in dims)


def reduce_labels(call: Call, space: Space) -> tuple[Layers, ...]:
    """For an op that leaves out some dims: what is labelled along them stays."""
    dims = reduced_dims(call)
    layers = pass_others(call, space, dims, "reduction")
    return tuple(tuple(squeeze(layer, dims, meta.ndim) for layer in layers) for meta in call.metas)


def squeeze(layer: Tensor, dims: frozenset[int], rank: int) -> Tensor:
    """A layer without ``dims``, along which it does not vary, unless the result of rank ``rank`` keeps them."""
    if layer.ndim == rank:
        return layer
    return layer.reshape([n for d, n in enumerate(layer.shape) if d not in dims])


def mean_constants(step: Step, known: Known) -> list[Tensor]:
    """The mean (or maximum) of equal entries is that entry; where entries differ, only zeros are looked at."""
    source: Value = step.call.args[0]
    dims = reduced_dims(step.call)
    channels = known.of(source)
    if not step.outputs[0].meta.is_floating_point():
        return nothing_known(step, known)
    if any(channels.shape[d] > 1 for d in dims):
        channels = _zeros(channels, dims)
    return [squeeze(channels, dims, out.rank) for out in step.outputs]


def _pick_constants(step: Step, known: Known) -> list[Tensor]:
    """One of equal entries is that entry; where it stood is unknown."""
    return [mean_constants(step, known)[0], *nothing_known(step, known)[1:]]


def _kept_constants(step: Step, known: Known) -> list[Tensor]:
    """Equal entries in another order, or the largest so far, are what they were; where they stood is unknown."""
    if not step.outputs[0].meta.is_floating_point():
        return nothing_known(step, known)
    channels = equal_along(known.of(step.call.args[0]), _one(step.call))
    return [channels, *nothing_known(step, known)[1:]]


def _running_constants(step: Step, known: Known) -> list[Tensor]:
    """Sums and products of zeros are zeros."""
    return [_zeros(known.of(step.call.args[0]), _one(step.call))]


def _product_constants(step: Step, known: Known) -> list[Tensor]:
    dims = reduced_dims(step.call)
    return [squeeze(_zeros(known.of(step.call.args[0]), dims), dims, out.rank) for out in step.outputs]


def _zeros(channels: Tensor, dims: frozenset[int]) -> Tensor:
    return zero_where((channels == 0).all(dim=list(dims), keepdim=True))


def _spread_constants(step: Step, known: Known) -> list[Tensor]:
    """The variance of zeros is zero, and so is their mean; the rounding of another mean would be left behind.

    Of a single entry there is none, for any channel. Where more is taken off, that of zeros may be none alone.
    """
    source: Value = step.call.args[0]
    dims = reduced_dims(step.call)
    count = math.prod(source.shape[d] for d in dims)
    correction = step.call.kwargs.get("correction", 1)
    unbiased = 1 if correction is None else correction
    if not dims or unbiased not in {0, 1} or count <= unbiased:
        return nothing_known(step, known)
    zeros = _zeros(known.of(source), dims)
    return [squeeze(zeros, dims, out.rank) for out in step.outputs]


def _last(count: Callable[[Call], int]) -> Dims:
    def dims(call: Call) -> frozenset[int]:
        rank = call.args[0].rank
        return frozenset(range(rank - count(call), rank))

    return dims


def _mixing(dims: Dims, code: str) -> Callable[[Call, Space], tuple[Layers, ...]]:
    """Ops that keep the shape and mix along ``dims``; their own parameters stay as well."""

    def labels(call: Call, space: Space) -> tuple[Layers, ...]:
        own = [a for a in call.args[1:] if isinstance(a, Value)]
        for value in own:
            for layer in value.layers:
                space.pin(layer, code, f"it belongs to {call.name}, which mixes all entries of its dims")
        layers = pass_others(call, space, dims(call), code)
        first = layers if len(call.metas) else ()
        return (first, *(() for _ in call.metas[1:]))

    return labels


def _normalized(call: Call) -> int:
    shape: Sequence[int] = call.args[1]
    return len(shape)


def _one(call: Call) -> frozenset[int]:
    return frozenset({call.arg(1, "dim", -1) % max(call.args[0].rank, 1)})


def _order_labels(call: Call, space: Space) -> tuple[Layers, ...]:
    """Values in another order, and where they stood."""
    layers = pass_others(call, space, _one(call), "reduction")
    return tuple(layers for _ in call.metas)


register(
    OpClass("mean", reduce_labels, mean_constants),
    ["mean", "amax", "amin", "aminmax", _AT.max.default, _AT.min.default, _AT.median.default, _AT.nanmedian.default],
)
register(OpClass("variance", reduce_labels, _spread_constants), ["var", "std", "var_mean", "std_mean"])
register(OpClass("product", reduce_labels, _product_constants), ["prod"])
register(OpClass("reduction", reduce_labels), ["logsumexp", "argmax", "argmin", "all", "any"])
register(
    OpClass("pick", reduce_labels, _pick_constants),
    [_AT.max.dim, _AT.min.dim, _AT.median.dim, _AT.nanmedian.dim, _AT.mode, "kthvalue"],
)
register(OpClass("order", _order_labels, _kept_constants), ["sort", "cummax", "cummin"])
register(OpClass("running sum", _mixing(_one, "reduction"), _running_constants), ["cumsum", "cumprod"])
SOFTMAX = register(OpClass("softmax", _mixing(_one, "softmax")), ["_softmax", "_log_softmax", "logcumsumexp"])
register(OpClass("layer norm", _mixing(_last(_normalized), "norm")), ["native_layer_norm"])
