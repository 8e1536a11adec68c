"""Whether tensors hold the same values, of which NaN is one."""

from torch import Tensor


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same shape and values; NaN is the same as NaN.

    >>> import torch
    >>> same_values(torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.nan]))
    True
    """
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())  # noqa: PLR0124 - NaN is not itself
