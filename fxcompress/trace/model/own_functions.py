"""Functions and weak references that a module holds, and that hold modules of the same model.

    self.head = lambda x: self.last(x)      # after copy.deepcopy: the same function, which calls the original's layer

``copy.deepcopy`` copies a bound method with its module, and leaves a function or a weak reference as it is. The copy of
a model would run layers of the original through it: those that the graph does not know, in the mode that the original
is in. So such a function is made anew over the copies, by its code; what ``torch.compile`` has made of one too.
"""

import functools
from collections.abc import Callable, Iterator
from types import CellType, FunctionType, MethodType
from typing import Any
from weakref import ref

from torch import nn

from fxcompress.trace.code.functions import is_full

COMPILED_FROM = "_torchdynamo_orig_callable"
"""The attribute of what ``torch.compile`` returns that holds what it was made from."""

COPIED = frozenset({FunctionType, ref, functools.partial})
"""The types of what is copied here."""


class OwnFunctions:
    """Copies functions together with the modules that they hold.

    Args:
        modules: of the model that is copied.
        copied: makes the copy of a value, or finds it.
    """

    def __init__(self, modules: list[nn.Module], copied: Callable[[Any], Any]) -> None:
        self._modules = {id(module) for module in modules}
        self._copied = copied
        self._cells: dict[int, CellType] = {}

    def copy(self, function: Callable[..., Any], memo: dict[Any, Any]) -> Any:  # noqa: ANN401
        """The same over the copies of the modules that it holds; itself where it holds none.

        A partial is always another one, as ``copy.deepcopy`` makes it: a call may write to a list that it holds.
        """
        if isinstance(function, functools.partial):
            args, kwargs = (self._copied(given) for given in (function.args, function.keywords))
            return functools.partial(self._copied(function.func), *args, **kwargs)
        if not self._holds(function, set()):
            return function
        if isinstance(function, ref):
            return ref(self._copied(function()))
        assert isinstance(function, FunctionType)
        if hasattr(function, COMPILED_FROM):
            return self._copied(getattr(function, COMPILED_FROM))
        cells = function.__closure__
        closure = None if cells is None else tuple(self._cell(cell) for cell in cells)
        new = FunctionType(function.__code__, function.__globals__, function.__name__, None, closure)
        memo[id(function)] = new  # it may hold itself
        for old, own in zip(cells or (), closure or (), strict=True):
            if own is not old and not is_full(own):
                own.cell_contents = self._copied(old.cell_contents)
        new.__defaults__, new.__kwdefaults__ = self._copied((function.__defaults__, function.__kwdefaults__))
        new.__dict__.update(function.__dict__)
        new.__module__, new.__qualname__, new.__doc__ = function.__module__, function.__qualname__, function.__doc__
        new.__annotations__ = function.__annotations__
        return new

    def _cell(self, cell: CellType) -> CellType:
        """A cell for the copy: the same one where it holds no module, as others may write to it."""
        if not (is_full(cell) and self._holds(cell.cell_contents, set())):
            return cell
        return self._cells.setdefault(id(cell), CellType())

    def _holds(self, value: object, seen: set[int]) -> bool:
        """Whether a value is a module of the model, or holds one."""
        if id(value) in self._modules:
            return True
        if isinstance(value, nn.Module) or id(value) in seen:
            return False
        seen.add(id(value))
        return any(self._holds(item, seen) for item in _inside(value))


def _inside(value: object) -> Iterator[object]:
    if isinstance(value, FunctionType):
        yield from (cell.cell_contents for cell in value.__closure__ or () if is_full(cell))
        yield from value.__defaults__ or ()
        yield from (value.__kwdefaults__ or {}).values()
        yield getattr(value, COMPILED_FROM, None)
    elif isinstance(value, MethodType):
        yield value.__self__
    elif isinstance(value, ref):
        yield value()
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, list | tuple | set):
        yield from value
    elif isinstance(value, dict):
        yield from value.values()
