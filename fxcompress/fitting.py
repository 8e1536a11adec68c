"""``fxcompress.fit``: compress, train, shrink and finalize in one call."""

import logging
import os
from collections.abc import Callable, Collection, Iterable
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel

from fxcompress.checkpoint import check_scheduler, save_checkpoint, take_up
from fxcompress.compress import compress
from fxcompress.errors import AverageError, CheckpointError
from fxcompress.objectives import LatencyTable
from fxcompress.storage.states import check_place, read_states
from fxcompress.trace.basics.precision import ordinary
from fxcompress.trace.model.skeleton import skeleton
from fxcompress.trace.support import check_module
from fxcompress.training.aims import Aims
from fxcompress.training.averages import copies_of
from fxcompress.training.batches import Batch, argument_names, check_callable, check_loss, count_batches, first_batch
from fxcompress.training.controller import Gamma
from fxcompress.training.fit import FitResult, Validate, gamma_of, longest_step, train
from fxcompress.training.guard import Guard
from fxcompress.training.history import EpochRecord
from fxcompress.training.in_pieces import Compressed
from fxcompress.training.parallel import is_first
from fxcompress.training.policy import PrunePolicy, prune_policy
from fxcompress.training.resume import Keeper, check_run
from fxcompress.training.schedule import LONG_REST, REST, check_scheduler_of, cosine
from fxcompress.training.suited import check_objective, check_suited, tell_of_mixed
from fxcompress.training.target import (
    begin_selection,
    check_target,
    held_epochs,
    tell_of_accuracy,
    tell_of_bits,
    tell_of_selection,
    tell_of_target,
)
from fxcompress.training.trainer import Loss, Scheduler

DEATH_LIMIT = 0.1
"""Share of the channels that may lose their last bit in one step, where :func:`fit` compresses the model."""
_LOG = logging.getLogger("fxcompress")
Resume = Literal[True, False, "auto"]


@ordinary
@torch.enable_grad()
def fit(  # noqa: PLR0913 - the user's call, all by keyword
    model: nn.Module,
    loader: Iterable[Any],
    loss_fn: Loss,
    *,
    epochs: int,
    gamma: float | Gamma | None = None,
    target_size: float | None = None,
    target_macs: float | None = None,
    target_latency: float | None = None,
    latency_table: LatencyTable | None = None,
    fine_tune: bool = False,
    lr: float | None = None,
    weight_decay: float | None = None,
    optimizer: Optimizer | None = None,
    scheduler: Scheduler | ReduceLROnPlateau | None = None,
    example_inputs: object = None,
    validate: Validate | None = None,
    prune: bool | int | PrunePolicy = True,
    min_accuracy: float | None = None,
    max_loss_increase: float | None = None,
    progress: bool = True,
    on_epoch: Callable[[EpochRecord], None] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: Resume = False,
    average: AveragedModel | None = None,
    teacher: nn.Module | None = None,
) -> FitResult:
    """Compress a model while it trains, and return it as a smaller ordinary network.

    Where torch.distributed is initialised, all processes train one network together: each passes a loader of its own
    part of the data, with as many batches as the others, and gets the same result. See docs/distributed.md.

    Args:
        model: any network, or one from :func:`compress`. A plain model is left as it is; a compressed one is trained.
        loader: batches, with a length; gone through once each epoch. A batch is (input, ..., target), or a dict that
            holds arguments of forward by their names: the target is then what forward does not take, one entry as it
            is, several as a dict. Where forward takes all of it, the target is the whole batch.
        loss_fn: of (output, target), or of (output, target, answer) with a ``teacher``; returns a scalar.
        epochs: how often.
        gamma: weight of ``net.size()`` in the loss, or a function of (progress, size); or else
        target_size: share of the original 32-bit weights to end at (fractional); gamma is steered to it.
        target_macs: share of the multiply-adds to end at, for a network that is to be fast rather than small: the
            channels that the task misses least for what they save are chosen, and lose their bits; the others keep
            theirs, unless there is a ``gamma`` or ``target_size`` as well. Each layer keeps a tenth of its channels.
        target_latency: the same with the share of the seconds that its layers take on this machine, as a
            :class:`LatencyTable` has them.
        latency_table: that table; by default it is measured at the start, on the example inputs, in the first process.
        fine_tune: the weights are trained already. The target is reached after a quarter of the training in place of
            half, the default scheduler lets bits and exponents rest in its last 40 % in place of 10 %, and the default
            optimizer moves bits by a tenth at most in a step (more where there are below 500), in place of a half.
        lr: of the weights, for the default optimizer, Adam; 1e-3 by default.
        weight_decay: the same; 0 by default.
        optimizer: of a compressed model's ``param_groups()``; only with a model from :func:`compress`.
        scheduler: of the ``optimizer``, stepped after each batch; ReduceLROnPlateau after each epoch, with what
            ``validate`` returned or, without it, the loss. :func:`fxcompress.cosine` by default: half a cosine down to
            0, which bits and exponents reach after 90 % of the training.
        example_inputs: taken from the first batch by default.
        validate: called with the network in evaluation mode after each epoch; its result, a number or None, is the
            record's metric. While bits or exponents move, running statistics are taken anew before, of some of the
            last batches, which then pass the network once more.
        prune: True: remove what is dead when the steps it has slowed down have cost as much as a removal does; a
            number: after so many steps; a :class:`PrunePolicy`; False: not while training. At the end what is dead goes
            in any case.
        min_accuracy: no pressure after an epoch for which ``validate`` returned less, until it returns as much again.
            The way to a ``target_size`` stops meanwhile, and may end above it.
        max_loss_increase: no pressure while the smoothed loss is above its lowest by more than this share (0.2: a
            fifth).
        progress: show a live display, in the first process; where there is no terminal, a line for each epoch.
        on_epoch: called with each record.
        checkpoint: a file that the run is kept in, written after each epoch, and on Ctrl-C or SIGTERM.
        resume: True: go on with the run in ``checkpoint``; ``"auto"``: the same if there is such a file, else start
            anew; False: start anew. All other arguments must be as they were. What is trained then is the same, bit for
            bit, as without a stop (see docs/training.md for what that takes).
        average: ``AveragedModel(net)`` of torch.optim.swa_utils, of the ``net`` from :func:`compress` that is passed:
            brought up to date after each step, cut with each removal, kept in the checkpoint. Its network is
            ``average.module``, and ``average.module.finalize()`` the one to use.
        teacher: a network to learn from (distillation), such as ``model`` itself, which has all of its accuracy. A copy
            of it that shares its weights is called in evaluation, without gradients, with what the network is called
            with, and the loss gets what it returns.

    Raises:
        TypeError: an argument is of another kind, the loader has no length, a batch or what a function returned is of
            another form.
        ValueError: the loader is empty; the loss or the objective has no gradient; neither or both of ``gamma`` and
            ``target_size`` are given (with ``target_macs`` or ``target_latency`` neither is needed), or both of these;
            the network is below its target already; the table does not fit; an optimizer of a plain model, ``lr`` or
            ``weight_decay`` beside an optimizer, ``min_accuracy`` without ``validate``, or ``resume`` without
            ``checkpoint``.
        OptimizerError: ``optimizer`` is of another network, or lacks the bits; ``scheduler`` is of another optimizer.
        AverageError: ``average`` is not of the network.
        CheckpointError: the checkpoint does not fit, or is there although the run is to start anew.
        TrainingInterrupted: Ctrl-C was pressed, or SIGTERM has come; a KeyboardInterrupt, raised after the step that
            ran. A second signal stops at once.
        DivergenceError: the loss or a gradient is not finite. The step was not made: the error holds the network as it
            was before it, the checkpoint the run after the last epoch.
        BatchError: a batch norm got one value for each channel, as from a last batch of one sample; the same holds.
        FxCompressError: see :func:`compress`.
        DistributedError: processes have different numbers of batches, disagree, or have died.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> loader = [(torch.randn(16, 4), torch.arange(16) % 2) for _ in range(3)]  # or a DataLoader
    >>> result = fit(model, loader, nn.functional.cross_entropy, epochs=2, gamma=0.01, progress=False)
    >>> result.module(torch.zeros(5, 4)).shape, len(result.history)
    (torch.Size([5, 2]), 2)
    """
    aims = Aims(target_macs, target_latency, latency_table)
    control = gamma_of(gamma, target_size, fine_tune=fine_tune, required=not aims)
    _check_kinds(model, epochs)
    if epochs < 1:
        raise ValueError(f"epochs={epochs} must be at least 1")
    if min_accuracy is not None and validate is None:
        raise ValueError("min_accuracy= is about what validate= returns: pass a function that measures the accuracy")
    own_teacher = _teacher(teacher, model)
    check_loss(loss_fn, taught=teacher is not None)
    _check_calls(validate, on_epoch, scheduler)
    count = count_batches(loader)
    guard, policy = Guard(min_accuracy, max_loss_increase), prune_policy(prune)
    going_on = _goes_on(checkpoint, resume)
    _check_whose(optimizer, model)
    own = {name: value for name, value in (("lr", lr), ("weight_decay", weight_decay)) if value is not None}
    _check_unused(optimizer, own)
    steps = epochs * count
    net = compressed_for(model, loader, example_inputs, target_size)
    _check_average(net, average)
    selection = aims.selection(net, steps)
    if not going_on:
        check_target(net, control)
        if selection is not None:
            begin_selection(selection, None, progress=progress)
    check_objective(net)
    if optimizer is not None:
        _check_optimizer(optimizer, net)
    most = longest_step(steps) if fine_tune else False
    chosen = optimizer or torch.optim.Adam(net.param_groups(**own, eps=_eps(net), fine_tune=most))
    rest = LONG_REST if fine_tune else REST
    _tell_of_loss(loss_fn, chosen)
    check_scheduler_of(scheduler, chosen, measured=validate is not None)
    schedule = scheduler or cosine(chosen, steps, min(steps // 20, 100), settle=rest)
    keeper, size = None, net.fractional_size()
    if checkpoint is not None:
        check = partial(
            check_run, gamma=control, loader=loader, batches=count, average=average, selection=selection, epochs=epochs,
            own_scheduler=scheduler is not None,
        )  # fmt: skip
        keeper = _keeper(Path(checkpoint), net, chosen, schedule, check, resume=going_on)
    result = train(
        net,
        loader,
        loss_fn,
        epochs=epochs,
        gamma=control,
        optimizer=chosen,
        scheduler=schedule,
        validate=validate,
        prune=False if policy is None else policy,
        guard=guard,
        progress=progress,
        on_epoch=on_epoch,
        average=average,
        teacher=own_teacher,
        selection=selection,
        keeper=keeper,
    )
    if is_first():
        why = held_epochs(result.history)
        tell_of_target(net, control, why)
        tell_of_bits(net, control, size, result.history, steps)
        tell_of_selection(selection, why)
        tell_of_accuracy(result.history, guard)
    return result


def _teacher(teacher: nn.Module | None, model: nn.Module) -> nn.Module | None:
    """A copy in evaluation, so that the caller's network, perhaps the one to compress, keeps its mode."""
    if teacher is None:
        return None
    if teacher is model and isinstance(model, Compressed):
        raise ValueError("teacher= is the network that is trained: pass the model that it was compressed from")
    if not isinstance(teacher, nn.Module):
        raise TypeError(f"teacher= is a {type(teacher).__name__}; pass a network, such as the model itself")
    return skeleton(teacher).eval()


def _check_kinds(model: object, epochs: object) -> None:
    check_module(model)
    if not isinstance(epochs, Integral):
        raise TypeError(f"epochs={epochs!r} is a {type(epochs).__name__}; it must be a whole number")


def _check_calls(validate: object, on_epoch: object, scheduler: object) -> None:
    """Check what is called after a batch or an epoch before the first one is made."""
    if validate is not None:
        check_callable("validate", validate, ("net",), "it gets the network and returns a number, or None")
    if on_epoch is not None:
        check_callable("on_epoch", on_epoch, ("record",), "it gets the record of an epoch")
    if scheduler is not None:
        step = getattr(scheduler, "step", scheduler)
        given = ("metrics",) if isinstance(scheduler, ReduceLROnPlateau) else ()
        check_callable("scheduler.step", step, given, "it is stepped after each batch: take one that follows the steps")


def _goes_on(checkpoint: str | os.PathLike[str] | None, resume: Resume) -> bool:
    """Whether there is a run to go on with; before anything is made or changed."""
    if resume not in {True, False, "auto"}:
        raise ValueError(f"resume={resume!r} is none of True, False and 'auto'")
    if checkpoint is None:
        if resume:
            raise ValueError("resume= needs checkpoint=, the file that the run is kept in")
        return False
    check_place(checkpoint)  # at once, and not after the first epoch
    there = Path(checkpoint).exists()
    if there and not resume:
        raise CheckpointError(
            f"{checkpoint} holds a run already: pass resume=True to go on with it, or delete the file to start anew"
        )
    if not there and resume is True:
        raise CheckpointError(
            f"there is no file {checkpoint} to go on from: check the path, or pass resume='auto' to start anew then"
        )
    return there


def _keeper(
    path: Path,
    net: Compressed,
    optimizer: Optimizer,
    scheduler: Scheduler | ReduceLROnPlateau,
    check: Callable[[dict[str, Any]], None],
    *,
    resume: bool,
) -> Keeper:
    check_scheduler(scheduler)
    start = None
    if resume:
        file = read_states(path)
        start = file["extra"].get("fit")
        if start is None:
            raise CheckpointError(f"{path} is of a loop of your own, not of fit(): take it up by load_checkpoint()")
        check(start)
        take_up(file, path, net, optimizer, scheduler, random=False)

    def write(state: dict[str, Any]) -> None:
        save_checkpoint(path, net, optimizer, scheduler, fit=state)

    return Keeper(str(path), write, start)


def compressed_for(
    model: nn.Module,
    loader: Iterable[Any],
    example_inputs: object = None,
    target_size: float | None = None,
) -> Compressed:
    """The network to train: ``model`` itself if it is compressed already, or else what :func:`fit` makes of it.

    Args:
        model: of the caller.
        loader: what the example inputs are taken from by default.
        example_inputs: for :func:`fxcompress.compress`.
        target_size: where training is to end: a large one needs more bits to begin with.
    """
    if isinstance(model, Compressed):
        return model
    inputs = example_inputs if example_inputs is not None else _first(model, loader)
    bits = min(24.0, max(8.0, 40 * (target_size or 0)))  # a quarter above the target of 32 bits, where 8 are too few
    return compress(model, inputs, bits=bits, death_limit=DEATH_LIMIT)


def _check_whose(optimizer: Optimizer | None, model: nn.Module) -> None:
    if optimizer is not None and not isinstance(model, Compressed):
        raise ValueError(
            "an optimizer needs the compressed network's parameters: net = compress(model), build the optimizer from "
            "net.param_groups(), and call fit(net, ..., optimizer=optimizer)"
        )


def _check_unused(optimizer: Optimizer | None, given: Collection[str]) -> None:
    """Check that nothing is asked of the default optimizer where there is another."""
    if optimizer is not None and given:
        name = min(given)
        raise ValueError(
            f"{name}= is of the default optimizer, and optimizer= is given: set it there, as in "
            f"net.param_groups({name}=...)"
        )


def _check_optimizer(optimizer: Optimizer, net: Compressed) -> None:
    check_suited(optimizer, net)
    tell_of_mixed(net, [optimizer])


def _tell_of_loss(loss_fn: object, optimizer: Optimizer) -> None:
    """Warn where a loss has parameters that nobody trains."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    own = loss_fn.parameters() if isinstance(loss_fn, nn.Module) else ()
    missed = sum(p.requires_grad and id(p) not in held for p in own)
    if missed and is_first():
        _LOG.warning(
            "fxcompress: the loss, a %s, has %d parameters that could be trained, and the optimizer lacks them: "
            "they stay as they are\n  train them too: Adam([*net.param_groups(), {'params': loss.parameters()}])",
            type(loss_fn).__name__, missed,
        )  # fmt: skip


def _eps(net: Compressed) -> float:
    """Adam's own, or what is more than 0 in the precision of the parameters."""
    return max([1e-8, *(torch.finfo(p.dtype).tiny for p in net.parameters() if p.is_floating_point())])


def _check_average(net: Compressed, average: object) -> None:
    if average is None:
        return
    if not isinstance(average, AveragedModel):
        raise TypeError(f"average= is a {type(average).__name__}; pass AveragedModel(net) of torch.optim.swa_utils")
    if not isinstance(average.module, Compressed):
        raise AverageError(
            f"average= is of a {type(average.module).__name__}; net = compress(model, ...), then "
            "fit(net, ..., average=AveragedModel(net))"
        )
    copies_of(net, [average])


def _first(model: nn.Module, loader: Iterable[Any]) -> tuple[Any, ...] | dict[str, Any]:
    """The inputs of the first batch, two samples of each at most, where the model is."""
    batch = Batch.of(first_batch(loader), argument_names(model))
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return batch.to(device).first(2)
