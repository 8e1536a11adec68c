"""Slots in a network that is cut: which slices of what is left they stand for."""

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from fxcompress.channels.analysis import Analysis
from fxcompress.channels.layers import Layers, support
from fxcompress.channels.space import FIXED, Slots, Space, components


class KnownSlots:
    """The slots of a network by what is left of their members.

    Args:
        analysis: of the network before the cut.
        alive: bool (atoms,), what is left.

    Attributes:
        name: int64 (atoms,), equal for atoms that stand for the same: a slot with one member left is that member.
        same: int64 (atoms,), equal for atoms that go together.
    """

    def __init__(self, analysis: Analysis, alive: np.ndarray) -> None:
        self.component = analysis.component
        self._of: dict[bytes, list[int]] = {}
        pairs = [pair for slots in analysis.space.slots for pair in self._read(slots, alive)]
        pairs += [(first, other) for first, *others in self._of.values() for other in others]
        a, b = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
        everything = np.arange(analysis.space.size)
        self.name = components(analysis.space.size, [(a, b)])
        self.same = components(analysis.space.size, [(everything, self.component), (a, b)]) if pairs else self.component

    def _read(self, slots: Slots, alive: np.ndarray) -> Iterator[tuple[int, int]]:
        """Enter what is left of the slots; the pairs of a slot and its only member."""
        left = alive[slots.members]
        for i in np.flatnonzero(alive[slots.atoms] & left.any(axis=1)).tolist():
            atom, members = int(slots.atoms[i]), np.unique(slots.members[i][left[i]])
            found = self._of.setdefault(self._key(members), [])
            if atom not in found:
                found.append(atom)
            if len(members) == 1:
                yield atom, int(members[0])

    def _key(self, members: np.ndarray) -> bytes:
        return np.unique(self.component[members]).tobytes()

    def find(self, members: np.ndarray) -> int:
        """The slot of a slice of what is left; FIXED for none, which no label of the original agrees with."""
        return self._of.get(self._key(members), [FIXED])[0]

    def told_apart(self, expected: Layers, found: Layers) -> Layers:
        """``found``, with the labels of ``expected`` in the place of those that stand for the same.

        Queries of (keys, queries to each of them, T, d) meet keys of (keys, 1, T, d): a slot for each head is left, but
        those of one key have members that go together, so they are found as one. The layer that is found does not vary
        along the second dim then, as the one that is expected does, although both say the same of each entry.
        """
        return tuple(next((x for x in expected if self._is_coarser(layer, x)), layer) for layer in found)

    def _is_coarser(self, found: Tensor, expected: Tensor) -> bool:
        fits = found.ndim == expected.ndim and support(found) < support(expected)
        return fits and bool((self.name[expected.numpy()] == self.name[found.numpy()]).all())

    def strangers(self, slots: Slots) -> np.ndarray:
        """Slots, and all of their members, that are not slots of the original: int64 (n,)."""
        wrong = [i for i, atom in enumerate(slots.atoms.tolist()) if not self._knows(atom, slots.members[i])]
        return np.concatenate([slots.atoms[wrong], slots.members[wrong].reshape(-1)])

    def _knows(self, atom: int, members: np.ndarray) -> bool:
        if (self.same[members] == self.same[atom]).all():
            return True
        known = self._of.get(self._key(members), [])
        return any((atom == FIXED) == (other == FIXED) and self.same[atom] == self.same[other] for other in known)


class PackedSpace(Space):
    """The space of a network that is cut: it makes no atoms, and finds its slots among those of the original."""

    def __init__(self, known: KnownSlots) -> None:
        super().__init__()
        self._known = known

    def _slot(self, row: np.ndarray) -> int:
        return self._known.find(row)
