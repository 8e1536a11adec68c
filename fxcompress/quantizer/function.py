"""The quantizer as a function with gradients of its own (the paper, arXiv 2301.13142, equation 1).

With s = 2^-e x, the bounds lo = -2^(b-1) and hi = 2^(b-1) - 1, and q the result, the gradients are

    dq/dx = 1 inside the range, 0 where clipped
    dq/db = 0 inside, +-ln2 * 2^e * 2^(b-1) where clipped high or low
    dq/de = ln2 * (q - x) inside, ln2 * q where clipped

so all that they need is x and q, which the layer that reads q keeps anyway.
With ``keep_range`` the bits of a channel are those of its grid alone: the exponent follows them (see :func:`quantize`).
On a CPU the passes over a weight are bound by memory: they go block by block, and a block stays in the cache.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = [
    "RANGE_BITS",
    "clip_range",
    "codes_of",
    "quantize",
    "quantize_reference",
    "quantize_rows",
    "wide",
]

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


def _formats(x: Tensor, bits: Tensor, exponent: Tensor) -> tuple[Tensor, Tensor, torch.dtype]:
    """Bits and exponents of one shape, and the dtype that is computed in."""
    bits, exponent = wide(bits), wide(exponent)
    if bits.shape != exponent.shape:
        bits, exponent = torch.broadcast_tensors(bits, exponent)
    dtype = torch.promote_types(torch.promote_types(x.dtype, bits.dtype), exponent.dtype)
    return bits, exponent, dtype


def _grid(bits: Tensor, exponent: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Of each channel: 2^-e, the lowest and the highest code, 2^e."""
    low, high = clip_range(bits)
    return tuple(value.to(dtype) for value in (torch.exp2(-exponent), low.round(), high.round(), torch.exp2(exponent)))


def _range(bits: Tensor, exponent: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of each channel: the lowest and the highest x that is not clipped."""
    scale = torch.exp2(exponent).to(dtype)
    low, high = clip_range(bits)
    return low.to(dtype) * scale, high.to(dtype) * scale


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
    total = values.sum_to_size(channels.shape)
    return total.clone() if out is not None and total.numel() == values.numel() else total


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


def _fused_forward(x: Tensor, bits: Tensor, exponent: Tensor) -> Tensor:
    """For compilers, which fuse operations themselves, and functional transforms: both want no memory to write to."""
    bits, exponent, dtype = _formats(x, bits, exponent)
    grid = [_computed(value) for value in _grid(bits, exponent, dtype)]
    exact = x.to(dtype)
    return _round(exact, grid, exact.new_zeros(())).to(x.dtype)


def _fused_backward(
    grad: Tensor,
    x: Tensor,
    q: Tensor,
    bits: Tensor,
    exponent: Tensor,
    keep_range: bool,  # noqa: FBT001
) -> tuple[Tensor, Tensor, Tensor]:
    bits, exponent, dtype = _formats(x, bits, exponent)
    low, high = [_computed(value) for value in _range(bits, exponent, dtype)]
    exact = x.to(dtype)
    exact_q = q if q.dtype == dtype else _fused_forward(exact, bits, exponent)
    grad_x, outside, change = _distribute((grad.to(dtype), exact, exact_q, low, high))
    return grad_x.to(x.dtype), *_gradients_of_formats(outside, change, bits, low, keep_range)


def _computed(value: Tensor) -> Tensor:
    """The same, for a compiler to put into memory, as this view needs its strides.

    It would otherwise work it out where it is read: powers of 2 for every few entries of a weight.
    """
    return value.as_strided(value.size(), value.stride()) if torch.compiler.is_compiling() else value


def _eager_forward(x: Tensor, bits: Tensor, exponent: Tensor) -> Tensor:
    """Operation by operation; on a CPU block by block."""
    bits, exponent, dtype = _formats(x, bits, exponent)
    grid, exact = _grid(bits, exponent, dtype), x.to(dtype)
    result = torch.empty_like(exact)
    zero = exact.new_zeros((1, *exact.shape[1:])[: exact.ndim])
    for out, part, *formats in _blocks(result, exact, *grid):
        _round(part, formats, zero, out)
    return result.to(x.dtype)


def _eager_backward(
    grad: Tensor,
    x: Tensor,
    q: Tensor,
    bits: Tensor,
    exponent: Tensor,
    keep_range: bool,  # noqa: FBT001
) -> tuple[Tensor, Tensor, Tensor]:
    bits, exponent, dtype = _formats(x, bits, exponent)
    low, high = _range(bits, exponent, dtype)
    exact = x.to(dtype)
    exact_q = q if q.dtype == dtype else _eager_forward(exact, bits, exponent)
    grad_x = torch.empty_like(exact)
    spare: Tensor | None = None
    sums: list[tuple[Tensor, ...]] = []
    for out, *parts in _blocks(grad_x, grad.to(dtype), exact, exact_q, low, high):
        # Memory asked for again in each block may be handed out as fresh pages, which cost more than all passes.
        spare = torch.empty_like(out) if spare is None else spare[: len(out)]
        sums.append(_distribute(parts, out, spare)[1:])
    by_block = low.ndim == exact.ndim and low.ndim and low.shape[0] != 1
    outside, change = (torch.cat(part) if by_block else torch.stack(part).sum(0) for part in zip(*sums, strict=True))
    return grad_x.to(x.dtype), *_gradients_of_formats(outside, change, bits, low, keep_range)


def _blocks(result: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Those parts of tensors along dim 0 that belong together; all of a tensor that is the same for all of them."""
    if result.device.type != "cpu" or result.numel() <= _BLOCK:
        return iter([(result, *tensors)])
    size = max(1, _BLOCK * len(result) // result.numel())
    count = -(-len(result) // size)
    whole = [value.ndim < result.ndim or len(value) == 1 for value in tensors]
    parts = [[value] * count if alike else value.split(size) for value, alike in zip(tensors, whole, strict=True)]
    return zip(result.split(size), *parts, strict=True)


class _Quantize(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, bits: Tensor, exponent: Tensor, keep_range: bool, rows: bool) -> Tensor:  # noqa: FBT001
        matrix, b, e = _as_rows(x, bits, exponent) if rows else (x, bits, exponent)
        return (_fused_forward if _is_fused(x) else _eager_forward)(matrix, b, e).view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, bool, bool], output: Tensor) -> None:  # noqa: ANN401
        *tensors, ctx.keep_range, ctx.rows = inputs
        ctx.save_for_backward(*tensors, output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        x, bits, exponent, q = ctx.saved_tensors
        matrix, b, e = _as_rows(x, bits, exponent) if ctx.rows else (x, bits, exponent)
        grad, q = grad.reshape(matrix.shape), q.view(matrix.shape)
        gradients = _fused_backward if _is_fused(x) or _is_fused(grad) else _eager_backward
        to_x, to_bits, to_exponent = gradients(grad, matrix, q, b, e, ctx.keep_range)
        need_x, need_bits, need_exponent, *_ = ctx.needs_input_grad
        return (
            to_x.view(x.shape) if need_x else None,
            to_bits.sum_to_size(b.shape).view(bits.shape).to(bits.dtype) if need_bits else None,
            to_exponent.sum_to_size(e.shape).view(exponent.shape).to(exponent.dtype) if need_exponent else None,
            None,
            None,
        )


def _as_rows(x: Tensor, bits: Tensor, exponent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Formats that broadcast along dim 0, and a matrix where the layout in memory allows."""
    x = x.flatten(1) if x.ndim > 1 and x.is_contiguous() else x
    shape = (-1, *[1] * (x.ndim - 1))
    return x, bits.view(shape), exponent.view(shape)


def _is_fused(x: Tensor) -> bool:
    """Whether a compiler is at work, or a functional transform such as ``torch.func.vmap``."""
    if torch.compiler.is_compiling():
        return True
    wrapped: bool = torch._C._functorch.is_functorch_wrapped_tensor(x)  # noqa: SLF001 -- there is no public question
    return wrapped


def quantize_rows(x: Tensor, bits: Tensor, exponent: Tensor, *, keep_range: bool = False) -> Tensor:
    """:func:`quantize` with a format for each entry of dim 0: ``x`` is (O, ...), ``bits`` and ``exponent`` are (O,).

    >>> quantize_rows(torch.tensor([[0.6, 9.0], [0.6, 9.0]]), torch.tensor([3.0, 2.0]), torch.zeros(2))
    tensor([[1., 3.],
            [1., 1.]])
    """
    result: Tensor = _Quantize.apply(x, bits, exponent, keep_range, True)
    return result


def quantize(x: Tensor, bits: Tensor, exponent: Tensor, *, keep_range: bool = False) -> Tensor:
    """Quantize ``x`` to signed fixed point (the paper, equation 1), with the closed-form gradients.

        q(x, b, e) = 2^e * round( min( max( 2^-e * x, -2^(b-1) ), 2^(b-1) - 1 ) )

    Rounds to nearest, ties to even, so at b = 0, where both bounds are -0.5, everything becomes exactly 0. The gradient
    passes straight through the rounding. With s = 2^-e * x and c = clip(s): dq/dx is 1 inside the range (bounds
    included) and 0 where clipped; dq/db is 0 inside and +-ln2 * 2^e * 2^(b-1) where clipped high or low; dq/de is
    ln2 * 2^e * (round(c) - s) inside and ln2 * 2^e * round(c) where clipped.

    In the paper b and e are independent: with a bit less at the same e, a channel covers half the range. With
    ``keep_range``, b and the range 2^(e+b-1) are: whoever changes b by some amount takes the same off e, and the
    gradient for b is that of both changes, dq/db - dq/de. Above two bits only; below, it is that of the paper.

    Args:
        x: float tensor of any shape and dtype; half and bfloat16 are computed in float32. Autocast changes nothing.
        bits: b >= 0, of a shape that broadcasts to ``x``'s. The caller keeps b >= 0, say by a projection after each
            step: below 0 every code would be -1. It is not checked, because a check would wait for the device.
        exponent: e, of a shape that broadcasts to ``x``'s.
        keep_range: give b the gradient at a fixed range.

    Returns:
        Tensor of ``x``'s shape and dtype; never -0.0. The backward pass keeps the arguments and this result, which
        the layer that reads it keeps anyway.

    Raises:
        RuntimeError: on a second differentiation, which a piecewise constant function has no use for.

    >>> quantize(torch.tensor([-9.0, -0.5, 0.6, 9.0]), torch.tensor(3.0), torch.tensor(0.0))
    tensor([-4.,  0.,  1.,  3.])
    """
    result: Tensor = _Quantize.apply(x, bits, exponent, keep_range, False)
    return result


def quantize_reference(x: Tensor, bits: Tensor, exponent: Tensor, *, keep_range: bool = False) -> Tensor:
    """:func:`quantize` from plain torch operations: same arguments, same values, same gradients, more memory.

    The yardstick of the tests, and a fallback where a compiler cannot take autograd functions.

    >>> quantize_reference(torch.tensor([-9.0, -0.5, 0.6, 9.0]), torch.tensor(3.0), torch.tensor(0.0))
    tensor([-4.,  0.,  1.,  3.])
    """
    if keep_range:  # e falls as b rises, in the gradient; its value is as it is
        exponent = exponent + torch.where(bits > RANGE_BITS, bits.detach() - bits, 0.0)
    lo, hi = clip_range(bits)
    scaled = wide(x) * torch.exp2(-wide(exponent))
    # Not clamp, minimum or maximum: those share a tie's gradient between their arguments, or give it to none.
    clipped = torch.where(scaled > hi, hi, torch.where(scaled < lo, lo, scaled))
    codes = clipped + (clipped.round() - clipped).detach()
    return (codes * torch.exp2(wide(exponent))).to(x.dtype)
