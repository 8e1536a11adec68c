"""What is in the containers and objects that code may put something into: to see that it has, and to undo it."""

import functools
import gc
import operator
import os
import pickle
import random
import threading
from array import array
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from enum import Enum
from functools import _lru_cache_wrapper, partial
from types import BuiltinMethodType, MappingProxyType, MethodType, MethodWrapperType, SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import numpy as np
import torch
from torch import nn

from fxcompress.trace.graph.objects import attributes_of

Mutable = list[Any] | deque[Any] | dict[Any, Any] | set[Any]


@dataclass(frozen=True, slots=True)
class Kind:
    """How something is read, compared and written that can hold something.

    Attributes:
        read: a copy of what is in it, which shares what is in that.
        same: whether two such copies hold the very same objects, or equal numbers.
        write: let it hold what a copy holds.
        inside: the values in a copy, which may hold something themselves.
    """

    read: Callable[[Any], Any]
    same: Callable[[Any, Any], bool]
    write: Callable[[Any, Any], None]
    inside: Callable[[Any], Iterable[Any]] = lambda _: ()


@dataclass(frozen=True, slots=True)
class Content:
    """What was in something.

    Attributes:
        value: in which it was.
        copy: of it.
        kind: of the value.
    """

    value: Any
    copy: Any
    kind: Kind

    @classmethod
    def of(cls, value: object) -> "Content | None":
        """What is in a container, an object with attributes, an array or a generator now; None of anything else."""
        kind = _kind_of(value)
        return None if kind is None else cls(value, kind.read(value), kind)

    def inside(self) -> list[Any]:
        """The values that were in it."""
        return list(self.kind.inside(self.copy))

    def is_there(self) -> bool:
        """Whether it still is what is in the value."""
        return self.kind.same(self.copy, self.kind.read(self.value))

    def put_back(self) -> None:
        """Let the value hold it again."""
        self.kind.write(self.value, self.copy)


def is_same(now: object, before: object) -> bool:
    """Whether something is the very same object as before, or an equal number or text."""
    simple = isinstance(now, bool | int | float | str) and type(now) is type(before)
    return now is before or (simple and now == before)


def _kind_of(value: object) -> Kind | None:
    own = type(value)
    if own in _SIMPLE:
        return None  # most attributes are: what follows takes a fifth of the time of tracing for them alone
    found = _CONTAINERS.get(own) or next((kind for classes, kind in _OTHERS if isinstance(value, classes)), None)
    if found is None and isinstance(value, _BASES):
        return _derived(next(base for base in _BASES if isinstance(value, base)))
    if found is None and _is_copied_by_attributes(own):
        return _OBJECT if attributes_of(value) is not None else _SLOTS if _slots(own) else None
    return found


def _slots(kind: type) -> list[str]:
    """The names of the attributes of an object that has slots for them, and no ``__dict__``."""
    found = [vars(base).get("__slots__", ()) for base in kind.__mro__]
    return [name for names in found for name in ((names,) if isinstance(names, str) else names)]


def _read_slots(value: object) -> dict[str, Any]:
    return {name: getattr(value, name) for name in _slots(type(value)) if hasattr(value, name)}


def _write_slots(value: object, copy: dict[str, Any]) -> None:
    for name in _read_slots(value).keys() - copy.keys():
        delattr(value, name)
    for name, item in copy.items():
        if getattr(value, name, None) is not item:
            setattr(value, name, item)


@functools.cache
def _derived(base: Any) -> Kind:  # noqa: ANN401 - one of _BASES
    """Of classes derived from a container: what is in it, by its own methods, as those of the class may do anything."""
    kind = _CONTAINERS[base]

    def read(value: Any) -> Any:  # noqa: ANN401
        items = base.items(value) if issubclass(base, dict) else base.__iter__(value)
        return (dict if issubclass(base, dict) else kind.read)(items), dict(getattr(value, "__dict__", {}))

    def write(value: Any, copy: Any) -> None:  # noqa: ANN401
        items, attributes = copy
        base.clear(value)
        for key, item in items.items() if issubclass(base, dict) else ():
            base.__setitem__(value, key, item)
        if not issubclass(base, dict):
            (base.update if base is set else base.extend)(value, items)
        if attributes or getattr(value, "__dict__", {}):
            _refill(vars(value), attributes)

    return Kind(
        read,
        lambda a, b: kind.same(a[0], b[0]) and _same_tables(a[1], b[1]),
        write,
        lambda copy: [*kind.inside(copy[0]), *copy[1].values()],
    )


def _is_copied_by_attributes(kind: type) -> bool:
    """Whether a copy of an object has copies of its attributes; a logger, say, is one for the whole process."""
    own = (getattr(kind, name) is not getattr(object, name) for name in ("__reduce_ex__", "__reduce__"))
    return not hasattr(kind, "__deepcopy__") and not any(own)


def _same_rows(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(map(is_same, a, b))


def _same_tables(a: dict[Any, Any], b: dict[Any, Any]) -> bool:
    return _same_rows(list(a), list(b)) and _same_rows(list(a.values()), list(b.values()))


def _same_arrays(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and bytes(a.tobytes()) == b.tobytes()


def _same_states(a: object, b: object) -> bool:
    return pickle.dumps(a) == pickle.dumps(b)


def _refill(value: Any, copy: Mutable) -> None:  # noqa: ANN401 - a container
    value.clear()
    value.extend(copy) if isinstance(copy, list) else value.update(copy)


def _state_of_numpy(generator: np.random.Generator, state: dict[str, Any]) -> None:
    generator.bit_generator.state = state


def _set_table(table: Any, copy: dict[str, str]) -> None:  # noqa: ANN401 - os.environ, which all of the process reads
    for key in table.keys() - copy.keys():
        del table[key]
    table.update({key: item for key, item in copy.items() if table.get(key) != item})


def _cached(function: Any) -> list[Any]:  # noqa: ANN401 - with a cache
    """What a function with a cache has returned, and has been given; the cache itself must be left alone."""
    found = [item for item in gc.get_referents(function) if item is not vars(function)]
    tables = [item for item in found if type(item) is dict]
    if function.cache_parameters()["maxsize"] is None:
        return [value for table in tables for value in table.values()]
    links = [id(table) for table in tables if all(type(link).__name__ == "_lru_list_elem" for link in table.values())]
    return [item for item in found if id(item) not in links]


def _leave(_value: object, _copy: object) -> None:
    """Write nothing."""


_ROW = Kind(list, _same_rows, _refill, list)
_TABLE = Kind(dict, _same_tables, _refill, lambda table: table.values())
_SET = Kind(set, set.__eq__, _refill)
_OBJECT = Kind(
    lambda value: dict(vars(value)), _same_tables, lambda value, copy: _refill(vars(value), copy), dict.values
)
_SLOTS = Kind(_read_slots, _same_tables, _write_slots, dict.values)
_PARTIAL = Kind(
    lambda value: [value.func, *value.args, *value.keywords.values()], _same_rows, lambda _value, _copy: None, list
)
_CONTAINERS: dict[type, Kind] = {
    **dict.fromkeys((list, deque), _ROW),
    **dict.fromkeys((dict, OrderedDict, defaultdict, Counter), _TABLE),
    set: _SET,
    SimpleNamespace: _OBJECT,
    partial: _PARTIAL,
}
_BASES = (OrderedDict, dict, list, deque, set)
_SIMPLE = frozenset({bool, int, float, complex, str, bytes, type(None)})
_OTHERS: list[tuple[Any, Kind]] = [
    (threading.local | Enum | nn.Module, _OBJECT),
    (type(os.environ), Kind(dict, _same_tables, _set_table, lambda table: table.values())),
    (WeakKeyDictionary | WeakValueDictionary, _TABLE),
    (ContextVar, Kind(lambda variable: [variable.get(None)], _same_rows, lambda v, copy: v.set(copy[0]), list)),
    (
        bytearray | array,
        Kind(lambda value: value[:], operator.eq, lambda value, copy: operator.setitem(value, slice(None), copy)),
    ),
    # These hold the same things for good, which may be others in themselves.
    (MappingProxyType, Kind(dict, _same_tables, _leave, dict.values)),
    (tuple, Kind(list, _same_rows, _leave, list)),
    (MethodType | MethodWrapperType | BuiltinMethodType, Kind(lambda m: [m.__self__], _same_rows, _leave, list)),
    (_lru_cache_wrapper, Kind(_cached, lambda _a, _b: True, _leave, list)),
    (np.ndarray, Kind(np.copy, _same_arrays, np.copyto)),
    (np.random.Generator, Kind(lambda generator: generator.bit_generator.state, _same_states, _state_of_numpy)),
    (
        np.random.RandomState,
        Kind(lambda g: g.get_state(legacy=False), _same_states, lambda g, state: g.set_state(state)),
    ),
    # How far an iterator has come nobody can tell: it counts as changed, and the graph must do without.
    (Iterator, Kind(lambda _: None, lambda _a, _b: False, lambda _value, _copy: None)),
    (random.Random, Kind(lambda g: g.getstate(), _same_states, lambda g, state: g.setstate(state))),
    (torch.Generator, Kind(lambda g: g.get_state(), torch.equal, lambda g, state: g.set_state(state))),
]
