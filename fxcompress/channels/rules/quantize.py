"""The quantizer: its bits and exponents go with the output channels of their weight."""

import torch
from torch import Tensor

from fxcompress.channels.layers import Layers, vector
from fxcompress.channels.rules.contraction import take
from fxcompress.channels.rules.registry import Known, OpClass, zero_where
from fxcompress.channels.space import Space
from fxcompress.channels.values import Call, Step, Value
from fxcompress.quantizer import channel_dims


def _labels(call: Call, space: Space) -> tuple[Layers, ...]:
    weight, bits, exponent, channel_dim, groups, batch_dims = call.args
    if batch_dims:
        _batched(weight, (bits, exponent), channel_dim, batch_dims, space)
        return (weight.layers,)
    channels = take(weight, 0 if groups > 1 else channel_dim, space)
    for value in (bits, exponent):
        own = take(value, 0, space)
        if own is None or channels is None:
            continue
        if channel_dim == 1 and groups > 1:
            space.couple(own.reshape(groups, -1), channels.reshape(groups, -1)[:, :1])
        else:
            space.couple(channels, own)
    return (weight.layers,)


def _batched(
    weight: Value, formats: tuple[Value, ...], channel_dim: int, batch_dims: tuple[int, ...], space: Space
) -> None:
    """Where each expert, say, has channels of its own: one goes with those of all experts, and these stay as many."""
    dims = channel_dims(channel_dim, batch_dims)
    channels = take(weight, channel_dim, space)
    shape = [weight.shape[dim] for dim in dims]
    for value in formats:
        for own in value.layers:
            fixed = own.new_zeros(())
            along = fixed if channels is None else vector(channels, len(dims), dims.index(channel_dim))
            space.couple(own.reshape(shape), along)
    for dim in batch_dims:
        labels = take(weight, dim, space)
        if labels is not None:
            space.pin(labels, "batch", "each entry of this dim has channels of its own, with bits of their own")


def _constants(step: Step, known: Known) -> list[Tensor]:
    """A channel of zero bits is zero."""
    weight, bits, _, channel_dim, groups, batch_dims = step.call.args
    zero = torch.from_numpy(known.small(bits) == 0)
    if channel_dim == 1 and groups > 1:
        inner = weight.shape[0] // groups
        zero = zero.expand(bits.shape).reshape(groups, 1, -1).expand(groups, inner, -1).reshape(weight.shape[0], -1)
        shape = [*zero.shape, *[1] * (weight.rank - 2)]
    else:
        dims = channel_dims(channel_dim, batch_dims)
        shape = [n if d in dims and zero.numel() > 1 else 1 for d, n in enumerate(weight.shape)]
    return [zero_where(zero).reshape(shape)]


QUANTIZE = OpClass("quantize", _labels, _constants)
