"""``fxcompress.save_checkpoint`` and ``load_checkpoint``: stop training, and go on from there."""

import logging
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from fxcompress.errors import CheckpointError
from fxcompress.storage.arguments import check_arguments
from fxcompress.storage.states import read_states, write_states
from fxcompress.training.held import with_held
from fxcompress.training.in_pieces import Compressed
from fxcompress.training.network import Settings
from fxcompress.training.optimizer import check_optimizers
from fxcompress.training.randomness import random_states, restore_random

__all__ = ["load_checkpoint", "save_checkpoint"]

_LOG = logging.getLogger("fxcompress")


def save_checkpoint(
    path: str | os.PathLike[str],
    net: Compressed,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    scheduler: Any = None,  # noqa: ANN401 - torch has no one base class for them
    **extra: Any,  # noqa: ANN401
) -> int:
    """Write all that training needs to go on, in place of what was at ``path``, and return the bytes written.

    The file appears whole or not at all: a program that is killed at any moment leaves the last one. It holds what was
    cut out of the network, its tensors, which parameters are frozen, the states of optimizer and scheduler, and the
    random number generators of torch, Python, numpy and the GPUs.

    Args:
        path: file in an existing folder.
        net: a network from :func:`fxcompress.compress`, however much it has shrunk.
        optimizer: of its parameters, perhaps of others too; a list, where several train the network.
        scheduler: anything with a ``state_dict``; a list of several.
        extra: what else is to be kept, by name: tensors, numbers, strings and containers of these, such as
            ``epoch=3``, ``scaler=scaler.state_dict()`` or ``shuffle=generator.get_state()``.

    Raises:
        CheckpointError: something of this cannot be saved, or the file cannot be written. The old file is still there.
        OptimizerError: an optimizer holds parameters that are not the network's, and lacks some of it.

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
    states = {
        "net": net.state_dict(), "random": random_states(), "extra": extra, "settings": _named(net.settings),
        "frozen": [name for name, p in _all_parameters(net) if not p.requires_grad],
    }  # fmt: skip
    if optimizer is not None:
        check_optimizers(_each(optimizer), net.parameters())
        names = {id(p): name for name, p in net.named_parameters()}
        states["optimizer"] = _one_or_several(optimizer, [_saved_optimizer(own, names) for own in _each(optimizer)])
    if scheduler is not None:
        own = [check_scheduler(one).state_dict() for one in _each(scheduler)]
        states["scheduler"] = _one_or_several(scheduler, own)
    return write_states(path, states)


def _saved_optimizer(optimizer: Optimizer, names: Mapping[int, str]) -> dict[str, Any]:
    """What is kept of an optimizer; what it holds that is not the network's has None for a name.

    A wrapper such as SAM leaves the state of the optimizer that it holds out of its own.
    """
    state = optimizer.state_dict()
    kept = {id(entry) for entry in state["state"].values()}
    held = [one if any(id(v) not in kept for v in one.state.values()) else None for one in with_held(optimizer)[1:]]
    return {
        "kind": type(optimizer).__name__,
        "names": [[names.get(id(p)) for p in group["params"]] for group in optimizer.param_groups],
        "state": state,
        "held": [None if one is None else one.state_dict() for one in held],
    }


def _each(given: Any) -> list[Any]:  # noqa: ANN401 - an optimizer or a scheduler, or several
    return list(given) if isinstance(given, list | tuple) else [given]


def _one_or_several(given: object, states: list[Any]) -> Any:  # noqa: ANN401
    return states if isinstance(given, list | tuple) else states[0]


def load_checkpoint(
    path: str | os.PathLike[str],
    net: Compressed,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    scheduler: Any = None,  # noqa: ANN401
    *,
    random: bool = True,
) -> dict[str, Any]:
    """Take up training where :func:`save_checkpoint` left it.

    The network is cut to the shape of the saved one first, and takes its tensors bit for bit. Its parameters stay the
    same objects, so the optimizer may have been built before this call; what is gone leaves it. What was frozen then
    (``requires_grad``) is frozen again, and nothing else is.

    Args:
        path: of a file that :func:`save_checkpoint` wrote.
        net: fresh from :func:`fxcompress.compress`, called as it was called then; or one that has lost no more than the
            saved one.
        optimizer: of its parameters, built as it was built then; the same list, where there were several. What it
            holds besides is not loaded, only its state: save that of a second network as ``extra``.
        scheduler: of the optimizer, or the same list.
        random: also set the random number generators.

    Returns:
        what was given as ``extra``.

    Raises:
        CheckpointError: there is no such file, it is damaged, or it does not fit. Nothing has changed then.
        OptimizerError: an optimizer holds parameters that are not the network's, and lacks some of it.

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
    optimizer: Optimizer | Sequence[Optimizer] | None,
    scheduler: Any,  # noqa: ANN401
    *,
    random: bool,
) -> dict[str, Any]:
    """:func:`load_checkpoint` with what was read from the file."""
    _check_net(net)
    try:
        recut = net.plan_load(file["net"])
        names = {id(p): name for name, p in net.named_parameters()} if recut is None else recut.names()
        take = [] if optimizer is None else _take_up(optimizer, net, file, names)
        schedules = [] if scheduler is None else _pairs(scheduler, file, "scheduler")
        for one, _ in schedules:
            check_scheduler(one)
    except CheckpointError as error:
        raise CheckpointError(f"{path} does not fit: {error}") from error
    _tell_of_settings(path, file.get("settings", {}), _named(net.settings))
    if recut is not None:
        recut.commit()
    net.load_state_dict(file["net"])
    if "frozen" in file:  # missing in files of earlier versions
        _freeze(net, frozenset(file["frozen"]))
    for taken in take:
        taken.commit()
    for one, state in schedules:
        one.load_state_dict(state)
    if random:
        restore_random(file["random"])
    extra: dict[str, Any] = file["extra"]
    return extra


def _all_parameters(net: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a network by each of their names."""
    return net.named_parameters(remove_duplicate=False)


def _freeze(net: nn.Module, frozen: Collection[str]) -> None:
    """Let the parameters of these names have no gradient, and all others one."""
    for name, parameter in _all_parameters(net):
        if parameter.requires_grad == (name in frozen):
            parameter.requires_grad_(name not in frozen)


def _named(settings: Settings) -> dict[str, Any]:
    """How a network compresses itself, by the arguments of ``compress``; an objective by its name."""
    objective: Any = settings.objective
    if not isinstance(objective, str):
        objective = getattr(objective, "__name__", type(objective).__name__)
    return {
        "objective": objective,
        "bias_shrink": settings.bias_shrink, "death_limit": settings.death_limit, "keep_range": settings.keep_range,
    }  # fmt: skip


def _tell_of_settings(path: str | os.PathLike[str], was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Warn where a network goes on in another way than it began."""
    differ = [name for name in now if name in was and was[name] != now[name]]
    if differ:
        _LOG.warning(
            "fxcompress: %s is of a network from compress(%s), and this one is from compress(%s): it goes on as the "
            "latter", path, *(", ".join(f"{name}={own[name]!r}" for name in differ) for own in (was, now)),
        )  # fmt: skip


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


def _pairs(given: Any, file: Mapping[str, Any], what: str) -> list[tuple[Any, Any]]:  # noqa: ANN401
    """Each optimizer, or scheduler, with the state that was saved of it."""
    if what not in file:
        raise CheckpointError(f"it holds no {what}: it was saved without; leave {what}= out")
    own, states = _each(given), _each(file[what])
    if len(own) != len(states):
        raise CheckpointError(
            f"it holds the states of {len(states)} {what}s, and {len(own)} are given; pass all of them"
        )
    return list(zip(own, states, strict=True))


@dataclass(frozen=True, slots=True, eq=False)
class _TakeUp:
    """A state for an optimizer that fits it, those of what it holds, and the parameters that it has from then on."""

    optimizer: Optimizer
    groups: list[list[nn.Parameter]]
    state: dict[str, Any]
    held: list[dict[str, Any] | None]

    def commit(self) -> None:
        held = with_held(self.optimizer)[1:]
        shared = [one for one in held if one.param_groups is self.optimizer.param_groups]
        for group, parameters in zip(self.optimizer.param_groups, self.groups, strict=True):
            group["params"][:] = parameters
            if "param_names" in group:
                group["param_names"] = group["param_names"][: len(parameters)]
        left = {id(p) for parameters in self.groups for p in parameters}
        for group in (group for one in held for group in one.param_groups):
            group["params"][:] = [p for p in group["params"] if id(p) in left]
        self.optimizer.state.clear()
        self.optimizer.load_state_dict(self.state)
        for one, state in zip(held, self.held, strict=False):
            if state is not None:
                one.state.clear()
                one.load_state_dict(state)
        for one in shared:  # loading makes new groups, and a scheduler knows those of the wrapper alone
            one.param_groups = self.optimizer.param_groups


def _take_up(
    optimizer: Optimizer | Sequence[Optimizer], net: nn.Module, file: Mapping[str, Any], names: Mapping[int, str]
) -> list[_TakeUp]:
    """Find the saved parameters in the groups of the optimizers; ``names`` are those that stay, by their ids."""
    check_optimizers(_each(optimizer), net.parameters())
    own = {id(p) for p in net.parameters()}
    return [_take_up_one(one, saved, own, names) for one, saved in _pairs(optimizer, file, "optimizer")]


def _take_up_one(
    optimizer: Optimizer, saved: Mapping[str, Any], own: Collection[int], names: Mapping[int, str]
) -> _TakeUp:
    kind, groups = type(optimizer).__name__, [group["params"] for group in optimizer.param_groups]
    if kind != saved["kind"]:
        raise CheckpointError(f"its optimizer is {saved['kind']}, not {kind}")
    if len(groups) != len(saved["names"]):
        raise CheckpointError(f"its optimizer has {len(saved['names'])} parameter groups, this {kind} {len(groups)}")
    taken = []
    for number, (group, wanted) in enumerate(zip(groups, saved["names"], strict=True)):
        held = {names[id(p)]: p for p in group if id(p) in names}
        others = [p for p in group if id(p) not in own]
        _check_group(number, held, others, wanted)
        rest = iter(others)
        taken.append([next(rest) if name is None else held[name] for name in wanted])
    return _TakeUp(optimizer, taken, saved["state"], saved.get("held", []))  # missing in files of earlier versions


def _check_group(
    number: int, held: Mapping[str, nn.Parameter], others: Sequence[nn.Parameter], wanted: Sequence[str | None]
) -> None:
    remedy = "build it from the same groups as then, such as net.param_groups()"
    different = held.keys() ^ {name for name in wanted if name is not None}
    if different:
        raise CheckpointError(
            f"{min(different)} is in param_groups[{number}] of one optimizer and not of the other; {remedy}"
        )
    if len(others) != wanted.count(None):
        raise CheckpointError(
            f"param_groups[{number}] of its optimizer held {wanted.count(None)} parameters that are not the network's, "
            f"and holds {len(others)} now; {remedy}"
        )
