"""Ops that mix all entries along some dims: what is labelled there stays."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fxcompress.channels.layers import Layers, support
from fxcompress.channels.rules.registry import Known, OpClass, nothing_known, register
from fxcompress.channels.space import Space
from fxcompress.channels.values import Call, Step, Value

Dims = Callable[[Call], frozenset[int]]


def pass_others(call: Call, space: Space, dims: frozenset[int], code: str) -> Layers:
    """The layers of the result of an op that mixes all entries along ``dims``, whose size must stay."""
    source: Value = call.args[0]
    text = f"{call.func.__name__} mixes all entries of this dim"
    held = [space.hold(x, mixed, code, text) if (mixed := support(x) & dims) else x for x in source.layers]
    return tuple(layer for layer in held if layer is not None)


def _some(call: Call) -> frozenset[int]:
    """The dims of ``mean(x, dim, keepdim)`` and its like."""
    source: Value = call.args[0]
    dim = call.arg(2 if call.func.overloadpacket is torch.ops.aten.linalg_vector_norm else 1, "dim")
    if call.func.__name__.endswith("default") and not isinstance(dim, int | list | tuple):
        dim = None
    dims = [dim] if isinstance(dim, int) else dim
    if not dims:
        return frozenset(range(source.rank))
    return frozenset(d % max(source.rank, 1) for d in dims)


def _reduce_labels(call: Call, space: Space) -> tuple[Layers, ...]:
    dims = _some(call)
    layers = pass_others(call, space, dims, "reduction")
    return tuple(tuple(_squeeze(layer, dims, meta.ndim) for layer in layers) for meta in call.metas)


def _squeeze(layer: Tensor, dims: frozenset[int], rank: int) -> Tensor:
    if layer.ndim == rank:
        return layer
    return layer.reshape([n for d, n in enumerate(layer.shape) if d not in dims])


def _mean_constants(step: Step, known: Known) -> list[Tensor]:
    """The mean (or maximum) of equal entries is that entry; a sum of zeros is zero."""
    source: Value = step.call.args[0]
    dims = _some(step.call)
    channels = known.of(source)
    if any(channels.shape[d] > 1 for d in dims) or not step.outputs[0].meta.is_floating_point():
        return nothing_known(step, known)
    return [_squeeze(channels, dims, out.rank) for out in step.outputs]


def _pick_constants(step: Step, known: Known) -> list[Tensor]:
    """One of equal entries is that entry; where it stood is unknown."""
    return [_mean_constants(step, known)[0], *nothing_known(step, known)[1:]]


def _sum_constants(step: Step, known: Known) -> list[Tensor]:
    return [torch.where(out == 0, out, torch.nan) for out in _mean_constants(step, known)]


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
                space.pin(layer, code, f"it belongs to {call.func.__name__}, which mixes all entries of its dims")
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


register(OpClass("mean", _reduce_labels, _mean_constants), ["mean", "amax", "amin"])
register(OpClass("sum", _reduce_labels, _sum_constants), ["sum"])
register(
    OpClass("reduction", _reduce_labels),
    ["prod", "var", "std", "var_mean", "std_mean", "logsumexp", "argmax", "argmin", "all", "any", "linalg_vector_norm"],
)
_AT = torch.ops.aten
register(
    OpClass("pick", _reduce_labels, _pick_constants),
    [_AT.max.dim, _AT.min.dim, _AT.median.dim, _AT.nanmedian.dim, _AT.mode],
)
register(OpClass("order", _order_labels), ["sort", "cummax", "cummin"])
register(OpClass("softmax", _mixing(_one, "softmax")), ["_softmax", "_log_softmax", "cumsum", "logcumsumexp"])
register(OpClass("layer norm", _mixing(_last(_normalized), "norm")), ["native_layer_norm"])
