"""Pooling, interpolation and border padding: windows over space, channel by channel."""

from collections.abc import Callable

import torch
from torch import Tensor

from fxcompress.channels.layers import Layers, support, vector
from fxcompress.channels.rules.pointwise import Operand, couple_aligned
from fxcompress.channels.rules.reductions import pass_others
from fxcompress.channels.rules.registry import (
    ConstantRule,
    Known,
    OpClass,
    equal_along,
    nothing_known,
    register,
    zero_where,
)
from fxcompress.channels.space import Space
from fxcompress.channels.values import Call, Step, Value


def _labels(spatial: int) -> Callable[[Call, Space], tuple[Layers, ...]]:
    def labels(call: Call, space: Space) -> tuple[Layers, ...]:
        rank = call.args[0].rank
        layers = pass_others(call, space, frozenset(range(rank - spatial, rank)), "window")
        return tuple(layers for _ in call.metas)

    return labels


def _constants(spatial: int) -> ConstantRule:
    """Windows over equal entries give that entry, but for padding with zeros; the padding of a maximum never wins."""

    def constants(step: Step, known: Known) -> list[Tensor]:
        channels = _everywhere(known.of(step.call.args[0]), spatial)
        first = torch.where(channels == 0, channels, torch.nan) if _counts_padding(step.call) else channels
        return [first, *nothing_known(step, known)[1:]]

    return constants


def _everywhere(found: Tensor, spatial: int) -> Tensor:
    """A map without its last dims: what is the same along all of them."""
    return equal_along(found, range(found.ndim - spatial, found.ndim))


def _counts_padding(call: Call) -> bool:
    """Whether a mean is taken over zeros at the borders as well, or divides by something else than its window."""
    if not call.func.overloadpacket.__name__.startswith("avg_pool"):
        return False
    padding = call.arg(3, "padding", 0)
    padded = any(padding) if isinstance(padding, list | tuple) else bool(padding)
    divisor = call.arg(6, "divisor_override")
    return (padded and bool(call.arg(5, "count_include_pad", default=True))) or divisor is not None


def _fold_labels(call: Call, space: Space) -> tuple[Layers, ...]:
    """Sums of overlapping windows, (N, C * positions, windows) to (N, C, H, W): a channel goes with its positions."""
    source: Value = call.args[0]
    dim, found = source.rank - 2, list[Tensor]()
    for layer in source.layers:
        if support(layer) == {dim}:
            first = space.hold(layer.reshape(call.metas[0].shape[dim], -1), {1}, "window", _FOLDS)
            found += [] if first is None else [vector(first.reshape(-1), call.metas[0].ndim, dim)]
        elif support(layer) & {dim, dim + 1}:
            space.pin(layer, "window", _FOLDS)
        else:
            found.append(layer.unsqueeze(-1))
    return (tuple(found),)


def _unpool_labels(spatial: int) -> Callable[[Call, Space], tuple[Layers, ...]]:
    """Each maximum goes back to where it stood, channel by channel: values and places have the same channels."""

    def labels(call: Call, space: Space) -> tuple[Layers, ...]:
        rank = call.metas[0].ndim
        dims = frozenset(range(rank - spatial, rank))
        operands: list[Operand] = []
        for given in call.args[:2]:
            layers = given.layers if isinstance(given, Value) else ()
            text = "max_unpool reads places along this dim"
            held = [space.hold(x, mixed, "window", text) if (mixed := support(x) & dims) else x for x in layers]
            shape = torch.Size([1 if d in dims else n for d, n in enumerate(given.shape)])
            operands.append((shape, tuple(layer for layer in held if layer is not None)))
        return (couple_aligned(operands, rank, space),)

    return labels


def _unpool_constants(spatial: int) -> ConstantRule:
    """Zeros among zeros."""

    def constants(step: Step, known: Known) -> list[Tensor]:
        source = step.call.args[0]
        if not isinstance(source, Value):
            return nothing_known(step, known)
        channels = _everywhere(known.of(source), spatial)
        return [torch.where(channels == 0, channels, torch.nan)]

    return constants


_FOLDS = "col2im adds up all entries of a channel's windows"


def _fold_constants(step: Step, known: Known) -> list[Tensor]:
    """Sums of zeros are zero."""
    source: Value = step.call.args[0]
    (out,), dim = step.outputs, source.rank - 2
    zero = (known.of(source) == 0).all(dim + 1, keepdim=True)
    if zero.shape[dim] > 1:
        zero = zero.unflatten(dim, (out.shape[dim], -1)).all(dim + 1)
    return [zero_where(zero.unsqueeze(-1))]


register(OpClass("fold", _fold_labels, _fold_constants), ["col2im"])
for _n in (2, 3):
    register(OpClass(f"max unpooling {_n}d", _unpool_labels(_n), _unpool_constants(_n)), [f"max_unpool{_n}d"])
for _n in (1, 2, 3):
    register(
        OpClass(f"max pooling {_n}d", _labels(_n), _constants(_n)),
        [f"max_pool{_n}d_with_indices", f"max_pool{_n}d", f"adaptive_max_pool{_n}d"],
    )
    register(
        OpClass(f"window {_n}d", _labels(_n), _constants(_n)),
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
