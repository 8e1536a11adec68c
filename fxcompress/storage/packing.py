"""Integer codes of quantized weights, at exactly the bits that each channel needs.

Letters: K channels, M weights of one channel.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fxcompress.errors import StorageError
from fxcompress.provenance import Grid
from fxcompress.quantizer import from_rows, rows

__all__ = ["Coded", "Whole", "decode", "encode", "encode_whole", "pack", "packed_size", "unpack"]

_MAX_WIDTH = 32
_BLOCK = 1 << 18
"""Codes that are taken apart to bits at a time: a bit takes a byte meanwhile."""
_LARGEST_CODE = 2**30
_INTEGERS = frozenset({torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})
_FLOATS = frozenset({torch.bfloat16, torch.float16, torch.float32, torch.float64})
_SAMPLE = 64
"""Values at the start of a tensor that tell most of those that are not whole."""
_NEIGHBOURS = 8
"""How many floats to either side of 2^exponent the scale may lie: in float64, log2 and exp2 lose that much."""


def packed_size(widths: Tensor, columns: int) -> int:
    """Bytes that :func:`pack` makes of channels of ``columns`` codes each, at ``widths`` (K,) bits a code.

    >>> packed_size(torch.tensor([3, 0, 2]), 5)
    4
    """
    return -(-int(widths.sum(dtype=torch.int64)) * columns // 8)


def pack(codes: Tensor, lo: Tensor, widths: Tensor) -> Tensor:
    """Pack each channel's codes as unsigned offsets from ``lo``, in ``widths`` bits each, without gaps between them.

    Channels lie in the order of their widths, those of width 0 take no space, and the last byte is filled up with
    zeros. Within a code the lowest bit comes first.

    Args:
        codes: integers (K, M).
        lo: the smallest code of each channel, integers (K,).
        widths: bits of each channel, 0 to 32, integers (K,).

    Returns:
        uint8 tensor of ``packed_size(widths, M)`` bytes, on the CPU.

    Raises:
        StorageError: a code lies outside of ``lo`` to ``lo + 2**width - 1``.

    >>> codes = torch.tensor([[-2, 1, 0], [5, 5, 5]])
    >>> packed = pack(codes, torch.tensor([-2, 5]), torch.tensor([2, 0]))
    >>> packed.tolist(), unpack(packed, torch.tensor([-2, 5]), torch.tensor([2, 0]), 3).tolist()
    ([44], [[-2, 1, 0], [5, 5, 5]])
    """
    codes, least = codes.cpu(), lo.cpu().long()[:, None]
    packed, rest = [np.zeros(0, np.uint8)], np.zeros(0, np.uint8)
    for width, channels in _blocks(widths, codes.shape[1]):
        offsets = (codes[channels].long() - least[channels]).numpy()
        if ((offsets < 0) | (offsets >> width != 0)).any():
            raise StorageError("a code does not fit its channel's width; take the width from the channel's own codes")
        bits = np.concatenate([rest, _to_bits(offsets, width)])
        whole = len(bits) // 8 * 8
        packed.append(np.packbits(bits[:whole], bitorder="little"))
        rest = bits[whole:]
    return torch.from_numpy(np.concatenate([*packed, np.packbits(rest, bitorder="little")]))


def unpack(packed: Tensor, lo: Tensor, widths: Tensor, columns: int) -> Tensor:
    """The codes (K, M) that :func:`pack` was given, as int64; ``columns`` is M.

    Raises:
        StorageError: ``packed`` has not the size that the widths ask for, or a width is above 32.
    """
    if packed.numel() != packed_size(widths, columns) or bool((widths > _MAX_WIDTH).any()):
        raise StorageError(
            f"{packed.numel()} bytes of codes, where {packed_size(widths, columns)} are expected, or a code of more "
            f"than {_MAX_WIDTH} bits"
        )
    octets, least = packed.cpu().numpy(), lo.cpu().numpy().astype(np.int64)[:, None]
    codes = np.empty((len(least), columns), np.int64)
    start = 0
    for width, channels in _blocks(widths, columns):
        stop = start + width * len(channels) * columns
        bits = np.unpackbits(octets[start // 8 : -(-stop // 8)], bitorder="little")[start % 8 :][: stop - start]
        offsets = _from_bits(bits, width, len(channels) * columns)
        codes[channels] = offsets.reshape(len(channels), columns) + least[channels]
        start = stop
    return torch.from_numpy(codes)


def _blocks(widths: Tensor, columns: int) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """Channels in the order in which their codes lie, a few of the same width at a time, with that width."""
    width_of = widths.cpu().numpy().astype(np.int64)
    step = max(1, _BLOCK // max(columns, 1))
    for width in np.unique(width_of).tolist():
        channels = np.flatnonzero(width_of == width)
        for start in range(0, len(channels), step):
            yield width, channels[start : start + step]


def _to_bits(offsets: npt.NDArray[np.int64], width: int) -> npt.NDArray[np.uint8]:
    octets = max(1, -(-width // 8))
    found = offsets.astype("<u4").reshape(-1, 1).view(np.uint8)[:, :octets]
    return np.unpackbits(found.reshape(-1), bitorder="little").reshape(offsets.size, 8 * octets)[:, :width].reshape(-1)


def _from_bits(bits: npt.NDArray[np.uint8], width: int, count: int) -> npt.NDArray[np.int64]:
    octets = max(1, -(-width // 8))
    whole = np.zeros((count, 8 * octets), np.uint8)
    whole[:, :width] = bits.reshape(count, width)
    found = np.zeros((count, 4), np.uint8)
    found[:, :octets] = np.packbits(whole.reshape(-1), bitorder="little").reshape(count, octets)
    return found.view("<u4").astype(np.int64)


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
        packed: uint8 (bytes,), on the CPU.
        smallest: of the numbers.
        width: bits of each number, as an offset from the smallest.
    """

    packed: Tensor
    smallest: int
    width: int

    def decode(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The tensor that :func:`encode_whole` was given, bit for bit."""
        smallest, width = torch.tensor([[self.smallest], [self.width]], device="cpu")
        return unpack(self.packed, smallest, width, math.prod(shape)).reshape(shape).to(dtype)


def encode_whole(tensor: Tensor) -> Whole | None:
    """Pack a tensor that holds whole numbers alone, each in as many bits as their range needs; None for others.

    >>> mask = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    >>> coded = encode_whole(mask)
    >>> coded.width, coded.packed.tolist(), torch.equal(coded.decode((2, 2), torch.float32), mask)
    (1, [13], True)
    """
    values = tensor.detach().reshape(-1)
    if not values.numel() or not (_are_whole(values[:_SAMPLE]) and _are_whole(values)):
        return None
    codes = values.to(torch.int64)
    smallest, span = int(codes.amin()), int(codes.amax() - codes.amin())
    if max(abs(smallest), span) > _LARGEST_CODE:
        return None
    width = span.bit_length()
    return Whole(pack(codes[None], codes.amin()[None], torch.tensor([width], device="cpu")), smallest, width)


def _are_whole(values: Tensor) -> bool:
    """Whether integers hold the values as they are: they have no negative zero, for one."""
    if values.dtype not in _FLOATS:
        return values.dtype in _INTEGERS
    fits = (values.abs() <= _LARGEST_CODE) & (values == values.trunc()) & ~((values == 0) & values.signbit())
    return bool(fits.all())
