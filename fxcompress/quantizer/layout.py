"""Where the output channels of a weight are: one row for each, whatever the layer.

Letters: O output channels, I input channels, g groups, k kernel sizes, M weights of one channel.
"""

from collections.abc import Sequence

from torch import Tensor

__all__ = ["from_rows", "is_grouped", "per_channel", "rows", "split_groups"]


def is_grouped(channel_dim: int, groups: int) -> bool:
    """Whether the channels lie apart, as those of a grouped transposed convolution (I, O/g, *k) do."""
    return channel_dim == 1 and groups > 1


def per_channel(values: Tensor, rank: int, channel_dim: int = 0, groups: int = 1) -> Tensor:
    """View ``values`` (O,) so that they broadcast against ``split_groups(weight, channel_dim, groups)``.

    ``rank`` is the weight's; the result has one dim more if the weight is a grouped transposed convolution's.

    >>> import torch
    >>> per_channel(torch.zeros(6), 4).shape, per_channel(torch.zeros(6), 4, channel_dim=1, groups=2).shape
    (torch.Size([6, 1, 1, 1]), torch.Size([2, 1, 3, 1, 1]))
    """
    if is_grouped(channel_dim, groups):
        return values.reshape(groups, 1, -1, *[1] * (rank - 2))
    return values.reshape([-1 if dim == channel_dim else 1 for dim in range(rank)])


def split_groups(weight: Tensor, channel_dim: int = 0, groups: int = 1) -> Tensor:
    """View the weight (I, O/g, *k) of a grouped transposed convolution as (g, I/g, O/g, *k); any other stays as it is.

    >>> import torch
    >>> split_groups(torch.zeros(4, 3, 5), channel_dim=1, groups=2).shape
    torch.Size([2, 2, 3, 5])
    """
    return weight.unflatten(0, (groups, -1)) if is_grouped(channel_dim, groups) else weight


def rows(weight: Tensor, channel_dim: int = 0, groups: int = 1) -> Tensor:
    """The weight with one row for each output channel: (O, M).

    >>> import torch
    >>> rows(torch.zeros(4, 3, 5), channel_dim=1, groups=2).shape
    torch.Size([6, 10])
    """
    if is_grouped(channel_dim, groups):
        return split_groups(weight, channel_dim, groups).movedim(2, 1).flatten(0, 1).flatten(1)
    return weight.movedim(channel_dim, 0).reshape(weight.shape[channel_dim], -1)


def from_rows(matrix: Tensor, shape: Sequence[int], channel_dim: int = 0, groups: int = 1) -> Tensor:
    """The contiguous weight of ``shape`` that :func:`rows` made the matrix (O, M) of.

    >>> import torch
    >>> weight = torch.arange(60).reshape(4, 3, 5)
    >>> torch.equal(from_rows(rows(weight, 1, 2), (4, 3, 5), 1, 2), weight)
    True
    """
    if is_grouped(channel_dim, groups):
        inputs, outputs, *kernel = shape
        return matrix.reshape(groups, outputs, inputs // groups, *kernel).movedim(1, 2).reshape(tuple(shape))
    others = [size for dim, size in enumerate(shape) if dim != channel_dim]
    return matrix.reshape(shape[channel_dim], *others).movedim(0, channel_dim).contiguous()
