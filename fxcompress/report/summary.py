"""What a network consists of, weight by weight: what it was, what is left, and in how many bits."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fxcompress.errors import FxCompressError
from fxcompress.provenance import Provenance, provenance_of
from fxcompress.quantizer import Quantizer, storage_bits
from fxcompress.report.measure import CHANNEL_BITS, FLOAT_BITS
from fxcompress.storage.codes import encode
from fxcompress.storage.file import read
from fxcompress.training.network import SizedNetwork

__all__ = ["Summary", "WeightSummary", "summary"]

_HEADINGS = ("weight", "at first", "now", "bits", "from", "to", "bytes")
_NAMES = 3
"""Columns at the left, of words; the others are numbers."""


@dataclass(frozen=True, slots=True)
class WeightSummary:
    """One weight.

    Attributes:
        name: in the state_dict.
        before: its shape in the network that was compressed.
        now: its shape; None where all of it is gone.
        bits: the mean bit depth of the channels that are left; None where they are in floats, or gone.
        least, most: bits of the channels that have fewest and most; None likewise.
        stored: bytes of its codes, in whole bits for each channel, and of its bits and exponents; those of its numbers
            where it has no codes.
    """

    name: str
    before: tuple[int, ...]
    now: tuple[int, ...] | None
    bits: float | None
    least: float | None
    most: float | None
    stored: int


@dataclass(frozen=True, slots=True)
class Summary:
    """What :func:`summary` found; printed, it is a table.

    Attributes:
        title: the class of the network, or the name of its file.
        weights: those that have bits, and all others of more than one dim.
        others: how many biases, norms and buffers there are.
        others_stored: bytes of these.
        before: how many weights the network had that was compressed: all that are listed.
        quantized: how many of these were quantized: N of the paper. 0 where none was.
        fractional: the bit depths, over 32 N bits; None of a file, which does not keep the trained ones, and without
            bits. A network from a file has the whole bits of its codes. Weights that have left their grid, as they were
            trained on, count with 32 bits.
        stored: the same in whole bits for each channel, with 5 bytes for its bits and exponent; None without bits.
            Of a network in training this, like ``fractional``, leaves out what reads dead channels, as a removal would.
        file: bytes of the file; None of a network.

    >>> import fxcompress as fxc
    >>> found = fxc.summary(fxc.compress(nn.Linear(8, 4), torch.zeros(1, 8)))
    >>> found.weights[0].bits, found.fractional
    (8.0, 0.25)
    """

    title: str
    weights: tuple[WeightSummary, ...]
    others: int
    others_stored: int
    before: int
    quantized: int
    fractional: float | None
    stored: float | None
    file: int | None = None

    def __str__(self) -> str:
        rows = [_HEADINGS, *map(_row, self.weights)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if i < _NAMES else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        rest = f"and {self.others} biases, norms and buffers of {self.others_stored:,} bytes"
        return "\n".join([self._heading(), "", *lines, rest])

    def _heading(self) -> str:
        left = sum(math.prod(weight.now) for weight in self.weights if weight.now is not None)
        found = [f"{left:,} of {self.before:,} weights"]
        if 0 < self.quantized < self.before:
            found.append(f"{self.quantized:,} of which were quantized")
        if self.fractional is not None:
            found.append(f"{self.fractional:.2%} of the bits")
        if self.stored is not None:
            found.append(f"{self.stored:.2%} in whole bits")
        if self.file is not None:
            whole = FLOAT_BITS // 8 * max(self.before, 1)
            found.append(f"a file of {self.file:,} bytes, {self.file / whole:.2%} of what its weights took in 32 bits")
        return f"{self.title}: {', '.join(found)}"


def summary(network: nn.Module | str | os.PathLike[str]) -> Summary:
    """What is left of a network, weight by weight, with the bits of each.

    Args:
        network: what ``compress``, ``finalize``, ``prune`` or ``load`` returned, in training or done, on any device; or
            a file that ``save`` wrote. It is only read.

    Raises:
        TypeError: neither a network nor a path.
        FxCompressError: the network comes from elsewhere, or is wrapped by another one.
        StorageError: the file is not there, none of fxcompress, or damaged; or safetensors is missing.

    >>> import fxcompress as fxc
    >>> net = fxc.compress(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)), torch.zeros(1, 8), bits=4)
    >>> print(fxc.summary(net))
    Sequential: 40 of 40 weights, 12.50% of the bits, 31.25% in whole bits
    <BLANKLINE>
    weight    at first  now     bits  from    to  bytes
    0.weight  (4, 8)    (4, 8)  4.00  4.00  4.00     36
    1.weight  (2, 4)    (2, 4)  4.00  4.00  4.00     14
    and 2 biases, norms and buffers of 24 bytes
    """
    if not isinstance(network, nn.Module):
        file = _path(network)
        saved = read(file)
        found = _Found(saved.tensors, saved.provenance, _bits_of_grids(saved.provenance))
        return found.summary(file.name, None, found.stored(), file.stat().st_size)
    provenance, title = provenance_of(network), type(network).__name__
    if provenance is None:
        raise FxCompressError(
            f"nothing is known of what this {title} was made from: pass what compress(), finalize(), prune() or load() "
            "returned"
        )
    if not isinstance(network, SizedNetwork) and any(isinstance(m, SizedNetwork) for m in network.modules()):
        raise FxCompressError(f"this {title} wraps the network in training: pass what compress() returned")
    state = {name: t for name, t in network.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    if not isinstance(network, SizedNetwork):
        found = _Found(state, provenance, _bits_of_grids(provenance, state))
        return found.summary(title, found.fractional(), found.stored())
    quantizers = {name: m.bits.detach() for name, m in network.named_modules() if isinstance(m, Quantizer)}
    bits = {name.removesuffix("_quantizer"): each for name, each in quantizers.items()}
    found = _Found({name: t for name, t in state.items() if name in provenance.shapes}, provenance, bits)
    return found.summary(title, network.fractional_size(), network.stored_size())


def _path(given: object) -> Path:
    if isinstance(getattr(given, "module", None), nn.Module):
        raise TypeError(f"a {type(given).__name__} holds the network as its .module: pass summary(result.module)")
    if not isinstance(given, str | os.PathLike):
        raise TypeError(
            f"summary takes a network, or the path of a file that save() wrote, not a {type(given).__name__}"
        )
    return Path(given)


def _bits_of_grids(provenance: Provenance, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The bits of each weight that lies on its grid; of what a file holds on a grid, all does."""
    return {
        name: torch.tensor(grid.bits, device="cpu")
        for name, grid in provenance.grids.items()
        if state is None or (name in state and encode(state[name], grid) is not None)
    }


@dataclass(frozen=True, slots=True)
class _Found:
    """What a network holds.

    Attributes:
        state: its tensors by their names; those that are one tensor are one object.
        provenance: what it was made from.
        bits: of each quantized weight, (channels,), by its name; where a tensor has several, by one of them.
    """

    state: Mapping[str, Tensor]
    provenance: Provenance
    bits: Mapping[str, Tensor]

    def listed(self) -> tuple[tuple[WeightSummary, ...], int, int]:
        """All weights, how many other tensors there are, and the bytes of these."""
        weights, others = list[WeightSummary](), list[int]()
        held = {id(self.state[name]): name for name in self.bits if name in self.state}
        for name in dict.fromkeys([*self.provenance.shapes, *self.state]):
            tensor = self.state.get(name)
            if tensor is not None and held.setdefault(id(tensor), name) != name:
                continue  # listed by another of its names
            shape = self.provenance.shapes.get(name, () if tensor is None else tuple(tensor.shape))
            if tensor is None or name in self.bits or (len(shape) > 1 and tensor.is_floating_point()):
                weights += [self._weight(name, shape, tensor)] if len(shape) > 1 else []
            else:
                others.append(tensor.nbytes)
        return tuple(weights), len(others), sum(others)

    def _weight(self, name: str, before: tuple[int, ...], tensor: Tensor | None) -> WeightSummary:
        if tensor is None:
            return WeightSummary(name, before, None, None, None, None, 0)
        now, bits = tuple(tensor.shape), self.bits.get(name)
        if bits is None or not len(bits):
            return WeightSummary(name, before, now, None, None, None, tensor.nbytes)
        mean, least, most = float(bits.mean()), float(bits.min()), float(bits.max())
        return WeightSummary(name, before, now, mean, least, most, -(-self._stored_bits(name) // 8))

    def summary(self, title: str, fractional: float | None, stored: float | None, file: int | None = None) -> Summary:
        """All of it, with sizes that were found elsewhere."""
        weights, others, others_stored = self.listed()
        before, quantized = sum(math.prod(weight.before) for weight in weights), self.provenance.weights
        return Summary(title, weights, others, others_stored, before, quantized, fractional, stored, file)

    def fractional(self) -> float | None:
        """The bits of all weights, over 32 for each that was quantized."""
        total = sum(float(bits.sum()) * self._weights_of_a_channel(name) for name, bits in self.bits.items())
        return (total + self._changed_bits()) / (FLOAT_BITS * self.provenance.weights) if self.bits else None

    def stored(self) -> float | None:
        """The same in whole bits, with the bits and exponents themselves."""
        total = sum(map(self._stored_bits, self.bits)) + self._changed_bits()
        return total / (FLOAT_BITS * self.provenance.weights) if self.bits else None

    def _changed_bits(self) -> int:
        """Bits of weights that have left their grid."""
        left = {name for name in self.provenance.grids if name in self.state and name not in self.bits}
        return FLOAT_BITS * sum(self.state[name].numel() for name in left)

    def _stored_bits(self, name: str) -> int:
        whole = storage_bits(self.bits[name].float())
        return int(whole.sum()) * self._weights_of_a_channel(name) + CHANNEL_BITS * int((whole > 0).sum())

    def _weights_of_a_channel(self, name: str) -> int:
        return self.state[name].numel() // max(1, len(self.bits[name]))


def _row(weight: WeightSummary) -> tuple[str, ...]:
    if weight.now is None:
        return weight.name, _shape(weight.before), "gone", "", "", "", ""
    bits = (weight.bits, weight.least, weight.most)
    shown = ("floats", "", "") if weight.bits is None else tuple(f"{number:.2f}" for number in bits)
    return weight.name, _shape(weight.before), _shape(weight.now), *shown, f"{weight.stored:,}"


def _shape(sizes: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, sizes))})"
