"""Ops that sample an image at computed places: grids of points, regions of interest, deformable convolutions."""

from torch import Tensor

from fxcompress.channels.layers import Layers, support
from fxcompress.channels.rules.contraction import DEFORMED
from fxcompress.channels.rules.reductions import pass_others
from fxcompress.channels.rules.registry import Known, OpClass, nothing_known, register, zero_where
from fxcompress.channels.space import Space
from fxcompress.channels.values import Call, Step, Value


def _labels(call: Call, space: Space) -> tuple[Layers, ...]:
    source, regions = call.args[:2]
    for layer in regions.layers if isinstance(regions, Value) else ():
        space.pin(layer, "window", f"{call.name} takes boxes of this size")
    if not isinstance(source, Value):
        return tuple(() for _ in call.metas)
    layers = pass_others(call, space, frozenset({0, 2, 3}), "window")
    layers = tuple(layer for layer in layers if support(layer) == {1})
    return tuple(layers for _ in call.metas)


def _constants(step: Step, known: Known) -> list[Tensor]:
    """Regions of zeros are zero; what lies outside of the image counts as zero, so other constants do not last."""
    source = step.call.args[0]
    channels = known.of(source) if isinstance(source, Value) else None
    if channels is None or any(n > 1 for d, n in enumerate(channels.shape) if d != 1):
        return nothing_known(step, known)
    return [zero_where(channels == 0), *nothing_known(step, known)[1:]]


def _grid_labels(call: Call, space: Space) -> tuple[Layers, ...]:
    source, grid = call.args[:2]
    for layer in grid.layers if isinstance(grid, Value) else ():
        space.pin(layer, "window", f"{call.name} takes points of this size")
    if not isinstance(source, Value):
        return ((),)
    layers = pass_others(call, space, _but_channels(source), "window")
    return (tuple(layer for layer in layers if support(layer) == {1}),)


def _grid_constants(step: Step, known: Known) -> list[Tensor]:
    """Points of zeros are zero, in the image and outside of it."""
    source = step.call.args[0]
    if not isinstance(source, Value):
        return nothing_known(step, known)
    zero = (known.of(source) == 0).all(dim=sorted(_but_channels(source)), keepdim=True)
    return [zero_where(zero)]


def _but_channels(source: Value) -> frozenset[int]:
    return frozenset(range(source.rank)) - {1}


GRID = register(OpClass("grid of points", _grid_labels, _grid_constants), ["grid_sampler_2d", "grid_sampler_3d"])
register(OpClass("regions", _labels, _constants), ["torchvision::roi_align", "torchvision::roi_pool"])
register(DEFORMED, ["torchvision::deform_conv2d"])
