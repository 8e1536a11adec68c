"""The arithmetic of the quantizer and of its gradients (the paper, arXiv 2301.13142, equation 1).

With s = 2^-e x, the bounds lo = -2^(b-1) and hi = 2^(b-1) - 1, and q the result, the gradients are

    dq/dx = 1 inside the range, 0 where clipped
    dq/db = 0 inside, +-ln2 * 2^e * 2^(b-1) where clipped high or low
    dq/de = ln2 * (q - x) inside, ln2 * q where clipped

so all that they need is x and q, which the layer that reads q keeps anyway (compiled passes work it out again).
With ``keep_range`` the bits of a channel are those of its grid alone: the exponent follows them (see ``quantize``).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["EAGER", "FUSED", "RANGE_BITS", "Kernels", "clip_range", "codes_of", "limits_of", "wide"]

RANGE_BITS = 2.0
"""Bits down to which ``keep_range`` keeps a range: with fewer, a range as wide as the weights leaves most of them 0."""
_LN2 = math.log(2.0)
_BLOCK = 2**19
"""Entries of a block: its passes stay in the cache, and each still pays for its call."""


def wide(x: Tensor) -> Tensor:
    """``x`` in float32 at least: half precision has too few digits for a bit depth, or for 8-bit codes."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def clip_range(bits: Tensor) -> tuple[Tensor, Tensor]:
    """The bounds lo and hi, before they are rounded to codes."""
    # Not exp2(bits - 1): 2**0 is exactly 1 on every device, so both bounds are exactly -0.5 at b = 0 and round to 0.
    half = torch.exp2(wide(bits)) * 0.5
    return -half, half - 1


def codes_of(x: Tensor, bits: Tensor, exponent: Tensor) -> Tensor:
    """The integers that the quantizer multiplies 2^e with, as floats, of ``x``'s shape."""
    lo, hi = clip_range(bits)
    return torch.clamp(wide(x) * torch.exp2(-wide(exponent)), lo, hi).round()


class Kernels(NamedTuple):
    """The passes over a weight, forward and backward, for what is at work.

    Attributes:
        forward: of x, b and e, which broadcast: q, and the lowest and the highest x of each channel that is not
            clipped.
        backward: of the gradient for q, x, q, b, e, those limits, and ``keep_range``: the gradient for x, and for each
            channel those for b and e.
    """

    forward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    backward: Callable[
        [Tensor, Tensor, Tensor, Tensor, Tensor, tuple[Tensor, Tensor], bool], tuple[Tensor, Tensor, Tensor]
    ]


def _eager_forward(x: Tensor, bits: Tensor, exponent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    bits, exponent, dtype = _formats(x, bits, exponent)
    grid, (low, high) = _grid(bits, exponent, dtype)
    return _round_in_blocks(x.to(dtype), grid).to(x.dtype), low, high


def _fused_forward(x: Tensor, bits: Tensor, exponent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    bits, exponent, dtype = _formats(x, bits, exponent)
    grid, (low, high) = _grid(bits, exponent, dtype)
    return _round_at_once(x.to(dtype), grid).to(x.dtype), low, high


def _eager_backward(
    grad: Tensor,
    x: Tensor,
    q: Tensor,
    bits: Tensor,
    exponent: Tensor,
    limits: tuple[Tensor, Tensor],
    keep_range: bool,  # noqa: FBT001
) -> tuple[Tensor, Tensor, Tensor]:
    bits, exponent, dtype = _formats(x, bits, exponent)
    exact = x.to(dtype)
    exact_q = q if q.dtype is dtype else _round_in_blocks(exact, _grid(bits, exponent, dtype)[0])
    grad_x, outside, change = _distribute_in_blocks(grad.to(dtype), exact, exact_q, *limits)
    return grad_x.to(x.dtype), *_gradients_of_formats(outside, change, bits, limits[0], keep_range)


def _fused_backward(
    grad: Tensor,
    x: Tensor,
    q: Tensor,
    bits: Tensor,
    exponent: Tensor,
    limits: tuple[Tensor, Tensor],
    keep_range: bool,  # noqa: FBT001
) -> tuple[Tensor, Tensor, Tensor]:
    bits, exponent, dtype = _formats(x, bits, exponent)
    exact = x.to(dtype)
    exact_q = _round_at_once(exact, _grid(bits, exponent, dtype)[0])  # memory is slower than to work it out again
    block = (grad.to(dtype), exact, exact_q, *[_computed(limit) for limit in limits])
    grad_x, outside, change = _distribute(block)
    return grad_x.to(x.dtype), *_gradients_of_formats(outside, change, bits, limits[0], keep_range)


EAGER = Kernels(_eager_forward, _eager_backward)
"""Operation by operation, into memory that is used again; on a CPU block by block, and a block stays in the cache."""
FUSED = Kernels(_fused_forward, _fused_backward)
"""For compilers, which fuse operations themselves, and functional transforms: both want no memory to write to."""


def limits_of(x: Tensor, bits: Tensor, exponent: Tensor) -> tuple[Tensor, Tensor]:
    """The lowest and the highest ``x`` of each channel that is not clipped."""
    low, high = _grid(*_formats(x, bits, exponent))[1]
    return low, high


def _formats(x: Tensor, bits: Tensor, exponent: Tensor) -> tuple[Tensor, Tensor, torch.dtype]:
    """Bits and exponents, and the dtype that is computed in.

    Each in its own shape: where it stands in a tensor may decide about the last digit of a power of 2.
    """
    dtype = x.dtype
    if not dtype is bits.dtype is exponent.dtype is torch.float32:  # as in most networks; then nothing is converted
        bits, exponent = wide(bits), wide(exponent)
        dtype = torch.promote_types(torch.promote_types(dtype, bits.dtype), exponent.dtype)
    return bits, exponent, dtype


def _grid(bits: Tensor, exponent: Tensor, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Of each channel: 2^-e, the lowest and the highest code, 2^e; and the lowest and the highest x not clipped."""
    low, high = clip_range(bits)
    grid = [torch.exp2(-exponent), low.round(), high.round(), torch.exp2(exponent)]
    if bits.dtype is not dtype or exponent.dtype is not dtype:
        low, high, *grid = [value.to(dtype) for value in (low, high, *grid)]
    return grid, [low * grid[3], high * grid[3]]


def _round_in_blocks(x: Tensor, grid: Sequence[Tensor]) -> Tensor:
    result = torch.empty_like(x)
    zero = x.new_zeros((1, *x.shape[1:])[: x.ndim])
    for out, part, *grid_of_part in _blocks(result, x, *grid):
        _round(part, grid_of_part, zero, out)
    return result


def _round_at_once(x: Tensor, grid: Sequence[Tensor]) -> Tensor:
    return _round(x, [_computed(value) for value in grid], x.new_zeros(()))


def _distribute_in_blocks(
    grad: Tensor, x: Tensor, q: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = torch.empty_like(x)
    spare: Tensor | None = None
    sums: list[tuple[Tensor, ...]] = []
    for out, *parts in _blocks(grad_x, grad, x, q, low, high):
        # Memory asked for again in each block may be handed out as fresh pages, which cost more than all passes.
        spare = torch.empty_like(out) if spare is None else spare[: len(out)]
        sums.append(_distribute(parts, out, spare)[1:])
    by_block = low.ndim == x.ndim and low.ndim and low.shape[0] != 1
    outside, change = (
        part[0] if len(part) == 1 else torch.cat(part) if by_block else torch.stack(part).sum(0)
        for part in zip(*sums, strict=True)
    )
    return grad_x, outside, change


def _gradients_of_formats(
    outside: Tensor,
    change: Tensor,
    bits: Tensor,
    low: Tensor,
    keep_range: bool,  # noqa: FBT001
) -> tuple[Tensor, Tensor]:
    """For b and e: -ln2 * low, which is ln2 * 2^e * 2^(b-1), and ln2 times the sums of :func:`_distribute`."""
    to_bits, to_exponent = outside * (low * -_LN2), change * _LN2
    return torch.where(bits > RANGE_BITS, to_bits - to_exponent, to_bits) if keep_range else to_bits, to_exponent


def _round(x: Tensor, grid: Sequence[Tensor], zero: Tensor, out: Tensor | None = None) -> Tensor:
    """The q of a block. Clipping comes after rounding, by rounded bounds: the same, as both are monotone."""
    inverse, low, high, scale = grid
    codes = torch.mul(x, inverse, out=out)
    codes = torch.round(codes, out=out)
    codes = torch.maximum(codes, low, out=out)
    codes = torch.minimum(codes, high, out=out)
    # 0 + code * scale in one pass: codes that round to -0.0 become 0.0, as integers have no negative zero.
    return torch.addcmul(zero, codes, scale, out=out)


def _distribute(
    block: Sequence[Tensor], out: Tensor | None = None, spare: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient for a block of x, and over each channel the sums that those for b and e are multiples of.

    Args:
        block: the gradient for q, x, q, and the range of each channel.
        out: where to write the first result.
        spare: memory to work in.
    """
    grad, x, q, low, high = block
    side = torch.maximum(x, low, out=spare)
    side = torch.minimum(side, high, out=spare)
    side = torch.sub(x, side, out=spare)
    side = torch.sign(side, out=spare)  # 1 where clipped high, -1 where low, 0 inside
    outside = torch.mul(grad, side, out=out)
    to_bits = _summed(outside, low, out)
    grad_x = torch.addcmul(grad, outside, side, value=-1, out=out)
    change = torch.mul(grad, q, out=spare)
    change = torch.addcmul(change, grad_x, x, value=-1, out=spare)
    return grad_x, to_bits, _summed(change, low, spare)


def _summed(values: Tensor, channels: Tensor, out: Tensor | None) -> Tensor:
    """Over each channel; never the memory ``out``, which is written to again."""
    shape = channels.shape
    rows = values.ndim == 2 and shape == (len(values), 1)
    total = values.sum(1, keepdim=True) if rows else values.sum_to_size(shape)
    return total.clone() if out is not None and total.numel() == values.numel() else total


def _computed(value: Tensor) -> Tensor:
    """The same, for a compiler to put into memory, as this view needs its strides.

    It would otherwise work it out where it is read: powers of 2 for every few entries of a weight.
    """
    if not torch.compiler.is_compiling():
        return value
    shape = value.shape  # from which strides follow, which torch 2.6 does not tell in the way back
    return value.contiguous().as_strided(shape, [math.prod(shape[dim + 1 :]) for dim in range(len(shape))])


def _blocks(result: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Those parts of tensors along dim 0 that belong together; all of a tensor that is the same for all of them."""
    if result.device.type != "cpu" or result.numel() <= _BLOCK:
        return iter([(result, *tensors)])
    size = max(1, _BLOCK * len(result) // result.numel())
    count = -(-len(result) // size)
    whole = [value.ndim < result.ndim or len(value) == 1 for value in tensors]
    parts = [[value] * count if alike else value.split(size) for value, alike in zip(tensors, whole, strict=True)]
    return zip(result.split(size), *parts, strict=True)
