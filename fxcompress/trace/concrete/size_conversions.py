"""Conversions of sizes, as ``int(h / 2)`` and ``math.sqrt(d)``, while a model runs to be traced.

Python itself lets ``int`` and the functions of ``math`` make nothing but plain numbers. So the code of the model finds
others under these names, which go on being sizes: the graph then holds for other inputs, too.
"""

import ast
import functools
import linecache
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import FunctionType
from typing import Any
from unittest.mock import patch

from torch import nn

from fxcompress.trace.basics.patching import patched
from fxcompress.trace.code.functions import code_around
from fxcompress.trace.concrete.sizes import OF_MATH, Number, converted

_CHECKS = {"isinstance", "issubclass"}


@contextmanager
def kept_conversions(model: nn.Module) -> Iterator[None]:
    """Within it, what the code of a model converts goes on being a size.

    Around several runs of a model it looks at the code once, and does nothing in each run, within.
    """
    if _active:
        yield
        return
    functions = {function: _kept(function) for function in OF_MATH}
    with ExitStack() as stack:
        for function, kept in functions.items():
            stack.enter_context(patch.object(math, function.__name__, kept))
        for space, code in _spaces(code_around(model.modules())):
            names: dict[str, Any] = {k: functions[v] for k, v in space.items() if _is_in(v, functions)}
            names |= {
                kind.__name__: _KINDS[kind] for kind in _KINDS if kind.__name__ not in space and _calls(code, kind)
            }
            stack.enter_context(patched(space, names))
        _active.append(model)
        try:
            yield
        finally:
            _active.clear()


_active: list[nn.Module] = []
"""The model whose code is patched now."""


def _kept(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def called(*args: Any) -> Any:  # noqa: ANN401 - as of math
        return converted(function, *args) if any(isinstance(a, Number) for a in args) else function(*args)

    return called


class _Kind(type):
    """A class in the place of ``int`` or ``float``."""

    kind: type

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as of int
        if len(args) == 1 and isinstance(args[0], Number):
            return args[0] if type(args[0].fxc_value) is cls.kind else converted(cls.kind, *args)
        return cls.kind(*args, **kwargs)

    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, cls.kind)

    def __subclasscheck__(cls, value: type) -> bool:
        return issubclass(value, cls.kind)


class _Int(metaclass=_Kind):
    kind = int


class _Float(metaclass=_Kind):
    kind = float


_KINDS: dict[type, type] = {int: _Int, float: _Float}


def _is_in(value: Any, functions: dict[Callable[..., Any], Any]) -> bool:  # noqa: ANN401 - any global
    return type(value) is type(math.sqrt) and value in functions


def _spaces(functions: Iterable[FunctionType]) -> Iterator[tuple[dict[str, Any], frozenset[str]]]:
    """The globals of functions, with the files that they stand in."""
    found: dict[int, tuple[dict[str, Any], set[str]]] = {}
    for function in functions:
        space, files = found.setdefault(id(function.__globals__), (function.__globals__, set()))
        files.add(function.__code__.co_filename)
    for space, files in found.values():
        if not str(space.get("__name__")).startswith(("torch.", "fxcompress.")):
            yield space, frozenset(files)


def _calls(files: frozenset[str], kind: type) -> bool:
    """Whether all that code does with the name of a type is to call it, or to ask whether something is of it."""
    return all(_only_called(file, kind.__name__) for file in files)


@functools.lru_cache(maxsize=256)
def _only_called(file: str, name: str) -> bool:
    """Whether a file, the source of which is there, does no more with a name; what annotations do is done by then."""
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except (SyntaxError, ValueError):
        return False
    return bool(tree.body) and name not in set(_other_uses(tree))


def _other_uses(tree: ast.AST) -> Iterator[str]:
    if isinstance(tree, ast.Name):
        yield tree.id
        return
    skipped: list[ast.AST | None] = []
    if isinstance(tree, ast.Call):
        skipped.append(tree.func if isinstance(tree.func, ast.Name) else None)
        if isinstance(tree.func, ast.Name) and tree.func.id in _CHECKS:
            skipped += tree.args[1:]
        elif isinstance(tree.func, ast.Name) and tree.func.id == "map":
            skipped += tree.args[:1]
    elif isinstance(tree, ast.arg | ast.AnnAssign):
        skipped.append(tree.annotation)
    elif isinstance(tree, ast.FunctionDef | ast.AsyncFunctionDef):
        skipped.append(tree.returns)
    for child in ast.iter_child_nodes(tree):
        if child not in skipped:
            yield from _other_uses(child)
