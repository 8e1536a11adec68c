"""How hard to press: gamma over the course of training."""

import math
from dataclasses import dataclass, field
from typing import Any

from fxcompress.errors import check_number


@dataclass(frozen=True, slots=True)
class ConstantGamma:
    """The same gamma throughout, after a linear warm-up.

    Attributes:
        gamma: weight of the size in the loss.
        warmup: share of the training in which gamma rises from 0.
    """

    gamma: float
    warmup: float = 0.0

    def __call__(self, progress: float, size: float) -> float:
        """Gamma at a point of the training; see :class:`TargetSize`."""
        return self.gamma * min(1.0, progress / self.warmup) if self.warmup > 0 else self.gamma


@dataclass(slots=True)
class TargetSize:
    """Steers gamma so that training ends at a given share of the original bits.

    The wanted size falls geometrically from where it starts to the target, which it reaches at ``arrival``; gamma
    follows by a proportional-integral rule on the logarithm of size over wanted size. It needs no tuning to the size of
    the network, which a fixed gamma does: the pressure on b grows with the share of the weights that a channel holds.

    Attributes:
        target: share of the original 32-bit weights, above 0 and below 1.
        warmup: share of the training without pressure.
        arrival: share of the training after which the size should be at the target.
        gamma: what to begin with; adapted by the rule.
        proportional: how strongly gamma rises with the logarithm of size over wanted size.
        braking: the same where the size is below what is wanted. It is much higher, as pressure makes a network
            smaller and nothing makes it larger again but the task.
        integral: what each step adds of that logarithm.
    """

    target: float
    warmup: float = 0.03
    arrival: float = 0.5
    gamma: float = 0.03
    proportional: float = 6.0
    braking: float = 60.0
    integral: float = 0.15
    _start: float | None = field(default=None, repr=False)
    _sum: float = field(default=0.0, repr=False)

    def __post_init__(self) -> None:
        check_number(target_size=self.target)
        if not 0 < self.target < 1:
            raise ValueError(f"target_size={self.target} must be a share of the original bits, between 0 and 1")

    def wanted(self, progress: float) -> float:
        """The size to be at, at a point of the training."""
        start = self._start if self._start is not None else self.target
        share = min(1.0, max(0.0, (progress - self.warmup) / max(self.arrival - self.warmup, 1e-9)))
        return math.exp((1 - share) * math.log(max(start, 1e-9)) + share * math.log(self.target))

    def __call__(self, progress: float, size: float) -> float:
        """Gamma for the next step.

        Args:
            progress: share of the training that is done, 0 to 1.
            size: share of the original bits that is left.
        """
        if self._start is None:
            self._start = max(size, self.target)
        if progress < self.warmup:
            return 0.0
        error = math.log(max(size, 1e-9) / self.wanted(progress))
        self._sum = min(8.0, max(-8.0, self._sum + self.integral * error))
        gain = self.proportional if error > 0 else self.braking
        return self.gamma * math.exp(min(5.0, max(-30.0, gain * error + self._sum)))

    def state_dict(self) -> dict[str, Any]:
        """What has been adapted, for a checkpoint."""
        return {"start": self._start, "sum": self._sum}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self._start, self._sum = state["start"], state["sum"]
