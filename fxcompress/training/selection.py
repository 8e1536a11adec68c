"""A share of the multiply-adds or of the latency to end at: what the task misses least for what it saves goes.

An objective presses on the bits of all channels alike, and a network that is to be fast rather than small gives up
precision for it that costs no time. Here all channels keep their bits but those that are to go: from time to time, as
many as the path to the target asks for are chosen, and the bits of each fall to 0 within a twentieth of the training.
They die as any other channel does.
"""

import logging
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from fxcompress.channels.analysis import Analysis
from fxcompress.objectives import LatencyTable
from fxcompress.objectives.latency import call_of
from fxcompress.training.choice import Choice
from fxcompress.training.costs import Cost, Macs, Seconds
from fxcompress.training.held import stepping
from fxcompress.training.importance import Importance
from fxcompress.training.network import SizedNetwork
from fxcompress.training.parallel import of_first
from fxcompress.training.plain_copy import plain_copy
from fxcompress.training.sized import SizedModule

_LOG = logging.getLogger("fxcompress")
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
WORDS = {"macs": "multiply-adds", "latency": "latency"}
"""What is counted."""
_BIASES_GO = 20.0
"""How far biases fall in a whole training at least: one of 2, of a channel that was chosen, within a tenth of it."""
_FOLLOWING: WeakKeyDictionary[SizedNetwork, tuple[str, list[RemovableHandle]]] = WeakKeyDictionary()
"""What each network is led to in a loop of the user's, in words, and the hooks that do it."""


@dataclass(slots=True)
class Selection:
    """Leads a network to a share of its multiply-adds, or of its latency, as it trains.

    A network has one at a time: a new one ends the one before, and forgets what that has chosen.

    When a channel was chosen, and what :class:`Importance` has said of it since the last choice, is noted beside the
    flags of what is dead, so that it is cut with the network.

    Attributes:
        net: the network.
        target: share of what the starting network costs, above 0 and below 1.
        total: steps of the training.
        kind: what is counted.
        table: the seconds of the layers, where the latency counts; None for one that is measured at the start.
        arrival: share of the training after which all that is to go has been chosen.
        done: steps that were made, where it follows an optimizer.
    """

    net: SizedNetwork
    target: float
    total: int
    kind: Literal["macs", "latency"] = "macs"
    table: LatencyTable | None = None
    arrival: float = 0.4
    done: int = 0
    _importance: Importance | None = field(default=None, init=False, repr=False)
    _of: tuple[Analysis, ...] = field(default=(), init=False, repr=False)
    _noted: Tensor = field(default_factory=lambda: torch.zeros(0, 2, device="cpu"), init=False, repr=False)
    _steps: list[Tensor] = field(default_factory=list, init=False, repr=False)
    _looks: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        _end_following(self.net)
        for part in _parts(self.net):
            part.fxc_start_selection(_BIASES_GO / max(1, self.total))

    @property
    def argument(self) -> str:
        """The name of the argument that the target was given as."""
        return f"target_{self.kind}"

    @property
    def what(self) -> str:
        """What is counted, in words."""
        return WORDS[self.kind]

    def measure(self, *, progress: bool = False) -> None:
        """Measure the layers, where that has to be and has not been: in the first of several processes.

        Args:
            progress: show a bar where it takes more than a few seconds.
        """
        if self.kind == "latency" and self.table is None:
            analyses = {
                path: part.liveness.census.analysis
                for path, part in self.net.fxc_parts().items()
                if isinstance(part, SizedModule)
            }

            def measured() -> dict[str, Any]:
                net, whole = self.net, None
                if isinstance(net, SizedModule):
                    whole = call_of(plain_copy(net)[0], net.settings.inputs)
                return LatencyTable.of_analyses(analyses, whole=whole, progress=progress).as_json()

            self.table = LatencyTable.from_json(of_first(measured))

    def left(self) -> float:
        """The share of what the starting network costs that is left, counting as gone what could be removed at once."""
        terms = self.net.fxc_all_terms()
        rows = sum(len(b) for b in self.net.fxc_bits)
        return self._cost(np.full(rows, -1)).left(np.ones(rows, dtype=bool)) if terms.uses else 0.0

    def _cost(self, unit: np.ndarray) -> Cost:
        terms = self.net.fxc_all_terms()
        return Macs(terms, unit) if self.table is None else Seconds(terms, unit, self.table)

    def follow(self, optimizer: Optimizer, progress: Callable[[], float] | None = None) -> list[RemovableHandle]:
        """See the gradients of each step of an optimizer, and lower bits after it; until the hooks are removed.

        Where the step gets a closure, there are gradients only after it. A step that a gradient scaler skips is none.

        Args:
            optimizer: of the network.
            progress: the share of the training that is done; by default by the steps of the optimizer.
        """

        def closed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
            return any(callable(found) for found in (*args, *kwargs.values()))

        def before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if progress is not None:
                self.done = round(progress() * self.total)
            if not closed(args, kwargs):
                scale = getattr(optimizer, "grad_scale", None)  # fused optimizers unscale by themselves
                self.see(self.done, 1.0 if scale is None else scale)

        def after(_: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if closed(args, kwargs):
                self.see(self.done)
            self.done += 1
            self.lower(self.done)

        steps = stepping(optimizer)
        hooks = [steps.register_step_pre_hook(before), steps.register_step_post_hook(after)]
        _FOLLOWING[self.net] = f"{self.target} of the {self.what}", hooks
        return hooks

    def floor(self) -> float:
        """The share that is left where all has gone that may."""
        importance = self._bound()
        state = self._state(importance.unit)
        fresh = state.next(np.zeros(len(importance.unit)), 0.0)
        return state.cost.left(state.alive & ~fresh)

    def wanted(self, done: int) -> float:
        """The share to be at after so many steps: by a cubic, fast while much is superfluous.

        Source: Zhu and Gupta, To prune, or not to prune, arXiv 1710.01878, equation 1.

        A quarter of the training, where half of it is for the path, is to leave an eighth of what is to go.
        """
        way = min(1.0, done / max(1.0, self.total * self.arrival))
        return self.target + (1 - self.target) * (1 - way) ** 3

    def see(self, done: int, scale: Tensor | float = 1.0) -> None:
        """Take in the gradients of a step, before the optimizer's; a few times between two choices.

        Args:
            done: steps before this one.
            scale: what the gradients are multiplied by at this time, by a gradient scaler.
        """
        if done % max(1, self._every // _LOOKS) == 0 and done <= self._last:
            importance = self._bound()
            self._noted[:, 1] += importance.now() / scale**2
            self._looks += 1

    @torch.no_grad()
    def lower(self, done: int, *, held: bool = False) -> None:
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
        fresh = self._state(importance.unit).next(self._noted[:, 1].cpu().numpy(), self.wanted(done))
        if fresh.any():
            self._noted[torch.from_numpy(fresh).to(self._noted.device), 0] = float(done)
            self._lay_out()

    def _state(self, unit: np.ndarray) -> Choice:
        """What is left to choose from, of the sets of :class:`Importance`."""
        counts = [len(b) for b in self.net.fxc_bits]
        bits = torch.cat([b.detach().float() for b in self.net.fxc_bits]).cpu().numpy()
        alive = (bits > 0) & np.isinf(self._noted[:, 0].cpu().numpy())
        layer = np.repeat(np.arange(len(counts)), counts)
        left = np.bincount(layer[alive], minlength=len(counts))
        return Choice(self._cost(unit), unit, layer, self._least(left), alive)

    def _least(self, counts: np.ndarray) -> np.ndarray:
        """How many channels of each layer stay: a share of those of the starting network, and two groups.

        Args:
            counts: (layers,) channels that are left; all of them are taken for those of the start where it is unknown.
        """
        names = [
            f"{path}.{name}" if path else name
            for path, part in self.net.fxc_parts().items()
            for name in part.liveness.census.weights  # type: ignore[attr-defined]
        ]
        terms = self.net.fxc_all_terms()
        before = {use.weight: use.outputs for use in terms.start.uses if not use.bits_of_inputs}
        two = {use.weight: 2 * use.outputs // use.blocks[1] for use in terms.uses if use.blocks[1] > 1}
        least = np.maximum(1, np.ceil(KEEP * np.array([before.get(n, c) for n, c in zip(names, counts, strict=True)])))
        return np.maximum(least, [two.get(name, 0) for name in names])

    def state_dict(self) -> dict[str, Any]:
        """What was chosen and found so far, for a checkpoint beside that of the network as it is; fit for JSON."""
        self._bound()
        return {
            "chosen": [None if step == float("inf") else step for step in self._noted[:, 0].tolist()],
            "lost": self._noted[:, 1].tolist(),
            "looks": self._looks,
            "done": self.done,
            "table": None if self.table is None else self.table.as_json(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave, once the network is what it was."""
        self._bound()
        chosen = [float("inf") if step is None else step for step in state["chosen"]]
        self._noted.copy_(self._noted.new_tensor([chosen, state["lost"]]).T)
        self._looks, self.done = state["looks"], state["done"]
        self.table = None if state["table"] is None else LatencyTable.from_json(state["table"])
        self._lay_out()


def _fresh(bits: Tensor) -> Tensor:
    """The notes of channels that were never chosen, (K, 2)."""
    return torch.stack([torch.full_like(bits, torch.inf), torch.zeros_like(bits)], dim=1)


def _parts(net: SizedNetwork) -> list[SizedModule]:
    return [part for part in net.fxc_parts().values() if isinstance(part, SizedModule)]


def _end_following(net: SizedNetwork) -> None:
    """End what leads a network in a loop of the user's, and say so where it was still at it."""
    where, hooks = _FOLLOWING.pop(net, ("", []))
    live = [hook for hook in hooks if hook.id in (hook.hooks_dict_ref() or ())]
    for hook in live:
        hook.remove()
    if live:
        _LOG.warning(
            "fxcompress: the network was on its way to %s; that has ended, and what is asked for now takes its place: "
            "channels that were chosen and are not dead yet stay", where,
        )  # fmt: skip
