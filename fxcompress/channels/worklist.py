"""Which rules of a fixpoint must be looked at again once some components have come back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fxcompress.channels.space import Reason


@dataclass(frozen=True, slots=True, eq=False)
class Rule:
    """A constraint that puts atoms back.

    Attributes:
        broken: from what is dead, bool (atoms,), to the dead atoms that must come back, int64 (n,).
        reason: for these to stay.
        reads: all atoms that ``broken`` looks at, arrays of any shape.
    """

    broken: Callable[[np.ndarray], np.ndarray]
    reason: Reason
    reads: tuple[np.ndarray, ...]


class Index:
    """The places of each number in an array.

    Args:
        numbers: int64 (n,), each below ``size``.
        size: how many different numbers there may be.
    """

    def __init__(self, numbers: np.ndarray, size: int) -> None:
        self._order = np.argsort(numbers, kind="stable")
        self._counts = np.bincount(numbers, minlength=size)
        self._ends = np.cumsum(self._counts)

    def of(self, numbers: np.ndarray) -> np.ndarray:
        """The places of all of ``numbers`` (m,), int64; takes time in proportion to how many these are."""
        counts = self._counts[numbers]
        ends = np.cumsum(counts)
        total = int(ends[-1]) if len(ends) else 0
        places: np.ndarray = self._order[np.arange(total) + np.repeat(self._ends[numbers] - ends, counts)]
        return places


class Worklist:
    """Rules, in order, and which of them may be broken: at first all, then those that read what has come back.

    Args:
        rules: in the order in which they are looked at.
        component: int64 (atoms,), the smallest atom that each one goes together with.
    """

    def __init__(self, rules: Sequence[Rule], component: np.ndarray) -> None:
        self.rules = rules
        reads = [component[np.concatenate([a.reshape(-1) for a in rule.reads])] for rule in rules]
        self._rule = np.repeat(np.arange(len(rules)), [len(r) for r in reads])
        self._index = Index(np.concatenate(reads) if reads else np.zeros(0, dtype=np.int64), len(component))
        self._open = np.ones(len(rules), dtype=bool)

    def reopen(self, roots: np.ndarray) -> None:
        """The components of these atoms (n,) have come back."""
        if self.rules:
            self._open[self._rule[self._index.of(roots)]] = True

    def reopen_all(self) -> None:
        """Any rule may be broken."""
        self._open[:] = True

    def sweep(self, restore: Callable[[np.ndarray, Reason], None], dead: np.ndarray) -> bool:
        """Look once at each rule that may be broken, in order; whether there was one.

        Args:
            restore: puts atoms back, for a reason, and calls :meth:`reopen`.
            dead: bool (atoms,), which ``restore`` changes.
        """
        found = False
        at = 0
        while at < len(self._open):
            at += int(self._open[at:].argmax())
            if not self._open[at]:
                break
            found = True
            self._open[at] = False
            rule = self.rules[at]
            atoms = rule.broken(dead)
            if len(atoms):
                restore(atoms, rule.reason)
            at += 1
        return found
