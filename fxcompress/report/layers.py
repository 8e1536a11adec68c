"""What became of each layer: its channels before and after."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from fxcompress.provenance import Grid, Provenance, provenance_of


@dataclass(frozen=True, slots=True)
class LayerWidth:
    """One weight that was quantized.

    Attributes:
        name: of the layer.
        before: its output and input channels in the network that was compressed.
        after: the same now; (0, 0) where the layer is gone.
        bits: mean bit depth of the weights that are left; 0 where none is.
    """

    name: str
    before: tuple[int, int]
    after: tuple[int, int]
    bits: float


def layer_widths(module: nn.Module, order: Sequence[str] = ()) -> list[LayerWidth]:
    """The widths of all layers of a network from ``finalize()``.

    Args:
        module: the network.
        order: names of its original parameters, to list weights that are gone as well; those of more than one dim
            count.
    """
    provenance = provenance_of(module)
    if provenance is None:
        return []
    names = [name for name in order if len(provenance.shapes.get(name, ())) > 1] or list(provenance.grids)
    return [_width(module, name, provenance) for name in names]


def _width(module: nn.Module, name: str, provenance: Provenance) -> LayerWidth:
    grid = provenance.grids.get(name)
    row = grid.channel_dim if grid is not None else 0
    before = _channels(provenance.shapes[name], row)
    after = _channels(tuple(module.get_parameter(name).shape), row) if grid is not None else (0, 0)
    return LayerWidth(name.removesuffix(".weight"), before, after, _mean_bits(grid))


def _channels(shape: tuple[int, ...], row: int) -> tuple[int, int]:
    others = [size for dim, size in enumerate(shape) if dim != row]
    return shape[row], others[0] if row < 2 else math.prod(others)


def _mean_bits(grid: Grid | None) -> float:
    return sum(grid.bits) / len(grid.bits) if grid is not None and grid.bits else 0.0
