"""Which sets of channels go next, of what the task would lose with each and what it costs to keep."""

from dataclasses import dataclass

import numpy as np

from fxcompress.training.costs import Cost


@dataclass(frozen=True, slots=True)
class Choice:
    """The state that sets are chosen in.

    Attributes:
        cost: of the network.
        unit: (R,) the number of the set that each channel goes with, -1 where it must stay.
        layer: (R,) the number of the layer of each.
        least: (layers,) how many channels of each layer stay.
        alive: (R,) the channels that are left, bool.
    """

    cost: Cost
    unit: np.ndarray
    layer: np.ndarray
    least: np.ndarray
    alive: np.ndarray

    def next(self, lost: np.ndarray, wanted: float) -> np.ndarray:
        """As many as it takes, or as there are, to be at a cost: (R,), bool; those first that are worth the least.

        Args:
            lost: (R,) what the task would lose with the set of each.
            wanted: the share of the starting network's cost to be at.
        """
        if self.cost.left(self.alive) <= wanted:
            return np.zeros(len(self.unit), dtype=bool)
        order = self._order(lost)
        low, high = 0, len(order)
        while low < high:
            middle = (low + high) // 2
            if self.cost.left(self.alive & ~np.isin(self.unit, order[:middle])) <= wanted:
                high = middle
            else:
                low = middle + 1
        fresh: np.ndarray = np.isin(self.unit, order[:low]) & self.alive
        return fresh

    def _order(self, lost: np.ndarray) -> np.ndarray:
        """The sets that may go, those first that lose the least for what they save."""
        saved = self.cost.saved(self.alive)
        rows = np.flatnonzero(self.alive & (self.unit >= 0))
        rows = rows[np.argsort(self.unit[rows], kind="stable")]
        found, first = np.unique(self.unit[rows], return_index=True)
        layers = np.split(self.layer[rows], first[1:])
        counts = np.bincount(self.layer[self.alive], minlength=len(self.least))
        may = []
        for i in np.argsort(lost[rows[first]] / np.maximum(saved[found], 1e-30), kind="stable"):
            own, going = np.unique(layers[i], return_counts=True)
            if saved[found[i]] > 0 and (counts[own] - going >= self.least[own]).all():
                counts[own] -= going
                may.append(found[i])
        return np.array(may, dtype=np.int64)
