"""How hard to press: gamma over the course of training."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fxcompress.errors import check_number

EARLY = 0.25
"""The share of a fine-tuning after which the size should be at the target: a trained network need not learn first."""
_SMOOTHING = 0.3
"""Weight of the newest step in the speed at which a network shrinks."""
_NEAR = 0.1
"""The share of the training beyond which nothing is foreseen, in runs of few steps."""
_FORGETTING = 3.0
"""How much faster the integral falls than it rises: what was needed to get under way is soon too much."""
_JUMP = 0.3
"""The integral sees no more of an error below the path: a network that loses a layer at once will not do so again."""
_FALL = 2.0
"""How much the logarithm of the path may fall in a whole training after a hold, where there was hardly a way to go."""


Gamma = Callable[[float, float], float]
_G = TypeVar("_G", bound=Gamma)


def gamma_now(gamma: Gamma, progress: float, size: float) -> float:
    """What a gamma says of the next step.

    Args:
        gamma: perhaps the user's own function.
        progress: share of the training that is done, 0 to 1.
        size: share of the original bits that is left.

    Raises:
        TypeError: it is no number.
        ValueError: it is not finite.

    >>> gamma_now(lambda progress, size: size, 0.5, 0.25)
    0.25
    """
    value = gamma(progress, size)
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"gamma returned a {type(value).__name__} for progress={progress:.3g}, size={size:.3g}; it must return one "
            "number, the weight of the size in the loss"
        ) from error
    if not math.isfinite(number):
        raise ValueError(f"gamma returned {number} for progress={progress:.3g}, size={size:.3g}; it must be finite")
    return number


def own_gamma(gamma: _G) -> _G:
    """For one training: what ours adapts belongs to it, and one object may be given to several trainings."""
    return copy.copy(gamma) if isinstance(gamma, TargetSize) else gamma


def held(gamma: Gamma) -> Gamma:
    """What takes the place of a gamma while there must be no pressure."""
    return gamma.held if isinstance(gamma, TargetSize) else ConstantGamma(0.0)


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
    follows the logarithm of size over wanted size by a proportional-integral-derivative rule. It needs no tuning to the
    size of the network, which a fixed gamma does: the pressure on b grows with the share of the weights that a channel
    holds.

    A network that shrinks goes on shrinking for some steps after the pressure has ended, as optimizers average over
    steps. So what is compared is where the size will be by then, and where it is wanted then. A network that is too
    small all the same gets a negative gamma, as the task seldom makes it larger: what is alive gets bits back.

    While there must be no pressure (:meth:`held`), the path stops. After that it begins anew where the network is by
    then, and falls no faster than it would have, and more slowly towards the end of the training: so it may arrive
    later, or not at all.

    Attributes:
        target: share of the original 32-bit weights, above 0 and below 1.
        warmup: share of the training without pressure.
        arrival: share of the training after which the size should be at the target.
        gamma: what to begin with; adapted by the rule.
        proportional: how strongly gamma rises with the logarithm of size over wanted size.
        braking: how strongly it falls where the size is below what is wanted: to 0 at 1/braking.
        integral: what each step adds of that logarithm.
        horizon: for how many steps a network goes on shrinking; 10 is the memory of Adam.
    """

    target: float
    warmup: float = 0.03
    arrival: float = 0.5
    gamma: float = 0.03
    proportional: float = 6.0
    braking: float = 150.0
    integral: float = 0.4
    horizon: float = 10.0
    _start: float | None = field(default=None, repr=False)
    _sum: float = field(default=0.0, repr=False)
    _last: tuple[float, float] | None = field(default=None, repr=False)
    _speed: float = field(default=0.0, repr=False)
    _path: tuple[float, float, float] | None = field(default=None, repr=False)
    _stopped: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        check_number(target_size=self.target)
        if not 0 < self.target < 1:
            raise ValueError(f"target_size={self.target} must be a share of the original bits, between 0 and 1")

    def wanted(self, progress: float) -> float:
        """The size to be at, at a point of the training."""
        start, begun, arrival = self._path or self._first_path()
        way = 0.0 if self._stopped else progress - begun
        share = min(1.0, max(0.0, way / max(arrival - begun, 1e-9)))
        return math.exp((1 - share) * math.log(max(start, 1e-9)) + share * math.log(self.target))

    def _first_path(self) -> tuple[float, float, float]:
        """The size that the path starts from, and the points of the training at which it begins and arrives."""
        return self.target if self._start is None else self._start, self.warmup, self.arrival

    def __call__(self, progress: float, size: float) -> float:
        """Gamma for the next step.

        Args:
            progress: share of the training that is done, 0 to 1.
            size: share of the original bits that is left.
        """
        self._begin(size)
        if self._stopped:
            self._begin_anew(progress, size)
        return self._gamma(progress, size)

    def _begin(self, size: float) -> None:
        """Note where the path starts, in the first step."""
        if self._start is None:
            self._start = max(size, self.target)

    def _begin_anew(self, progress: float, size: float) -> None:
        """Let the path go on from the present size; from where it stopped, if the network is below that.

        A large error that a hold has left would press so hard that the network falls far below the path.
        """
        start, begun = max(size, self.wanted(progress)), max(progress, self.warmup)
        first, _, _ = self._first_path()
        fall = max(_FALL, math.log(first / self.target) / max(self.arrival - self.warmup, 1e-9))
        fall *= min(1.0, (1 - begun) / max(1 - self.arrival, 1e-9))
        need = math.log(start / self.target) / max(fall, 1e-9)
        self._path = start, begun, max(self.arrival, begun + need)
        self._stopped = False

    def _gamma(self, progress: float, size: float) -> float:
        log_size = math.log(max(size, 1e-9))
        now, error = log_size - math.log(self.wanted(progress)), self._coming(progress, log_size)
        if progress < self.warmup:
            return 0.0
        if (now > 0) == (error > 0):
            added = self.integral * (error if error > 0 else _FORGETTING * max(error, -_JUMP))
            self._sum = min(8.0, max(-8.0, self._sum + added))
        above = math.exp(min(5.0, self.proportional * error))
        below = max(0.0 if now > 0 else -1.0, 1 + self.braking * error)
        return self.gamma * math.exp(self._sum) * (above if error > 0 else below)

    def held(self, progress: float, size: float) -> float:
        """Gamma for the next step where there must be no pressure: negative for a network that is too small, or else 0.

        Pressure that has just ended may have carried it far below the path, and the task alone would leave it there.
        """
        self._begin(size)
        if not self._stopped:
            self._path = (self.wanted(progress), progress, self.arrival)
            self._stopped = True
        before = self._sum
        gamma = self._gamma(progress, size)
        self._sum = min(before, self._sum)
        return min(0.0, gamma)

    def _coming(self, progress: float, log_size: float) -> float:
        """How far above the path, in logarithms, the size will be when a network stops that is let go now."""
        before, self._last = self._last, (progress, log_size)
        if before is None:
            return log_size - math.log(self.wanted(progress))
        self._speed += _SMOOTHING * (log_size - before[1] - self._speed)
        step = max(progress - before[0], 1e-9)
        horizon = min(self.horizon, _NEAR / step)
        return log_size + horizon * min(self._speed, 0.0) - math.log(self.wanted(progress + horizon * step))

    def state_dict(self) -> dict[str, Any]:
        """What has been adapted, for a checkpoint."""
        return {
            "start": self._start, "sum": self._sum, "last": self._last, "speed": self._speed,
            "path": self._path, "stopped": self._stopped,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self._start, self._sum = state["start"], state["sum"]
        last, path = state.get("last"), state.get("path")  # missing in files of earlier versions, as the speed may be
        self._last, self._speed = (float(last[0]), float(last[1])) if last else None, state.get("speed", 0.0)
        self._path = (float(path[0]), float(path[1]), float(path[2])) if path else None
        self._stopped = state.get("stopped", False)
