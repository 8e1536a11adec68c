"""The code around the pieces of a model: which attributes it names, and which it takes apart.

Code that reaches into a piece, past its ``forward``, must be found even where the example inputs do not run it. So what
counts is the byte code, used or not.
"""

import dis
import functools
import inspect
import sys
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torch import nn

_NOT_AT_WORK = {"__init__", "__repr__", "extra_repr", "_load_from_state_dict", "reset_parameters", "_init_weights"}
"""Methods that no forward calls."""
_TELLS_ALL = {"children", "named_children", "modules", "named_modules", "parameters", "named_parameters", "state_dict"}
_BY_STRING = {"getattr", "get_submodule", "get_parameter", "get_buffer", "attrgetter"}

_OF_GLOBALS = {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"}
_OF_OBJECTS = {"LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR", "DELETE_ATTR"}
_JUMPS = frozenset({*dis.hasjrel, *dis.hasjabs})
_PUSHING = ("LOAD_FAST", "LOAD_CONST", "LOAD_GLOBAL", "LOAD_DEREF", "LOAD_CLOSURE", "LOAD_SMALL_INT", "PUSH_")
"""Instructions that push a value and read none; an empty container is made by one that counts what it takes."""


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


def loaded_by(code: CodeType, space: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """What code loads by the name of a global, and what it reads off a module that it has loaded: ``helpers.f``.

    With each goes the name under which it stands in the code. A name that it reads off anything else, as ``self.f``, is
    none of a global, although there may be one of that name.
    """
    steps = _steps(code)
    loaded: list[tuple[str, Any]] = []
    for i, step in enumerate(steps):
        if step.opname in _OF_GLOBALS:
            name = str(step.argval)
            found = space.get(name)
            for after in steps[i + 1 :]:
                if not isinstance(found, ModuleType) or after.opname not in _OF_OBJECTS:
                    break
                loaded.append((name, found))
                name, found = f"{name}.{after.argval}", vars(found).get(str(after.argval))
            loaded.append((name, found))
    yield from loaded
    strings = list(_strings(code))
    yield from (
        (f"{owner}.{name}", vars(module)[name])
        for owner, module in loaded
        if isinstance(module, ModuleType)
        for name in strings
        if name in vars(module)
    )
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from loaded_by(constant, space)


def _package(function: FunctionType) -> str:
    return str(function.__module__).split(".")[0]


def is_full(cell: Any) -> bool:  # noqa: ANN401 - a cell
    """Whether a variable of an enclosing function has a value yet."""
    try:
        cell.cell_contents  # noqa: B018 - raises where it is empty
    except ValueError:
        return False
    return True


def names_in(functions: Iterable[FunctionType]) -> frozenset[str]:
    """The attributes that some functions name."""
    return frozenset(name for function in functions for name in _names(function.__code__))


def names_beyond_self(functions: Iterable[FunctionType]) -> frozenset[str]:
    """The attributes that some functions name of anything but ``self``.

    A piece is ``self`` in its own methods alone: in others it would have to be handed over, which takes it apart.
    """
    return frozenset(name for function in functions for name in _beyond_self(function.__code__))


def _beyond_self(code: CodeType) -> Iterator[str]:
    if code.co_varnames[:1] != ("self",) or not code.co_argcount:
        yield from _names(code)
        return
    steps = _steps(code)
    if any("self" in _words(step) for step in steps if step.opname.startswith(("STORE_F", "STORE_D", "DELETE"))):
        yield from _names(code)
        return
    of_self = [step.argval == "self" and step.opname.startswith(("LOAD_FAST", "LOAD_DEREF")) for step in steps]
    on_self = {i for i in range(1, len(steps)) if of_self[i - 1] and steps[i].opname in _OF_OBJECTS}
    named = {step.argval for i, step in enumerate(steps) if i not in on_self and isinstance(step.argval, str)}
    yield from named.intersection(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
    yield from _strings(code)


def _words(step: dis.Instruction) -> tuple[object, ...]:
    """The variables of an instruction; those that do two things at once have two."""
    return step.argval if isinstance(step.argval, tuple) else (step.argval,)


@functools.lru_cache(maxsize=4096)
def _steps(code: CodeType) -> list[dis.Instruction]:
    """The instructions of a function; asked for by each trace of a model, and there are thousands of them."""
    return [step for step in dis.get_instructions(code) if step.opname not in {"CACHE", "EXTENDED_ARG"}]


def _names(code: CodeType) -> Iterator[str]:
    """The names of attributes and globals; strings too, where the code finds attributes by them."""
    yield from code.co_names
    yield from _strings(code)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _strings(code: CodeType) -> Iterator[str]:
    """The names in strings, where code finds attributes by them; no name has a space in it, as docstrings have."""
    if not _BY_STRING.isdisjoint(code.co_names):
        found = (value for value in code.co_consts if isinstance(value, str) and len(value.split()) == 1)
        yield from (name for value in found for name in value.split("."))


def opened_in(functions: Iterable[FunctionType]) -> frozenset[str]:
    """The attributes that some functions may take apart: by an index, by a loop, in another place.

    Not among them are those that they only call, compare with None, ask for their type, or for an attribute of theirs.
    """
    return frozenset(name for function in functions for name in _opened(function.__code__))


def _opened(code: CodeType) -> Iterator[str]:
    steps = _steps(code)
    for i, step in enumerate(steps):
        asked = i > 1 and steps[i - 2].argval in {"isinstance", "hasattr"}
        if step.opname != "LOAD_ATTR" or asked or _is_method(step):
            continue
        if not _is_shut(steps[i + 1 : i + 3]) and not _is_called(steps[i + 1 :]):
            yield str(step.argval)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _opened(constant)


def _is_called(after: list[dis.Instruction]) -> bool:
    """Whether what lies on top of the stack is called with ``*args`` or ``**kwargs``, and that is all."""
    above = 0  # how many values lie on top of it
    for step in after:
        if step.opname == "CALL_FUNCTION_EX":
            keywords = (step.arg or 0) & 1 or sys.version_info >= (3, 14)
            if above == 1 + keywords + (sys.version_info >= (3, 13)):
                return True
        if step.opname.startswith(("RETURN", "YIELD", "SWAP", "ROT")) or step.opcode in _JUMPS:
            return False
        change = dis.stack_effect(step.opcode, step.arg if step.opcode >= dis.HAVE_ARGUMENT else None, jump=False)
        if not step.opname.startswith(_PUSHING) and max(1, 1 - change) > above:
            return False
        above += change
    return False


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
