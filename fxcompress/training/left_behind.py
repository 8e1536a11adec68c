"""Optimizers that train no parameter of the network: they hold those of the model, or those before a removal."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fxcompress.training.optimizer import Replacement

_LOG = logging.getLogger("fxcompress")
_WATCHED = "_fxc_watched"
_STILL = "_fxc_still"
_ENOUGH = 10
"""Steps without a change until it is said. A gradient scaler that looks for its scale skips some of the first ones."""


@dataclass(frozen=True, slots=True, eq=False)
class _Watched:
    """A parameter as it was right after it was cut.

    Attributes:
        name: of the parameter.
        version: how often it had been written to.
        value: a copy, for optimizers that write to ``parameter.data``, which leaves the version as it is.
        gradient: which it had, see :func:`_mark`.
    """

    name: str
    version: int
    value: Tensor
    gradient: tuple[int, int] | None


def watch(net: nn.Module, changes: Iterable[Replacement]) -> None:
    """Note one parameter that was cut by ``prune()`` without an optimizer, to see whether anything trains it."""
    cut = {id(change.new) for change in changes if change.new is not None and change.new.requires_grad}
    named = [(name, parameter) for name, parameter in net.named_parameters() if id(parameter) in cut]
    if named:
        name, parameter = min(named, key=lambda item: (item[1].ndim < 2, item[1].numel()))  # a weight, if there is one
        value = parameter.detach().clone()
        net.__dict__[_WATCHED] = _Watched(name, parameter._version, value, _mark(parameter.grad))  # noqa: SLF001


def warn_of_left_behind(net: nn.Module) -> None:
    """Say so where the first gradient since ``prune()`` without an optimizer has changed nothing; before each step.

    A step that is skipped for gradients that are not finite, by a gradient scaler, decides nothing.
    """
    watched: _Watched | None = net.__dict__.get(_WATCHED)
    if watched is None:
        return
    parameter = dict(net.named_parameters()).get(watched.name)
    grad = None if parameter is None else parameter.grad
    if parameter is not None and (grad is None or _mark(grad) == watched.gradient or not _is_of_use(grad)):
        return
    del net.__dict__[_WATCHED]
    if parameter is not None and parameter._version == watched.version and torch.equal(parameter, watched.value):  # noqa: SLF001
        _LOG.warning(
            "fxcompress: net.prune() has cut %s, and nothing trains it since then: it has a gradient, and no step has "
            "changed it\n"
            "  an optimizer that was built before still holds the parameters as they were, which are no longer the "
            "network's: build it anew from net.param_groups(), and from now on pass it, net.prune(optimizer)",
            watched.name,
        )


@dataclass(slots=True, eq=False)
class _Still:
    """A network none of whose parameters has changed between two steps so far.

    Attributes:
        name: of a parameter with a gradient.
        value: a copy of it, for optimizers that write to ``parameter.data``.
        versions: how often each parameter had been written to, at the end of the last step.
        gradient: of that parameter, see :func:`_mark`.
        steps: that had a new gradient.
    """

    name: str
    value: Tensor
    versions: tuple[int, ...]
    gradient: tuple[int, int] | None
    steps: int = 0


def warn_of_untrained(net: nn.Module) -> None:
    """Say, once, that an optimizer trains nothing of a network; before each step, see :func:`note_unchanged`."""
    still: _Still | None = net.__dict__.get(_STILL)
    if still is None:
        return
    parameter = dict(net.named_parameters()).get(still.name)
    if parameter is None or _versions(net) != still.versions:
        net.__dict__[_STILL] = None
        return
    if parameter.grad is None or _mark(parameter.grad) == still.gradient:
        return
    still.gradient, still.steps = _mark(parameter.grad), still.steps + 1
    if still.steps < _ENOUGH or not _is_of_use(parameter.grad):
        return
    net.__dict__[_STILL] = None
    if torch.equal(parameter, still.value):
        _LOG.warning(
            "fxcompress: in %d steps, nothing has changed a parameter of %s, although they have gradients\n"
            "  the parameters of the model that was compressed are not those of the network: build the optimizer from "
            "net.param_groups()",
            still.steps, type(net).__name__,
        )  # fmt: skip


def note_unchanged(net: nn.Module) -> None:
    """Note what the parameters of a network are, at the end of each step, until an optimizer has changed one."""
    if _STILL in net.__dict__:
        if net.__dict__[_STILL] is not None:
            net.__dict__[_STILL].versions = _versions(net)
        return
    found = [(name, parameter) for name, parameter in net.named_parameters() if parameter.grad is not None]
    if found:
        name, parameter = min(found, key=lambda item: (item[1].ndim < 2, item[1].numel()))
        mark = _mark(parameter.grad)
        net.__dict__[_STILL] = _Still(name, parameter.detach().clone(), _versions(net), mark)


def _versions(net: nn.Module) -> tuple[int, ...]:
    return tuple(parameter._version for parameter in net.parameters())  # noqa: SLF001


def _mark(grad: Tensor | None) -> tuple[int, int] | None:
    """Another one as soon as a backward pass has added to a gradient."""
    return None if grad is None else (id(grad), grad._version)  # noqa: SLF001


def _is_of_use(grad: Tensor) -> bool:
    return grad.layout is torch.strided and bool(torch.isfinite(grad).all()) and bool(grad.any())
