"""Objects that a model makes in its forward and returns, such as the keys and values that a language model remembers.

A graph has no node for them, but it can make them again: a new object of the same class, with the same attributes.
"""

from collections.abc import Iterable
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


class ClassItself:
    """A function that returns a class: code that is made from a graph can call a function, but not name a class."""

    def __init__(self, kind: type) -> None:
        self.kind = kind
        self.__name__ = self.__qualname__ = f"class_{kind.__name__}"

    def __call__(self) -> type:
        """The class."""
        return self.kind


@cache
def class_itself(kind: type) -> ClassItself:
    """The one such function of a class, so that two graphs with it compare equal."""
    return ClassItself(kind)


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
