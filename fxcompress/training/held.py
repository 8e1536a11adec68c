"""Optimizers that hold another one: SAM, Lookahead and their like step an optimizer of their own.

Such a wrapper has the parameter groups of what it holds, and mostly a state of its own; the momenta are in the state of
the other one. So what happens to the wrapper must happen to both::

    SAM.state[weight] = {old_p}      SAM.base_optimizer.state[weight] = {step, exp_avg, exp_avg_sq}
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from fxcompress.errors import OptimizerError

_OWN = frozenset({"param_groups", "state", "defaults"})
"""What every optimizer has, and others know what to do with."""


def with_held(optimizer: Optimizer) -> list[Optimizer]:
    """An optimizer and all that it holds, those that others hold after these.

    >>> import torch
    >>> inner = torch.optim.SGD([torch.ones(1)], lr=0.1)
    >>> outer = torch.optim.SGD(inner.param_groups)
    >>> outer.base_optimizer = inner
    >>> with_held(outer) == [outer, inner]
    True
    """
    found = [optimizer]
    for one in found:  # it grows on the way
        for value in vars(one).values():
            items = value if isinstance(value, list | tuple) else (value,)
            found += [item for item in items if isinstance(item, Optimizer) and all(item is not own for own in found)]
    return found


def stepping(optimizer: Optimizer) -> Optimizer:
    """The optimizer whose step hooks are called once for each step that is made: the innermost one.

    Those of a wrapper may never be. torch calls hooks around ``step`` of a class whose ``__init__`` has called its own,
    which that of many wrappers does not; and a loop for SAM calls ``first_step`` and ``second_step``.
    """
    return with_held(optimizer)[-1]


def check_own_tensors(optimizer: Optimizer, changed: Collection[Tensor]) -> None:
    """Check that an optimizer keeps tensors in its state alone, where it is known what they belong to.

    Args:
        optimizer: any.
        changed: the parameters that are to be cut.

    Raises:
        OptimizerError: it has an attribute that holds some of them, or tensors of their shapes.
    """
    ids, shapes = {id(p) for p in changed}, {tuple(p.shape) for p in changed if p.numel() > 1}
    known = {id(group["params"]) for group in optimizer.param_groups} | {id(o.state) for o in with_held(optimizer)}
    for name, value in vars(optimizer).items():
        if name in _OWN:
            continue
        for tensor in _tensors(value, known):
            if id(tensor) in ids or tuple(tensor.shape) in shapes:
                raise OptimizerError(
                    f"{type(optimizer).__name__} keeps a tensor of shape {tuple(tensor.shape)}, which a parameter that "
                    f"is cut has as well, in its attribute {name}, where nobody knows which parameter it belongs to: "
                    f"keep it in optimizer.state[parameter], prune before the optimizer is built, or build a new one "
                    "after pruning"
                )


def _tensors(value: Any, known: Collection[int]) -> Iterator[Tensor]:  # noqa: ANN401 - what attributes hold
    """The tensors in nested containers; those that are ``known`` are passed over."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple) and id(value) not in known:
        for item in value.items() if isinstance(value, Mapping) else value:
            yield from _tensors(item, known)
