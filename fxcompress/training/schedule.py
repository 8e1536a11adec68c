"""How learning rates fall over a training."""

import logging
import math
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from fxcompress.errors import OptimizerError, check_number
from fxcompress.training.held import with_held

REST = 0.1
"""The share of a training in which formats rest."""
LONG_REST = 0.4
"""The share of a fine-tuning in which formats rest: weights that were trained have to settle on them, and no more."""
_FALLEN = 50.0
"""How far learning rates may fall, as a factor, in a quarter of a training without a word."""
_LOG = logging.getLogger("fxcompress")
_FORMATS = frozenset({"bits", "exponents"})
"""Names of the parameter groups that decide on number formats."""


def cosine(optimizer: Optimizer, steps: int, warmup: int = 0, *, settle: float = REST) -> LambdaLR:
    """All learning rates from a linear warm-up down to 0 along half a cosine; those of bits and exponents come first.

    While number formats move, the outputs of layers do, and the running statistics of batch norm lag behind: a network
    may answer as it should in training and fail in evaluation. At the end of the training formats rest, and the weights
    and the statistics settle on them.

    Args:
        optimizer: of the groups of ``net.param_groups()``, or of others.
        steps: in which all of it has fallen; call ``step()`` of the result after each step of the optimizer.
        warmup: how many of them the learning rates rise in.
        settle: share of the steps, at the end, in which bits and exponents have a learning rate of 0.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: ``settle`` is no share, there are no steps, or ``warmup`` is negative.

    >>> import torch, fxcompress as fxc
    >>> net = fxc.compress(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)))
    >>> optimizer = torch.optim.Adam(net.param_groups(1e-3))
    >>> schedule = fxc.cosine(optimizer, 100)
    >>> for _ in range(90):
    ...     optimizer.step()
    ...     schedule.step()
    >>> {group["name"]: round(group["lr"], 6) for group in optimizer.param_groups}
    {'weights': 2.4e-05, 'biases and norms': 2.4e-05, 'bits': 0.0, 'exponents': 0.0}
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"expected a torch.optim.Optimizer, got {type(optimizer).__name__}: call it as cosine(optimizer, steps)"
        )
    check_number(steps=steps, warmup=warmup, settle=settle)
    if not (steps >= 1 and warmup >= 0):
        raise ValueError(f"steps={steps} must be at least 1, and warmup={warmup} at least 0")
    if not 0 <= settle < 1:
        raise ValueError(f"settle={settle} must be a share of the training: at least 0, and below 1")
    ends = [(1 - settle if group.get("name") in _FORMATS else 1) * steps for group in optimizer.param_groups]
    return LambdaLR(optimizer, [partial(_factor, end, warmup) for end in ends])


def _factor(end: float, warmup: int, step: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, end - warmup))))


def formats_move(optimizer: Optimizer) -> bool:
    """Whether the next step may change bits or exponents; groups without a name may hold them."""
    groups = (group for group in optimizer.param_groups if group.get("name", "bits") in _FORMATS)
    return any(bool(group["lr"]) for group in groups)


def check_scheduler_of(scheduler: object, optimizer: Optimizer, *, measured: bool) -> None:
    """Check that a scheduler sets the learning rates of an optimizer, and gets what it waits for.

    Args:
        scheduler: of the user.
        optimizer: that trains the network.
        measured: whether there is a metric after each epoch; without, there is the loss.

    Raises:
        OptimizerError: it is of another optimizer, so that the learning rates would stay as they are.
        ValueError: it waits for something that rises, and the loss falls.
    """
    other = getattr(scheduler, "optimizer", None)
    if isinstance(other, Optimizer):
        own = {id(group) for one in with_held(optimizer) for group in one.param_groups}
        if own.isdisjoint(id(group) for one in with_held(other) for group in one.param_groups):
            raise OptimizerError(
                f"scheduler= is of another {type(other).__name__} than the one that trains the network, whose learning "
                "rates it would leave alone: build it of the optimizer that is passed as optimizer="
            )
    if isinstance(scheduler, ReduceLROnPlateau) and scheduler.mode == "max" and not measured:
        raise ValueError(
            'ReduceLROnPlateau(mode="max") waits for a number that rises, and without validate= it gets the loss, '
            'which falls: pass validate=, or take mode="min"'
        )


def largest_rates(optimizer: Optimizer, so_far: list[float]) -> list[float]:
    """The largest learning rate that each group has had, with that of the next step."""
    now = [float(group["lr"]) for group in optimizer.param_groups]
    return [max(pair) for pair in zip(now, so_far or now, strict=False)]


def tell_of_fall(optimizer: Optimizer, largest: list[float], done: int, total: int) -> None:
    """Warn where all learning rates have fallen long before the end, as where a scheduler counts epochs.

    Args:
        optimizer: by now.
        largest: see :func:`largest_rates`.
        done: steps that were made.
        total: steps of the whole training.
    """
    now = [float(group["lr"]) for group in optimizer.param_groups]
    if 4 * done <= total and all(rate * _FALLEN < most for rate, most in zip(now, largest, strict=False)):
        _LOG.warning(
            "fxcompress: after %d of %d steps, the scheduler has let the learning rate fall from %.2g to %.2g: it is "
            "stepped after each batch\n  where it counts epochs, give it len(loader) times as many",
            done, total, largest[0], now[0],
        )  # fmt: skip
