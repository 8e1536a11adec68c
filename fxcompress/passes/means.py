"""Means over channels some of which are gone: they were zero, and the number to divide by stays what it was.

A rewritten graph calls these functions in the place of ``mean``, ``var``, ``std``, ``rms_norm``, ``layer_norm`` and
``group_norm``.
"""

import torch
from torch import Tensor, fx

from fxcompress.channels.rules.extremes import extreme_of
from fxcompress.channels.rules.group_sums import normalized_in_groups
from fxcompress.channels.rules.sums import normalized, normalized_channels
from fxcompress.channels.rules.variances import deviation, mean_square_of, variance

Sizes = tuple[tuple[int, int], ...]
"""For each dim that was cut, how many entries it had: (dim, size)."""


@fx.wrap
def mean_over(
    x: Tensor, dims: tuple[int, ...], sizes: Sizes, *, keepdim: bool = False, dtype: torch.dtype | None = None
) -> Tensor:
    """The mean of ``x`` over ``dims``, as if the entries that are gone were there, and zero.

    Args:
        x: of any shape.
        dims: not negative.
        sizes: of those of the dims that were cut, before they were.
        keepdim: as for ``torch.mean``.
        dtype: the same.

    >>> mean_over(torch.tensor([[1.0, 2.0]]), (1,), ((1, 4),))
    tensor([0.7500])
    """
    total = x.sum(dims, keepdim, dtype=dtype)
    return total / _count(x, dims, sizes)


@fx.wrap
def var_over(x: Tensor, dims: tuple[int, ...], sizes: Sizes, correction: float = 1, *, keepdim: bool = False) -> Tensor:
    """The variance of ``x`` over ``dims``, as if the entries that are gone were there, and zero.

    Args:
        x: of any shape, floating.
        dims: not negative.
        sizes: of those of the dims that were cut, before they were.
        correction: as for ``torch.var``.
        keepdim: the same.

    >>> var_over(torch.tensor([[2.0, 2.0]]), (1,), ((1, 4),), 0)
    tensor([1.])
    """
    return var_mean_over(x, dims, sizes, correction, keepdim=keepdim)[0]


@fx.wrap
def var_mean_over(
    x: Tensor, dims: tuple[int, ...], sizes: Sizes, correction: float = 1, *, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    """The same, and the mean."""
    return variance(x, dims, _count(x, dims, sizes), correction, keepdim)


@fx.wrap
def std_over(x: Tensor, dims: tuple[int, ...], sizes: Sizes, correction: float = 1, *, keepdim: bool = False) -> Tensor:
    """The standard deviation in the same way.

    >>> std_over(torch.tensor([[2.0, 2.0]]), (1,), ((1, 4),), 0)
    tensor([1.])
    """
    return std_mean_over(x, dims, sizes, correction, keepdim=keepdim)[0]


@fx.wrap
def std_mean_over(
    x: Tensor, dims: tuple[int, ...], sizes: Sizes, correction: float = 1, *, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    """The same, and the mean."""
    square, mean = variance(x, dims, _count(x, dims, sizes), correction, keepdim)
    return deviation(square), mean


@fx.wrap
def mean_square_over(
    x: Tensor, dims: tuple[int, ...], sizes: Sizes, *, keepdim: bool = False, power: bool = True
) -> Tensor:
    """The same for a variance that was written by hand, see :func:`fxcompress.trace.graph.variances.mean_square`.

    >>> mean_square_over(torch.tensor([[2.0, 2.0]]), (1,), ((1, 4),))
    tensor([1.])
    """
    return mean_square_of(x, dims, _count(x, dims, sizes), keepdim=keepdim, power=power)


@fx.wrap
def extreme_over(
    x: Tensor, dims: tuple[int, ...], *, keepdim: bool = False, largest: bool = True, picks: bool = False
) -> Tensor:
    """The largest entry of ``x`` along ``dims``, or the smallest, as if there was zero as well.

    Args:
        x: of any shape.
        dims: not negative.
        keepdim: as for ``torch.amax``.
        largest: or else the smallest.
        picks: one of several that are as large gets the gradient, as in ``max``, and not all of them, as in ``amax``.

    >>> extreme_over(torch.tensor([[-2.0, -3.0]]), (1,))
    tensor([0.])
    """
    return extreme_of(x, dims, keepdim=keepdim, largest=largest, picks=picks, zero=True)


@fx.wrap
def rms_norm_over(
    x: Tensor, dims: tuple[int, ...], sizes: Sizes, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """RMS norm of ``x`` over its last ``dims``, as if the entries that are gone were there, and zero.

    Args:
        x: of any shape, floating.
        dims: not negative.
        sizes: of those of the dims that were cut, before they were.
        weight: of the shape that ``x`` has along ``dims``.
        eps: as for ``torch.nn.functional.rms_norm``.

    >>> rms_norm_over(torch.tensor([[2.0, 2.0]]), (1,), ((1, 8),), eps=0.0)
    tensor([[2., 2.]])
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # as torch does for numbers of half precision
    square = wide.pow(2).sum(dims, keepdim=True) / _count(x, dims, sizes)
    square.add_(torch.finfo(wide.dtype).eps if eps is None else eps)  # in place, as torch does: the check compares ops
    y = wide * torch.rsqrt(square)
    return (y if weight is None else y * weight).to(x.dtype)


@fx.wrap
def layer_norm_over(
    x: Tensor,
    dims: tuple[int, ...],
    sizes: Sizes,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Layer norm of ``x`` over its last ``dims``, as if the entries that are gone were there, and zero.

    It is a handful of elementwise ops where ``torch.nn.functional.layer_norm`` is one; ``torch.compile`` fuses them.

    Args:
        x: of any shape, floating.
        dims: not negative.
        sizes: of those of the dims that were cut, before they were.
        weight: of the shape that ``x`` has along ``dims``.
        bias: the same.
        eps: as for ``torch.nn.functional.layer_norm``.

    >>> layer_norm_over(torch.tensor([[2.0, 2.0]]), (1,), ((1, 4),), eps=0.0)
    tensor([[1., 1.]])
    """
    y, _, _ = normalized(x, dims, _count(x, dims, sizes), weight, bias, eps)
    return y


@fx.wrap
def group_norm_over(
    x: Tensor,
    sizes: Sizes,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    groups: tuple[int, ...] | None = None,
) -> Tensor:
    """Group norm of ``x``, as if the entries that are gone were there, and zero.

    Args:
        x: (N, C, ...), floating.
        sizes: of those of the dims that were cut, before they were; of the channels, those of one group.
        weight: (C,).
        bias: the same.
        eps: as for ``torch.nn.functional.group_norm``.
        groups: how many channels are left of each group; None for one group, of all of them.

    >>> group_norm_over(torch.tensor([[2.0, 2.0]]), ((1, 4),), eps=0.0)
    tensor([[1., 1.]])
    >>> group_norm_over(torch.tensor([[2.0, 2.0, 3.0]]), ((1, 4),), eps=0.0, groups=(2, 1)).round(decimals=2)
    tensor([[1.0000, 1.0000, 1.7300]])
    """
    if groups is not None:
        return normalized_in_groups(x, groups, dict(sizes)[1], weight, bias, eps)[0]
    y, _, _ = normalized_channels(x, _count(x, tuple(range(1, x.ndim)), sizes), weight, bias, eps)
    return y


def _count(x: Tensor, dims: tuple[int, ...], sizes: Sizes) -> int:
    """How many entries there would be; along dims that were not cut it may depend on the input."""
    before, count = dict(sizes), 1
    for d in dims:  # a loop, as torch.compile takes it in
        count *= before[d] if d in before else x.shape[d]
    return count
