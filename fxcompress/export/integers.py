"""Which integers a constant of an exported graph holds: weights come out of an exporter renamed, turned and scaled.

Nothing is assumed of the exporter. A constant is integers times a scale if these give it back; where to look for them
is told by its name, or else by its channels, each of which is looked up among those of all weights.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fxcompress.provenance import Grid
from fxcompress.quantizer import from_rows, rows
from fxcompress.storage.codes import Coded, encode

Array = npt.NDArray[Any]

_ULPS = 4
"""How far a scaled weight may be from codes times scale: an exporter multiplied it by the scale of a norm."""


@dataclass(frozen=True, slots=True, eq=False)
class Integers:
    """A constant as ``codes * scale``.

    Attributes:
        codes: int64, of the constant's shape.
        scale: of the constant's dtype and rank; of size 1 along the dims on which it does not depend.
        weights: names of the weights that the codes come from.
    """

    codes: npt.NDArray[np.int64]
    scale: Array
    weights: frozenset[str]

    def along(self, dim: int) -> Array | None:
        """The scale of each entry of ``dim``; None where it depends on other dims as well."""
        if self.scale.size != self.scale.shape[dim]:
            return None
        return np.broadcast_to(self.scale.reshape(-1), self.codes.shape[dim])

    def fits(self, bits: int) -> bool:
        """Whether signed integers of so many bits hold all codes."""
        return bool(fits(self.codes, bits).all())

    def clipped(self, bits: int) -> "Integers":
        """With scales above zero, and the codes for which that takes more than ``bits`` bits clipped to these."""
        half = 1 << (bits - 1)
        codes = np.clip(np.where(self.scale < 0, -self.codes, self.codes), -half, half - 1)
        return Integers(codes, np.abs(self.scale), self.weights)


def fits(codes: npt.NDArray[np.int64], bits: int) -> npt.NDArray[np.bool_]:
    """Which codes a signed integer of so many bits holds."""
    half = 1 << (bits - 1)
    return (codes >= -half) & (codes < half)


@dataclass(frozen=True, slots=True, eq=False)
class _Channel:
    """One output channel of a weight."""

    weight: str
    codes: npt.NDArray[np.int64]
    scale: float


class WeightCodes:
    """The codes of all weights of a finalized network that are on their grid.

    Args:
        state: its tensors, by name.
        grids: the number formats of those that have one.
    """

    def __init__(self, state: Mapping[str, Tensor], grids: Mapping[str, Grid]) -> None:
        self.grids = {name: grid for name, grid in grids.items() if name in state}
        found = {name: encode(state[name], grid) for name, grid in self.grids.items()}
        self.coded: dict[str, Coded] = {name: coded for name, coded in found.items() if coded is not None}
        self._channels: defaultdict[bytes, list[_Channel]] = defaultdict(list)
        for name, coded in self.coded.items():
            for codes, scale in zip(coded.codes.numpy(), coded.scale.tolist(), strict=True):
                self._channels[_key(codes)].append(_Channel(name, codes, scale))

    def of(self, name: str, constant: Array) -> Integers | None:
        """Integers and scales that give ``constant`` back, up to a rounding where it was scaled; None if none do.

        Args:
            name: that the exporter gave it.
            constant: its values.
        """
        if constant.dtype not in (np.float32, np.float64) or constant.ndim < 2 or not constant.size:
            return None
        found = self._by_name(name, constant)
        return found or next(
            (each for dims in _ways(constant.ndim) if (each := self._by_channels(constant, dims))), None
        )

    def _by_name(self, name: str, constant: Array) -> Integers | None:
        """As the weight of this name lies in the network, whatever its layout."""
        if name not in self.coded:
            return None
        coded, grid = self.coded[name], self.grids[name]
        layout = grid.channel_dim, grid.groups, grid.batch_dims
        try:
            matrix = rows(torch.from_numpy(constant.copy()), *layout).numpy()
        except (RuntimeError, IndexError):  # another rank
            return None
        codes = coded.codes.numpy()
        if matrix.shape != codes.shape:
            return None
        scale = _scales(matrix, codes, coded.scale.numpy().astype(matrix.dtype))
        if scale is None:
            return None

        def laid(each: Array) -> Array:
            spread = np.broadcast_to(each, codes.shape).copy()
            return from_rows(torch.from_numpy(spread), constant.shape, *layout).numpy()

        codes, scale = _positive(codes, scale)
        return Integers(laid(codes).astype(np.int64), _narrow(laid(scale[:, None])), frozenset({name}))

    def _by_channels(self, constant: Array, dims: tuple[int, ...]) -> Integers | None:
        """Channel by channel along ``dims``: rows that were put together from several weights, or in another order."""
        first = tuple(range(len(dims)))
        turned = np.moveaxis(constant, dims, first)
        matrix = turned.reshape(math.prod(turned.shape[: len(dims)]), -1)
        if matrix.shape[1] == 1:
            return None  # any number is a multiple of any code
        codes, scale = np.zeros(matrix.shape, np.int64), np.ones(len(matrix), matrix.dtype)
        every, some = set(self.coded), set[str]()
        for number, row in enumerate(matrix):
            if not row.any():
                continue  # zeros are codes of zero, of whatever weight
            matches = list(self._matches(row))
            if not matches:
                return None
            codes[number], scale[number] = matches[0][1:]
            names = {name for name, _, _ in matches}
            every, some = every & names, some | {matches[0][0]}
        if not some:
            return None
        codes, scale = _positive(codes, scale)
        back = np.moveaxis(codes.reshape(turned.shape), first, dims)
        scales = scale.reshape(*turned.shape[: len(dims)], *[1] * (turned.ndim - len(dims)))
        return Integers(np.ascontiguousarray(back), _narrow(np.moveaxis(scales, first, dims)), frozenset(every or some))

    def _matches(self, row: Array) -> Iterator[tuple[str, npt.NDArray[np.int64], Any]]:
        for channel in self._channels.get(_key(row), ()):
            if len(channel.codes) == len(row):
                expected = np.array([channel.scale], row.dtype)
                scale = _scales(row[None], channel.codes[None], expected)
                if scale is not None:
                    yield channel.weight, channel.codes, scale[0]


def _ways(rank: int) -> Iterator[tuple[int, ...]]:
    """The dims of a constant along which its channels may lie: one, or as those of experts all but one."""
    yield from ((dim,) for dim in range(rank))
    if rank > 2:
        yield from (tuple(dim for dim in range(rank) if dim != summed) for summed in range(rank))


def _key(row: Array) -> bytes:
    """The same for a channel and its multiples: where its entries are zero, and which have the sign of the first."""
    signs = np.sign(row)
    first = signs[signs.nonzero()[0][:1]]
    return np.packbits(np.concatenate([signs == 0, signs == first] if len(first) else [signs == 0])).tobytes()


def _scales(matrix: Array, codes: npt.NDArray[np.int64], expected: Array) -> Array | None:
    """Scales (K,) with which ``codes`` (K, M) give ``matrix`` back: ``expected`` if they do, else what fits best."""
    if ((codes * expected[:, None]).astype(matrix.dtype) == matrix).all():
        return expected
    places = np.abs(codes).argmax(1)[:, None]
    largest = np.take_along_axis(codes, places, 1)[:, 0]
    scale = (np.take_along_axis(matrix, places, 1)[:, 0] / np.where(largest, largest, 1)).astype(matrix.dtype)
    scale = np.where(largest, scale, 1).astype(matrix.dtype)
    off = np.abs(codes * scale[:, None] - matrix)
    return scale if (off <= _ULPS * np.finfo(matrix.dtype).eps * np.abs(matrix)).all() else None


def _positive(codes: npt.NDArray[np.int64], scale: Array) -> tuple[npt.NDArray[np.int64], Array]:
    """The same channels (K, M) with scales above zero, as runtimes expect, but where codes then took a bit more."""
    low, high = codes.min(1), codes.max(1)
    flipped = (scale < 0) & (_bits(-high, -low) <= _bits(low, high))
    return np.where(flipped[:, None], -codes, codes), np.where(flipped, -scale, scale).astype(scale.dtype)


def _bits(low: npt.NDArray[np.int64], high: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """Bits that signed integers from ``low`` to ``high`` take, without the sign."""
    return np.frexp(np.maximum(high, ~low))[1]


def _narrow(spread: Array) -> Array:
    """Of size 1 along each dim on which the values do not depend."""
    for dim in range(spread.ndim):
        first = spread.take([0], dim)
        if (spread == first).all():
            spread = first
    return spread
