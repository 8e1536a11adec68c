"""Which size to try next, on the way to the smallest that keeps an accuracy."""

import math
from dataclasses import dataclass

CLOSE = 1.15
"""A size that fails and one that keeps the accuracy are as near as it is worth, when their ratio is below this."""
_STEP = 0.5
"""What each round asks for, of the size before, until the first one fails."""


@dataclass(slots=True)
class Bracket:
    """The smallest size that kept the accuracy, and the largest below it that did not.

    Sizes are shares of the original, and what counts is their ratio: so the next one lies in the middle of the
    two by their logarithms.

    Attributes:
        start: the size to begin below.
        kept: the smallest size that kept it; None if none has.
        failed: the largest size below that one that did not; None if none has.

    >>> bracket = Bracket(0.25)
    >>> bracket.next()
    0.125
    >>> bracket.see(0.125, kept=True); bracket.see(0.0625, kept=False)
    >>> round(bracket.next(), 4)
    0.0884
    """

    start: float
    kept: float | None = None
    failed: float | None = None

    def see(self, size: float, *, kept: bool) -> None:
        """Take in how a size has turned out."""
        if kept:
            self.kept = size if self.kept is None else min(size, self.kept)
        else:
            self.failed = size if self.failed is None else max(size, self.failed)
        if self.kept is not None and self.failed is not None and self.failed >= self.kept:
            self.failed = None  # a smaller one has kept it since: training is not the same twice

    @property
    def upper(self) -> float:
        """The size that the next one is to be below."""
        return self.start if self.kept is None else self.kept

    def next(self) -> float | None:
        """The size to try next; None where there is nothing left to gain."""
        if self.failed is None:
            return self.upper * _STEP
        return math.sqrt(self.upper * self.failed) if self.upper > CLOSE * self.failed else None
