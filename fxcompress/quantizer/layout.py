"""Where the output channels of a weight are: one row for each, whatever the layer.

Letters: O output channels, I input channels, g groups, k kernel sizes, M weights of one channel, E experts (or heads).
"""

from collections.abc import Sequence

from torch import Tensor

__all__ = ["channel_dims", "channels_of", "from_rows", "is_grouped", "per_channel", "rows", "split_groups"]


def is_grouped(channel_dim: int, groups: int) -> bool:
    """Whether the channels lie apart, as those of a grouped transposed convolution (I, O/g, *k) do."""
    return channel_dim == 1 and groups > 1


def channel_dims(channel_dim: int, batch_dims: Sequence[int] = ()) -> tuple[int, ...]:
    """The dims along which the channels of a weight differ, in the order in which they are counted.

    >>> channel_dims(1, (2, 0))
    (0, 1, 2)
    """
    return tuple(sorted((*batch_dims, channel_dim)))


def channels_of(shape: Sequence[int], channel_dim: int = 0, groups: int = 1, batch_dims: Sequence[int] = ()) -> int:
    """How many output channels a weight of ``shape`` has.

    >>> channels_of((6, 3, 5)), channels_of((4, 3, 5), 1, 2), channels_of((4, 3, 5), 2, batch_dims=(0,))
    (6, 6, 20)
    """
    count = shape[channel_dim] * (groups if is_grouped(channel_dim, groups) else 1)
    for dim in batch_dims:  # no generator, which torch.compile does not follow
        count *= shape[dim]
    return count


def per_channel(
    values: Tensor, shape: Sequence[int], channel_dim: int = 0, groups: int = 1, batch_dims: Sequence[int] = ()
) -> Tensor:
    """View ``values`` (O,) so that they broadcast against ``split_groups(weight, channel_dim, groups)``.

    ``shape`` is the weight's; the result has one dim more if the weight is a grouped transposed convolution's.

    >>> import torch
    >>> per_channel(torch.zeros(6), (6, 3, 5)).shape, per_channel(torch.zeros(6), (4, 3, 5), 1, 2).shape
    (torch.Size([6, 1, 1]), torch.Size([2, 1, 3, 1]))
    >>> per_channel(torch.zeros(20), (4, 3, 5), channel_dim=2, batch_dims=(0,)).shape
    torch.Size([4, 1, 5])
    """
    if is_grouped(channel_dim, groups):
        return values.reshape(groups, 1, -1, *[1] * (len(shape) - 2))
    if batch_dims:
        return values.reshape([n if dim == channel_dim or dim in batch_dims else 1 for dim, n in enumerate(shape)])
    return values.reshape([-1 if dim == channel_dim else 1 for dim in range(len(shape))])


def split_groups(weight: Tensor, channel_dim: int = 0, groups: int = 1) -> Tensor:
    """View the weight (I, O/g, *k) of a grouped transposed convolution as (g, I/g, O/g, *k); any other stays as it is.

    >>> import torch
    >>> split_groups(torch.zeros(4, 3, 5), channel_dim=1, groups=2).shape
    torch.Size([2, 2, 3, 5])
    """
    return weight.unflatten(0, (groups, -1)) if is_grouped(channel_dim, groups) else weight


def rows(weight: Tensor, channel_dim: int = 0, groups: int = 1, batch_dims: Sequence[int] = ()) -> Tensor:
    """The weight with one row for each output channel: (O, M).

    Those of a weight with ``batch_dims`` are all pairs of an entry of these and a channel, in the order of the dims: an
    expert and one of its channels, for (E, I, O).

    >>> import torch
    >>> rows(torch.zeros(4, 3, 5), channel_dim=1, groups=2).shape
    torch.Size([6, 10])
    """
    if is_grouped(channel_dim, groups):
        return split_groups(weight, channel_dim, groups).movedim(2, 1).flatten(0, 1).flatten(1)
    dims = channel_dims(channel_dim, batch_dims)
    return weight.movedim(dims, tuple(range(len(dims)))).reshape(
        channels_of(weight.shape, channel_dim, groups, batch_dims), -1
    )


def from_rows(
    matrix: Tensor, shape: Sequence[int], channel_dim: int = 0, groups: int = 1, batch_dims: Sequence[int] = ()
) -> Tensor:
    """The contiguous weight of ``shape`` that :func:`rows` made the matrix (O, M) of.

    >>> import torch
    >>> weight = torch.arange(60).reshape(4, 3, 5)
    >>> torch.equal(from_rows(rows(weight, 1, 2), (4, 3, 5), 1, 2), weight)
    True
    """
    if is_grouped(channel_dim, groups):
        inputs, outputs, *kernel = shape
        return matrix.reshape(groups, outputs, inputs // groups, *kernel).movedim(1, 2).reshape(tuple(shape))
    dims = channel_dims(channel_dim, batch_dims)
    others = [size for dim, size in enumerate(shape) if dim not in dims]
    there = matrix.reshape(*(shape[dim] for dim in dims), *others)
    return there.movedim(tuple(range(len(dims))), dims).contiguous()
