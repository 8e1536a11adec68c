"""The quantizer as a function with gradients of its own (the paper, arXiv 2301.13142, equation 1)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fxcompress.quantizer.arithmetic import EAGER, FUSED, RANGE_BITS, Kernels, clip_range, limits_of, wide

__all__ = ["quantize", "quantize_by", "quantize_reference"]


_TWICE = (
    "trying to differentiate twice through a quantizer, which has no second derivatives: of weights, bits and "
    "exponents there are first ones alone (no create_graph=True for these). Gradients of inputs, as in a gradient "
    "penalty, can be differentiated; for a Hessian of the weights, take the network before compress() or after "
    "finalize()"
)


class _Once(torch.autograd.Function):
    """Hands gradients on, and refuses to be differentiated."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        return tuple(None if gradient is None else gradient.view_as(gradient) for gradient in gradients)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        raise RuntimeError(_TWICE)


class _Quantize(torch.autograd.Function):
    """By kernels that work at once. What they work out of the formats is kept for the way back: it is small."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        bits: Tensor,
        exponent: Tensor,
        keep_range: bool,  # noqa: FBT001
        rows: bool,  # noqa: FBT001
        kernels: Kernels,
    ) -> Tensor:
        ctx.keep_range, ctx.rows, ctx.kernels, ctx.is_matrix = keep_range, rows, kernels, _is_matrix(x)
        q, *limits = kernels.forward(*_as_rows(x, bits, exponent, rows=rows, is_matrix=ctx.is_matrix))
        q = q.view_as(x)
        ctx.save_for_backward(x, bits, exponent, q, *limits)
        return q

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        *tensors, low, high = ctx.saved_tensors
        kernels = FUSED if _is_fused(grad) else ctx.kernels  # of several gradients at once
        with torch.no_grad():
            gradients = _gradients(ctx, kernels, grad, tensors, (low, high))
        if torch.is_grad_enabled() and grad.requires_grad:  # with create_graph=True
            gradients = _Once.apply(grad, *gradients)
        return *gradients, None


class _QuantizeFused(torch.autograd.Function):
    """While a compiler or a functional transform is at work."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, bits: Tensor, exponent: Tensor, keep_range: bool, rows: bool) -> Tensor:  # noqa: FBT001
        return FUSED.forward(*_as_rows(x, bits, exponent, rows=rows, is_matrix=_is_matrix(x)))[0].view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, bool, bool], output: Tensor) -> None:  # noqa: ANN401
        *tensors, ctx.keep_range, ctx.rows = inputs
        ctx.is_matrix = _is_matrix(tensors[0])  # which torch 2.6 cannot tell in the way back
        ctx.save_for_backward(*tensors, output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        x, bits, exponent, q = ctx.saved_tensors
        limits = limits_of(*_as_rows(x, bits, exponent, rows=ctx.rows, is_matrix=ctx.is_matrix))
        return _gradients(ctx, FUSED, grad, (x, bits, exponent, q), limits)


def _gradients(
    ctx: Any,  # noqa: ANN401
    kernels: Kernels,
    grad: Tensor,
    tensors: Sequence[Tensor],
    limits: tuple[Tensor, Tensor],
) -> tuple[Tensor | None, ...]:
    """For x, b and e, and two arguments that have none."""
    x, bits, exponent, q = tensors
    matrix, b, e = _as_rows(x, bits, exponent, rows=ctx.rows, is_matrix=ctx.is_matrix)
    shape = matrix.shape
    to_x, to_bits, to_exponent = kernels.backward(
        grad.reshape(shape), matrix, q.detach().view(shape), b, e, limits, ctx.keep_range
    )
    need_x, need_bits, need_exponent, *_ = ctx.needs_input_grad
    return (
        to_x.view(x.shape) if need_x else None,
        _of_argument(to_bits, b).view(bits.shape).to(bits.dtype) if need_bits else None,
        _of_argument(to_exponent, e).view(exponent.shape).to(exponent.dtype) if need_exponent else None,
        None,
        None,
    )


def _of_argument(gradient: Tensor, argument: Tensor) -> Tensor:
    return gradient if gradient.shape == argument.shape else gradient.sum_to_size(argument.shape)


def _is_matrix(x: Tensor) -> bool:
    """Whether the layout in memory allows to view a weight as a matrix."""
    return x.ndim > 1 and bool(x.numel()) and x.is_contiguous()


def _as_rows(
    x: Tensor, bits: Tensor, exponent: Tensor, *, rows: bool, is_matrix: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """With ``rows``, formats that broadcast along dim 0, and a matrix where the layout in memory allows.

    Detached, so that a compiler sees no parameters, whose sizes it would take for fixed, and no graph.
    """
    x, bits, exponent = x.detach(), bits.detach(), exponent.detach()
    if not rows:
        return x, bits, exponent
    x = x.view(len(x), -1) if is_matrix else x
    shape = (-1, *[1] * (x.ndim - 1))
    return x, bits.view(shape), exponent.view(shape)


def _is_fused(x: Tensor) -> bool:
    """Whether a compiler is at work, or a functional transform such as ``torch.func.vmap``."""
    if torch.compiler.is_compiling():
        return True
    # There are no public questions. The second is about ``torch.autograd.grad(..., is_grads_batched=True)``.
    of_transforms = torch._C._functorch  # noqa: SLF001
    wrapped: bool = of_transforms.is_functorch_wrapped_tensor(x) or of_transforms.is_legacy_batchedtensor(x)
    return wrapped


def quantize_by(
    kernels: Kernels,
    x: Tensor,
    bits: Tensor,
    exponent: Tensor,
    *,
    keep_range: bool,
    rows: bool,
) -> Tensor:
    """:func:`quantize` by kernels of one's own where no compiler sees the call.

    With ``rows``, ``x`` is (O, ...) and each entry of its dim 0 has a format: ``bits`` and ``exponent`` are (O,).

    >>> bits, exponent = torch.tensor([3.0, 2.0]), torch.zeros(2)
    >>> quantize_by(EAGER, torch.tensor([[0.6, 9.0], [0.6, 9.0]]), bits, exponent, keep_range=False, rows=True)
    tensor([[1., 3.],
            [1., 1.]])
    """
    result: Tensor
    if _is_fused(x):
        result = _QuantizeFused.apply(x, bits, exponent, keep_range, rows)
    else:
        result = _Quantize.apply(x, bits, exponent, keep_range, rows, kernels)
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
    return quantize_by(EAGER, x, bits, exponent, keep_range=keep_range, rows=False)


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
