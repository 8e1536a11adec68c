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
        before: weights of the network that was compressed: N of the paper, or all that are listed where none has bits.
        fractional: the trained bit depths, over 32 N bits; None of a file, which does not keep them, and without bits.
        stored: what the weights that have bits take by ``WeightSummary.stored``, over 32 N bits; None without bits.
        file: bytes of the file; None of a network.
    """

    title: str
    weights: tuple[WeightSummary, ...]
    others: int
    others_stored: int
    before: int
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
        if self.fractional is not None:
            found.append(f"{self.fractional:.2%} of the bits")
        if self.stored is not None:
            found.append(f"{self.stored:.2%} in whole bits")
        if self.file is not None:
            whole = FLOAT_BITS // 8 * max(self.before, 1)
            found.append(f"a file of {self.file:,} bytes, {self.file / whole:.2%} of the weights in 32 bits")
        return f"{self.title}: {', '.join(found)}"


def summary(network: nn.Module | str | os.PathLike[str]) -> Summary:
    """What is left of a network, weight by weight, with the bits of each.

    Args:
        network: what ``compress``, ``finalize``, ``prune`` or ``load`` returned, in training or done, on any device; or
            a file that ``save`` wrote. It is only read.

    Raises:
        FxCompressError: the network comes from elsewhere.
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
        saved, file = read(network), Path(network)
        found = _Found(saved.tensors, saved.provenance, _bits_of_grids(saved.provenance))
        return Summary(file.name, *found.listed(), found.before(), None, found.stored(), file.stat().st_size)
    provenance, title = provenance_of(network), type(network).__name__
    if provenance is None:
        raise FxCompressError(
            f"nothing is known of what this {title} was made from: pass what compress(), finalize(), prune() or load() "
            "returned"
        )
    state = {name: t for name, t in network.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    if not isinstance(network, SizedNetwork):
        found = _Found(state, provenance, _bits_of_grids(provenance))
        return Summary(title, *found.listed(), found.before(), found.fractional(), found.stored())
    quantizers = {name: m.bits.detach() for name, m in network.named_modules() if isinstance(m, Quantizer)}
    bits = {name.removesuffix("_quantizer"): each for name, each in quantizers.items()}
    found = _Found({name: t for name, t in state.items() if name in provenance.shapes}, provenance, bits)
    return Summary(title, *found.listed(), network.weights, network.fractional_size(), network.stored_size())


def _bits_of_grids(provenance: Provenance) -> dict[str, Tensor]:
    return {name: torch.tensor(grid.bits, device="cpu") for name, grid in provenance.grids.items()}


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

    def before(self) -> int:
        """How many weights there were at first."""
        return self.provenance.weights or sum(math.prod(weight.before) for weight in self.listed()[0])

    def fractional(self) -> float | None:
        """The bits of all weights, over 32 for each of those at first."""
        total = sum(float(bits.sum()) * self._weights_of_a_channel(name) for name, bits in self.bits.items())
        return total / (FLOAT_BITS * self.before()) if self.bits else None

    def stored(self) -> float | None:
        """The same in whole bits, with the bits and exponents themselves."""
        total = sum(map(self._stored_bits, self.bits))
        return total / (FLOAT_BITS * self.before()) if self.bits else None

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
