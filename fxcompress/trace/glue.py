"""The code around the pieces of a model: which attributes it names, and which it takes apart.

Code that reaches into a piece, past its ``forward``, must be found even where the example inputs do not run it. So what
counts is the byte code, used or not.
"""

import dis
import inspect
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType
from typing import Any

from torch import nn

_NOT_AT_WORK = {"__init__", "__repr__", "extra_repr", "_load_from_state_dict", "reset_parameters", "_init_weights"}
"""Methods that no forward calls."""
_TELLS_ALL = {"children", "named_children", "modules", "named_modules", "parameters", "named_parameters", "state_dict"}
_BY_STRING = {"getattr", "get_submodule", "get_parameter", "get_buffer", "attrgetter"}


def code_around(modules: Iterable[nn.Module]) -> frozenset[FunctionType]:
    """The functions of the classes of ``modules``, and of the objects on them, with those that they call."""
    held = [value for module in modules for value in module.__dict__.values()]
    kinds = {type(value) for value in (*modules, *held)}
    own = {f for kind in kinds for name, f in methods(kind) if name not in _NOT_AT_WORK}
    return with_called(own | {value for value in held if isinstance(value, FunctionType)})


def methods(kind: type) -> Iterator[tuple[str, FunctionType]]:
    """All functions of a class and of its bases, by name; not those of torch, and none of ours."""
    for base in kind.__mro__:
        if base.__module__.split(".")[0] in {"torch", "builtins", "fxcompress"}:
            continue
        for name, value in vars(base).items():
            yield from ((name, function) for function in _functions(value))


def _functions(value: Any) -> Iterator[FunctionType]:  # noqa: ANN401 - what stands in a class
    if isinstance(value, property):
        value = value.fget
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    if isinstance(value, FunctionType):
        yield value


def with_called(functions: Iterable[FunctionType]) -> frozenset[FunctionType]:
    """Some functions, and the functions of the same package that they name."""
    found: set[FunctionType] = set()
    left = [inspect.unwrap(function) for function in functions]
    while left:
        function = left.pop()
        if function in found:
            continue
        found.add(function)
        cells = [cell.cell_contents for cell in function.__closure__ or () if _is_full(cell)]
        named = [*(function.__globals__.get(name) for name in _names(function.__code__)), *cells]
        left += [inspect.unwrap(f) for f in named if isinstance(f, FunctionType) and _package(f) == _package(function)]
    return frozenset(found)


def _package(function: FunctionType) -> str:
    return str(function.__module__).split(".")[0]


def _is_full(cell: Any) -> bool:  # noqa: ANN401 - a cell
    try:
        cell.cell_contents  # noqa: B018 - raises where it is empty
    except ValueError:
        return False
    return True


def names_in(functions: Iterable[FunctionType]) -> frozenset[str]:
    """The attributes that some functions name."""
    return frozenset(name for function in functions for name in _names(function.__code__))


def _names(code: CodeType) -> Iterator[str]:
    """The names of attributes and globals; strings too, where the code finds attributes by them."""
    yield from code.co_names
    by_string = not _BY_STRING.isdisjoint(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
        elif isinstance(constant, str) and by_string:
            yield from constant.split(".")


def opened_in(functions: Iterable[FunctionType]) -> frozenset[str]:
    """The attributes that some functions may take apart: by an index, by a loop, in another place.

    Not among them are those that they only call, compare with None, ask for their type, or for an attribute of theirs.
    """
    return frozenset(name for function in functions for name in _opened(function.__code__))


def _opened(code: CodeType) -> Iterator[str]:
    steps = [step for step in dis.get_instructions(code) if step.opname not in {"CACHE", "EXTENDED_ARG"}]
    for i, step in enumerate(steps):
        asked = i > 1 and steps[i - 2].argval in {"isinstance", "hasattr"}
        if step.opname == "LOAD_ATTR" and not (asked or _is_method(step) or _is_shut(steps[i + 1 : i + 3])):
            yield str(step.argval)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _opened(constant)


def _is_method(step: dis.Instruction) -> bool:
    """Whether an attribute is called at once; Python before 3.12 has another instruction for that."""
    return "NULL" in step.argrepr


def _is_shut(after: list[dis.Instruction]) -> bool:
    """Whether all that happens to an attribute is that another one is read off it, or that it is found there or not."""
    step = after[0]  # code never ends with a load
    if step.opname in {"LOAD_ATTR", "LOAD_METHOD"}:
        return step.argval not in _TELLS_ALL
    return step.opname.startswith(("POP_JUMP", "TO_BOOL")) or (
        step.opname == "LOAD_CONST" and step.argval is None and after[1].opname == "IS_OP"
    )
