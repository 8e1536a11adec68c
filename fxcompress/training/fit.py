"""The whole loop in one call: train, shrink, finalize."""

import logging
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel

from fxcompress.channels.analysis import analyse
from fxcompress.errors import check_number
from fxcompress.objectives import starting_costs
from fxcompress.passes.prune_report import PruneReport
from fxcompress.provenance import provenance_of
from fxcompress.trace.traced import TracedModule
from fxcompress.training.batches import check_callable, count_batches
from fxcompress.training.controller import EARLY, ConstantGamma, Gamma, TargetSize, own_gamma
from fxcompress.training.display import Display
from fxcompress.training.ended import StepRefusedError, ended, interrupted
from fxcompress.training.guard import Guard, other_unit
from fxcompress.training.history import EpochRecord
from fxcompress.training.in_pieces import Compressed
from fxcompress.training.interrupt import Interrupt, StepDone
from fxcompress.training.network import FINE_STEP
from fxcompress.training.parallel import Processes
from fxcompress.training.policy import PrunePolicy, prune_policy
from fxcompress.training.resume import Keeper, Run
from fxcompress.training.schedule import formats_move, tell_of_fall
from fxcompress.training.selection import Selection
from fxcompress.training.trainer import Loss, Scheduler, Trainer

_LOG = logging.getLogger("fxcompress")
_WAY = 12.0
"""Bits that there must be time for on the way to a target: more than most networks have, as steps get shorter."""
Validate = Callable[[nn.Module], float | Tensor | None]


@dataclass(frozen=True, slots=True, repr=False)
class FitResult:
    """The result of :func:`fxcompress.fit`; ``print(result)`` shows the figures of the run.

    Attributes:
        module: the finalized network in evaluation mode: an ordinary GraphModule or, where the model was compressed in
            pieces or with ``keep_code``, a module of its own class.
        net: the network that was trained, with its quantizers.
        history: one record for each epoch.
        reports: what each pruning removed.
        latency: with ``target_latency``, the share of the seconds that is left, as the table has them; else None.
    """

    module: nn.Module
    net: Compressed
    history: list[EpochRecord] = field(default_factory=list)
    reports: list[PruneReport] = field(default_factory=list)
    latency: float | None = None

    def macs_left(self) -> float:
        """The multiply-adds of :attr:`module`, over those of the starting network; see ``net.macs_left()``.

        They are fewer where a constant was folded, whose channels stay while the network is trained. Where the module
        is no graph, those of :attr:`net`.
        """
        provenance = provenance_of(self.module)
        if not isinstance(self.module, TracedModule) or provenance is None:
            return self.net.macs_left()
        found = starting_costs(analyse(self.module, self.net.settings.inputs), provenance.grids)
        return found.macs / max(1, self.net.fxc_all_terms().start.macs)

    def __repr__(self) -> str:
        seconds = sum(record.seconds for record in self.history)
        parameters = sum(p.numel() for p in self.module.parameters())
        trained, stored = self.net.fractional_size(), self.net.stored_size()
        epochs = "1 epoch" if len(self.history) == 1 else f"{len(self.history)} epochs"
        lines = [
            f"FitResult after {epochs}, {seconds:.0f} s of training",
            *map(str, self.history[-1:]),
            f"weights: {trained:.2%} of their bits as trained, {stored:.2%} as stored",
            f"multiply-adds of quantized layers, whatever the bits: {self.macs_left():.1%}",
            *([] if self.latency is None else [f"seconds of its layers, by the table: {self.latency:.1%}"]),
            f".module: {type(self.module).__name__} with {parameters:,} parameters, to be used and saved",
        ]
        return "\n  ".join(lines)


def train(  # noqa: PLR0913 - what is behind the user's call
    net: Compressed,
    loader: Iterable[Any],
    loss_fn: Loss,
    *,
    epochs: int,
    gamma: Gamma,
    optimizer: Optimizer,
    scheduler: Scheduler | ReduceLROnPlateau,
    validate: Validate | None = None,
    prune: bool | int | PrunePolicy = True,
    guard: Guard | None = None,
    progress: bool = True,
    on_epoch: Callable[[EpochRecord], None] | None = None,
    average: AveragedModel | None = None,
    teacher: nn.Module | None = None,
    selection: Selection | None = None,
    keeper: Keeper | None = None,
) -> FitResult:
    """The loop behind :func:`fxcompress.fit`, on a network that is compressed already."""
    steps = epochs * count_batches(loader)
    processes = Processes.around(net, steps)
    trainer = Trainer(
        net, optimizer, scheduler, loss_fn, gamma, steps, module=processes.module, mean=processes.mean,
        mean_gradients=processes.mean_gradients, policy=prune_policy(prune), guard=guard or Guard(),
        average=average, teacher=teacher, selection=selection,
    )  # fmt: skip
    run = Run(trainer, loader, count_batches(loader), keeper, writes=processes.is_first)
    run.take_up(next(net.parameters()).device)
    processes.share_beside(optimizer, loss_fn)
    shown = progress and processes.is_first
    with Interrupt() as trainer.interrupt, Display("self-compressing", epochs, enabled=shown) as display:
        for record in run.history[-1:]:
            display.show(record)
        for epoch in range(len(run.history) + 1, epochs + 1):
            start = time.perf_counter() - run.seconds
            processes.start_epoch(loader, epoch)
            try:
                loss = trainer.epoch(run.epoch())
            except StepDone:
                run.keep(time.perf_counter() - start)
                raise interrupted(run, trainer, epochs) from None
            except StepRefusedError as error:
                raise ended(error, trainer, run.history, run) from error
            _tell_of_first(trainer, run, epochs, now=processes.is_first and epoch == 1)
            processes.share_buffers(*(m for m in (average, loss_fn) if isinstance(m, nn.Module)))
            if epoch == epochs and trainer.policy is not None:
                trainer.remove()
            seconds, run.seconds = time.perf_counter() - start, 0.0
            held = trainer.guard.holds  # by what was known before this epoch was measured
            _settle(trainer, run, processes, measured=validate is not None)
            metric = None if validate is None else measured(net, validate)
            if trainer.guard.min_metric is not None:
                trainer.guard.see_metric(processes.mean(needed(metric, "min_accuracy=")))
                _tell_of_unit(trainer.guard.min_metric, needed(metric), now=processes.is_first and epoch == 1)
            if isinstance(scheduler, ReduceLROnPlateau):
                trainer.see_metric(loss if validate is None else processes.mean(needed(metric, "the scheduler")))
            record = EpochRecord(
                epoch, loss, metric, net.fractional_size(), net.weights_left(), net.channels_left(),
                trainer.last_gamma, seconds, name_of(validate), None if selection is None else selection.left(),
                "" if selection is None else selection.what, held,
            )  # fmt: skip
            run.history.append(record)
            display.show(record)
            if on_epoch is not None:
                on_epoch(record)
            run.keep()
            if trainer.interrupt.requested:
                raise interrupted(run, trainer, epochs)
    latency = selection.left() if selection is not None and selection.kind == "latency" else None
    return FitResult(net.finalize().eval(), net, run.history, trainer.reports, latency)


def _settle(trainer: Trainer, run: Run, processes: Processes, *, measured: bool) -> None:
    """Let running statistics agree with the weights before they are measured, while number formats still move."""
    batches = run.last.take()
    if measured and formats_move(trainer.optimizer):
        trainer.refresh_statistics(batches)
        processes.share_buffers()


def _tell_of_first(trainer: Trainer, run: Run, epochs: int, *, now: bool) -> None:
    """Warn after the first epoch where steps are not what the loader or the scheduler takes them for."""
    if now:
        _tell_of_batches(trainer.done, run.batches, epochs)
        tell_of_fall(trainer.optimizer, trainer.rates, trainer.done, trainer.total)


def _tell_of_batches(given: int, said: int, epochs: int) -> None:
    """Warn where a loader has not the length that it says: what falls over all steps would not have fallen."""
    if given != said:
        _LOG.warning(
            "fxcompress: the loader has a length of %d, and gave %d batches in an epoch: learning rates and gamma "
            "follow a course of %d steps, of which %d will be made\n"
            "  let len(loader) be the number of batches that it gives", said, given, said * epochs, given * epochs,
        )  # fmt: skip


def _tell_of_unit(least: float, metric: float, *, now: bool) -> None:
    """Warn where an accuracy that is asked for is not in the unit of what is measured."""
    found = other_unit(least, metric) if now else ""
    if found:
        _LOG.warning("fxcompress: %s: pass both in the same unit, or the brake holds always or never", found)


def train_plain(
    net: nn.Module,
    loader: Iterable[Any],
    loss_fn: Loss,
    *,
    epochs: int,
    optimizer: Optimizer,
    scheduler: Scheduler,
    validate: Validate | None = None,
    progress: bool = True,
) -> list[EpochRecord]:
    """The same loop for a network without quantizers, to compare with."""
    trainer = Trainer(net, optimizer, scheduler, loss_fn, ConstantGamma(0.0), epochs * count_batches(loader))
    channels = sum(p.shape[0] for p in net.parameters() if p.ndim > 1)
    history: list[EpochRecord] = []
    with Display("float baseline", epochs, enabled=progress) as display:
        for epoch in range(1, epochs + 1):
            start = time.perf_counter()
            try:
                loss = trainer.epoch(loader)
            except StepRefusedError as error:
                raise ended(error, trainer, history) from error
            seconds = time.perf_counter() - start
            metric = None if validate is None else measured(net, validate)
            history.append(EpochRecord(epoch, loss, metric, 1.0, 1.0, channels, 0.0, seconds, name_of(validate)))
            display.show(history[-1])
    return history


def name_of(validate: Validate | None) -> str:
    """What the metric is called: a function without a name of its own, such as a lambda, gives it none."""
    name = getattr(validate, "__name__", "")
    return name if name.isidentifier() else "metric"


def needed(metric: float | None, by: str = "min_accuracy=") -> float:
    """The metric, where something depends on it.

    Args:
        metric: what was measured.
        by: what depends on it, in words.

    Raises:
        TypeError: there is none.
    """
    if metric is None:
        raise TypeError(f"validate returned None, and {by} needs the accuracy: return it")
    return metric


def measured(net: nn.Module, validate: Validate) -> float | None:
    """What ``validate`` says of a network in evaluation mode, as a number; its mode is as before afterwards.

    Raises:
        TypeError: it says something else.
    """
    training = net.training
    net.eval()
    try:
        with torch.no_grad():
            metric = validate(net)
    finally:
        net.train(training)
    if metric is None:
        return None
    try:
        return float(metric)
    except (TypeError, ValueError, RuntimeError) as error:
        what = f"shape {tuple(metric.shape)}" if isinstance(metric, Tensor) else f"a {type(metric).__name__}"
        raise TypeError(
            f"validate returned {what}; it must return one number, such as the accuracy, or None"
        ) from error


def longest_step(steps: int) -> float:
    """How far bits may move in a step of a fine-tuning: a tenth, and up to a half where there are few steps.

    Args:
        steps: of all of it; the target is to be reached after a share of them, :data:`EARLY`.

    >>> longest_step(1000), longest_step(200), longest_step(10)
    (0.1, 0.24, 0.5)
    """
    return min(0.5, max(FINE_STEP, _WAY / (EARLY * steps)))


def gamma_of(
    gamma: float | Gamma | None, target_size: float | None, *, fine_tune: bool = False, required: bool = True
) -> Gamma:
    """The controller for what the user asked for.

    Args:
        gamma: the weight of the size in the loss, or a function of (progress, size).
        target_size: in its place, the share of the bits to end at.
        fine_tune: the weights are trained already, so most of the training is for what the target has cost.
        required: whether one of them must be given: without both there is no pressure.

    Raises:
        TypeError: one is no number, and no function of (progress, size).
        ValueError: neither or both are given, or a value is out of range.
    """
    if not required and gamma is None and target_size is None:
        return ConstantGamma(0.0)
    if (gamma is None) == (target_size is None):
        others = "; for speed alone, target_macs= or target_latency=" if gamma is None else ""
        raise ValueError(
            f"pass either gamma= (the weight of the size in the loss) or target_size= (share of the bits){others}"
        )
    if target_size is not None:
        return TargetSize(target_size, arrival=EARLY) if fine_tune else TargetSize(target_size)
    if callable(gamma):
        check_callable("gamma", gamma, ("progress", "size"), "it gets shares of the training and of the original bits")
        return own_gamma(gamma)
    assert gamma is not None
    check_number(gamma=gamma)
    if gamma < 0:
        raise ValueError(f"gamma={gamma} must not be negative: the network would be paid for growing")
    if not gamma < math.inf:
        raise ValueError(f"gamma={gamma} must be finite: no loss has a part in a sum with it")
    return ConstantGamma(gamma)
