"""Calls that need care when a model runs on fake tensors: those that are refused, and those that others stand for."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor

from fxcompress.errors import TraceError
from fxcompress.trace.code.locations import place
from fxcompress.trace.effects.gradient_hooks import METHODS


def holds_values(value: object) -> bool:
    """Whether it is a tensor with values, which is none of the fake ones."""
    return isinstance(value, Tensor) and not isinstance(value, FakeTensor)


def as_written(func: Any) -> str:  # noqa: ANN401 - any function
    """A function as the user has written its call, for messages."""
    name = getattr(func, "__name__", type(func).__name__)
    return {"__getitem__": "x[mask]", "__setitem__": "x[mask] = y"}.get(name, name.strip("_"))


def refuse_call(func: Any, args: tuple[Any, ...]) -> None:  # noqa: ANN401 - whatever a mode is shown
    """Refuse what runs functions of the model, and what gives values to code that torch does not see."""
    if isinstance(func, HigherOrderOperator):
        raise TraceError(
            f"it calls torch.{func.name()}{place()}, which runs functions as the values of tensors say\n"
            "  keep both ways in tensors (torch.where in place of torch.cond), or take this out of the model"
        )
    if func in _REFUSED and not holds_values(args[0]):
        what, instead = _REFUSED[func]
        raise TraceError(f"it {what}{place()}, which a graph cannot do\n  {instead}")


def _new_full(tensor: Tensor, size: Any, fill_value: Tensor, **options: Any) -> Tensor:  # noqa: ANN401
    return tensor.new_zeros(size, **options).copy_(fill_value.detach())


def _full_like(input: Tensor, fill_value: Tensor, **options: Any) -> Tensor:  # noqa: A002, ANN401 - torch's names
    return torch.zeros_like(input, **options).copy_(fill_value.detach())


_NUMPY = "makes an array of numpy of a tensor", "compute with torch, or take this out of the model"
_REFUSED: dict[Any, tuple[str, str]] = {
    Tensor.numpy: _NUMPY,
    Tensor.__array__: _NUMPY,
    **METHODS,
    Tensor.__reduce_ex__: ("copies a tensor as an object (copy.copy, pickle)", "call x.clone() instead"),
}
"""Methods that give values to what torch does not see: what they do, and what to do instead."""
FILLED: dict[Any, Callable[..., Tensor]] = {Tensor.new_full: _new_full, torch.full_like: _full_like}
"""Functions that read the value of a tensor, to write it into all of another one."""
