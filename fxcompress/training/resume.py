"""A run of training that can be stopped and taken up again, to the very same numbers.

A run is taken up in the middle of an epoch like this: the generators are set to where they stood when the epoch began,
the loader starts again and gives the batches that were done, which are dropped; then the generators are set to where
they stood when the run was stopped.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from fxcompress.errors import CheckpointError
from fxcompress.passes.prune_report import KeptChannel, PruneReport
from fxcompress.training.controller import ConstantGamma
from fxcompress.training.guard import Guard
from fxcompress.training.history import EpochRecord
from fxcompress.training.policy import PrunePolicy
from fxcompress.training.randomness import loader_generators, restore_run, run_states
from fxcompress.training.selection import Selection
from fxcompress.training.statistics import LastBatches

_LOG = logging.getLogger("fxcompress")


class Position(Protocol):
    """Where a trainer stands, and what it adapts; see :class:`fxcompress.training.trainer.Trainer`."""

    done: int
    total: int
    last_gamma: float
    batch: int
    loss_sum: Tensor | None
    reports: list[PruneReport]
    policy: PrunePolicy | None
    guard: Guard
    average: AveragedModel | None
    selection: Selection | None

    @property
    def gamma(self) -> Callable[[float, float], float]:
        """The pressure."""
        ...

    @property
    def loss(self) -> Callable[..., Tensor]:
        """The loss of the task, perhaps with parameters of its own."""
        ...


@dataclass(frozen=True, slots=True)
class Keeper:
    """Where the state of a run is kept.

    Attributes:
        path: of the file, for messages.
        write: called with plain values; keeps them together with network, optimizer and scheduler.
        start: what was given to ``write`` when the run was stopped, once all else has been taken up; None at the
            start of a run.
    """

    path: str
    write: Callable[[dict[str, Any]], object]
    start: dict[str, Any] | None = None


@dataclass(slots=True, eq=False)
class Run:
    """The state of a run besides that of network, optimizer and scheduler.

    Attributes:
        trainer: that makes the steps.
        loader: the batches of each epoch.
        batches: how many.
        keeper: where to keep it all; None for nowhere.
        writes: whether this process is the one that keeps it.
        history: records of the epochs that are finished.
        seconds: that earlier attempts at the present epoch took.
        last: the last batches that the loader gave, also to an earlier attempt.
    """

    trainer: Position
    loader: Iterable[Any]
    batches: int
    keeper: Keeper | None
    writes: bool = True
    history: list[EpochRecord] = field(default_factory=list)
    seconds: float = 0.0
    last: LastBatches = field(init=False)
    _began: dict[str, Any] | None = None
    _stopped: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Keep no more batches than an epoch of this length needs."""
        self.last = LastBatches(self.batches)

    def take_up(self, device: torch.device) -> None:
        """Go on where the keeper says; nothing at the start of a run."""
        state = None if self.keeper is None else self.keeper.start
        if state is None:
            return
        trainer = self.trainer
        trainer.done, trainer.last_gamma, trainer.batch = state["done"], state["last_gamma"], state["batch"]
        trainer.loss_sum = None if state["loss_sum"] is None else state["loss_sum"].to(device)
        if state["gamma"] is not None:
            trainer.gamma.load_state_dict(state["gamma"])  # type: ignore[attr-defined]
        self.history[:] = [EpochRecord(**record) for record in state["history"]]
        trainer.reports[:] = [_report(report) for report in state["reports"]]
        trainer.guard.low, trainer.guard.smoothed, trainer.guard.lowest = state["guard"]
        if trainer.selection is not None:
            trainer.selection.load_state_dict(state["selection"])
        if trainer.policy is not None and state["wasted"] is not None:
            trainer.policy.wasted = state["wasted"]
        if trainer.average is not None:
            trainer.average.load_state_dict(state["average"])
        _load_loss(trainer.loss, state.get("loss"))
        self.seconds, self._began, self._stopped = state["seconds"], state["began"], state["now"]
        if not trainer.batch:
            restore_run(state["now"], self.loader)

    def _selected(self) -> dict[str, Any] | None:
        """What leads to a share of the multiply-adds or of the latency, and its target."""
        selection = self.trainer.selection
        return (
            None if selection is None else {"target": selection.target, "kind": selection.kind} | selection.state_dict()
        )

    def epoch(self) -> Iterator[Any]:
        """The batches of an epoch that are left to do."""
        skip = self.trainer.batch
        if skip and self._began is not None:
            restore_run(self._began, self.loader)
        elif self.keeper is not None:
            self._began = run_states(self.loader)
        batches = self._seen(iter(self.loader))
        for done in range(skip):
            if next(batches, None) is None:
                raise CheckpointError(
                    f"the run had done {skip} batches of an epoch, and the loader gives {done}; pass a loader of the "
                    "same batches"
                )
        if skip and self._stopped is not None:
            restore_run(self._stopped, self.loader)
        yield from batches
        self._began = None

    def _seen(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            self.last.see(batch)
            yield batch

    def keep(self, seconds: float = 0.0) -> None:
        """Write down where the run stands, where that is wanted; in the middle of an epoch after so many seconds."""
        if self.keeper is None or not self.writes:
            return
        trainer, guard = self.trainer, self.trainer.guard
        adapted = getattr(trainer.gamma, "state_dict", None)
        unbegun = not trainer.batch and self._began is not None  # stopped before the first batch of an epoch was there
        self.keeper.write(
            {
                "done": trainer.done, "last_gamma": float(trainer.last_gamma), "batch": trainer.batch,
                "loss_sum": trainer.loss_sum, "seconds": seconds, "batches": self.batches, "total": trainer.total,
                "control": type(trainer.gamma).__name__, "settings": _settings(trainer.gamma),
                "gamma": None if adapted is None else adapted(),
                "history": [record.as_dict() for record in self.history],
                "reports": [asdict(report) for report in trainer.reports],
                "average": None if trainer.average is None else trainer.average.state_dict(),
                "selection": self._selected(),
                "loss": trainer.loss.state_dict() if isinstance(trainer.loss, nn.Module) else None,
                "guard": [guard.low, guard.smoothed, guard.lowest],
                "wasted": None if trainer.policy is None else trainer.policy.wasted,
                "began": self._began if trainer.batch else None,
                "now": self._began if unbegun else run_states(self.loader),
            }
        )  # fmt: skip


def _load_loss(loss: object, state: dict[str, Any] | None) -> None:
    """Give a loss that is a module what it had; nothing where it is none, or the file is of an earlier version."""
    if isinstance(loss, nn.Module) and state is not None:
        try:
            loss.load_state_dict(state)
        except RuntimeError as error:
            raise CheckpointError(f"the loss is another one than the run began with: {error}") from error


def check_run(
    state: Mapping[str, Any],
    gamma: object,
    loader: Iterable[Any],
    batches: int,
    average: AveragedModel | None,
    selection: Selection | None,
    *,
    epochs: int,
    own_scheduler: bool,
) -> None:
    """Whether a run can go on with these.

    Args:
        state: what was kept of the run.
        gamma: the pressure.
        loader: the batches of each epoch.
        batches: how many.
        average: the moving average.
        selection: what leads to a share of the multiply-adds or of the latency.
        epochs: of the whole run.
        own_scheduler: the user gave the scheduler, whose course is then the user's.

    Raises:
        CheckpointError: it was one of another kind.
    """
    kind = type(gamma).__name__
    if kind != state["control"]:
        raise CheckpointError(
            f"the run was one with a {state['control']} for gamma, and this one has a {kind}; "
            "pass the gamma or target_size that it began with"
        )
    was, now = state.get("settings", {}), _settings(gamma)
    for name in sorted(name for name in was.keys() & now.keys() if was[name] != now[name]):
        _LOG.warning(
            "the run began with %s %s=%g and goes on with %g: the result is that of neither", kind, name, was[name],
            now[name],
        )  # fmt: skip
    if batches != state["batches"]:
        raise CheckpointError(
            f"the run had {state['batches']} batches in an epoch, and the loader has {batches}; "
            "pass a loader of the same batches"
        )
    _check_epochs(state["total"] // batches, epochs, gamma, own_scheduler=own_scheduler)
    if (average is None) != (state["average"] is None):
        raise CheckpointError(
            "the run kept a moving average, so it needs average= to go on"
            if average is None
            else "the run kept no moving average, so there is none to go on with; leave average= out"
        )
    kept, none = state.get("selection"), "neither target_macs nor target_latency"
    began = none if kept is None else f"target_{kept['kind']}={kept['target']}"
    given = none if selection is None else f"{selection.argument}={selection.target}"
    if began != given:
        raise CheckpointError(f"the run was one with {began}, and this one has {given}; pass what it began with")
    generators, before = len(loader_generators(loader)), len(state["now"]["loader"])
    if generators != before:
        raise CheckpointError(
            f"the loader of the run had {before} random generators of its own, and this one has {generators}; "
            "pass a loader that is made as it was then"
        )


def _settings(gamma: object) -> dict[str, float]:
    """The numbers that a pressure was made with: its target, say, and not what it has adapted since."""
    if not is_dataclass(gamma):
        return {}
    named = {f.name: getattr(gamma, f.name) for f in fields(gamma) if f.init and not f.name.startswith("_")}
    return {name: float(value) for name, value in named.items() if isinstance(value, int | float)}


def _check_epochs(before: int, now: int, gamma: object, *, own_scheduler: bool) -> None:
    """Learning rates and pressure follow a course over all epochs: another number of them is another course."""
    constant = isinstance(gamma, ConstantGamma) and not gamma.warmup
    if now == before or (constant and own_scheduler):
        return
    what = "gamma follows a course" if own_scheduler else "the learning rates follow a course"
    raise CheckpointError(
        f"the run was one of {before} epochs, and this one is of {now}: {what} over all epochs, so the result would be "
        f"neither; pass epochs={before}. To train longer, call fit(result.net, ...) when it is finished; a run with "
        "a scheduler= of its own and a constant gamma can be made longer at any time"
    )


def _report(state: dict[str, Any]) -> PruneReport:
    return PruneReport(**{**state, "kept": tuple(KeptChannel(**kept) for kept in state["kept"])})
