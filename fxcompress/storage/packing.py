"""Whole numbers of a few bits each, packed into bytes and deflated, those of the same width together.

Most weights on a grid lie near zero, so the codes of a channel hold less than their bits. The bytes of all channels of
the same width share Huffman codes (RFC 1951, by zlib), as in S. Han et al., *Deep Compression* (arXiv 1510.00149,
section 4). Numbers of up to four bits share a byte with neighbours, so that a frequent one may take less than a bit.

Letters: K channels, M numbers of one channel.
"""

import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fxcompress.errors import StorageError

__all__ = ["Packer", "Unpacker"]

_MAX_WIDTH = 32
_BLOCK = 1 << 20
"""Numbers that are packed at a time: they take eight bytes each meanwhile."""
_RAW = -15
"""zlib's name for a stream without header and checksum: the file has one of its own."""

_Integers = npt.NDArray[np.int64]
_Octets = npt.NDArray[np.uint8]
Row = tuple[int, ...]
"""Of an index: the width of some numbers, whether they repeat, and the bytes that each of their octets takes."""


class _Kind(NamedTuple):
    """Numbers that are deflated together.

    Attributes:
        width: bits of each of them.
        repeat: whether a run of them is likely to come again, as in tables of indices, and should be looked for. In
            weights, what comes again does so by chance, and to point at it takes more than to write it.
    """

    width: int
    repeat: bool

    @property
    def octets(self) -> int:
        """Bytes of each number; each is a stream of its own, as high and low ones are not alike."""
        return -(-self.width // 8)

    @property
    def shared(self) -> int:
        """Numbers in a byte."""
        return max(1, 8 // self.width)

    @property
    def places(self) -> _Octets:
        """The lowest bit of each number in a byte."""
        return np.arange(self.shared, dtype=np.uint8) * np.uint8(8 // self.shared)


class Packer:
    """Collects numbers, and deflates them as they come.

    >>> packer = Packer()
    >>> packer.put(torch.tensor([[-2, 1, 0], [5, 5, 5]]), torch.tensor([2, 0]))
    >>> packed, table = packer.finish()
    >>> Unpacker(packed, table).take(torch.tensor([-2, 5]), torch.tensor([2, 0]), 3).tolist()
    [[-2, 1, 0], [5, 5, 5]]
    """

    def __init__(self) -> None:
        self._packed: dict[_Kind, _Deflated] = {}

    def put(self, numbers: Tensor, widths: Tensor, *, repeat: bool = False) -> None:
        """Add channels of numbers. Of each number the lowest bits are kept, which tell it from others of its channel.

        Args:
            numbers: integers (K, M), on any device.
            widths: bits of each channel, integers (K,) from 0 to 32; those of no bits take no space. The largest number
                of a channel must be less than ``2**width`` above the smallest.
            repeat: whether runs of them are likely to come again.

        Raises:
            StorageError: a width does not tell the numbers of its channel apart.
        """
        found = numbers.cpu().numpy()
        for width, channels in _blocks(widths, numbers.shape[1]):
            block = found[channels].astype(np.int64)
            if block.size and ((block.max(1) - block.min(1)) >> width).any():
                raise StorageError(f"{width} bits do not hold a channel's numbers; take the width from its own numbers")
            if block.size and width:
                kind = _Kind(width, repeat)
                if kind not in self._packed:
                    self._packed[kind] = _Deflated(kind)
                self._packed[kind].put(block.reshape(-1))

    def finish(self) -> tuple[Tensor, list[Row]]:
        """All numbers, uint8 (bytes,) on the CPU, and what lies where in them."""
        done = {kind: self._packed[kind].finish() for kind in sorted(self._packed)}
        packed = bytearray().join(part for parts in done.values() for part in parts)
        table = [(kind.width, int(kind.repeat), *map(len, parts)) for kind, parts in done.items()]
        return torch.from_numpy(np.frombuffer(packed, np.uint8)), table


class Unpacker:
    """Takes numbers in the order in which :class:`Packer` got them.

    Args:
        packed: what its ``finish`` returned, uint8 (bytes,) on the CPU.
        table: the same, from a file that may be damaged.

    Raises:
        StorageError: they do not fit each other.
        zlib.error: what is packed is damaged.
    """

    def __init__(self, packed: Tensor, table: list[Row]) -> None:
        content, self._left, start = packed.numpy(), dict[_Kind, _Octets](), 0
        self._taken: dict[_Kind, int] = {}
        for width, repeat, *lengths in table:
            kind, octets = _Kind(width, bool(repeat)), []
            for length in lengths:
                octets.append(np.frombuffer(zlib.decompress(content[start : start + length].data, _RAW), np.uint8))
                start += length
            if not 0 < width <= _MAX_WIDTH or kind.octets != len(octets) or len({len(o) for o in octets}) != 1:
                raise StorageError(f"numbers of {width} bits cannot lie in {[len(o) for o in octets]} bytes")
            self._left[kind] = np.stack(octets, 1) if len(octets) > 1 else octets[0][:, None]
            self._taken[kind] = 0
        if start != len(content):
            raise StorageError(f"{len(content)} bytes of packed numbers, where {start} are expected")

    def take(self, smallest: Tensor, widths: Tensor, columns: int, *, repeat: bool = False) -> Tensor:
        """The numbers (K, M) that ``put`` was given, as int64.

        Args:
            smallest: of each channel, integers (K,), or what is less by so little that ``2**width`` reaches.
            widths: as given to ``put``.
            columns: M.
            repeat: as given to ``put``.

        Raises:
            StorageError: there are fewer numbers left.
        """
        least = smallest.cpu().numpy().astype(np.int64)
        numbers = np.empty((len(least), columns), np.int64)
        for width, channels in _blocks(widths, columns):
            low = least[channels, None]
            if width:
                fields = self._fields(_Kind(width, repeat), len(channels) * columns).reshape(len(channels), columns)
                numbers[channels] = low + ((fields - low) & (2**width - 1))
            else:
                numbers[channels] = low
        return torch.from_numpy(numbers)

    def check_finished(self) -> None:
        """Raise StorageError where numbers have not been taken."""
        for kind, octets in self._left.items():
            if -(-self._taken[kind] // kind.shared) != len(octets):
                raise StorageError(f"numbers of {kind.width} bits are left over")

    def _fields(self, kind: _Kind, count: int) -> _Integers:
        start = self._taken.get(kind, 0)
        stop = start + count
        first, last = start // kind.shared, -(-stop // kind.shared)
        if count and (kind not in self._left or last > len(self._left[kind])):
            raise StorageError(f"the numbers of {kind.width} bits end early")
        if not count:
            return np.zeros(0, np.int64)
        self._taken[kind] = stop
        octets = self._left[kind][first:last]
        if kind.octets > 1:
            return np.asarray((octets.astype(np.int64) << (8 * np.arange(kind.octets))).sum(1))
        fields = (octets >> kind.places) & np.uint8(2**kind.width - 1)
        return fields.reshape(-1)[start - first * kind.shared :][:count].astype(np.int64)


class _Deflated:
    """Numbers of one kind."""

    def __init__(self, kind: _Kind) -> None:
        self._kind = kind
        strategy = zlib.Z_DEFAULT_STRATEGY if kind.repeat else zlib.Z_RLE
        self._streams = [zlib.compressobj(9, zlib.DEFLATED, _RAW, 9, strategy) for _ in range(kind.octets)]
        self._parts: list[list[bytes]] = [[] for _ in range(kind.octets)]
        self._rest = np.zeros(0, np.uint8)

    def put(self, numbers: _Integers) -> None:
        if self._kind.octets > 1:
            for octet in range(self._kind.octets):
                bits = min(8, self._kind.width - 8 * octet)
                self._add(octet, (numbers >> (8 * octet) & (2**bits - 1)).astype(np.uint8))
            return
        fields = np.concatenate([self._rest, (numbers & (2**self._kind.width - 1)).astype(np.uint8)])
        whole = len(fields) // self._kind.shared * self._kind.shared
        self._share(fields[:whole])
        self._rest = fields[whole:]

    def finish(self) -> list[bytes]:
        if len(self._rest):
            self._share(np.concatenate([self._rest, np.zeros(self._kind.shared - len(self._rest), np.uint8)]))
        return [b"".join([*parts, stream.flush()]) for parts, stream in zip(self._parts, self._streams, strict=True)]

    def _share(self, fields: _Octets) -> None:
        """Add numbers that fill bytes."""
        self._add(0, np.bitwise_or.reduce(fields.reshape(-1, self._kind.shared) << self._kind.places, axis=1))

    def _add(self, octet: int, octets: _Octets) -> None:
        self._parts[octet].append(self._streams[octet].compress(octets.tobytes()))


def _blocks(widths: Tensor, columns: int) -> Iterator[tuple[int, _Integers]]:
    """Channels of the same width, a few at a time, with that width: the narrow ones first."""
    width_of = widths.cpu().numpy().astype(np.int64)
    step = max(1, _BLOCK // max(columns, 1))
    for width in np.unique(width_of).tolist():
        if width > _MAX_WIDTH:
            raise StorageError(f"numbers of {width} bits, where {_MAX_WIDTH} are the most")
        channels = np.flatnonzero(width_of == width)
        for start in range(0, len(channels), step):
            yield width, channels[start : start + step]
