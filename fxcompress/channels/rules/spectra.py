"""Fourier transforms, and complex tensors seen as pairs of real ones."""

import torch
from torch import Tensor

from fxcompress.channels.layers import Layers, pad_rank, support
from fxcompress.channels.rules.pointwise import POINTWISE
from fxcompress.channels.rules.reductions import pass_others
from fxcompress.channels.rules.registry import Known, OpClass, nothing_known, register, zero_where
from fxcompress.channels.space import Space
from fxcompress.channels.values import Call, Step, Value


def _dims(call: Call) -> frozenset[int]:
    return frozenset(d % call.args[0].rank for d in call.args[1])


def _transform_labels(call: Call, space: Space) -> tuple[Layers, ...]:
    return (pass_others(call, space, _dims(call), "transform"),)


def _transform_constants(step: Step, known: Known) -> list[Tensor]:
    """The transform of zeros is zero; all along its dims must be, as each of its results is a sum of them."""
    zero = known.of(step.call.args[0]) == 0
    dims = _dims(step.call)
    return [zero_where(zero.all(dim=list(dims), keepdim=True) if dims else zero)]


def _zeros(channels: Tensor) -> Tensor:
    """What is left when only zeros are followed: a map holds one number where a complex entry has two."""
    return zero_where(channels == 0)


def _as_real_labels(call: Call, space: Space) -> tuple[Layers, ...]:
    return (tuple(layer.unsqueeze(-1) for layer in call.args[0].layers),)


def _as_real_constants(step: Step, known: Known) -> list[Tensor]:
    return [_zeros(known.of(step.call.args[0])).unsqueeze(-1)]


def _as_complex_labels(call: Call, space: Space) -> tuple[Layers, ...]:
    source: Value = call.args[0]
    last = source.rank - 1
    held = [
        space.hold(x, {last}, "complex", "it is the real or the imaginary part") if last in support(x) else x
        for x in source.layers
    ]
    return (tuple(layer.squeeze(-1) for layer in held if layer is not None),)


def _as_complex_constants(step: Step, known: Known) -> list[Tensor]:
    return [_zeros(known.of(step.call.args[0]).abs().amax(-1))]


def _joined_constants(step: Step, known: Known) -> list[Tensor]:
    """Zero where both parts are; of a length and an angle, where the length is."""
    if not all(isinstance(part, Value) for part in step.call.args):  # one is a tensor that the code has made
        return nothing_known(step, known)
    parts = [known.of(value) for value in step.call.args]
    if step.call.func.overloadpacket is torch.ops.aten.polar:
        return [_zeros(parts[0])]
    real, imaginary = torch.broadcast_tensors(*(pad_rank(part, step.outputs[0].rank) for part in parts))
    return [_zeros(real.abs() + imaginary.abs())]


register(OpClass("Fourier transform", _transform_labels, _transform_constants), ["_fft_r2c", "_fft_c2c", "_fft_c2r"])
register(OpClass("complex as real", _as_real_labels, _as_real_constants), ["view_as_real"])
register(OpClass("real as complex", _as_complex_labels, _as_complex_constants), ["view_as_complex"])
register(OpClass("pointwise, two reals as complex", POINTWISE.labels, _joined_constants), ["complex", "polar"])
register(POINTWISE, ["_conj", "angle"])
