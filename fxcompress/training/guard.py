"""Holding the pressure while a network forgets: what is removed does not come back."""

import math
from dataclasses import dataclass, field

from fxcompress.errors import check_number

_MEMORY = 0.98
"""Of the loss in the last step, for the smoothed loss: some fifty steps."""
_PERCENT = 100.0


def other_unit(least: float, metric: float) -> str:
    """How one of two accuracies seems to be in percent and the other a share of 1, in words; empty where none does.

    Args:
        least: what is asked for.
        metric: what was measured.

    >>> other_unit(97.0, 0.93), other_unit(0.97, 0.93)
    ('min_accuracy=97 seems to be in percent, and validate returned 0.93, a share of 1', '')
    """
    if 0 <= metric <= 1 < least <= _PERCENT:
        return f"min_accuracy={least:.4g} seems to be in percent, and validate returned {metric:.4g}, a share of 1"
    if 0 < least <= 1 and 2 < metric <= _PERCENT:  # some scores are a little above 1
        return f"min_accuracy={least:.4g} seems to be a share of 1, and validate returned {metric:.4g}, as in percent"
    return ""


@dataclass(slots=True)
class Guard:
    """Tells when gamma must be zero.

    Attributes:
        min_metric: no pressure after an epoch whose metric is lower, until one reaches it again.
        max_loss_increase: no pressure while the task's loss, smoothed, is above the lowest so far by more than this
            share: 0.2 for a fifth.
        low: whether the metric was too low.
        smoothed, lowest: the smoothed loss, and the lowest that it has been.

    >>> guard = Guard(max_loss_increase=0.5)
    >>> guard.see_loss(1.0); guard.holds
    False
    >>> for _ in range(100): guard.see_loss(2.0)
    >>> guard.holds
    True
    """

    min_metric: float | None = None
    max_loss_increase: float | None = None
    low: bool = field(default=False, repr=False)
    smoothed: float = field(default=math.nan, repr=False)
    lowest: float = field(default=math.inf, repr=False)

    def __post_init__(self) -> None:
        given = {"min_accuracy": self.min_metric, "max_loss_increase": self.max_loss_increase}
        check_number(**{name: value for name, value in given.items() if value is not None})
        if self.min_metric is not None and math.isnan(self.min_metric):
            raise ValueError("min_accuracy=nan is reached by no network, so that there would never be pressure")
        if self.max_loss_increase is not None and not self.max_loss_increase > 0:
            raise ValueError(f"max_loss_increase={self.max_loss_increase} must be positive: 0.2 allows a fifth more")

    @property
    def watches_loss(self) -> bool:
        """Whether :meth:`see_loss` is of use; it needs the loss on the host."""
        return self.max_loss_increase is not None

    @property
    def holds(self) -> bool:
        """Whether there must be no pressure now."""
        return self.low or (
            self.max_loss_increase is not None
            and self.smoothed > self.lowest + self.max_loss_increase * abs(self.lowest)  # likelihoods fall below 0
        )

    def see_loss(self, loss: float) -> None:
        """Take in the task's loss of a step."""
        self.smoothed = loss if math.isnan(self.smoothed) else _MEMORY * self.smoothed + (1 - _MEMORY) * loss
        self.lowest = min(self.lowest, self.smoothed)

    def see_metric(self, metric: float) -> None:
        """Take in the metric of an epoch; the higher the better, and one that is not a number reaches nothing."""
        self.low = self.min_metric is not None and not metric >= self.min_metric
