"""Sums, norms of vectors, and means, which are sums divided by a number.

An entry that is zero adds nothing, so it may go, if the number of entries that a mean divides by stays what it was. Of
a joint layer (heads and their dims) each slice leaves behind one label, a slot.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fxcompress.channels.layers import Layers, slices, support
from fxcompress.channels.rules.reductions import reduce_labels, reduced_dims, squeeze
from fxcompress.channels.rules.registry import Known, OpClass, register
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
    return [squeeze(torch.where(zero, 0.0, torch.nan).to(torch.float64), dims, out.rank).cpu()]


def is_labelled_mean(func: object, args: tuple[object, ...], kwargs: dict[str, object]) -> bool:
    """Whether a call is a mean over entries that have labels."""
    if getattr(func, "overloadpacket", None) is not torch.ops.aten.mean or not isinstance(args[0], LabelTensor):
        return False
    value = args[0].fxc_value
    dims = reduced_dims(Call(func, (value, *args[1:]), kwargs, ()))
    return any(support(layer) & dims for layer in value.layers)


def mean_as_sum(
    x: Tensor,
    dim: int | list[int] | None = None,
    keepdim: bool = False,  # noqa: FBT001, FBT002 - the signature of aten.mean
    *,
    dtype: object = None,
) -> Tensor:
    """A mean as a sum and a division by the number of entries, run on labels."""
    dims = sorted(reduced_dims(Call(torch.ops.aten.mean.dim, (x.fxc_value, dim), {}, ())))  # type: ignore[attr-defined]
    total = torch.ops.aten.sum.dim_IntList(x, dims, keepdim, dtype=dtype)
    return total / math.prod(x.shape[d] for d in dims)  # type: ignore[no-any-return]


SUM = register(OpClass("sum", _labels, _constants), ["sum", "linalg_vector_norm"])
