"""Norms whose parameters go with their channels: batch norm channel by channel, group norm a group at a time."""

import numpy as np
import torch
from torch import Tensor

from fxcompress.channels.layers import Layers, along, support, vector
from fxcompress.channels.rules.contraction import meet, take
from fxcompress.channels.rules.registry import Known, OpClass, nothing_known, register
from fxcompress.channels.space import Space
from fxcompress.channels.values import Call, Step, Value


def _labels(call: Call, space: Space) -> tuple[Layers, ...]:
    source: Value = call.args[0]
    channels = take(source, 1, space)
    for own in call.args[1:5]:
        if isinstance(own, Value):
            meet(channels, take(own, 0, space), space)
    for layer in (x for x in source.layers if not support(x) & {1}):
        space.pin(layer, "norm", "in training a batch norm mixes all entries of this dim")
    others = tuple(layer for layer in source.layers if layer.shape[1] == 1)
    if channels is None:
        return (others, *(() for _ in call.metas[1:]))
    own = along(source.layers, 1)
    own = own if own is not None and own.numel() == channels.numel() else vector(channels, source.rank, 1)
    return ((own, *others), *((channels,) for _ in call.metas[1:]))


def _constants(step: Step, known: Known) -> list[Tensor]:
    source, weight, bias, mean, var, *flags, _, eps = step.call.args
    training = any(flags)  # the op for evaluation alone has no such flag
    x = _channels(known.of(source))
    gamma, beta = _vector(weight, 1.0, known), _vector(bias, 0.0, known)
    with np.errstate(all="ignore"):  # numpy, as these are small: a line of it takes a third of the time of torch's
        # Of the batch: a constant that is not zero leaves the rounding of its own mean behind.
        value = np.where((x == 0) | (gamma == 0), beta, np.nan)
        if not (known.training or training):
            means, variances = _vector(mean, torch.nan, known), _vector(var, torch.nan, known)
            running = np.where(
                (gamma == 0) | ((x == means) & np.isfinite(x)),  # whatever the variance is
                beta,
                (x - means) * (gamma / np.sqrt(variances + eps)) + beta,
            )
            value = running if known.training is False else np.where(value == running, value, np.nan)
    return [_along_channels(value, step.outputs[0].rank), *nothing_known(step, known)[1:]]


def _channels(source: Tensor) -> np.ndarray:
    """What is known of each channel: float64 (C,) or (1,)."""
    others = [d for d, n in enumerate(source.shape) if n > 1 and d != 1]
    if others:  # a weight, perhaps, that is standardised: its rows of zeros are known
        source = torch.where((source == 0).all(dim=others, keepdim=True), 0.0, torch.nan)
    return source.double().numpy().reshape(-1)


def _along_channels(value: np.ndarray, rank: int) -> Tensor:
    """The map of a tensor of ``rank`` that varies along its channels alone, from (C,) or (1,)."""
    return torch.from_numpy(value.reshape(1, -1, *(1,) * (rank - 2)))


def _vector(value: Value | None, default: float, known: Known) -> np.ndarray:
    return np.array([default]) if value is None else known.small(value)


BATCH_NORM = register(
    OpClass("batch norm", _labels, _constants),
    ["native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "_batch_norm_with_update"],
)


def _group_labels(call: Call, space: Space) -> tuple[Layers, ...]:
    """A group of channels goes as a whole."""
    source: Value = call.args[0]
    groups: int = call.args[6]
    channels = take(source, 1, space)
    for own in (a for a in call.args[1:3] if isinstance(a, Value)):
        meet(channels, take(own, 0, space), space)
    if channels is not None:
        text = "a group norm mixes all channels of a group"
        space.hold(channels.reshape(groups, -1), {1}, "norm", text)
    for layer in (x for x in source.layers if min(support(x)) > 1):
        space.pin(layer, "norm", "a group norm mixes all entries of this dim")
    kept = tuple(x for x in source.layers if support(x) == {0})
    first = kept if channels is None else (*kept, vector(channels, source.rank, 1))
    return (first, (), ())


def per_group(call: Call) -> int:
    """How many channels each group of a group norm has; 0 for all other calls.

    A number of groups that is written into a graph may divide what is left of the channels as well, in groups that are
    parts of the old ones: no labels tell.
    """
    if call.func is not _GROUP_NORM:
        return 0
    channels, groups = call.args[4], call.args[6]
    return int(channels) // int(groups)


def _group_constants(step: Step, known: Known) -> list[Tensor]:
    """A group of zeros is the bias; other constants leave the rounding of their mean behind."""
    source, _, bias, *_ = step.call.args
    groups: int = step.call.args[6]
    channels = known.of(source)
    if any(n > 1 for d, n in enumerate(channels.shape) if d != 1):
        return nothing_known(step, known)
    zero = (channels.reshape(-1).expand(source.shape[1]).reshape(groups, -1) == 0).all(1, keepdim=True)
    zero = zero.expand(groups, source.shape[1] // groups).reshape(-1)
    value = np.where(zero.numpy(), _vector(bias, 0.0, known), np.nan)
    return [_along_channels(value, step.outputs[0].rank), *nothing_known(step, known)[1:]]


_GROUP_NORM = torch.ops.aten.native_group_norm.default
register(OpClass("group norm", _group_labels, _group_constants), ["native_group_norm"])
