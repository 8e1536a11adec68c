"""Tensors as integers: weights that lie on the grid of their bits, and what holds whole numbers alone.

Letters: K channels, M weights of one channel.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fxcompress.provenance import Grid
from fxcompress.quantizer import from_rows, rows

__all__ = ["Coded", "Whole", "decode", "encode", "encode_whole"]

_LARGEST_CODE = 2**30
_INTEGERS = frozenset({torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})
_FLOATS = frozenset({torch.bfloat16, torch.float16, torch.float32, torch.float64})
_SAMPLE = 64
"""Values at the start of a tensor that tell most of those that are not whole."""
_NEIGHBOURS = 8
"""How many floats to either side of 2^exponent the scale may lie: in float64, log2 and exp2 lose that much."""


@dataclass(frozen=True, slots=True, eq=False)
class Coded:
    """A weight as integers: ``weight = code * scale``, bit for bit.

    Attributes:
        codes: integers (K, M), one row for each output channel; int32, or int64 where they have been read.
        scale: float32 (K,); float64 where the weight was quantized in float64.
    """

    codes: Tensor
    scale: Tensor

    @property
    def minimum(self) -> Tensor:
        """The smallest code present in each channel, (K,), in the smallest integer type that holds them all."""
        lowest = self.codes.amin(1)
        for dtype in (torch.int8, torch.int16):
            if bool((lowest.to(dtype) == lowest).all()):
                return lowest.to(dtype)
        return lowest.to(torch.int32)

    @property
    def widths(self) -> Tensor:
        """Bits that hold all codes from the smallest to the largest one present, uint8 (K,)."""
        span = self.codes.amax(1).long() - self.codes.amin(1).long()
        return torch.bucketize(span + 1, 2 ** torch.arange(62, device="cpu")).to(torch.uint8)

    @property
    def bits(self) -> Tensor:
        """The smallest whole bit depth whose range -2^(b-1) to 2^(b-1) - 1 holds the codes present, int64 (K,)."""
        smallest, largest = self.codes.amin(1).long(), self.codes.amax(1).long()
        signed = torch.bucketize(torch.maximum(largest, ~smallest) + 1, 2 ** torch.arange(62, device="cpu")) + 1
        return torch.where((smallest == 0) & (largest == 0), 0, signed)


def encode(weight: Tensor, grid: Grid) -> Coded | None:
    """Find the codes of a weight that lies on ``grid``; None if it does not, say because somebody edited it.

    The scales are not simply 2^exponent: devices differ in the last bits of ``exp2``, so the neighbours of that number
    are tried too. ``decode`` then gives the weight back bit for bit, except that -0.0 becomes 0.0.
    """
    if weight.numel() == 0 or not weight.is_floating_point():
        return None
    matrix = rows(weight.detach().cpu(), grid.channel_dim, grid.groups, grid.batch_dims)
    scale = _fitting_scale(matrix, grid.exponent) if len(grid.exponent) == len(matrix) else None
    # In the order of channels, whose codes are looked at one after the other: those of a table are columns.
    return None if scale is None else Coded(_round(matrix, scale).to(torch.int32).contiguous(), scale)


def decode(coded: Coded, shape: tuple[int, ...], dtype: torch.dtype, grid: Grid) -> Tensor:
    """The weight that :func:`encode` was given; of ``grid`` only the layout is read, no bits and exponents."""
    matrix = _on_grid(coded.codes, coded.scale, dtype)
    return from_rows(matrix, shape, grid.channel_dim, grid.groups, grid.batch_dims)


def _round(matrix: Tensor, scale: Tensor) -> Tensor:
    work = torch.promote_types(matrix.dtype, scale.dtype)
    return (matrix.to(work) / scale.to(work)[:, None]).round()


def _on_grid(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    work = torch.promote_types(dtype, scale.dtype)
    return (codes.to(work) * scale.to(work)[:, None]).to(dtype)


def _fits(matrix: Tensor, scale: Tensor) -> Tensor:
    """Which channels (K,) are integers of a storable size times ``scale``, exactly."""
    codes = _round(matrix, scale)
    return ((codes.abs() <= _LARGEST_CODE) & (_on_grid(codes, scale, matrix.dtype) == matrix)).all(1)


def _candidates(exponent: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Scales (K,) that some device may have computed from ``exponent``, likely ones first."""
    yield torch.exp2(exponent).to(dtype)
    yield torch.exp2(exponent.to(dtype))
    below = above = torch.exp2(exponent).to(dtype)
    for _ in range(_NEIGHBOURS):
        below, above = below.nextafter(below.new_zeros(())), above.nextafter(above.new_tensor(torch.inf))
        yield below
        yield above


def _fitting_scale(matrix: Tensor, exponents: tuple[float, ...]) -> Tensor | None:
    exponent = torch.tensor(exponents, dtype=torch.float64, device="cpu")
    for dtype in (torch.float32, torch.float64):
        found = torch.full_like(exponent, torch.nan, dtype=dtype)
        for candidate in _candidates(exponent, dtype):
            left = found.isnan()
            found[left] = torch.where(_fits(matrix[left], candidate[left]), candidate[left], torch.nan)
            if not found.isnan().any():
                return found
    return None


@dataclass(frozen=True, slots=True, eq=False)
class Whole:
    """A tensor of whole numbers of a small range: a mask, or a table of indices.

    Attributes:
        numbers: all of them in one row, int64.
        smallest: of the numbers.
        width: bits of each number, as an offset from the smallest.
    """

    numbers: Tensor
    smallest: int
    width: int


def encode_whole(tensor: Tensor) -> Whole | None:
    """The whole numbers that a tensor holds, if it holds nothing else; None for others.

    >>> coded = encode_whole(torch.tensor([[5.0, 3.0], [4.0, 5.0]]))
    >>> coded.numbers.tolist(), coded.smallest, coded.width
    ([5, 3, 4, 5], 3, 2)
    """
    values = tensor.detach().reshape(-1)
    if not values.numel() or not (_are_whole(values[:_SAMPLE]) and _are_whole(values)):
        return None
    numbers = values.to(torch.int64)
    smallest, span = int(numbers.amin()), int(numbers.amax() - numbers.amin())
    return None if max(abs(smallest), span) > _LARGEST_CODE else Whole(numbers, smallest, span.bit_length())


def _are_whole(values: Tensor) -> bool:
    """Whether integers hold the values as they are: they have no negative zero, for one."""
    if values.dtype not in _FLOATS:
        return values.dtype in _INTEGERS
    fits = (values.abs() <= _LARGEST_CODE) & (values == values.trunc()) & ~((values == 0) & values.signbit())
    return bool(fits.all())
