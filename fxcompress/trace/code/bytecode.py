"""What functions name, and what they take apart, by their byte code: used or not, as other inputs may take that path.

Code that reaches into a piece of a model, past its ``forward``, must be found even where the example inputs do not run
it.
"""

import dis
import functools
import sys
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

_TELLS_ALL = {"children", "named_children", "modules", "named_modules", "parameters", "named_parameters", "state_dict"}
_BY_STRING = {"getattr", "get_submodule", "get_parameter", "get_buffer", "attrgetter"}
_OF_GLOBALS = {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"}
_OF_OBJECTS = {"LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR", "DELETE_ATTR"}
_JUMPS = frozenset({*dis.hasjrel, *dis.hasjabs})
_PUSHING = ("LOAD_FAST", "LOAD_CONST", "LOAD_GLOBAL", "LOAD_DEREF", "LOAD_CLOSURE", "LOAD_SMALL_INT", "PUSH_")
"""Instructions that push a value and read none; an empty container is made by one that counts what it takes."""


def nested(code: CodeType) -> Iterator[CodeType]:
    """The code of a function, and of the functions inside of it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from nested(constant)


@functools.lru_cache(maxsize=8192)
def names_with(code: CodeType, opname: str) -> frozenset[str]:
    """What instructions of a kind name in code, and in the functions inside of it."""
    return frozenset(str(step.argval) for each in nested(code) for step in _steps(each) if step.opname == opname)


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
    for inner in nested(code):
        yield from inner.co_names if inner is not code else ()
        yield from _strings(inner)


def _words(step: dis.Instruction) -> tuple[object, ...]:
    """The variables of an instruction; those that do two things at once have two."""
    return step.argval if isinstance(step.argval, tuple) else (step.argval,)


@functools.lru_cache(maxsize=4096)
def _steps(code: CodeType) -> list[dis.Instruction]:
    """The instructions of a function; asked for by each trace of a model, and there are thousands of them."""
    return [step for step in dis.get_instructions(code) if step.opname not in {"CACHE", "EXTENDED_ARG"}]


def _names(code: CodeType) -> Iterator[str]:
    """The names of attributes and globals; strings too, where the code finds attributes by them."""
    for each in nested(code):
        yield from each.co_names
        yield from _strings(each)


def _strings(code: CodeType) -> Iterator[str]:
    """The names in strings, where code finds attributes by them; no name has a space in it, as docstrings have."""
    if not _BY_STRING.isdisjoint(code.co_names):
        found = (value for value in code.co_consts if isinstance(value, str) and len(value.split()) == 1)
        yield from (name for value in found for name in value.split("."))


def opened_in(functions: Iterable[FunctionType]) -> frozenset[str]:
    """The attributes that some functions may take apart: by an index, by a loop, in another place.

    Not among them are those that they only call, compare with None, ask for their type, or for an attribute of theirs.
    """
    return frozenset(name for function in functions for code in nested(function.__code__) for name in _opened(code))


def _opened(code: CodeType) -> Iterator[str]:
    steps = _steps(code)
    for i, step in enumerate(steps):
        asked = i > 1 and steps[i - 2].argval in {"isinstance", "hasattr"}
        if step.opname != "LOAD_ATTR" or asked or _is_method(step):
            continue
        if not _is_shut(steps[i + 1 : i + 3]) and not _is_called(steps[i + 1 :]):
            yield str(step.argval)


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
