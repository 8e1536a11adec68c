"""Counts multiply-adds of a network some channels of which would be gone."""

import numpy as np

from fxcompress.objectives import SizeTerms


class Macs:
    """The multiply-adds of the quantized layers, in evaluation, as channels go.

    Args:
        terms: of the network as it is.
        unit: (R,) for all bits one after the other the number of the set that a channel goes with, -1 for none.
    """

    def __init__(self, terms: SizeTerms, unit: np.ndarray) -> None:
        self._unit = unit
        self._rows, self._row_block = terms.rows.cpu().numpy(), terms.row_block.cpu().numpy()
        self._each = terms.macs.cpu().numpy().astype(np.float64)
        self._cell_block, self._count = terms.cell_block.cpu().numpy(), terms.cell_count.cpu().numpy()
        self._feed_cell, self._feed_row = terms.feed_cell.cpu().numpy(), terms.feed_row.cpu().numpy()
        self._free = terms.free.cpu().numpy()
        self._start = max(1, terms.start.macs)

    def left(self, alive: np.ndarray) -> float:
        """The share of the starting network's that is left.

        Args:
            alive: (R,) which channels are not gone, bool.
        """
        outputs, inputs, _ = self._widths(alive)
        return float((self._each * outputs * inputs).sum()) / self._start

    def saved(self, alive: np.ndarray) -> np.ndarray:
        """What would go with each set, alone, as a share of the starting network's; (largest number + 1,).

        Args:
            alive: (R,) which channels are not gone, bool.
        """
        outputs, inputs, fed = self._widths(alive)
        found = np.zeros(self._unit.max(initial=-1) + 2)  # the last one is that of no set
        block = self._row_block
        np.add.at(found, self._unit[self._rows], (self._each * inputs)[block] * alive[self._rows])
        sets = np.full(len(self._free), -1)
        sets[self._feed_cell] = self._unit[self._feed_row]
        np.add.at(found, sets, (self._each * outputs)[self._cell_block] * self._count * fed)
        return found[:-1] / self._start

    def _widths(self, alive: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Output and input channels of each block, and which cells something that is alive feeds."""
        blocks = len(self._each)
        outputs = np.bincount(self._row_block, alive[self._rows], blocks)
        feeding = np.bincount(self._feed_cell, alive[self._feed_row], len(self._free))
        fed = (feeding > 0) | self._free
        return outputs, np.bincount(self._cell_block, fed * self._count, blocks), fed
