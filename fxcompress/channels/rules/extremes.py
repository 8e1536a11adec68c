"""Maxima and minima: an entry that is zero may go, if zero goes on being one of the numbers to choose from."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxcompress.channels.layers import support
from fxcompress.channels.rules.reductions import reduced
from fxcompress.channels.rules.sums import EXTREME
from fxcompress.channels.values import LabelTensor
from fxcompress.trace.graph.extremes import extreme

_OPS = {True: torch.ops.aten.amax.default, False: torch.ops.aten.amin.default}
"""By whether it is the largest."""


def extreme_of(
    x: Tensor, dims: tuple[int, ...], *, keepdim: bool, largest: bool, picks: bool = False, zero: bool = False
) -> Tensor:
    """The largest entry along some dims, or the smallest.

    Args:
        x: of any shape.
        dims: not negative.
        keepdim: whether they stay, of size 1.
        largest: or else the smallest.
        picks: one of several that are as large gets the gradient, as in ``max``, and not all of them, as in ``amax``.
        zero: whether there were entries of zero, which are gone.
    """
    if isinstance(x, LabelTensor):
        shape = tuple(1 if d in dims else n for d, n in enumerate(x.shape) if keepdim or d not in dims)
        found: Tensor = x.fxc_run.emit(EXTREME, _OPS[largest], (x.fxc_value, dims, keepdim, zero), shape, x)
        return found
    if picks:
        found = (torch.max if largest else torch.min)(x, dims[0], keepdim)[0]
    else:
        found = (torch.amax if largest else torch.amin)(x, dims, keepdim)
    if not zero:
        return found
    return found.clamp_min(0) if largest else found.clamp_max(0)


def _extreme(x: Tensor, dim: int, *, keepdim: bool = False, largest: bool = True) -> Tensor:
    return extreme_of(x, (dim % x.ndim,), keepdim=keepdim, largest=largest)


def in_extremes(func: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any] | None:
    """What runs ``amax`` and ``amin`` on labels, where there are labels along their dims."""
    if func not in _OPS.values() or not isinstance(args[0], LabelTensor):
        return None
    value = args[0].fxc_value
    dims = reduced(args[1] if len(args) > 1 else kwargs.get("dim"), value.rank)
    if not any(support(layer) & dims for layer in value.layers):
        return None

    def run(x: Tensor, dim: object = None, keepdim: bool = False) -> Tensor:  # noqa: FBT001, FBT002 - as in torch
        return extreme_of(x, tuple(sorted(dims)), keepdim=keepdim, largest=func is _OPS[True])

    return run


ON_LABELS: dict[object, Callable[..., Any]] = {extreme: _extreme}
"""Functions of a graph, and what runs on labels in their place."""
