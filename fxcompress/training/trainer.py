"""One run over the data, step by step: task and size, the optimizer, what dies, and when it is removed."""

import math
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel

from fxcompress.passes.prune_report import PruneReport
from fxcompress.training.altered import unhooked
from fxcompress.training.batches import NO_BATCH, Batch, argument_names, scalar_loss
from fxcompress.training.compressed import CompressedModule
from fxcompress.training.controller import ConstantGamma, Gamma, gamma_now, held
from fxcompress.training.ended import NotFiniteError, too_few_values
from fxcompress.training.finite import Forward, what_is_not_finite, why_not_finite
from fxcompress.training.guard import Guard
from fxcompress.training.in_pieces import Compressed
from fxcompress.training.interrupt import Interrupt, StepDone
from fxcompress.training.parallel import beside
from fxcompress.training.policy import PrunePolicy
from fxcompress.training.schedule import largest_rates
from fxcompress.training.selection import Selection
from fxcompress.training.statistics import refresh_statistics

_ELSEWHERE = "the loss in another process is not finite"
Loss = Callable[..., Tensor]
"""Of output and target, and of the teacher's output where there is one."""


class Scheduler(Protocol):
    """What is stepped after each optimizer step."""

    def step(self) -> None:
        """Set the learning rates of the next step."""
        ...


@dataclass(slots=True)
class Trainer:
    """Trains a network, with quantizers or without.

    Attributes:
        net: what is trained.
        optimizer, scheduler: of its parameters; the scheduler steps after each batch, or with :meth:`see_metric`.
        loss: of output and target.
        gamma: the pressure, from (progress, size).
        total: steps of the whole run.
        module: what is called in place of ``net``: a wrapper of it that averages gradients over processes.
        mean: the mean of a number over the processes.
        mean_gradients: does that for what the optimizer trains beside ``net``; None in a single process.
        policy: when to remove what is dead; None for never.
        guard: when there must be no pressure.
        interrupt: tells when to stop.
        average: of ``net``, brought up to date after each step; None for none.
        teacher: called with what the network is called with, for the loss; None for none.
        selection: leads the network to a share of its multiply-adds or its latency; None for none.
        reports: of all removals.
        done: steps that were made.
        last_gamma: of the step before.
        rates: the largest learning rate that each group of the optimizer has had.
        batch, loss_sum: batches of the present epoch that are done, and the sum of their task losses.
    """

    net: nn.Module
    optimizer: Optimizer
    scheduler: Scheduler | ReduceLROnPlateau
    loss: Loss
    gamma: Gamma
    total: int
    module: nn.Module | None = None
    mean: Callable[[float], float] = float
    mean_gradients: Callable[[Optimizer], object] | None = None
    policy: PrunePolicy | None = None
    guard: Guard = field(default_factory=Guard)
    interrupt: Interrupt | None = None
    average: AveragedModel | None = None
    teacher: nn.Module | None = None
    selection: Selection | None = None
    reports: list[PruneReport] = field(default_factory=list)
    done: int = 0
    last_gamma: float = 0.0
    rates: list[float] = field(default_factory=list)
    batch: int = 0
    loss_sum: Tensor | None = None
    _in_evaluation: frozenset[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Note which modules of a network in training the caller has put into evaluation: frozen norms, say."""
        modules = self.net.named_modules() if self.net.training else ()
        self._in_evaluation = frozenset(name for name, module in modules if not module.training)

    def epoch(self, loader: Iterable[Any]) -> float:
        """Train on each batch once; the mean task loss. What was in evaluation alone at the start stays there.

        Raises:
            ValueError: there was no batch.
            StepRefusedError: the loss or a gradient of the next step is not finite, or a norm has too few values. The
                network is as it was before it.
            StepDone: Ctrl-C was pressed, or SIGTERM has come.
        """
        self.net.train()
        for name, module in self.net.named_modules():
            if name in self._in_evaluation:
                module.training = False
        names = argument_names(self.net)
        with closing(self._until_asked(loader)) as batches:
            for batch in batches:
                loss = self._step(Batch.of(batch, names).to(next(self.net.parameters()).device))
                loss = loss.to(torch.promote_types(loss.dtype, torch.float32))  # a sum of halves stops rising
                self.loss_sum = loss if self.loss_sum is None else self.loss_sum + loss
                self.batch += 1
                if self.interrupt is not None and self.interrupt.requested:
                    raise StepDone
        if self.loss_sum is None:
            raise ValueError(NO_BATCH)
        mean = float(self.loss_sum) / self.batch
        self.batch, self.loss_sum = 0, None
        return self.mean(mean)

    def _until_asked(self, loader: Iterable[Any]) -> Generator[Any]:
        """The batches; where a loader fails after one was asked to stop, its workers have had the same signal.

        To be closed, so that workers end with it, and not when a traceback is forgotten.
        """
        batches = iter(loader)
        try:
            while True:
                try:
                    batch = next(batches)
                except StopIteration:
                    return
                except Exception:
                    if self.interrupt is not None and self.interrupt.requested:
                        raise StepDone from None
                    raise
                yield batch
        finally:
            if isinstance(batches, Generator):
                batches.close()

    def refresh_statistics(self, batches: Iterable[Any]) -> None:
        """Take the running statistics anew, of some batches, for a network whose code keeps nothing of a run."""
        if isinstance(self.net, CompressedModule):
            names, device = argument_names(self.net), next(self.net.parameters()).device
            with unhooked(self.net):
                refresh_statistics(self.net, (Batch.of(batch, names).to(device) for batch in batches))

    def see_metric(self, metric: float) -> None:
        """Step a scheduler that waits for what was measured after an epoch; others have made their steps."""
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(metric)

    def remove(self) -> None:
        """Remove what is dead now."""
        assert isinstance(self.net, Compressed)
        report = self.net.prune(self.optimizer, averages=[] if self.average is None else [self.average])
        self.reports += [report] if report.modified else []

    def _step(self, batch: Batch) -> Tensor:
        forward = Forward(self.net)
        task = scalar_loss(self.loss(self._output(batch, forward), batch.target, *self._answers(batch)))
        self.optimizer.zero_grad(set_to_none=True)
        if isinstance(self.net, Compressed):
            self.last_gamma = self._pressure(self.net)
            (task + self.last_gamma * self.net.size()).backward()
        else:
            task.backward()
        if self.mean_gradients is not None:
            self.mean_gradients(self.optimizer)
        self._check_finite(task, batch, forward)
        if self.selection is not None:
            self.selection.see(self.done)
        self.rates = largest_rates(self.optimizer, self.rates)
        self.optimizer.step()
        if not isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step()
        self.done += 1
        if self.guard.watches_loss:
            self.guard.see_loss(self.mean(float(task.detach())))
        if isinstance(self.net, Compressed):
            if self.selection is not None:
                self.selection.lower(self.done, held=self.guard.holds)
            self.net.step()
            if self.average is not None:
                self.average.update_parameters(self.net)
            if self.policy is not None and self.policy.due(self.net.removable()):
                self.remove()
        return task.detach()

    def _output(self, batch: Batch, forward: Forward) -> Any:  # noqa: ANN401 - whatever the network returns
        module = self.net if self.module is None else self.module
        try:
            return module(*batch.args, **batch.kwargs)
        except ValueError as error:
            refused = too_few_values(error, self.net)
            if refused is None:
                raise
            self._undo(forward)
            raise refused from error

    def _answers(self, batch: Batch) -> tuple[Any, ...]:
        """What the teacher returns, if there is one."""
        if self.teacher is None:
            return ()
        with torch.no_grad():
            return (self.teacher(*batch.args, **batch.kwargs),)

    def _check_finite(self, task: Tensor, batch: Batch, forward: Forward) -> None:
        wrong = what_is_not_finite(task, [*self.net.named_parameters(), *self._beside()])
        if self.mean(float(bool(wrong))):  # in all processes or in none
            self._undo(forward)
            raise NotFiniteError(wrong + why_not_finite(self.net, batch) if wrong else _ELSEWHERE)

    def _beside(self) -> Iterator[tuple[str, Tensor]]:
        """What the optimizer trains beside the network, such as parameters of the loss, with their names there."""
        own = self.loss.named_parameters() if isinstance(self.loss, nn.Module) else ()
        names = {id(parameter): f"{name} of the loss" for name, parameter in own}
        for number, parameter in enumerate(beside(self.net, self.optimizer), 1):
            other = f"parameter {number} beside the network, of shape {tuple(parameter.shape)},"
            yield names.get(id(parameter), other), parameter

    def _undo(self, forward: Forward) -> None:
        """Leave the network as it was before a step."""
        forward.undo()
        self.optimizer.zero_grad(set_to_none=True)

    def _pressure(self, net: Compressed) -> float:
        # The size is on the device: to ask for it where the pressure is constant would wait for nothing.
        gamma = held(self.gamma) if self.guard.holds else self.gamma
        size = math.nan if isinstance(gamma, ConstantGamma) else net.fractional_size()
        return gamma_now(gamma, self.done / max(1, self.total), size)
