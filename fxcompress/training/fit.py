"""The whole loop in one call: train, shrink, finalize."""

import math
import time
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxcompress.passes.prune_report import PruneReport
from fxcompress.trace.traced import TracedModule
from fxcompress.training.compressed import CompressedModule
from fxcompress.training.controller import ConstantGamma, TargetSize
from fxcompress.training.display import Display
from fxcompress.training.history import EpochRecord
from fxcompress.training.interrupt import Interrupt, StepDone, TrainingInterrupted
from fxcompress.training.resume import Keeper, Run

Loss = Callable[[Any, Any], Tensor]
Gamma = Callable[[float, float], float]


class Scheduler(Protocol):
    """What is stepped after each optimizer step."""

    def step(self) -> None:
        """Set the learning rates of the next step."""
        ...


@dataclass(frozen=True, slots=True)
class FitResult:
    """The result of :func:`fxcompress.fit`.

    Attributes:
        module: the finalized network, an ordinary GraphModule in evaluation mode.
        net: the network that was trained, with its quantizers.
        history: one record for each epoch.
        reports: what each pruning removed.
    """

    module: TracedModule
    net: CompressedModule
    history: list[EpochRecord] = field(default_factory=list)
    reports: list[PruneReport] = field(default_factory=list)


def cosine(optimizer: Optimizer, steps: int, warmup: int = 0) -> Scheduler:
    """All learning rates from a linear warm-up down to 0 along half a cosine.

    The learning rate of bits must fall to nearly 0 as well, or batch norm's statistics never settle.
    """

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


@dataclass(slots=True)
class Trainer:
    """One run over the data, epoch by epoch.

    Attributes:
        net: what is trained; with quantizers or without.
        optimizer, scheduler: of its parameters; the scheduler steps after each batch.
        loss: of output and target.
        gamma: the pressure, from (progress, size).
        total: steps of the whole run.
        done: steps that were made.
        batch, loss_sum: batches of the present epoch that are done, and the sum of their task losses.
        interrupt: tells when to stop.
    """

    net: nn.Module
    optimizer: Optimizer
    scheduler: Scheduler
    loss: Loss
    gamma: Gamma
    total: int
    done: int = 0
    last_gamma: float = 0.0
    batch: int = 0
    loss_sum: Tensor | None = None
    interrupt: Interrupt | None = None

    def epoch(self, loader: Iterable[Any]) -> float:
        """Train on each batch once; the mean task loss.

        Raises:
            StepDone: Ctrl-C was pressed.
        """
        self.net.train()
        for batch in loader:
            loss = self._step(*_batch(batch, next(self.net.parameters()).device))
            self.loss_sum = loss if self.loss_sum is None else self.loss_sum + loss
            self.batch += 1
            if self.interrupt is not None and self.interrupt.requested:
                raise StepDone
        mean = float(self.loss_sum) / self.batch if self.loss_sum is not None else math.nan
        self.batch, self.loss_sum = 0, None
        return mean

    def _step(self, inputs: tuple[Any, ...], target: Any) -> Tensor:  # noqa: ANN401
        task = self.loss(self.net(*inputs), target)
        full = task
        if isinstance(self.net, CompressedModule):
            size = self.net.size()
            self.last_gamma = self.gamma(self.done / max(1, self.total), self._fraction())
            full = task + self.last_gamma * size
        self.optimizer.zero_grad(set_to_none=True)
        full.backward()
        self.optimizer.step()
        self.scheduler.step()
        if isinstance(self.net, CompressedModule):
            self.net.step()
        self.done += 1
        return task.detach()

    def _fraction(self) -> float:
        """The size that a controller steers by; free where the pressure is constant."""
        if isinstance(self.gamma, ConstantGamma) or not isinstance(self.net, CompressedModule):
            return math.nan
        return self.net.fractional_size()


def _batch(batch: Any, device: torch.device) -> tuple[tuple[Any, ...], Any]:  # noqa: ANN401
    """(inputs, target) on the device; the last item of a batch is the target."""
    if not isinstance(batch, tuple | list) or len(batch) < 2:
        raise TypeError(
            f"a batch must be a tuple (input, ..., target), got {type(batch).__name__}; "
            "write the loop by hand for other batches (see the README)"
        )
    items = [item.to(device, non_blocking=True) if isinstance(item, Tensor) else item for item in batch]
    return tuple(items[:-1]), items[-1]


def train(
    net: CompressedModule,
    loader: Iterable[Any],
    loss_fn: Loss,
    *,
    epochs: int,
    gamma: Gamma,
    optimizer: Optimizer,
    scheduler: Scheduler,
    validate: Callable[[nn.Module], float] | None = None,
    prune: bool = True,
    progress: bool = True,
    on_epoch: Callable[[EpochRecord], None] | None = None,
    keeper: Keeper | None = None,
) -> FitResult:
    """The loop behind :func:`fxcompress.fit`, on a network that is compressed already."""
    trainer = Trainer(net, optimizer, scheduler, loss_fn, gamma, epochs * batches(loader))
    run = Run(trainer, loader, batches(loader), keeper)
    run.take_up(next(net.parameters()).device)
    with Interrupt() as trainer.interrupt, Display("self-compressing", epochs, enabled=progress) as display:
        for record in run.history[-1:]:
            display.show(record)
        for epoch in range(len(run.history) + 1, epochs + 1):
            start = time.perf_counter() - run.seconds
            try:
                loss = trainer.epoch(run.epoch())
            except StepDone:
                run.keep(time.perf_counter() - start)
                raise _interrupted(run, trainer, epochs) from None
            if prune:
                report = net.prune(optimizer)
                run.reports += [report] if report.modified else []
            seconds, run.seconds = time.perf_counter() - start, 0.0
            metric = _validated(net, validate)
            record = EpochRecord(
                epoch, loss, metric, net.fractional_size(), net.weights_left(), net.channels_left(),
                trainer.last_gamma, seconds,
            )  # fmt: skip
            run.history.append(record)
            display.show(record)
            if on_epoch is not None:
                on_epoch(record)
            run.keep()
            if trainer.interrupt.requested:
                raise _interrupted(run, trainer, epochs)
    return FitResult(net.finalize().eval(), net, run.history, run.reports)


def _interrupted(run: Run, trainer: Trainer, epochs: int) -> TrainingInterrupted:
    where = f"after step {trainer.done} of {trainer.total}, with {len(run.history)} of {epochs} epochs finished"
    path = None if run.keeper is None else run.keeper.path
    return TrainingInterrupted(where, trainer.net, run.history, path)


def train_plain(
    net: nn.Module,
    loader: Iterable[Any],
    loss_fn: Loss,
    *,
    epochs: int,
    optimizer: Optimizer,
    scheduler: Scheduler,
    validate: Callable[[nn.Module], float] | None = None,
    progress: bool = True,
    title: str = "float baseline",
) -> list[EpochRecord]:
    """The same loop for a network without quantizers, to compare with."""
    trainer = Trainer(net, optimizer, scheduler, loss_fn, ConstantGamma(0.0), epochs * batches(loader))
    channels = sum(p.shape[0] for p in net.parameters() if p.ndim > 1)
    history: list[EpochRecord] = []
    with Display(title, epochs, enabled=progress) as display:
        for epoch in range(1, epochs + 1):
            start = time.perf_counter()
            loss = trainer.epoch(loader)
            seconds = time.perf_counter() - start
            history.append(EpochRecord(epoch, loss, _validated(net, validate), 1.0, 1.0, channels, 0.0, seconds))
            display.show(history[-1])
    return history


def batches(loader: Iterable[Any]) -> int:
    """The number of batches of a loader.

    Raises:
        TypeError: it does not say.
    """
    if not isinstance(loader, Sized):
        raise TypeError(f"{type(loader).__name__} has no length; pass a DataLoader or a list of batches")
    return len(loader)


def _validated(net: nn.Module, validate: Callable[[nn.Module], float] | None) -> float | None:
    if validate is None:
        return None
    net.eval()
    with torch.no_grad():
        metric = float(validate(net))
    net.train()
    return metric


def gamma_of(gamma: float | Gamma | None, target_size: float | None) -> Gamma:
    """The controller for what the user asked for.

    Raises:
        ValueError: neither or both are given, or a value is out of range.
    """
    if (gamma is None) == (target_size is None):
        raise ValueError("pass either gamma= (the weight of the size in the loss) or target_size= (share of the bits)")
    if target_size is not None:
        return TargetSize(target_size)
    if callable(gamma):
        return gamma
    assert gamma is not None
    if gamma < 0:
        raise ValueError(f"gamma={gamma} must not be negative: the network would be paid for growing")
    return ConstantGamma(gamma)
