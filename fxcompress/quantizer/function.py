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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["RANGE_BITS", "clip_range", "codes_of", "quantize", "quantize_reference", "wide"]

RANGE_BITS = 2.0
"""Bits down to which ``keep_range`` keeps a range: with fewer, a range as wide as the weights leaves most of them 0."""
_LN2 = math.log(2.0)
_BLOCK = 2**19
"""Entries of a block: its passes stay in the cache, and each still pays for its call."""

Span = tuple[int, int] | None
"""Where a block starts along dim 0 and how long it is; None for all of a tensor."""


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


@dataclass(frozen=True, slots=True)
class _Format:
    """The number format of each channel, in the dtype that is computed in; all of one shape.

    ``traced`` is for compilers, which fuse the passes themselves, and for functional transforms: both want no tensors
    to write to.
    """

    scale: Tensor
    inverse: Tensor
    low: Tensor
    high: Tensor
    low_code: Tensor
    high_code: Tensor
    traced: bool

    @classmethod
    def of(cls, x: Tensor, bits: Tensor, exponent: Tensor) -> "_Format":
        bits, exponent = torch.broadcast_tensors(wide(bits), wide(exponent))
        dtype = torch.promote_types(torch.promote_types(x.dtype, bits.dtype), exponent.dtype)
        scale = torch.exp2(exponent).to(dtype)
        low, high = (bound.to(dtype) for bound in clip_range(bits))
        traced = torch.compiler.is_compiling() or _is_wrapped(x)
        inverse = torch.exp2(-exponent).to(dtype)
        values = [scale, inverse, low * scale, high * scale, low.round(), high.round()]
        scale, inverse, low, high, low_code, high_code = [_computed(value) for value in values]
        return cls(scale, inverse, low, high, low_code, high_code, traced)

    def block(self, ndim: int, span: Span) -> "_Format":
        if span is None:
            return self
        low, high = (_cut(value, ndim, span) for value in (self.low, self.high))
        low_code, high_code = (_cut(value, ndim, span) for value in (self.low_code, self.high_code))
        scale, inverse = (_cut(value, ndim, span) for value in (self.scale, self.inverse))
        return _Format(scale, inverse, low, high, low_code, high_code, self.traced)

    def spans(self, x: Tensor) -> list[Span]:
        """The blocks of a tensor."""
        if self.traced or x.device.type != "cpu" or x.numel() <= _BLOCK:
            return [None]
        size = max(1, _BLOCK * x.shape[0] // x.numel())
        return [(start, min(size, x.shape[0] - start)) for start in range(0, x.shape[0], size)]

    def quantized(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """The q of a block. Clipping comes after rounding, by rounded bounds: the same, as both are monotone."""
        codes = torch.mul(x, self.inverse, out=out)
        out = None if self.traced else codes
        codes = torch.round(codes, out=out)
        codes = torch.maximum(codes, self.low_code, out=out)
        codes = torch.minimum(codes, self.high_code, out=out)
        # 0 + code * scale in one pass: codes that round to -0.0 become 0.0, as integers have no negative zero.
        zero = codes.new_zeros(() if self.traced else (1, *codes.shape[1:])[: codes.ndim])
        return torch.addcmul(zero, codes, self.scale, out=out)

    def clipped(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """1 where a block is clipped high, -1 where low, 0 inside."""
        bounded = torch.maximum(x, self.low, out=out)
        out = None if self.traced else bounded
        bounded = torch.minimum(bounded, self.high, out=out)
        return torch.sign(torch.sub(x, bounded, out=out), out=out)

    def gradients(
        self, grad: Tensor, x: Tensor, q: Tensor, out: Tensor | None = None, spare: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """dq/dx of a block, and over each channel the sums that dq/db and dq/de are multiples of."""
        side = self.clipped(x, spare)
        outside = torch.mul(grad, side, out=out)
        to_bits = self.summed(outside)
        into, spare = (None, None) if self.traced else (outside, side)
        grad_x = torch.addcmul(grad, outside, side, value=-1, out=into)
        change = torch.addcmul(torch.mul(grad, q, out=spare), grad_x, x, value=-1, out=spare)
        return grad_x, to_bits, self.summed(change)

    def summed(self, values: Tensor) -> Tensor:
        """Over each channel; never the same memory, which is written to again."""
        total = values.sum_to_size(self.scale.shape)
        return total.clone() if not self.traced and total.numel() == values.numel() else total


def _computed(value: Tensor) -> Tensor:
    """The same, for a compiler to put into memory, as this view needs its strides.

    It would otherwise work it out where it is read: powers of 2 for every few entries of a weight.
    """
    return value.as_strided(value.size(), value.stride()) if torch.compiler.is_compiling() else value


def _is_wrapped(x: Tensor) -> bool:
    """Whether a functional transform such as ``torch.func.vmap`` is at work; torch has no public question for it."""
    wrapped: bool = torch._C._functorch.is_functorch_wrapped_tensor(x)  # noqa: SLF001
    return wrapped


def _cut(value: Tensor, ndim: int, span: Span) -> Tensor:
    """The part of a tensor that belongs to a block; all of it where it is the same for all blocks."""
    return value if span is None or value.ndim < ndim or value.shape[0] == 1 else value.narrow(0, *span)


def _quantized(form: _Format, x: Tensor) -> Tensor:
    spans = form.spans(x)
    if len(spans) == 1:
        return form.quantized(x)
    result = torch.empty_like(x)
    for span in spans:
        form.block(x.ndim, span).quantized(_cut(x, x.ndim, span), _cut(result, x.ndim, span))
    return result


def _gradients(form: _Format, grad: Tensor, x: Tensor, q: Tensor) -> tuple[Tensor, ...]:
    spans = form.spans(x)
    if len(spans) == 1:
        return form.gradients(grad, x, q)
    result = torch.empty_like(x)
    # Memory that is asked for again in each block may be handed out as fresh pages, which cost more than all passes.
    spare = torch.empty_like(_cut(x, x.ndim, spans[0]))
    parts: list[tuple[Tensor, ...]] = []
    for span in spans:
        g, of_x, of_q, out = (_cut(tensor, x.ndim, span) for tensor in (grad, x, q, result))
        parts.append(form.block(x.ndim, span).gradients(g, of_x, of_q, out, spare[: len(out)])[1:])
    shape = form.scale.shape
    by_block = len(shape) == x.ndim and shape[0] != 1
    sums = (torch.cat(part) if by_block else torch.stack(part).sum(0) for part in zip(*parts, strict=True))
    return result, *sums


class _Quantize(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, bits: Tensor, exponent: Tensor, keep_range: bool) -> Tensor:  # noqa: FBT001
        form = _Format.of(x, bits, exponent)
        return _quantized(form, x.to(form.scale.dtype)).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, bool], output: Tensor) -> None:  # noqa: ANN401
        *tensors, ctx.keep_range = inputs
        ctx.save_for_backward(*tensors, output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        x, bits, exponent, result = ctx.saved_tensors
        form = _Format.of(x, bits, exponent)
        exact = x.to(form.scale.dtype)
        q = result if exact.dtype == result.dtype else _quantized(form, exact)
        grad_x, outside, change = _gradients(form, grad.to(exact.dtype), exact, q)
        factor = _LN2 * 0.5 * torch.exp2(wide(bits)) * form.scale
        to_bits, to_exponent = outside * factor, change * _LN2
        if ctx.keep_range:
            to_bits = torch.where(bits > RANGE_BITS, to_bits - to_exponent, to_bits)
        need_x, need_bits, need_exponent, _ = ctx.needs_input_grad
        return (
            grad_x.to(x.dtype) if need_x else None,
            to_bits.sum_to_size(bits.shape).to(bits.dtype) if need_bits else None,
            to_exponent.sum_to_size(exponent.shape).to(exponent.dtype) if need_exponent else None,
            None,
        )


def quantize(x: Tensor, bits: Tensor, exponent: Tensor, keep_range: bool = False) -> Tensor:  # noqa: FBT001, FBT002
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
    result: Tensor = _Quantize.apply(x, bits, exponent, keep_range)
    return result


def quantize_reference(x: Tensor, bits: Tensor, exponent: Tensor, keep_range: bool = False) -> Tensor:  # noqa: FBT001, FBT002
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
