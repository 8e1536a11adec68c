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
from fxcompress.channels.rules.contraction import meet, take
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
    if isinstance(x, LabelTensor):
        return _on_labels(x, groups, count, weight, bias, eps)
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
    assert isinstance(x, LabelTensor)
    if weight is None:  # it has as many entries as there are channels
        x.fxc_run.hold_counted(x.fxc_value, (1,))
    count = channels // groups
    return normalized_in_groups(x, (count,) * groups, count, weight, bias, eps)


def _on_labels(
    x: LabelTensor, groups: Groups, count: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One step; of the means and scales nothing is known."""
    own = (None if t is None else _value(t) for t in (weight, bias))
    args = (x.fxc_value, *own, groups, count, eps, _slots(x.fxc_value, groups, x.fxc_run.space))
    y = x.fxc_run.emit(GROUP_SUM, normalized_in_groups, args, tuple(x.shape), x)
    rest = torch.empty(x.shape[0], len(groups), dtype=x.dtype, device="meta")
    mean, scale = (LabelTensor(Value(rest), x.fxc_run, x.device) for _ in range(2))
    return y, mean, scale


def _value(tensor: Tensor) -> Value:
    """Of a tensor without labels nothing is known."""
    return tensor.fxc_value if isinstance(tensor, LabelTensor) else Value(tensor.to("meta"))


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
    source: Value = call.args[0]
    channels = take(source, 1, space)
    for own in (a for a in call.args[1:3] if a is not None):
        meet(channels, take(own, 0, space), space)
    return (source.layers,)


def summed_in_groups(step: Step) -> Iterator[tuple[Tensor, Tensor]]:
    """The labels of the channels, each with that of its group."""
    value, *_, slots = step.call.args
    layer = along(value.layers, 1)
    if layer is not None:
        yield layer, slots


def _constants(step: Step, known: Known) -> list[Tensor]:
    """A group of zeros is the bias, and so is a channel whose weight is zero."""
    value, weight, bias, groups, *_ = step.call.args
    zero = known.of(value) == 0
    others = [d for d in range(zero.ndim) if d != 1]
    zero = zero.all(dim=others).expand(sum(groups))
    found = torch.cat([part.all().expand(len(part)) for part in zero.split(list(groups))])
    if weight is not None:
        found = found | torch.from_numpy(known.small(weight) == 0)
    numbers = np.where(found.numpy(), 0.0 if bias is None else known.small(bias), np.nan)
    return [vector(torch.from_numpy(numbers), value.rank, 1)]


def left_of(groups: Sequence[int], kept: np.ndarray) -> Groups:
    """The sizes of the groups that are left.

    Args:
        groups: before.
        kept: bool (C,), which channels are left.
    """
    parts = np.split(kept, np.cumsum(groups)[:-1])
    return tuple(int(part.sum()) for part in parts if part.any())


GROUP_SUM = OpClass("group norm by sums", _labels, _constants)
"""Arguments: those of :func:`normalized_in_groups`, but for the order, and an atom for each group."""
