"""What code changes past the modules of its model: globals, variables of enclosing functions, attributes of classes.

A graph runs none of it, as it runs no assignment to an attribute of a module (attributes.py). A table that is made once
for all models does no harm, a count of calls does, if something is computed from it.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn

from fxcompress.trace.basics.modules import modules_in
from fxcompress.trace.code.bytecode import loaded_by, names_with, nested
from fxcompress.trace.code.functions import code_around, is_full, is_users_class, methods
from fxcompress.trace.effects.contents import Content, is_same

_MISSING = object()
_BY_STRING = frozenset({"setattr", "globals", "vars", "__dict__"})
_DEPTH = 3
"""How far to look into what holds something that holds something: a registry of the whole library may be a global."""


class Surroundings:
    """What the code of a model may change around it, before it runs.

    Args:
        model: whose code is looked at.
    """

    def __init__(self, model: nn.Module) -> None:
        own = modules_in(model)
        functions = code_around(own, wrappers=True)
        self._own = {id(module) for module in own}
        self._places: list[tuple[Any, str, object]] = []
        self._cells: list[tuple[str, CellType, object]] = []
        self._held: dict[int, tuple[str, Content]] = {}
        self._seen: dict[int, object] = {}
        stored = {name for f in functions for name in _stored(f.__code__)}
        kinds = {base for module in own for base in type(module).__mro__}
        spaces = {id(f.__globals__): f.__globals__ for f in functions}
        self._places += [(space, name, space[name]) for space in spaces.values() for name in stored & space.keys()]
        for function in functions:
            self._look_at(function, stored, kinds)
        for kind in kinds:
            if is_users_class(kind):
                self._look_into(kind, kind.__name__, stored)

    def _look_at(self, function: FunctionType, stored: set[str], kinds: set[type]) -> None:
        """Note what a function may change by its globals, its closure, its defaults and its own attributes."""
        code, space = function.__code__, function.__globals__
        self._hold(function.__name__, vars(function))
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self._hold(f"default of {function.__name__}", value)
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            if is_full(cell):
                self._cells.append((name, cell, cell.cell_contents))
                self._hold(name, cell.cell_contents)
        self._places += [(space, name, space.get(name, _MISSING)) for name in names_with(code, "STORE_GLOBAL")]
        for name, value in loaded_by(code, space):
            if id(value) not in self._seen:
                self._seen[id(value)] = value
                self._hold(name, value)
                if isinstance(value, type | ModuleType) and value not in kinds and not _is_class_of_torch(value):
                    self._look_into(value, name, stored)

    def _look_into(self, owner: type | ModuleType, name: str, stored: set[str]) -> None:
        """Note what hangs on a class or a module under names that code sets on anything, and the tables of a class."""
        own = {f for _, f in methods(owner)} if isinstance(owner, type) else set()
        names = stored.union(*(names_with(f.__code__, "STORE_ATTR") for f in own))
        self._places += [(owner, key, vars(owner).get(key, _MISSING)) for key in names & vars(owner).keys()]
        for key, value in vars(owner).items() if isinstance(owner, type) else ():
            self._hold(f"{name}.{key}", value)

    def _hold(self, name: str, value: object) -> None:
        """Note what is in a container, or in an object."""
        level = [value]
        for _ in range(_DEPTH):
            deeper: list[object] = []
            for each in level:
                known = isinstance(each, Tensor | type | ModuleType) or id(each) in self._own or id(each) in self._held
                content = None if known else Content.of(each)
                if content is not None:
                    self._held[id(each)] = name, content
                    deeper += content.inside()
            level = deeper

    def changed(self) -> set[str]:
        """The names of what is something else now."""
        return {
            *(name for owner, name, value in self._places if not is_same(_now(owner, name), value)),
            *(name for name, cell, value in self._cells if not is_same(cell.cell_contents, value)),
            *(name for name, content in self._held.values() if not content.is_there()),
        }

    def restore(self) -> None:
        """Put back what was there."""
        for owner, name, value in self._places:
            if not is_same(_now(owner, name), value):
                _put(owner, name, value)
        for _, cell, value in self._cells:
            cell.cell_contents = value
        for _, content in self._held.values():
            if not content.is_there():
                content.put_back()


@contextmanager
def restored_around(model: nn.Module) -> Iterator[None]:
    """Put back afterwards what the code of a model changes past its modules."""
    around = Surroundings(model)
    try:
        yield
    finally:
        around.restore()


def _is_class_of_torch(value: object) -> bool:
    return isinstance(value, type) and value.__module__.partition(".")[0] == "torch"


@functools.lru_cache(maxsize=8192)
def _stored(code: CodeType) -> frozenset[str]:
    """The names of attributes that code sets; all that it has in strings, where it may set them by these."""
    by_string = (each for each in nested(code) if not _BY_STRING.isdisjoint(each.co_names))
    strings = (value for each in by_string for value in each.co_consts if isinstance(value, str))
    return names_with(code, "STORE_ATTR").union(value for value in strings if value.isidentifier())


def _now(owner: Any, name: str) -> object:  # noqa: ANN401 - globals, a class or a module
    return (owner if isinstance(owner, dict) else vars(owner)).get(name, _MISSING)


def _put(owner: Any, name: str, value: object) -> None:  # noqa: ANN401
    if isinstance(owner, dict):
        owner.pop(name, None) if value is _MISSING else owner.update({name: value})
    else:
        setattr(owner, name, value)
