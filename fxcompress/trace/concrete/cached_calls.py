"""Functions with a cache, in the code of a model or of a library that it uses, while a model runs to be traced.

What such a function makes of a size is part of the run: it must not be found by the next one, nor by a call of the same
run in which another size has the same value. So given sizes it runs each time, as if it had no cache; and what it keeps
of a run, of whatever arguments, is forgotten at the end of it.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import _lru_cache_wrapper, wraps
from types import ModuleType
from typing import Any
from unittest.mock import patch
from weakref import WeakKeyDictionary

import torch
from torch._subclasses import FakeTensor

from fxcompress.errors import TraceError
from fxcompress.trace.basics.op_watch import OpWatch
from fxcompress.trace.basics.trees import holds
from fxcompress.trace.code.locations import place
from fxcompress.trace.concrete.sizes import Number

_OTHERS = frozenset({"torch", "fxcompress", "numpy", "sympy", "networkx"}) | frozenset(sys.stdlib_module_names) - {
    "__main__"
}
"""Packages whose functions are given no sizes of a model."""


@contextmanager
def without_caches() -> Iterator[None]:
    """Within it, functions with a cache keep nothing of a run.

    Around several runs it looks for such functions once, and each run, within, only forgets what it has left.
    """
    if _active:
        try:
            yield
        finally:
            for call in _active:
                call.forget()
        return
    calls: dict[int, _Call] = {}
    with ExitStack() as stack:
        for holder, name, value in list(_cached()):
            function = value.__func__ if isinstance(value, staticmethod | classmethod) else value
            call = calls.setdefault(id(function), _Call(function))
            made = call.function() if function is value else type(value)(call.function())
            with suppress(AttributeError, TypeError):  # a class that lets nobody set its attributes
                stack.enter_context(patch.object(holder, name, made))
        _active.extend(calls.values())
        try:
            yield
        finally:
            _active.clear()
            for call in calls.values():
                call.forget()


class _Call:
    """Stands in for a function with a cache."""

    def __init__(self, cached: Any) -> None:  # noqa: ANN401 - made by functools
        self.cached = cached
        self.keeps = False
        """Whether its cache has come to hold something of the run."""

    def function(self) -> Callable[..., Any]:
        """As a function, so that it is a method where it stands in a class."""

        @wraps(self.cached.__wrapped__)
        def called(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as of the user's function
            with _Draws(self.cached.__name__):
                if holds((args, kwargs), Number):
                    return self.cached.__wrapped__(*args, **kwargs)
                result = self.cached(*args, **kwargs)
            self.keeps |= holds((args, kwargs, result), Number | FakeTensor)
            return result

        for name in ("cache_info", "cache_clear", "cache_parameters"):
            setattr(called, name, getattr(self.cached, name))
        return called

    def forget(self) -> None:
        """Empty the cache, if it holds something of the run."""
        if self.keeps:
            self.cached.cache_clear()
        self.keeps = False


_active: list[_Call] = []
"""Those that are patched now."""


class _Draws(OpWatch):
    """Refuses random numbers: a function with a cache draws them once, and a graph would draw them each time."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def before(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ANN401 - an op
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise TraceError(
                f"{self.name}, which has a cache, draws random numbers{place()}: the same ones whenever it is called, "
                "and a graph would draw others each time\n  draw them when the model is made, and keep them in a buffer"
            )


def _cached() -> Iterator[tuple[Any, str, Any]]:
    """Functions with a cache: what holds them, under which name, and what it holds."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in _OTHERS or not isinstance(module, ModuleType):
            continue
        size, places = _known.get(module, (-1, []))
        if size != len(vars(module)) or name == "__main__":  # where people define things anew
            size, places = len(vars(module)), list(_places(name, module))
            _known[module] = size, places
        found = ((holder, key, vars(holder).get(key)) for holder, key in places)
        yield from ((holder, key, value) for holder, key, value in found if _is_cached(value))


def _places(name: str, module: ModuleType) -> Iterator[tuple[Any, str]]:
    for key, value in list(vars(module).items()):
        if type(value) is _lru_cache_wrapper:
            yield module, key
        elif isinstance(value, type) and value.__module__ == name:
            yield from ((value, k) for k, v in list(vars(value).items()) if _is_cached(v))


_known: WeakKeyDictionary[ModuleType, tuple[int, list[tuple[Any, str]]]] = WeakKeyDictionary()
"""How many names a module had when it was searched, and which of them are functions with a cache."""


def _is_cached(value: object) -> bool:
    function = value.__func__ if isinstance(value, staticmethod | classmethod) else value
    return type(function) is _lru_cache_wrapper
