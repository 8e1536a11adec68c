"""The codes that the quantizer emits at each bit depth, and the bits that they take in a file."""

import torch
from torch import Tensor

from fxcompress.quantizer.arithmetic import clip_range

__all__ = ["code_bounds", "code_count", "storage_bits"]


def code_bounds(bits: Tensor) -> tuple[Tensor, Tensor]:
    """The lowest and highest code that the quantizer emits at each bit depth >= 0; two int64 tensors of its shape.

    >>> code_bounds(torch.tensor([0.0, 1.0, 2.0, 8.0]))
    (tensor([   0,   -1,   -2, -128]), tensor([  0,   0,   1, 127]))
    """
    lo, hi = clip_range(bits.detach())
    return lo.round().long(), hi.round().long()


def code_count(bits: Tensor) -> Tensor:
    """The number of codes that the quantizer can emit at each bit depth >= 0; int64 of the same shape.

    Not 2^b, since the bounds round: 1 at b = 0, then 2 up to b = 1.585, 4 up to 2.322, 6 up to 2.807, 8 up to 3.17.
    Taken from the same float operations as the quantizer's own bounds, so that it agrees at the thresholds too.

    >>> code_count(torch.tensor([0.0, 0.5, 2.0, 2.5, 3.0]))
    tensor([1, 2, 4, 6, 8])
    """
    lo, hi = code_bounds(bits)
    return hi - lo + 1


def storage_bits(bits: Tensor) -> Tensor:
    """Whole bits that a code takes in a file at each bit depth >= 0: ceil(log2(code_count)), int64 of the same shape.

    >>> storage_bits(torch.tensor([0.0, 0.5, 2.0, 2.5, 3.0]))
    tensor([0, 1, 2, 3, 3])
    """
    powers = 2 ** torch.arange(62, device=bits.device)
    return torch.bucketize(code_count(bits), powers)
