"""What ends a training in the middle, and what is left then, in words."""

from collections.abc import Sequence
from types import TracebackType
from typing import Protocol

from torch import nn

from fxcompress.errors import BatchError, DivergenceError
from fxcompress.training.finite import EMPTY, IN_THE_DATA
from fxcompress.training.history import EpochRecord
from fxcompress.training.interrupt import TrainingInterrupted
from fxcompress.training.resume import Run

_TOO_FEW = (
    "Expected more than 1 value per channel when training",
    "Expected more than 1 spatial element when training",
)
"""How torch begins to say that a norm has nothing to take a variance of."""


class StepRefusedError(Exception):
    """Raised before a step that must not be made, in words; turned into an error that says where."""


class NotFiniteError(StepRefusedError):
    """The loss or a gradient is not finite."""


class TooFewValuesError(StepRefusedError):
    """A norm cannot be trained on this batch."""


class Stand(Protocol):
    """Where a trainer stands; see :class:`fxcompress.training.trainer.Trainer`."""

    net: nn.Module
    done: int
    total: int
    batch: int


def interrupted(run: Run, trainer: Stand, epochs: int) -> TrainingInterrupted:
    """What is raised when the program was asked to stop."""
    where = f"after step {trainer.done} of {trainer.total}, with {len(run.history)} of {epochs} epochs finished"
    path = None if run.keeper is None else run.keeper.path
    return TrainingInterrupted(where, trainer.net, run.history, path)


def ended(
    error: StepRefusedError, trainer: Stand, history: Sequence[EpochRecord], run: Run | None = None
) -> DivergenceError | BatchError:
    """What is raised when a step cannot be made: where, why, what is left, and what to do."""
    epoch, batch = len(history) + 1, trainer.batch + 1
    lines = [
        f"epoch {epoch}, batch {batch} (step {trainer.done + 1} of {trainer.total}): {error}",
        "  this step was not made: the network is as it was before it, and this exception holds it as .net",
    ]
    if run is not None and run.keeper is not None and history:
        path = run.keeper.path
        lines += [
            f"  {path} holds the run as it was after epoch {len(history)}; load_checkpoint({path!r}, net) reads it"
        ]
    kind = BatchError if isinstance(error, TooFewValuesError) else DivergenceError
    return kind("\n".join([*lines, f"  {_remedy(error)}"]), trainer.net, history)


def _remedy(error: StepRefusedError) -> str:
    if isinstance(error, TooFewValuesError):
        return "let the loader leave such batches out, as DataLoader(..., drop_last=True) does with the last one"
    if IN_THE_DATA in str(error):
        return "look at the data, and at what prepares it: torch.isfinite(batch).all() finds the samples"
    if EMPTY in str(error):
        return "let the loader leave such batches out: the mean of a loss over nothing is nan"
    return "take a lower lr= or a longer warm-up, or look at what the loss divides by or takes the logarithm of"


def too_few_values(error: ValueError, net: nn.Module) -> TooFewValuesError | None:
    """What torch has said of a norm that has one value for each channel, with the layer; None of any other error.

    Args:
        error: raised by a call of ``net``.
        net: that was called.
    """
    said = str(error)
    if not said.startswith(_TOO_FEW):
        return None
    name = _innermost(error.__traceback__, net)
    return TooFewValuesError(
        f"{name or 'a norm'} has one value for each channel, and no variance to train with: {said}"
    )


def _innermost(trace: TracebackType | None, net: nn.Module) -> str:
    """The path of the innermost module of a network whose code an error has passed; empty where there is none."""
    names, found = {id(module): name for name, module in net.named_modules() if name}, ""
    while trace is not None:
        found = names.get(id(trace.tb_frame.f_locals.get("self")), found)
        trace = trace.tb_next
    return found
