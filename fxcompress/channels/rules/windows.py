"""Pooling, interpolation and border padding: windows over space, channel by channel."""

from collections.abc import Callable

import torch
from torch import Tensor

from fxcompress.channels.layers import Layers
from fxcompress.channels.rules.reductions import pass_others
from fxcompress.channels.rules.registry import ConstantRule, Known, OpClass, nothing_known, register
from fxcompress.channels.space import Space
from fxcompress.channels.values import Call, Step


def _labels(spatial: int) -> Callable[[Call, Space], tuple[Layers, ...]]:
    def labels(call: Call, space: Space) -> tuple[Layers, ...]:
        rank = call.args[0].rank
        layers = pass_others(call, space, frozenset(range(rank - spatial, rank)), "window")
        return tuple(layers for _ in call.metas)

    return labels


def _constants(spatial: int, *, any_value: bool) -> ConstantRule:
    """A maximum over equal entries is that entry (the padding of max pooling never wins); a mean over zeros is zero.

    Other constants differ at the borders, or by rounding.
    """

    def constants(step: Step, known: Known) -> list[Tensor]:
        channels = known.of(step.call.args[0])
        if any(n > 1 for n in channels.shape[channels.ndim - spatial :]):
            return nothing_known(step, known)
        first = channels if any_value else torch.where(channels == 0, channels, torch.nan)
        return [first, *nothing_known(step, known)[1:]]

    return constants


for _n in (1, 2, 3):
    register(
        OpClass(f"max pooling {_n}d", _labels(_n), _constants(_n, any_value=True)),
        [f"max_pool{_n}d_with_indices", f"max_pool{_n}d", f"adaptive_max_pool{_n}d"],
    )
    register(
        OpClass(f"window {_n}d", _labels(_n), _constants(_n, any_value=False)),
        [
            f"avg_pool{_n}d",
            f"_adaptive_avg_pool{_n}d",
            f"adaptive_avg_pool{_n}d",
            f"reflection_pad{_n}d",
            f"replication_pad{_n}d",
            f"upsample_nearest{_n}d",
            f"_upsample_nearest_exact{_n}d",
            *{1: ["upsample_linear1d"], 3: ["upsample_trilinear3d"]}.get(
                _n, ["upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"]
            ),
        ],
    )
