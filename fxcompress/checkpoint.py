"""``fxcompress.save_checkpoint`` and ``load_checkpoint``: stop training, and go on from there."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from fxcompress.errors import CheckpointError
from fxcompress.storage.arguments import check_arguments
from fxcompress.storage.states import read_states, write_states
from fxcompress.training.in_pieces import Compressed
from fxcompress.training.optimizer import check_optimizer
from fxcompress.training.randomness import random_states, restore_random

__all__ = ["load_checkpoint", "save_checkpoint"]


def save_checkpoint(
    path: str | os.PathLike[str],
    net: Compressed,
    optimizer: Optimizer | None = None,
    scheduler: Any = None,  # noqa: ANN401 - torch has no one base class for them
    **extra: Any,  # noqa: ANN401
) -> int:
    """Write all that training needs to go on, in place of what was at ``path``, and return the bytes written.

    The file appears whole or not at all: a program that is killed at any moment leaves the last one. It holds what was
    cut out of the network, its tensors, the states of optimizer and scheduler, and the random number generators of
    torch, Python, numpy and the GPUs.

    Args:
        path: file in an existing folder.
        net: a network from :func:`fxcompress.compress`, however much it has shrunk.
        optimizer: of its parameters.
        scheduler: anything with a ``state_dict``.
        extra: what else is to be kept, by name: tensors, numbers, strings and containers of these, such as
            ``epoch=3``, ``scaler=scaler.state_dict()`` or ``shuffle=generator.get_state()``.

    Raises:
        CheckpointError: something of this cannot be saved, or the file cannot be written. The old file is still there.
        OptimizerError: the optimizer holds parameters that are not the network's.

    >>> import tempfile, torch, fxcompress as fxc
    >>> net = fxc.compress(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.zeros(1, 4))
    >>> optimizer = torch.optim.Adam(net.param_groups())
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = save_checkpoint(f"{folder}/run.pt", net, optimizer, epoch=3)
    ...     load_checkpoint(f"{folder}/run.pt", net, optimizer)
    {'epoch': 3}
    """
    check_arguments("save_checkpoint(path, net, optimizer)", path, net)
    _check_net(net)
    states = {"net": net.state_dict(), "random": random_states(), "extra": extra}
    if optimizer is not None:
        check_optimizer(optimizer, net.parameters())
        names = {id(p): name for name, p in net.named_parameters()}
        states["optimizer"] = {
            "kind": type(optimizer).__name__,
            "names": [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups],
            "state": optimizer.state_dict(),
        }
    if scheduler is not None:
        states["scheduler"] = check_scheduler(scheduler).state_dict()
    return write_states(path, states)


def load_checkpoint(
    path: str | os.PathLike[str],
    net: Compressed,
    optimizer: Optimizer | None = None,
    scheduler: Any = None,  # noqa: ANN401
    *,
    random: bool = True,
) -> dict[str, Any]:
    """Take up training where :func:`save_checkpoint` left it.

    The network is cut to the shape of the saved one first, and takes its tensors bit for bit. Its parameters stay the
    same objects, so the optimizer may have been built before this call; what is gone leaves it.

    Args:
        path: of a file that :func:`save_checkpoint` wrote.
        net: fresh from :func:`fxcompress.compress`, called as it was called then; or one that has lost no more than the
            saved one.
        optimizer: of its parameters, built as it was built then.
        scheduler: of the optimizer.
        random: also set the random number generators.

    Returns:
        what was given as ``extra``.

    Raises:
        CheckpointError: there is no such file, it is damaged, or it does not fit. Nothing has changed then.
        OptimizerError: the optimizer holds parameters that are not the network's.

    >>> import tempfile, torch, fxcompress as fxc
    >>> build = lambda: fxc.compress(torch.nn.Linear(8, 4), torch.zeros(1, 8))
    >>> net = build()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = fxc.save_checkpoint(f"{folder}/run.pt", net, epoch=3)
    ...     fxc.load_checkpoint(f"{folder}/run.pt", build())
    {'epoch': 3}
    """
    check_arguments("load_checkpoint(path, net, optimizer)", path, net)
    return take_up(read_states(path), path, net, optimizer, scheduler, random=random)


def take_up(
    file: Mapping[str, Any],
    path: str | os.PathLike[str],
    net: Compressed,
    optimizer: Optimizer | None,
    scheduler: Any,  # noqa: ANN401
    *,
    random: bool,
) -> dict[str, Any]:
    """:func:`load_checkpoint` with what was read from the file."""
    _check_net(net)
    try:
        recut = net.plan_load(file["net"])
        names = {id(p): name for name, p in net.named_parameters()} if recut is None else recut.names()
        take = None if optimizer is None else _take_up(optimizer, net, file, names)
        if scheduler is not None:
            check_scheduler(scheduler)
            _saved(file, "scheduler")
    except CheckpointError as error:
        raise CheckpointError(f"{path} does not fit: {error}") from error
    if recut is not None:
        recut.commit()
    net.load_state_dict(file["net"])
    if take is not None:
        take.commit()
    if scheduler is not None:
        scheduler.load_state_dict(file["scheduler"])
    if random:
        restore_random(file["random"])
    extra: dict[str, Any] = file["extra"]
    return extra


def check_scheduler(scheduler: Any) -> Any:  # noqa: ANN401
    """The scheduler, if its state can be saved.

    Raises:
        CheckpointError: it cannot.
    """
    if not hasattr(scheduler, "state_dict") or not hasattr(scheduler, "load_state_dict"):
        raise CheckpointError(
            f"{type(scheduler).__name__} has no state_dict and load_state_dict, so nobody could go on with it; use a "
            "scheduler of torch.optim, or give it both"
        )
    return scheduler


def _check_net(net: nn.Module) -> None:
    if not isinstance(net, Compressed):
        raise CheckpointError(
            f"a checkpoint is of a network from compress(), not of a {type(net).__name__}; pass what is inside of a "
            "wrapper (net.module), and use save() and load() for a finalized network"
        )


def _saved(file: Mapping[str, Any], what: str) -> Any:  # noqa: ANN401
    if what not in file:
        raise CheckpointError(f"it holds no {what}: it was saved without; leave {what}= out")
    return file[what]


@dataclass(frozen=True, slots=True, eq=False)
class _TakeUp:
    """A state for an optimizer that fits it, and the parameters that it holds from then on."""

    optimizer: Optimizer
    groups: list[list[nn.Parameter]]
    state: dict[str, Any]

    def commit(self) -> None:
        for group, parameters in zip(self.optimizer.param_groups, self.groups, strict=True):
            group["params"][:] = parameters
            if "param_names" in group:
                group["param_names"] = group["param_names"][: len(parameters)]
        self.optimizer.state.clear()
        self.optimizer.load_state_dict(self.state)


def _take_up(optimizer: Optimizer, net: nn.Module, file: Mapping[str, Any], names: Mapping[int, str]) -> _TakeUp:
    """Find the saved parameters in the groups of the optimizer; ``names`` are those that stay, by their ids."""
    check_optimizer(optimizer, net.parameters())
    saved = _saved(file, "optimizer")
    kind = type(optimizer).__name__
    if kind != saved["kind"]:
        raise CheckpointError(f"its optimizer is {saved['kind']}, not {kind}")
    held = [{names[id(p)]: p for p in group["params"] if id(p) in names} for group in optimizer.param_groups]
    if len(held) != len(saved["names"]):
        raise CheckpointError(f"its optimizer has {len(saved['names'])} parameter groups, this {kind} {len(held)}")
    for number, (own, wanted) in enumerate(zip(held, saved["names"], strict=True)):
        _check_group(number, own, wanted)
    groups = [[own[name] for name in wanted] for own, wanted in zip(held, saved["names"], strict=True)]
    return _TakeUp(optimizer, groups, saved["state"])


def _check_group(number: int, own: Mapping[str, nn.Parameter], wanted: Sequence[str]) -> None:
    different = own.keys() ^ set(wanted)
    if different:
        raise CheckpointError(
            f"{min(different)} is in param_groups[{number}] of one optimizer and not of the other; build it from the "
            "same groups as then, such as net.param_groups()"
        )
