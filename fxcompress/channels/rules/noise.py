"""Modules that add noise in training: dropout, stochastic depth.

They are interpreted once, as in evaluation; here is the difference.
"""

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from fxcompress.channels.layers import Layers
from fxcompress.channels.rules.registry import Known, OpClass
from fxcompress.channels.space import Space
from fxcompress.channels.values import Call, Step, Value
from fxcompress.trace.model.stochastic_depth import is_stochastic_depth


def noise_of(module: nn.Module, value: Value) -> Call | None:
    """The call that makes the result of a module in training from its result in evaluation; None for most modules."""
    drops = isinstance(module, _DropoutNd) and module.p != 0
    if not drops and not is_stochastic_depth(module):
        return None
    keeps_zero = not isinstance(module, nn.AlphaDropout | nn.FeatureAlphaDropout)
    return Call(type(module), (value, keeps_zero), {}, (value.meta,))


def _labels(call: Call, space: Space) -> tuple[Layers, ...]:
    return (call.args[0].layers,)


def _constants(step: Step, known: Known) -> list[Tensor]:
    value, keeps_zero = step.call.args
    found = known.of(value)
    if known.training is False:
        return [found]
    return [torch.where(found == 0, found, torch.nan) if keeps_zero else torch.full_like(found, torch.nan)]


NOISE = OpClass("noise", _labels, _constants)
