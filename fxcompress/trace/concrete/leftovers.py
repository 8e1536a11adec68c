"""What the code of a model keeps outside of the copy that runs: caches, tables in a module or a class, globals.

A trace runs the code on stand-ins. One that stays behind in such a place would be found by the next run, which may be
one of the same trace: a mask that is kept for each size, for instance. All else that a trace changes there is put back
at its end, see effects/global_state.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import _lru_cache_wrapper
from types import FunctionType
from typing import Any

from torch import fx, nn
from torch._subclasses import FakeTensor

from fxcompress.trace.basics.trees import holds
from fxcompress.trace.code.bytecode import names_in, names_with
from fxcompress.trace.code.functions import code_around, is_full, is_users_class
from fxcompress.trace.concrete.sizes import Number


@contextmanager
def clean_caches(model: nn.Module) -> Iterator[None]:
    """Take out of such places again what is left there of a trace within."""
    functions = code_around(model.modules())
    found = {id(value): value for value in (*_named(functions), *_of_classes(model), *_of_modules(model))}
    cached = [(f, f.cache_info().misses) for f in found.values() if isinstance(f, _lru_cache_wrapper)]
    tables = [(table, table.copy()) for table in found.values() if isinstance(table, dict | list)]
    names = [
        (f.__globals__, name, f.__globals__.get(name, _MISSING))
        for f in functions
        for name in names_with(f.__code__, "STORE_GLOBAL")
    ]
    try:
        yield
    finally:
        for function, misses in cached:
            if function.cache_info().misses != misses:
                function.cache_clear()
        for table, before in tables:
            if holds(table, _OF_TRACES):
                table.clear()
                table.update(before) if isinstance(table, dict) else table.extend(before)
        for space, name, value in names:
            if holds(space.get(name), _OF_TRACES):
                space.pop(name) if value is _MISSING else space.update({name: value})


_MISSING = object()
_OF_TRACES = FakeTensor | fx.Proxy | Number


def _named(functions: frozenset[FunctionType]) -> Iterator[Any]:
    """What functions name of the modules that they stand in, and of the functions that they stand in."""
    for function in functions:
        space = function.__globals__
        yield from (space[name] for name in names_in([function]) if name in space)
        yield from (cell.cell_contents for cell in function.__closure__ or () if is_full(cell))


def _of_classes(model: nn.Module) -> Iterator[Any]:
    kinds = {base for kind in set(map(type, model.modules())) for base in kind.__mro__}
    for kind in kinds:
        if is_users_class(kind):
            for name, value in vars(kind).items():
                if not name.startswith("__"):
                    yield value.__func__ if isinstance(value, staticmethod | classmethod) else value


def _of_modules(model: nn.Module) -> Iterator[Any]:
    """What hangs on the modules themselves: a hook that was made with ``self`` writes there, whichever copy runs it."""
    for module in model.modules():
        yield from (value for name, value in vars(module).items() if not name.startswith("_"))
