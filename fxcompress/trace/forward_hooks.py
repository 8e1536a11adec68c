"""Forward hooks: those that the code of a model registers are part of what it computes, all others are the caller's.

A model may hook into its own layers, when it is made or when it is first asked for what the hooks collect. Such hooks
run in a trace like all other code of the model, and what they compute is in the graph. Hooks of the caller are refused,
see support.py: nobody knows what else they are for.
"""

import functools
import inspect
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from fxcompress.trace.basics.modules import modules_in
from fxcompress.trace.code.bytecode import nested
from fxcompress.trace.code.functions import methods, with_called
from fxcompress.trace.weights.norm import is_weight_norm_hook
from fxcompress.trace.weights.opened import can_be_opened

FORWARD = ("_forward_hooks", "_forward_pre_hooks")
TABLES = frozenset(
    {*FORWARD, "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs"}
)
"""Where nn.Module keeps them."""


def hooks_of(module: nn.Module) -> list[Any]:
    """The forward hooks of a module, but for those of torch that compute a weight."""
    found = (hook for name in FORWARD for hook in getattr(module, name).values())
    return [hook for hook in found if not (is_weight_norm_hook(hook) or can_be_opened(module, hook))]


def hooked(model: nn.Module) -> bool:
    """Whether any module of a model has a forward hook."""
    return any(hooks_of(module) for module in modules_in(model))


def remove_hooks(model: nn.Module) -> None:
    """Remove all forward hooks from the modules of a copy."""
    for module in model.modules() if hooked(model) else ():
        for name in TABLES:
            getattr(module, name).clear()


def hooks_of_its_own(model: nn.Module) -> frozenset[int]:
    """The ids of those forward hooks of a model that its own code registers."""
    found = [hook for module in modules_in(model) for hook in hooks_of(module)]
    codes = set(_codes(model)) if found else set()
    return frozenset(id(hook) for hook in found if _code(hook) in codes)


def _code(hook: Any) -> CodeType | None:  # noqa: ANN401 - whatever can be called
    while isinstance(hook, functools.partial):
        hook = hook.func
    function = inspect.unwrap(getattr(hook, "__func__", hook))
    return function.__code__ if isinstance(function, FunctionType) else None


def _codes(model: nn.Module) -> Iterator[CodeType]:
    """The code of a model: of the methods of its classes, and of the functions of the same package that they name."""
    own = {function for kind in set(map(type, model.modules())) for _, function in methods(kind)}
    for function in with_called(own, wrappers=True):
        yield from nested(function.__code__)
