"""What a network would cost some channels of which were gone: in multiply-adds, or in measured seconds."""

from abc import ABC, abstractmethod

import numpy as np

from fxcompress.objectives import LatencyTable, SizeTerms
from fxcompress.objectives.curves import Curve, Point

Slopes = tuple[np.ndarray, np.ndarray]


class Cost(ABC):
    """Of the quantized layers, in evaluation, on the example inputs, whatever the bits.

    Args:
        terms: of the network as it is.
        unit: (R,) for all bits one after the other the number of the set that a channel goes with, -1 for none.
    """

    def __init__(self, terms: SizeTerms, unit: np.ndarray) -> None:
        self._unit = unit
        self._rows, self._row_block = terms.rows.cpu().numpy(), terms.row_block.cpu().numpy()
        self._blocks = terms.macs.numel()
        self._cell_block, self._count = terms.cell_block.cpu().numpy(), terms.cell_count.cpu().numpy()
        self._feed_cell, self._feed_row = terms.feed_cell.cpu().numpy(), terms.feed_row.cpu().numpy()
        self._free = terms.free.cpu().numpy()

    @abstractmethod
    def _total(self, outputs: np.ndarray, inputs: np.ndarray) -> float:
        """The share of the starting network's that blocks of these widths cost.

        Args:
            outputs: (B,) channels that each block makes.
            inputs: (B,) channels that it reads.
        """

    @abstractmethod
    def _slopes(self, outputs: np.ndarray, inputs: np.ndarray) -> Slopes:
        """What the last output and the last input channel of each block add to that; (B,) each."""

    def _both(self) -> np.ndarray:
        """What is in both slopes of a block, for a pair of an output and an input channel; (B,)."""
        return np.zeros(self._blocks)

    def left(self, alive: np.ndarray) -> float:
        """The share of the starting network's that is left.

        Args:
            alive: (R,) which channels are not gone, bool.
        """
        outputs, inputs, _ = self._widths(alive)
        return self._total(outputs, inputs)

    def saved(self, alive: np.ndarray) -> np.ndarray:
        """What would go with each set, alone, as a share of the starting network's; (largest number + 1,).

        Args:
            alive: (R,) which channels are not gone, bool.
        """
        outputs, inputs, fed = self._widths(alive)
        by_output, by_input = self._slopes(outputs, inputs)
        found = np.zeros(self._unit.max(initial=-1) + 2)  # the last one is that of no set
        rows = alive[self._rows]
        row_sets, row_block = self._unit[self._rows][rows], self._row_block[rows]
        np.add.at(found, row_sets, by_output[row_block])
        sets = np.where(fed, self._sets_of_cells(alive), -1)
        np.add.at(found, sets, by_input[self._cell_block] * self._count)
        keys, made = np.unique(row_sets * self._blocks + row_block, return_counts=True)
        read_keys, place = np.unique(sets * self._blocks + self._cell_block, return_inverse=True)
        read = np.bincount(place, self._count, len(read_keys))
        common, i, j = np.intersect1d(keys, read_keys, assume_unique=True, return_indices=True)
        np.subtract.at(found, common // self._blocks, self._both()[common % self._blocks] * made[i] * read[j])
        return found[:-1]

    def _sets_of_cells(self, alive: np.ndarray) -> np.ndarray:
        """The set that alone feeds each cell, -1 where there is none."""
        going = alive[self._feed_row]
        cells, sets = self._feed_cell[going], self._unit[self._feed_row[going]]
        first, last = np.full(len(self._free), np.iinfo(np.int64).max), np.full(len(self._free), -1)
        np.minimum.at(first, cells, sets)
        np.maximum.at(last, cells, sets)
        return np.where((first == last) & ~self._free, last, -1)

    def _widths(self, alive: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Output and input channels of each block, and which cells something that is alive feeds."""
        outputs = np.bincount(self._row_block, alive[self._rows], self._blocks)
        feeding = np.bincount(self._feed_cell, alive[self._feed_row], len(self._free))
        fed = (feeding > 0) | self._free
        return outputs, np.bincount(self._cell_block, fed * self._count, self._blocks), fed


class Macs(Cost):
    """In multiply-adds."""

    def __init__(self, terms: SizeTerms, unit: np.ndarray) -> None:
        super().__init__(terms, unit)
        self._each = terms.macs.cpu().numpy().astype(np.float64) / max(1, terms.start.macs)

    def _total(self, outputs: np.ndarray, inputs: np.ndarray) -> float:
        return float((self._each * outputs * inputs).sum())

    def _slopes(self, outputs: np.ndarray, inputs: np.ndarray) -> Slopes:
        return self._each * inputs, self._each * outputs

    def _both(self) -> np.ndarray:
        return self._each


class Seconds(Cost):
    """In seconds, as a table has them: the sum of those of all layers, and of what is none.

    What the whole network takes beyond its layers (norms, activations, sums, calls) is taken to be in proportion to the
    values that layers write.

    Args:
        terms, unit: see :class:`Cost`.
        table: of the network.

    Raises:
        ValueError: the table lacks a layer of the network, or is narrower than it.
    """

    def __init__(self, terms: SizeTerms, unit: np.ndarray, table: LatencyTable) -> None:
        super().__init__(terms, unit)
        self._curves = table.matched(terms.uses)
        layers = sum(c.at(u.outputs, u.inputs).seconds for u, c in table.matched(terms.start.uses))
        self._start = max(layers, table.whole)
        beyond = (self._start - layers) / self._start / max(1, terms.start.activations)
        self._writing = terms.writes.cpu().numpy().astype(np.float64) * beyond

    def _points(self, outputs: np.ndarray, inputs: np.ndarray) -> list[tuple[slice, Curve, Point, bool]]:
        found = []
        for use, curve in self._curves:
            blocks = slice(use.blocks[0], sum(use.blocks))
            made, read = int(outputs[blocks].sum()), int(inputs[blocks].sum())
            turned = use.bits_of_inputs
            found.append((blocks, curve, curve.at(*((read, made) if turned else (made, read))), turned))
        return found

    def _total(self, outputs: np.ndarray, inputs: np.ndarray) -> float:
        layers = sum(point.seconds for _, _, point, _ in self._points(outputs, inputs)) / self._start
        return layers + float((self._writing * outputs).sum())

    def _slopes(self, outputs: np.ndarray, inputs: np.ndarray) -> Slopes:
        by_row, by_cell = np.zeros((2, self._blocks))
        for blocks, curve, point, turned in self._points(outputs, inputs):
            by_input = point.by_input if curve.groups == 1 else 0.0  # groups go whole: outputs say how many are left
            by_row[blocks] = (by_input if turned else point.by_output) / self._start
            by_cell[blocks] = (point.by_output if turned else by_input) / self._start
        return by_row + self._writing, by_cell
