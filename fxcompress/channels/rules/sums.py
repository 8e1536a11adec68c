"""Sums, norms of vectors, and means and layer norm, which are sums divided by a number.

An entry that is zero adds nothing, so it may go, if the number of entries that a mean divides by stays what it was. Of
a joint layer (heads and their dims) each slice leaves behind one label, a slot.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fxcompress.channels.layers import Layers, slices, support
from fxcompress.channels.rules.group_sums import GROUP_SUM, fits, group_norm_as_sums, summed_in_groups
from fxcompress.channels.rules.pointwise import MULTIPLY
from fxcompress.channels.rules.reductions import mean_constants, reduce_labels, reduced_dims, squeeze
from fxcompress.channels.rules.registry import Known, OpClass, register, zero_where
from fxcompress.channels.rules.variances import IN_SUMS, takes
from fxcompress.channels.space import Space
from fxcompress.channels.values import Call, LabelTensor, Step, Value

_NORM = torch.ops.aten.linalg_vector_norm


def _labels(call: Call, space: Space) -> tuple[Layers, ...]:
    if not _adds_up(call):
        return reduce_labels(call, space)
    source: Value = call.args[0]
    dims, left = reduced_dims(call), []
    for layer in source.layers:
        rest = support(layer) - dims
        if rest == support(layer):
            left.append(layer)
        elif rest:
            left.append(space.slot(slices(layer, rest)).reshape(_of_slices(layer, rest)))
    return (tuple(squeeze(layer, dims, call.metas[0].ndim) for layer in left),)


def _adds_up(call: Call) -> bool:
    """Whether zeros make no difference; they do to a norm of negative order, which is about the smallest entry."""
    return call.func.overloadpacket is not _NORM or call.arg(1, "ord", 2) > 0


def _of_slices(layer: Tensor, rest: frozenset[int]) -> list[int]:
    return [n if d in rest else 1 for d, n in enumerate(layer.shape)]


def summed(step: Step) -> Iterator[tuple[Tensor, Tensor]]:
    """The layers that are read along a dim, each with the labels of the slices that are left of it, or no labels.

    The second has as many dims as the first and size 1 along those that are summed; of size 0 where nothing is left.
    """
    if step.op is GROUP_SUM:
        yield from summed_in_groups(step)
        return
    if not _adds_up(step.call):
        return
    source: Value = step.call.args[0]
    dims, left = reduced_dims(step.call), iter(step.outputs[0].layers)
    for layer in source.layers:
        rest = support(layer) - dims
        slots = next(left).reshape(_of_slices(layer, rest)) if rest else layer.new_empty(0)
        if rest != support(layer):
            yield layer, slots


def _constants(step: Step, known: Known) -> list[Tensor]:
    """A sum of zeros is zero."""
    (out,) = step.outputs
    zero = known.of(step.call.args[0]) == 0
    dims = reduced_dims(step.call)
    zero = zero.all(dim=list(dims), keepdim=True) if dims else zero
    return [squeeze(zero_where(zero), dims, out.rank)]


def _extreme_constants(step: Step, known: Known) -> list[Tensor]:
    """As of a mean; among what is gone there was zero."""
    (found,), zero = mean_constants(step, known), step.call.args[3]
    if not zero:
        return [found]
    return [found.clamp_min(0) if step.call.func is torch.ops.aten.amax.default else found.clamp_max(0)]


def in_sums(func: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any] | None:
    """What takes a call apart into sums, where it is a mean or a layer norm over entries that have labels."""
    packet = getattr(func, "overloadpacket", None)
    if packet not in _IN_SUMS or not isinstance(args[0], LabelTensor):
        return None
    value = args[0].fxc_value
    if packet is torch.ops.aten.native_group_norm and args[6] > 1:
        return group_norm_as_sums if fits(value, args[4], args[6]) else None
    if packet in IN_SUMS and not takes(args[0], args[1] if len(args) > 1 else None, kwargs.get("correction")):
        return None
    if packet is torch.ops.aten.mean or packet in IN_SUMS:
        dims = reduced_dims(Call(func, (value, *args[1:]), kwargs, ()))
    elif packet is torch.ops.aten.native_group_norm:
        dims = frozenset(range(1, value.rank))
    else:
        dims = frozenset(_last(value.rank, args[1]))
    return _IN_SUMS[packet] if any(support(layer) & dims for layer in value.layers) else None


def _last(rank: int, shape: Sequence[int]) -> tuple[int, ...]:
    """The dims that layer norm over ``shape`` is about."""
    return tuple(range(rank - len(shape), rank))


def _mean_as_sum(
    x: Tensor,
    dim: int | list[int] | None = None,
    keepdim: bool = False,  # noqa: FBT001, FBT002 - the signature of aten.mean
    *,
    dtype: object = None,
) -> Tensor:
    """A mean as a sum and a division by the number of entries, run on labels."""
    assert isinstance(x, LabelTensor)
    dims = sorted(reduced_dims(Call(torch.ops.aten.mean.dim, (x.fxc_value, dim), {}, ())))
    x.fxc_run.hold_counted(x.fxc_value, dims)
    total = torch.ops.aten.sum.dim_IntList(x, dims, keepdim, dtype=dtype)
    return total / math.prod(x.shape[d] for d in dims)  # type: ignore[no-any-return]


def _layer_norm_as_sums(
    x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """A layer norm as sums over as many entries as there are, run on labels."""
    dims = _last(x.ndim, shape)
    if list(x.shape[dims[0] :]) != list(shape):
        raise ValueError(f"layer_norm over {list(shape)} of a tensor of shape {list(x.shape)}")
    return normalized(x, dims, math.prod(shape), weight, bias, eps)


def _group_norm_as_sums(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    _batch: int,
    channels: int,
    places: int,
    _groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """A group norm with one group as sums over as many entries as there are, run on labels."""
    assert isinstance(x, LabelTensor)
    if weight is None:  # it has as many entries as there are channels
        x.fxc_run.hold_counted(x.fxc_value, (1,))
    return normalized_channels(x, channels * places, weight, bias, eps)


def normalized_channels(
    x: Tensor, count: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`normalized` over all dims but the first, with weights along the second; as ``native_group_norm``."""
    shape = (-1, *[1] * (x.ndim - 2))
    weight, bias = (None if own is None else own.reshape(shape) for own in (weight, bias))
    y, mean, scale = normalized(x, tuple(range(1, x.ndim)), count, weight, bias, eps)
    if x.ndim > 2:  # where it is none, torch does nothing: the check of a rewrite compares ops
        mean, scale = mean.flatten(1), scale.flatten(1)
    return y, mean, scale


def normalized(
    x: Tensor, dims: tuple[int, ...], count: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Layer norm over ``count`` entries, of which those that ``x`` does not have are zero; as ``native_layer_norm``.

    An entry of zero adds nothing to either sum, as the square of the distance from the mean is written as
    sum((x - mean) ** 2) = sum(x * (x - mean)), which holds as sum(x - mean) = 0. The rounding of the right side grows
    with mean / deviation, as that of x - mean itself does; it is not that of sum(x ** 2) - count * mean ** 2, which
    grows with its square.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # as torch does for numbers of half precision
    mean = wide.sum(dims, keepdim=True) / count
    centered = wide - mean
    variance = (wide * centered).sum(dims, keepdim=True) / count
    scale = torch.rsqrt(variance.clamp_min(0.0) + eps)
    y = centered * scale
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    return y.to(x.dtype), mean, scale


_IN_SUMS: dict[object, Callable[..., Any]] = {
    torch.ops.aten.mean: _mean_as_sum,
    torch.ops.aten.native_layer_norm: _layer_norm_as_sums,
    torch.ops.aten.native_group_norm: _group_norm_as_sums,
    **IN_SUMS,
}
SUM = register(OpClass("sum", _labels, _constants), ["sum", "linalg_vector_norm"])
EXTREME = OpClass("extreme", _labels, _extreme_constants)
"""Maxima and minima over entries of which zeros may go. Arguments: those of amax, and whether some have gone."""
SUMS = frozenset({SUM, GROUP_SUM, EXTREME})
"""Classes whose steps :func:`summed` is about."""


def summed_products(tape: Iterable[Step]) -> dict[int, Step]:
    """For the steps that sum what a product of two tensors has made, by their ids, the product."""
    products: dict[int, Step] = {}
    found: dict[int, Step] = {}
    for step in tape:
        if step.op is MULTIPLY:
            products[step.outputs[0].key] = step
        elif step.op is SUM and is_sum(step) and step.call.args[0].key in products:
            found[id(step)] = products[step.call.args[0].key]
    return found


def is_sum(step: Step) -> bool:
    """Whether a step of the class adds entries up, and is no norm of them."""
    return step.call.func.overloadpacket is not _NORM
