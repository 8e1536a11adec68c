"""The quantizer: its bits and exponents go with the output channels of their weight."""

import torch
from torch import Tensor

from fxcompress.channels.layers import Layers
from fxcompress.channels.rules.contraction import take
from fxcompress.channels.rules.registry import Known, OpClass
from fxcompress.channels.space import Space
from fxcompress.channels.values import Call, Step


def _labels(call: Call, space: Space) -> tuple[Layers, ...]:
    weight, bits, exponent, channel_dim, groups = call.args
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


def _constants(step: Step, known: Known) -> list[Tensor]:
    """A channel of zero bits is zero."""
    weight, bits, _, channel_dim, groups = step.call.args
    zero = torch.from_numpy(known.small(bits) == 0)
    if channel_dim == 1 and groups > 1:
        inner = weight.shape[0] // groups
        zero = zero.expand(bits.shape).reshape(groups, 1, -1).expand(groups, inner, -1).reshape(weight.shape[0], -1)
        shape = [*zero.shape, *[1] * (weight.rank - 2)]
    else:
        shape = [zero.numel() if d == channel_dim else 1 for d in range(weight.rank)]
    return [torch.where(zero, 0.0, torch.nan).to(torch.float64).reshape(shape)]


QUANTIZE = OpClass("quantize", _labels, _constants)
