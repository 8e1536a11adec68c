"""Variances and standard deviations as sums over as many entries as there were; those that are gone are zero."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fxcompress.channels.rules.reductions import reduced
from fxcompress.channels.values import LabelTensor
from fxcompress.trace.graph.variances import mean_square, squared


def variance(
    x: Tensor,
    dims: tuple[int, ...],
    count: int,
    correction: float,
    keepdim: bool,  # noqa: FBT001 - beside the others, as torch has it
) -> tuple[Tensor, Tensor]:
    """The variance and the mean over ``count`` entries.

    The sum of squares is written as in :func:`fxcompress.channels.rules.sums.normalized`, and for the same reason.

    Args:
        x: of any shape, floating.
        dims: not negative.
        count: at least as many as ``x`` has there.
        correction: what is taken off the count.
        keepdim: whether the dims stay, of size 1.
    """
    if isinstance(x, LabelTensor):
        x.fxc_run.hold_counted(x.fxc_value, dims)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # as torch does for numbers of half precision
    mean = wide.sum(dims, keepdim=True) / count
    square = (wide * (wide - mean)).sum(dims, keepdim=True) / (count - correction)
    square, mean = square.clamp_min(0.0).to(x.dtype), mean.to(x.dtype)
    return (square, mean) if keepdim else (square.squeeze(dims), mean.squeeze(dims))


def deviation(square: Tensor) -> Tensor:
    """The root of a variance; that of zero is zero, and passes no gradient on, as in ``torch.std``."""
    return square * torch.where(square > 0, square, torch.ones_like(square)).rsqrt()


def mean_square_of(
    x: Tensor, dims: tuple[int, ...], count: int | None = None, *, keepdim: bool, power: bool = True
) -> Tensor:
    """:func:`fxcompress.trace.graph.variances.mean_square` over ``count`` entries; the entries that are gone are zero.

    Each of these is as far from the mean as the mean is from zero. On labels it is a :func:`variance`.
    """
    dims = tuple(sorted(reduced(dims, x.ndim)))
    there = _entries(x, dims)
    count = there if count is None else count
    if isinstance(x, LabelTensor):
        return variance(x, dims, count, 0, keepdim)[0]
    mean = x.sum(dims, keepdim=True) / count
    total = squared(x - mean, power=power).sum(dims, keepdim=True) + (count - there) * squared(mean, power=power)
    result: Tensor = total / count
    return result if keepdim else result.squeeze(dims)


ON_LABELS: dict[object, Callable[..., Any]] = {mean_square: mean_square_of}
"""Functions of a graph, and what runs on labels in their place."""


def takes(x: Tensor, dim: object, correction: float | None) -> bool:
    """Whether there is a variance: more entries than the correction takes off."""
    return x.ndim > 0 and _entries(x, reduced(dim, x.ndim)) > (1 if correction is None else correction)


def _entries(x: Tensor, dims: Iterable[int]) -> int:
    """How many entries lie along these dims together."""
    count = 1
    for d in dims:
        count *= x.shape[d]
    return count


def _as_sums(results: Callable[[Tensor, Tensor], Any]) -> Callable[..., Any]:
    """An op of torch that takes dims, a correction and ``keepdim``, run on labels."""

    def run(
        x: Tensor,
        dim: list[int] | None = None,
        *,
        correction: float | None = None,
        keepdim: bool = False,
    ) -> Any:  # noqa: ANN401 - one tensor or two
        dims = tuple(sorted(reduced(dim, x.ndim)))
        return results(*variance(x, dims, _entries(x, dims), 1 if correction is None else correction, keepdim))

    return run


IN_SUMS: dict[object, Callable[..., Any]] = {
    torch.ops.aten.var: _as_sums(lambda square, mean: square),
    torch.ops.aten.std: _as_sums(lambda square, mean: deviation(square)),
    torch.ops.aten.var_mean: _as_sums(lambda square, mean: (square, mean)),
    torch.ops.aten.std_mean: _as_sums(lambda square, mean: (deviation(square), mean)),
}
"""From the op to what runs it on labels."""
