"""Optimizers that a removal was not told of: they go on with parameters that are no longer the network's."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fxcompress.training.optimizer import Replacement

_LOG = logging.getLogger("fxcompress")
_WATCHED = "_fxc_watched"


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


def _mark(grad: Tensor | None) -> tuple[int, int] | None:
    """Another one as soon as a backward pass has added to a gradient."""
    return None if grad is None else (id(grad), grad._version)  # noqa: SLF001


def _is_of_use(grad: Tensor) -> bool:
    return grad.layout is torch.strided and bool(torch.isfinite(grad).all()) and bool(grad.any())
