"""The quantizer: signed fixed point with a trained bit depth and a trained exponent for each output channel.

Source: S. Cséfalvay and J. Imber, "Self-Compressing Neural Networks", arXiv 2301.13142 (the *paper*), equation 1.
Letters: O output channels, I input channels, k kernel sizes, M weights of one channel.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fxcompress.errors import UnsupportedModelError

__all__ = [
    "Quantizer",
    "code_bounds",
    "code_count",
    "from_rows",
    "per_channel",
    "quantize",
    "quantize_reference",
    "rows",
    "split_groups",
    "storage_bits",
]

_LN2 = math.log(2.0)
_SMALLEST = 2.0**-100
"""Channels are scaled as if their largest weight were at least this, so that 2**-e stays a finite float32."""


def _wide(x: Tensor) -> Tensor:
    """``x`` in float32 at least: half precision has too few digits for a bit depth, or for 8-bit codes."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _clip_range(bits: Tensor) -> tuple[Tensor, Tensor]:
    # Not exp2(bits - 1): 2**0 is exactly 1 on every device, so both bounds are exactly -0.5 at b = 0 and round to 0.
    half = torch.exp2(_wide(bits)) * 0.5
    return -half, half - 1


def _scale_and_clip(x: Tensor, bits: Tensor, exponent: Tensor) -> tuple[Tensor, Tensor]:
    """The s and c of the formulas: x in units of the grid, before and after clipping."""
    scaled = _wide(x) * torch.exp2(-_wide(exponent))
    return scaled, torch.clamp(scaled, *_clip_range(bits))


class _Quantize(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, bits: Tensor, exponent: Tensor) -> Tensor:
        _, clipped = _scale_and_clip(x, bits, exponent)
        codes = clipped.round_()
        # 0 + code * scale in one kernel: codes that round to -0.0 become 0.0, as integers have no negative zero.
        return torch.addcmul(codes.new_zeros(()), codes, torch.exp2(_wide(exponent)).to(codes.dtype)).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:  # noqa: ANN401
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # noqa: ANN401
        x, bits, exponent = ctx.saved_tensors
        scaled, clipped = _scale_and_clip(x, bits, exponent)
        grad = grad.to(scaled.dtype)
        inside = scaled == clipped
        grad_x = torch.where(inside, grad, 0).to(x.dtype) if ctx.needs_input_grad[0] else None
        grad_bits = _grad_bits(grad, torch.sign(scaled - clipped), bits, exponent) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[2]:
            return grad_x, grad_bits, None
        return grad_x, grad_bits, _grad_exponent(grad, clipped.round() - torch.where(inside, scaled, 0), exponent)


def _grad_bits(grad: Tensor, side: Tensor, bits: Tensor, exponent: Tensor) -> Tensor:
    """Gradient of b: ±ln2 * 2^e * 2^(b-1) where clipped high or low. ``side``: 1, -1, and 0 for not clipped."""
    shape = torch.broadcast_shapes(bits.shape, exponent.shape)
    factor = _LN2 * 0.5 * torch.exp2(_wide(bits)) * torch.exp2(_wide(exponent))
    return ((grad * side).sum_to_size(shape) * factor).sum_to_size(bits.shape).to(bits.dtype)


def _grad_exponent(grad: Tensor, change: Tensor, exponent: Tensor) -> Tensor:
    """Gradient of e: ln2 * 2^e * (round(c) - s) inside, ln2 * 2^e * round(c) where clipped."""
    return ((grad * change).sum_to_size(exponent.shape) * torch.exp2(_wide(exponent)) * _LN2).to(exponent.dtype)


def quantize(x: Tensor, bits: Tensor, exponent: Tensor) -> Tensor:
    """Quantize ``x`` to signed fixed point (the paper, equation 1), with the closed-form gradients.

        q(x, b, e) = 2^e * round( min( max( 2^-e * x, -2^(b-1) ), 2^(b-1) - 1 ) )

    Rounds to nearest, ties to even, so at b = 0, where both bounds are -0.5, everything becomes exactly 0. The gradient
    passes straight through the rounding. With s = 2^-e * x and c = clip(s): dq/dx is 1 inside the range (bounds
    included) and 0 where clipped; dq/db is 0 inside and +-ln2 * 2^e * 2^(b-1) where clipped high or low; dq/de is
    ln2 * 2^e * (round(c) - s) inside and ln2 * 2^e * round(c) where clipped.

    Args:
        x: float tensor of any shape and dtype; half and bfloat16 are computed in float32. Autocast changes nothing.
        bits: b >= 0, of a shape that broadcasts to ``x``'s. The caller keeps b >= 0, say by a projection after each
            step: below 0 every code would be -1. It is not checked, because a check would wait for the device.
        exponent: e, of a shape that broadcasts to ``x``'s.

    Returns:
        Tensor of ``x``'s shape and dtype; never -0.0. For the backward pass nothing but the arguments is kept.

    Raises:
        RuntimeError: on a second differentiation, which a piecewise constant function has no use for.

    >>> quantize(torch.tensor([-9.0, -0.5, 0.6, 9.0]), torch.tensor(3.0), torch.tensor(0.0))
    tensor([-4.,  0.,  1.,  3.])
    """
    result: Tensor = _Quantize.apply(x, bits, exponent)
    return result


def quantize_reference(x: Tensor, bits: Tensor, exponent: Tensor) -> Tensor:
    """:func:`quantize` from plain torch operations: same arguments, same values, same gradients, more memory.

    The yardstick of the tests, and a fallback where a compiler cannot take autograd functions.

    >>> quantize_reference(torch.tensor([-9.0, -0.5, 0.6, 9.0]), torch.tensor(3.0), torch.tensor(0.0))
    tensor([-4.,  0.,  1.,  3.])
    """
    lo, hi = _clip_range(bits)
    scaled = _wide(x) * torch.exp2(-_wide(exponent))
    # Not clamp, minimum or maximum: those share a tie's gradient between their arguments, or give it to none.
    clipped = torch.where(scaled > hi, hi, torch.where(scaled < lo, lo, scaled))
    codes = clipped + (clipped.round() - clipped).detach()
    return (codes * torch.exp2(_wide(exponent))).to(x.dtype)


def code_bounds(bits: Tensor) -> tuple[Tensor, Tensor]:
    """The lowest and highest code that the quantizer emits at each bit depth >= 0; two int64 tensors of its shape.

    >>> code_bounds(torch.tensor([0.0, 1.0, 2.0, 8.0]))
    (tensor([   0,   -1,   -2, -128]), tensor([  0,   0,   1, 127]))
    """
    lo, hi = _clip_range(bits.detach())
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


def _is_grouped(channel_dim: int, groups: int) -> bool:
    return channel_dim == 1 and groups > 1


def per_channel(values: Tensor, rank: int, channel_dim: int = 0, groups: int = 1) -> Tensor:
    """View ``values`` (O,) so that they broadcast against ``split_groups(weight, channel_dim, groups)``.

    ``rank`` is the weight's; the result has one dim more if the weight is a grouped transposed convolution's.

    >>> per_channel(torch.zeros(6), 4).shape, per_channel(torch.zeros(6), 4, channel_dim=1, groups=2).shape
    (torch.Size([6, 1, 1, 1]), torch.Size([2, 1, 3, 1, 1]))
    """
    if _is_grouped(channel_dim, groups):
        return values.reshape(groups, 1, -1, *[1] * (rank - 2))
    return values.reshape([-1 if dim == channel_dim else 1 for dim in range(rank)])


def split_groups(weight: Tensor, channel_dim: int = 0, groups: int = 1) -> Tensor:
    """View the weight (I, O/g, *k) of a grouped transposed convolution as (g, I/g, O/g, *k); any other stays as it is.

    >>> split_groups(torch.zeros(4, 3, 5), channel_dim=1, groups=2).shape
    torch.Size([2, 2, 3, 5])
    """
    return weight.unflatten(0, (groups, -1)) if _is_grouped(channel_dim, groups) else weight


def rows(weight: Tensor, channel_dim: int = 0, groups: int = 1) -> Tensor:
    """The weight with one row for each output channel: (O, M).

    >>> rows(torch.zeros(4, 3, 5), channel_dim=1, groups=2).shape
    torch.Size([6, 10])
    """
    if _is_grouped(channel_dim, groups):
        return split_groups(weight, channel_dim, groups).movedim(2, 1).flatten(0, 1).flatten(1)
    return weight.movedim(channel_dim, 0).reshape(weight.shape[channel_dim], -1)


def from_rows(matrix: Tensor, shape: Sequence[int], channel_dim: int = 0, groups: int = 1) -> Tensor:
    """The contiguous weight of ``shape`` that :func:`rows` made the matrix (O, M) of.

    >>> weight = torch.arange(60).reshape(4, 3, 5)
    >>> torch.equal(from_rows(rows(weight, 1, 2), (4, 3, 5), 1, 2), weight)
    True
    """
    if _is_grouped(channel_dim, groups):
        inputs, outputs, *kernel = shape
        return matrix.reshape(groups, outputs, inputs // groups, *kernel).movedim(1, 2).reshape(tuple(shape))
    others = [size for dim, size in enumerate(shape) if dim != channel_dim]
    return matrix.reshape(shape[channel_dim], *others).movedim(0, channel_dim).contiguous()


class Quantizer(nn.Module):
    """Quantizes a weight with one bit depth and one exponent for each of its output channels.

    The number of channels is that of ``bits``, read at each call: cutting channels means replacing ``bits`` and
    ``exponent`` by shorter parameters, and for a grouped transposed convolution setting ``groups``.

    Attributes:
        bits: b, parameter of shape (O,), in float32 at least. To be kept >= 0 by whoever trains it.
        exponent: e, parameter of shape (O,).
        channel_dim: the dim of the weight that holds its output channels: 0, and 1 for transposed convolutions.
        groups: with ``channel_dim == 1``, the groups that dim 0 is split into: the weight is (I, O/groups, *k), and
            channel c is entry c % (O/groups) of group c // (O/groups). Without meaning for ``channel_dim == 0``.

    >>> conv = nn.Conv2d(3, 8, 3)
    >>> quantizer = Quantizer.for_weight(conv.weight, bits=4.0)
    >>> quantizer(conv.weight).shape, int(quantizer.codes(conv.weight).abs().max()) <= 8
    (torch.Size([8, 3, 3, 3]), True)
    """

    def __init__(self, bits: Tensor, exponent: Tensor, *, channel_dim: int = 0, groups: int = 1) -> None:
        super().__init__()
        self.bits = nn.Parameter(bits)
        self.exponent = nn.Parameter(exponent)
        self.channel_dim = channel_dim
        self.groups = groups

    @classmethod
    def for_weight(cls, weight: Tensor, *, bits: float = 8.0, channel_dim: int = 0, groups: int = 1) -> "Quantizer":
        """A quantizer for a float ``weight`` of any rank >= 1, on its device, with all bit depths at ``bits``.

        Exponents start at log2(max |w|) - (b - 1) of each channel: the range is full, and nothing is clipped but a
        largest weight that is positive, by one step, as 2^(b-1) itself is no code. A channel of zeros takes the
        largest max |w| of the others.

        Raises:
            UnsupportedModelError: the weight is not float, or has not the dims that the arguments speak of.
        """
        shape = tuple(weight.shape)
        if not weight.is_floating_point() or not 0 <= channel_dim < len(shape):
            raise UnsupportedModelError(
                f"cannot quantize a weight of shape {shape} and dtype {weight.dtype}: it must be float and have "
                f"a dim {channel_dim}, which holds the output channels; leave this weight out"
            )
        if _is_grouped(channel_dim, groups) and shape[0] % groups:
            raise UnsupportedModelError(f"a weight of shape {shape} cannot have {groups} groups along dim 0")
        largest = _wide(rows(weight.detach(), channel_dim, groups)).abs().amax(1)
        largest = torch.where(largest > 0, largest, torch.where(largest.max() > 0, largest.max(), 1.0))
        exponent = largest.clamp(min=_SMALLEST).log2() - (bits - 1)
        return cls(torch.full_like(exponent, bits), exponent, channel_dim=channel_dim, groups=groups)

    def forward(self, weight: Tensor) -> Tensor:
        """The quantized weight, of the same shape and dtype; see :func:`quantize`.

        Raises:
            UnsupportedModelError: ``weight`` has another number of output channels than ``bits``.
        """
        blocks = self._blocks(weight)
        quantized = quantize(blocks, self._broadcast(self.bits, weight), self._broadcast(self.exponent, weight))
        return quantized.reshape(weight.shape)

    def codes(self, weight: Tensor) -> Tensor:
        """The integers that ``forward(weight)`` is the ``scale(weight)``-fold of; int32, of the weight's shape."""
        with torch.no_grad():
            bits, exponent = self._broadcast(self.bits, weight), self._broadcast(self.exponent, weight)
            _, clipped = _scale_and_clip(self._blocks(weight), bits, exponent)
            return clipped.round().to(torch.int32).reshape(weight.shape)

    def scale(self, weight: Tensor) -> Tensor:
        """2^e in ``exponent``'s dtype, of a shape that broadcasts against ``weight``; without gradient.

        For (O, I, k, k) that is (O, 1, 1, 1). A grouped transposed (I, O/g, k, k) gets (I, O/g, 1, 1).
        """
        scale = self._broadcast(torch.exp2(_wide(self.exponent.detach())), weight)
        if scale.ndim == weight.ndim:
            return scale
        return scale.expand(-1, weight.shape[0] // self.groups, *[-1] * (scale.ndim - 2)).flatten(0, 1)

    def extra_repr(self) -> str:
        """Channels and layout; no values, which would wait for the device."""
        return f"channels={self.bits.numel()}, channel_dim={self.channel_dim}, groups={self.groups}"

    def _broadcast(self, values: Tensor, weight: Tensor) -> Tensor:
        return per_channel(values, weight.ndim, self.channel_dim, self.groups)

    def _blocks(self, weight: Tensor) -> Tensor:
        channels = weight.shape[self.channel_dim]
        channels *= self.groups if _is_grouped(self.channel_dim, self.groups) else 1
        if channels != self.bits.numel():
            raise UnsupportedModelError(
                f"the weight of shape {tuple(weight.shape)} has {channels} output channels (channel_dim="
                f"{self.channel_dim}, groups={self.groups}), but its quantizer has {self.bits.numel()} bit depths; "
                "both must be cut together"
            )
        return split_groups(weight, self.channel_dim, self.groups)
