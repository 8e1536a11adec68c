"""``fxcompress.fit_to_accuracy``: the smallest network that is still good enough, round by round."""

import copy
import inspect
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from fxcompress.errors import check_number
from fxcompress.fitting import compressed_for, fit
from fxcompress.objectives import LatencyTable
from fxcompress.storage.file import save
from fxcompress.storage.states import check_place
from fxcompress.trace.basics.modules import elements_in
from fxcompress.training.aims import By, Goal
from fxcompress.training.batches import check_callable
from fxcompress.training.bracket import CLOSE, Bracket
from fxcompress.training.display import tell
from fxcompress.training.fit import Validate, measured, name_of, needed
from fxcompress.training.guard import other_unit
from fxcompress.training.history import shown
from fxcompress.training.in_pieces import Compressed
from fxcompress.training.parallel import is_first, mean_of_processes
from fxcompress.training.trainer import Loss

_LOG = logging.getLogger("fxcompress")
_OWN = {
    "gamma": "the pressure follows from min_accuracy",
    "target_size": "each round has its own",
    "target_macs": 'each round has its own; pass by="macs" for the one with the least multiply-adds',
    "target_latency": 'each round has its own; pass by="latency" for the fastest one',
    "optimizer": "each round makes its own, for the network that it begins with",
    "scheduler": "each round makes its own",
    "average": "each round begins with another network",
    "checkpoint": "pass path=, to keep the best network of the rounds that are done",
    "resume": "pass the network of error.net, or of load(), as the model to go on from",
}
"""Arguments of :func:`fxcompress.fit` that make no sense here, and why."""
_OPTIONS = frozenset(inspect.signature(fit).parameters)


@dataclass(frozen=True, slots=True)
class Round:
    """One training, and how it turned out.

    Attributes:
        target: share of the original that was asked for; None of the network as it was at the start.
        size: share that was reached: of the bits (fractional), or of what else is counted.
        metric: what ``validate`` said of the finalized network.
        kept: whether that is at least ``min_accuracy``.
        metric_name: the name of the function ``validate``; an ``accuracy`` is shown as a percentage.
        counted: what is counted, in words.
    """

    target: float | None
    size: float
    metric: float
    kept: bool
    metric_name: str = "metric"
    counted: str = "bits"

    def __str__(self) -> str:
        outcome = "good enough" if self.kept else "not good enough"
        return f"{self.counted} {self.size:6.2%} {shown(self.metric, self.metric_name)} {outcome}"


@dataclass(frozen=True, slots=True, repr=False)
class AccuracyResult:
    """The result of :func:`fit_to_accuracy`; ``print(result)`` shows its rounds.

    Attributes:
        module: the finalized network in evaluation mode: the smallest that kept the accuracy, or the best of all where
            ``kept`` is False.
        net: the same with its quantizers, to be trained on.
        size: its share of the original bits (fractional), or of what else is counted.
        metric: what ``validate`` said of ``module``.
        kept: whether that is at least ``min_accuracy``.
        rounds: all trainings, the network as it was at the start first.
    """

    module: nn.Module
    net: Compressed
    size: float
    metric: float
    kept: bool
    rounds: list[Round] = field(default_factory=list)

    def __repr__(self) -> str:
        parameters = elements_in(self.module)
        best = "the smallest that is good enough" if self.kept else "none is good enough, the best"
        metric = shown(self.metric, self.rounds[0].metric_name if self.rounds else "metric")
        counted = self.rounds[0].counted if self.rounds else "bits"
        lines = [
            f"AccuracyResult after {len(self.rounds) - 1} rounds; {best}: {counted} {self.size:.2%} {metric}",
            *map(str, self.rounds),
            f".module: {type(self.module).__name__} with {parameters:,} parameters, to be used and saved",
        ]
        return "\n  ".join(lines)


def fit_to_accuracy(
    model: nn.Module,
    loader: Iterable[Any],
    loss_fn: Loss,
    *,
    min_accuracy: float,
    validate: Validate,
    epochs: int,
    by: By = "size",
    latency_table: LatencyTable | None = None,
    rounds: int = 6,
    fine_tune: bool = True,
    example_inputs: object = None,
    path: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **options: Any,  # noqa: ANN401 - those of fit
) -> AccuracyResult:
    """Find the smallest network that keeps an accuracy, by rounds of training.

    Each round is a :func:`fxcompress.fit` with a target of its own, and begins with the smallest network so far that
    kept the accuracy. The first one asks for half of what the network starts with; while rounds keep the accuracy, each
    asks for half of what the last one did, and after one that did not, for the geometric middle of the two. What counts
    is the finalized network, measured when its formats rest.

    Args:
        model: any network, or one from :func:`fxcompress.compress`, for an objective of your own, say; both are left as
            they are.
        loader: as for :func:`fxcompress.fit`.
        loss_fn: the same.
        min_accuracy: what ``validate`` must return at least.
        validate: called with a network in evaluation mode; returns a number, the higher the better. Data that it
            measures on are chosen by here, as by any search: keep others for the last word.
        epochs: of each round.
        by: what is to be small: ``"size"``, the bits that are left; ``"macs"``, the multiply-adds; ``"latency"``, the
            seconds of a :class:`LatencyTable`. See ``target_size``, ``target_macs`` and ``target_latency`` of ``fit``.
        latency_table: these seconds; measured at the start by default.
        rounds: of training, at most; fewer where nothing is left to gain.
        fine_tune: whether the weights are trained already, see :func:`fxcompress.fit`. If not, the first round trains
            them, and the others begin with what it has found.
        example_inputs: taken from the first batch by default.
        path: a file that the smallest network so far is kept in, by :func:`fxcompress.save`, from the round that found
            it on: what is left when a run is stopped.
        progress: show a live display of each round, and a line when it ends.
        options: others of :func:`fxcompress.fit`: ``teacher``, ``lr``, ``prune``, ``on_epoch`` and so on.

    Raises:
        TypeError: an option is unknown, or an argument is of another kind.
        ValueError: ``rounds`` is less than 1, ``by`` is something else, an option is one that each round chooses
            itself, or ``min_accuracy`` is in percent and what ``validate`` returns a share of 1, or the reverse.
        CheckpointError: ``path`` cannot be written.
        FxCompressError: see :func:`fxcompress.compress`, and what :func:`fxcompress.fit` raises.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> x = torch.randn(64, 4)
    >>> y = (x[:, 0] > 0).long()
    >>> model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> found = fit_to_accuracy(
    ...     model, [(x, y)] * 20, nn.functional.cross_entropy, min_accuracy=0.8, fine_tune=False, epochs=3, rounds=2,
    ...     validate=lambda net: float((net(x).argmax(1) == y).float().mean()), lr=0.02, progress=False)
    >>> found.kept, found.metric >= 0.8, len(found.rounds)
    (True, True, 3)
    """
    _check(validate, min_accuracy, rounds, path, options)
    goal = _goal(by, latency_table)
    start = compressed_for(model, loader, example_inputs)
    start = copy.deepcopy(start) if start is model else start  # the caller may be leading it somewhere
    search = _Search(validate, min_accuracy, path, goal, shown=progress and is_first())
    module = start.finalize().eval()
    metric = search.measure(module)
    unit = other_unit(min_accuracy, metric)
    if unit:
        raise ValueError(f"{unit}, so that all networks would be good enough or none: pass both in the same unit")
    goal.begin(start, progress=progress)
    search.see(None, copy.deepcopy(start), module, metric)
    bracket = Bracket(goal.share(start))
    for _ in range(rounds):
        target = bracket.next()
        if target is None:
            break
        kept = search.best if search.best is not None and search.best.kept else None
        net = copy.deepcopy(start if kept is None else kept.net)
        floor = goal.floor(net)
        if floor > target:
            target = floor
            if target * CLOSE > bracket.upper:
                break
        trained = fit(
            net, loader, loss_fn, epochs=epochs, fine_tune=fine_tune or kept is not None, validate=validate,
            progress=progress, **goal.options(target), **options,
        )  # fmt: skip
        found = search.see(target, trained.net, trained.module, search.measure(trained.module))
        bracket.see(found.size, kept=found.kept)
    return search.result()


class _Search:
    """The rounds so far, and the best network of them."""

    def __init__(
        self, validate: Validate, least: float, path: str | os.PathLike[str] | None, goal: Goal, *, shown: bool
    ) -> None:
        self.validate, self.least, self.path, self.goal, self.shown = validate, least, path, goal, shown
        self.rounds: list[Round] = []
        self.best: AccuracyResult | None = None

    def measure(self, module: nn.Module) -> float:
        """What ``validate`` says of a finalized network, as the mean over the processes."""
        metric = needed(measured(module, self.validate))
        return mean_of_processes(metric, next(module.parameters()).device)

    def see(self, target: float | None, net: Compressed, module: nn.Module, metric: float) -> Round:
        """Take in a network, the finalized one, and what was measured of that."""
        size, kept = self.goal.share(net), metric >= self.least
        found = Round(target, size, metric, kept, name_of(self.validate), self.goal.word)
        self.rounds.append(found)
        if self.best is None or _better(found, self.best):
            self.best = AccuracyResult(module, net, found.size, found.metric, found.kept)
            if self.path is not None and found.kept and is_first():
                save(module, self.path)
        tell(f"round {len(self.rounds) - 1}: {found}" if target else f"at the start: {found}", enabled=self.shown)
        return found

    def result(self) -> AccuracyResult:
        """The best one, with a word where it is not good enough."""
        best = self.best
        assert best is not None
        if not best.kept:
            _LOG.warning(
                "fxcompress: no network reached min_accuracy=%.4g: the best, with %.2f %% of the %s, had %.4g\n"
                "  take more epochs, a lower min_accuracy, or, if the weights are not trained yet, fine_tune=False; "
                "validate and min_accuracy must be in the same unit", self.least, 100 * best.size, self.goal.word,
                best.metric,
            )  # fmt: skip
        return replace(best, rounds=self.rounds)


def _better(found: Round, best: AccuracyResult) -> bool:
    if found.kept != best.kept:
        return found.kept
    return found.size < best.size if found.kept else found.metric > best.metric


def _goal(by: By, table: LatencyTable | None) -> Goal:
    if by not in {"size", "macs", "latency"}:
        raise ValueError(f"by={by!r} is none of 'size', 'macs' and 'latency'")
    if by != "latency" and table is not None:
        raise ValueError('latency_table= is for by="latency", the seconds to make small')
    return Goal(by, table)


def _check(
    validate: object, least: float, rounds: int, path: str | os.PathLike[str] | None, options: dict[str, Any]
) -> None:
    """Check what can be checked before anything is trained; the rest is for :func:`fxcompress.fit`."""
    for name in options:
        if name in _OWN:
            raise ValueError(f"{name}= is no argument of fit_to_accuracy: {_OWN[name]}")
        if name not in _OPTIONS:
            raise TypeError(f"{name}= is no argument of fit_to_accuracy, nor of fit")
    check_number(min_accuracy=least, rounds=rounds)
    if rounds < 1:
        raise ValueError(f"rounds={rounds} must be at least 1")
    check_callable("validate", validate, ("net",), "it gets the network and returns a number")
    if path is not None:
        check_place(path)
