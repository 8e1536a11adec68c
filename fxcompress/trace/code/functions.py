"""The functions that a model is made of: those of the classes of its modules, and those that they call."""

import inspect
import sys
from collections.abc import Iterable, Iterator
from types import FunctionType
from typing import Any

from torch import nn

from fxcompress.trace.code.bytecode import loaded_by, names_in

_NOT_AT_WORK = {"__init__", "__repr__", "extra_repr", "_load_from_state_dict", "reset_parameters", "_init_weights"}
"""Methods that no forward calls."""


def code_around(modules: Iterable[nn.Module], *, wrappers: bool = False) -> frozenset[FunctionType]:
    """The functions of the classes of ``modules``, and of the objects on them, with those that they call.

    Class methods make models, and get hold of none: they count where something names them.

    Args:
        modules: of a model.
        wrappers: with what decorators have put around a function, which sees its arguments as well.
    """
    modules = list(modules)
    held = [value for module in modules for value in module.__dict__.values()]
    kinds = {type(value) for value in (*modules, *held)}
    own = {f: name for kind in kinds for name, f in methods(kind) if name not in _NOT_AT_WORK}
    makers = {f for kind in kinds for f in _class_methods(kind)}
    found = with_called(
        {*(own.keys() - makers), *(value for value in held if isinstance(value, FunctionType))}, wrappers=wrappers
    )
    while True:
        names = names_in(found)
        more = {f for f in makers & own.keys() if own[f] in names}
        if not more:
            return found
        makers -= more
        found |= with_called(more, wrappers=wrappers)


def _class_methods(kind: type) -> Iterator[FunctionType]:
    found = (value for base in kind.__mro__ for value in vars(base).values() if isinstance(value, classmethod))
    return (value.__func__ for value in found if isinstance(value.__func__, FunctionType))


def is_users_class(kind: type) -> bool:
    """Whether a class is neither torch's, nor Python's own, nor ours."""
    return kind.__module__.partition(".")[0] not in {"torch", "builtins", "fxcompress"}


def methods(kind: type) -> Iterator[tuple[str, FunctionType]]:
    """All functions of a class and of its bases, by name; not those of torch, and none of ours."""
    for base in filter(is_users_class, kind.__mro__):
        for name, value in vars(base).items():
            yield from ((name, function) for function in _functions(value))


def _functions(value: Any) -> Iterator[FunctionType]:  # noqa: ANN401 - what stands in a class
    if isinstance(value, property):
        value = value.fget
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    if isinstance(value, FunctionType):
        yield value


def with_called(functions: Iterable[FunctionType], *, wrappers: bool = False) -> frozenset[FunctionType]:
    """Some functions, and the functions of the same package that they name, with their wrappers or without."""
    found: set[FunctionType] = set()
    opened = _layers if wrappers else _inner
    left = [each for function in functions for each in opened(function)]
    while left:
        function = left.pop()
        if function in found:
            continue
        found.add(function)
        cells = [cell.cell_contents for cell in function.__closure__ or () if is_full(cell)]
        named = [*(value for _, value in loaded_by(function.__code__, function.__globals__)), *cells]
        own = (f for f in named if isinstance(f, FunctionType) and _package(f) == _package(function))
        left += [each for f in own for each in opened(f)]
    return frozenset(found)


def _inner(function: FunctionType) -> list[FunctionType]:
    found = inspect.unwrap(function)
    return [found] if isinstance(found, FunctionType) else []  # torch.compile wraps functions of C as well


def _layers(function: FunctionType) -> list[FunctionType]:
    """A function and all that it wraps; what Python or torch wraps it with is left out."""
    found = [function]
    while isinstance(inner := getattr(found[-1], "__wrapped__", None), FunctionType):
        found.append(inner)
    inner = None if hasattr(found[-1], "__wrapped__") else found[-1]  # it may wrap a function of C
    return [each for each in found if each is inner or _home(each) not in {"torch", *sys.stdlib_module_names}]


def _home(function: FunctionType) -> str:
    """The package that the code of a function is in; ``__module__`` of a wrapper is that of what it wraps."""
    return str(function.__globals__.get("__name__")).partition(".")[0]


def _package(function: FunctionType) -> str:
    return str(function.__module__).split(".")[0]


def is_full(cell: Any) -> bool:  # noqa: ANN401 - a cell
    """Whether a variable of an enclosing function has a value yet."""
    try:
        cell.cell_contents  # noqa: B018 - raises where it is empty
    except ValueError:
        return False
    return True
