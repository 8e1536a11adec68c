"""A share of the multiply-adds to end at: the channels that the task misses least for what they save lose their bits.

An objective presses on the bits of all channels alike, and a network that is to be fast rather than small gives up
precision for it that costs no time. Here all channels keep their bits but those that are to go: from time to time, as
many as the path to the target asks for are chosen, and the bits of each fall to 0 within a twentieth of the training.
They die as any other channel does.
"""

import operator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxcompress.channels.analysis import Analysis
from fxcompress.errors import check_number
from fxcompress.training.importance import Importance
from fxcompress.training.macs import Macs
from fxcompress.training.network import SizedNetwork
from fxcompress.training.sized import SizedModule

KEEP = 0.1
"""Share of the channels of each layer of the starting network that stay."""
_TIMES = 100
"""How often channels are chosen in a whole training."""
_FALL = 0.05
"""Share of the training in which the bits of a chosen channel fall."""
_FROM = 8.0
"""Where they begin."""
_LOOKS = 4
"""Of how many steps gradients are looked at between two choices, where there are as many."""


@dataclass(slots=True)
class Selection:
    """Leads a network to a share of its multiply-adds, as it trains.

    When a channel was chosen, and what :class:`Importance` has said of it since the last choice, is noted beside the
    flags of what is dead, so that it is cut with the network.

    Attributes:
        net: the network.
        target: share of the multiply-adds of the starting network, above 0 and below 1.
        total: steps of the training.
        arrival: share of the training after which all that is to go has been chosen.
    """

    net: SizedNetwork
    target: float
    total: int
    arrival: float = 0.4
    _importance: Importance | None = field(default=None, init=False, repr=False)
    _of: tuple[Analysis, ...] = field(default=(), init=False, repr=False)
    _noted: Tensor = field(default_factory=lambda: torch.zeros(0, 2, device="cpu"), init=False, repr=False)
    _steps: list[Tensor] = field(default_factory=list, init=False, repr=False)
    _looks: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        check_number(target_macs=self.target)
        if not 0 < self.target < 1:
            raise ValueError(f"target_macs={self.target} must be a share of the multiply-adds, between 0 and 1")
        for part in _parts(self.net):
            part.liveness.flags.noted.clear()  # of another training

    def wanted(self, done: int) -> float:
        """The share to be at after so many steps: by a cubic, fast while much is superfluous.

        Source: Zhu and Gupta, To prune, or not to prune, arXiv 1710.01878, equation 1.

        A quarter of the training, where half of it is for the path, is to leave an eighth of what is to go.
        """
        way = min(1.0, done / max(1.0, self.total * self.arrival))
        return self.target + (1 - self.target) * (1 - way) ** 3

    def see(self, done: int) -> None:
        """Take in the gradients of a step, before the optimizer's; a few times between two choices.

        Args:
            done: steps before this one.
        """
        if done % max(1, self._every // _LOOKS) == 0 and done <= self._last:
            importance = self._bound()
            self._noted[:, 1] += importance.now()
            self._looks += 1

    @torch.no_grad()
    def follow(self, done: int, *, held: bool = False) -> None:
        """Choose, if it is time to, and lower the bits of what is chosen; between the optimizer's step and the net's.

        Args:
            done: steps, with this one.
            held: choose none now.
        """
        importance = self._bound()
        if done % self._every == 0 and done <= self._last and self._looks and not held:
            self._choose(importance, done)
            self._noted[:, 1], self._looks = 0, 0
        if not self._steps:
            return
        fall = _FROM / max(1.0, _FALL * self.total)
        levels = torch._foreach_mul(self._steps, fall)  # noqa: SLF001 - as torch's optimizers do
        torch._foreach_add_(levels, _FROM - fall * done)
        torch._foreach_clamp_min_(levels, 0.0)
        bits = self.net.fxc_bits
        torch._foreach_copy_(bits, [b.minimum(level.to(b.dtype)) for b, level in zip(bits, levels, strict=True)])

    @property
    def _every(self) -> int:
        """Steps from one choice to the next."""
        return max(1, self.total // _TIMES)

    @property
    def _last(self) -> float:
        """The step of the last choice, once the path has arrived."""
        return self.total * self.arrival + 2 * self._every

    def _bound(self) -> Importance:
        """What belongs to the network as it is; found anew when it has lost channels."""
        now = tuple(part.liveness.census.analysis for part in _parts(self.net))
        if self._importance is None or len(now) != len(self._of) or any(map(operator.is_not, now, self._of)):
            self._importance, self._of = Importance(self.net), now
            self._take_up(self._importance.dtype)
        return self._importance

    def _take_up(self, dtype: torch.dtype) -> None:
        """Put what is noted of all channels into one tensor, (R, 2), of which the notes are parts."""
        places = [
            (part.liveness.flags.noted, *named) for part in _parts(self.net) for named in part.liveness.named_bits()
        ]
        rows = [noted[name].to(dtype) if name in noted else _fresh(b).to(dtype) for noted, name, b in places]
        self._noted = torch.cat(rows) if rows else self._noted[:0]
        for (noted, name, _), own in zip(places, self._noted.split([len(b) for _, _, b in places]), strict=True):
            noted[name] = own
        self._lay_out()

    def _lay_out(self) -> None:
        """Put the steps at which channels were chosen beside their bits, where any was."""
        self._steps = []
        if bool(self._noted[:, 0].isfinite().any()):
            self._steps = [s.contiguous() for s in self._noted[:, 0].split([len(b) for b in self.net.fxc_bits])]

    def _choose(self, importance: Importance, done: int) -> None:
        """Choose as many sets of channels as the path asks for."""
        bits = torch.cat([b.detach().float() for b in self.net.fxc_bits]).cpu().numpy()
        noted, unit = self._noted.cpu().numpy(), importance.unit
        alive = (bits > 0) & np.isinf(noted[:, 0])
        macs = Macs(self.net.fxc_all_terms(), unit)
        if macs.left(alive) <= self.wanted(done):
            return
        order = self._order(importance.unit, noted[:, 1], macs, alive)
        low, high = 0, len(order)
        while low < high:
            middle = (low + high) // 2
            if macs.left(alive & ~np.isin(unit, order[:middle])) <= self.wanted(done):
                high = middle
            else:
                low = middle + 1
        fresh = np.isin(unit, order[:low]) & alive
        if fresh.any():
            self._noted[torch.from_numpy(fresh).to(self._noted.device), 0] = float(done)
            self._lay_out()

    def _order(self, unit: np.ndarray, lost: np.ndarray, macs: Macs, alive: np.ndarray) -> np.ndarray:
        """The sets of channels that may be chosen, those first that cost the least for what they save.

        Args:
            unit: (R,) as in :class:`Importance`.
            lost: (R,) what the task would lose.
            macs: counts.
            alive: (R,) the channels that are left.
        """
        saved = macs.saved(alive)
        layer = np.repeat(np.arange(len(self.net.fxc_bits)), [len(b) for b in self.net.fxc_bits])
        rows = np.flatnonzero(alive & (unit >= 0))
        rows = rows[np.argsort(unit[rows], kind="stable")]
        found, first = np.unique(unit[rows], return_index=True)
        layers = np.split(layer[rows], first[1:])
        counts = np.bincount(layer[alive], minlength=layer.max(initial=-1) + 1)
        least = np.maximum(1, np.ceil(KEEP * self._started_with(counts)))
        may = []
        for i in np.argsort(lost[rows[first]] / np.maximum(saved[found], 1e-30), kind="stable"):
            own, going = np.unique(layers[i], return_counts=True)
            if saved[found[i]] > 0 and (counts[own] - going >= least[own]).all():
                counts[own] -= going
                may.append(found[i])
        return np.array(may, dtype=np.int64)

    def _started_with(self, counts: np.ndarray) -> np.ndarray:
        """How many channels each layer had in the starting network, as many as there are where that is not known."""
        names = [
            f"{path}.{name}" if path else name
            for path, part in self.net.fxc_parts().items()
            for name in part.liveness.census.weights  # type: ignore[attr-defined]
        ]
        before = {use.weight: use.outputs for use in self.net.fxc_all_terms().start.uses if not use.bits_of_inputs}
        return np.array([before.get(name, count) for name, count in zip(names, counts, strict=True)])

    def state_dict(self) -> dict[str, Any]:
        """What was chosen and found so far, for a checkpoint beside that of the network as it is."""
        self._bound()
        return {"noted": self._noted, "looks": self._looks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave, once the network is what it was."""
        self._bound()
        self._noted.copy_(state["noted"])
        self._looks = state["looks"]
        self._lay_out()


def _fresh(bits: Tensor) -> Tensor:
    """The notes of channels that were never chosen, (K, 2)."""
    return torch.stack([torch.full_like(bits, torch.inf), torch.zeros_like(bits)], dim=1)


def _parts(net: SizedNetwork) -> list[SizedModule]:
    return [part for part in net.fxc_parts().values() if isinstance(part, SizedModule)]
