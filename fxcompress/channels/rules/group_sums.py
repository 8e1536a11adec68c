"""Group norm as sums over the channels of each group.

An entry that is zero adds nothing to the sum of its group, so a channel may go alone, if the number that the sum is
divided by stays what it was. The groups are then of different sizes, each still a run of neighbouring channels::

    4 groups of 4 channels        x x x x | x x x x | x x x x | x x x x        channels 1, 4, 5 and 12 to 15 go
    (3, 2, 4), divided by 4       x x x | x x | x x x x
"""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fxcompress.channels.layers import Layers, along, support, vector
from fxcompress.channels.rules.registry import Known, OpClass
from fxcompress.channels.space import Space
from fxcompress.channels.values import Call, LabelTensor, Step, Value

Groups = tuple[int, ...]
"""How many channels each group has."""


def normalized_in_groups(
    x: Tensor, groups: Groups, count: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Group norm over groups of ``count`` channels, of which those that ``x`` does not have are zero.

    For each channel the mean and the scale of its group, beside the result. The square of the distance from the mean
    is written as in :func:`fxcompress.channels.rules.sums.normalized`, and for the same reason.

    Args:
        x: (N, C, ...).
        groups: C channels in all.
        count: that each group is divided by.
        weight: (C,).
        bias: the same.
        eps: added to the variance.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # as torch does for numbers of half precision
    mean = sums_of_groups(_of_channels(wide), groups) / count
    centered = wide - mean
    variance = sums_of_groups(_of_channels(wide * centered), groups) / count
    scale = torch.rsqrt(variance.clamp_min(0.0) + eps)
    shape = (-1, *[1] * (x.ndim - 2))
    y = centered * (scale if weight is None else scale * weight.reshape(shape))
    y = y if bias is None else y + bias.reshape(shape)
    return y.to(x.dtype), mean, scale


def _of_channels(x: Tensor) -> Tensor:
    """The mean of each channel over all places."""
    return x.mean(tuple(range(2, x.ndim)), keepdim=True) if x.ndim > 2 else x


def sums_of_groups(x: Tensor, groups: Groups) -> Tensor:
    """For each channel the sum over all channels of its group.

    >>> sums_of_groups(torch.tensor([[1.0, 2.0, 4.0]]), (2, 1))
    tensor([[3., 3., 4.]])
    """
    if isinstance(x, LabelTensor):
        slots = _slots(x.fxc_value, groups, x.fxc_run.space)
        args = (x.fxc_value, groups, slots)
        sums: Tensor = x.fxc_run.emit(GROUP_SUM, sums_of_groups, args, tuple(x.shape), x)
        return sums
    if min(groups) == max(groups):
        parts = x.unflatten(1, (len(groups), groups[0]))
        spread: Tensor = parts.sum(2, keepdim=True).expand_as(parts).flatten(1, 2)
        return spread
    index = _group_of_each(groups, x.device)
    whole = x.new_zeros((x.shape[0], len(groups), *x.shape[2:]))
    return whole.index_add(1, index, x).index_select(1, index)


def _group_of_each(groups: Groups, device: torch.device) -> Tensor:
    """The group of each channel, int64 (C,)."""
    if device.type == "cpu":
        return torch.tensor([i for i, size in enumerate(groups) for _ in range(size)], device=device)
    return in_runs(groups, device)


def in_runs(groups: Groups, device: torch.device) -> Tensor:
    """The same, made on the device, a run of equal groups at a time: it does not wait for numbers that are sent there.

    >>> in_runs((2, 2, 1), torch.device("cpu"))
    tensor([0, 0, 1, 1, 2])
    """
    parts, first = [], 0
    for size, run in itertools.groupby(groups):
        last = first + len(list(run))
        parts.append(torch.arange(first, last, device=device).repeat_interleave(size))
        first = last
    return torch.cat(parts)


def fits(value: Value, channels: int, groups: int) -> bool:
    """Whether the channels of a group norm may go one by one: they have labels, and no others along other dims."""
    supports = {support(layer) for layer in value.layers}
    return 1 < groups < channels and frozenset({1}) in supports and supports <= {frozenset({0}), frozenset({1})}


def group_norm_as_sums(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    _batch: int,
    channels: int,
    _places: int,
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``native_group_norm`` as sums, run on labels."""
    count = channels // groups
    return normalized_in_groups(x, (count,) * groups, count, weight, bias, eps)


def _slots(value: Value, groups: Groups, space: Space) -> Tensor:
    """For each channel an atom for its group, as a layer; of size 0 where the channels have no labels."""
    layer = along(value.layers, 1)
    if layer is None:
        return torch.empty(0, dtype=torch.int64, device="cpu")
    rows = [part.tolist() for part in layer.reshape(-1).split(list(groups))]
    members = torch.tensor([row + row[:1] * (max(groups) - len(row)) for row in rows], device="cpu")
    slots = space.slot(members).repeat_interleave(torch.tensor(groups, device="cpu"))
    return vector(slots, value.rank, 1)


def _labels(call: Call, space: Space) -> tuple[Layers, ...]:
    return (call.args[0].layers,)


def summed_in_groups(step: Step) -> Iterator[tuple[Tensor, Tensor]]:
    """The labels of the channels, each with that of its group."""
    value, _, slots = step.call.args
    layer = along(value.layers, 1)
    if layer is not None:
        yield layer, slots


def _constants(step: Step, known: Known) -> list[Tensor]:
    """A sum of zeros is zero."""
    value, groups, _ = step.call.args
    zero = (known.of(value) == 0).cpu()
    whole = zero.expand([sum(groups) if d == 1 else n for d, n in enumerate(zero.shape)])
    parts = [part.all(1, keepdim=True).expand_as(part) for part in whole.split(list(groups), 1)]
    return [torch.where(torch.cat(parts, 1), 0.0, torch.nan).double()]


def left_of(groups: Sequence[int], kept: np.ndarray) -> Groups:
    """The sizes of the groups that are left.

    Args:
        groups: before.
        kept: bool (C,), which channels are left.
    """
    parts = np.split(kept, np.cumsum(groups)[:-1])
    return tuple(int(part.sum()) for part in parts if part.any())


GROUP_SUM = OpClass("sum of groups", _labels, _constants)
"""Arguments: the channels, the sizes of their groups, an atom for each group."""
