"""Objects that a model makes in its forward and returns, such as the keys and values that a language model remembers.

A graph has no node for them, but it can make them again: a new object of the same class, with the same attributes.
"""

from collections.abc import Iterable
from enum import Enum
from functools import cache
from typing import Any

from torch import Tensor, nn


def restored(kind: type, state: dict[str, Any]) -> object:
    """An object with the attributes of another one; its constructor does not run.

    >>> class Pair: ...
    >>> vars(restored(Pair, {"keys": 1, "values": 2}))
    {'keys': 1, 'values': 2}
    """
    made: object = object.__new__(kind)
    made.__dict__.update(state)
    return made


class Itself:
    """A function that returns a class or a member of an enum: the code of a graph can call it, and not name these."""

    def __init__(self, thing: type | Enum) -> None:
        self.thing = thing
        name = thing.__name__ if isinstance(thing, type) else f"{type(thing).__name__}_{thing.name}"
        self.__name__ = self.__qualname__ = f"itself_{name}"

    def __call__(self) -> type | Enum:
        """The class, or the member."""
        return self.thing


@cache
def itself(thing: type | Enum) -> Itself:
    """The one such function of a class or member, so that two graphs with it compare equal."""
    return Itself(thing)


def attributes_of(value: object) -> dict[str, Any] | None:
    """The attributes of an object; None where it may be more than these: a container, a function, a module, slots."""
    kind = type(value)
    slots = any(base.__dict__.get("__slots__") for base in kind.__mro__)
    plain = kind.__new__ is object.__new__ and kind.__module__ != "builtins" and not slots
    return dict(vars(value)) if plain and not isinstance(value, nn.Module) and hasattr(value, "__dict__") else None


def objects_in(values: Iterable[object]) -> set[int]:
    """The ids of all objects with attributes in nested containers and attributes."""
    found: set[int] = set()
    left = list(values)
    while left:
        value = left.pop()
        if isinstance(value, Tensor | nn.Module) or id(value) in found:
            continue
        if isinstance(value, dict | list | tuple | set):
            found.add(id(value))
            left += value.values() if isinstance(value, dict) else value
            continue
        inner = attributes_of(value)
        if inner is not None:
            found.add(id(value))
            left += inner.values()
    return found
