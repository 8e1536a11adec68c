"""Nested arguments and results."""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

Named = Callable[[type, list[Any]], Any]


def _named(kind: type, items: list[Any]) -> Any:  # noqa: ANN401 - a named tuple
    return kind(*items)


def rebuild(function: Callable[[Any], Any], tree: Any, named: Named = _named) -> Any:  # noqa: ANN401 - a tree of anything
    """The tree with ``function`` applied to each leaf, inside tuples, lists, plain dicts and slices.

    Args:
        function: of a leaf.
        tree: of anything.
        named: makes a named tuple, from its class and what is in it.
    """
    if isinstance(tree, tuple | list):
        items = [rebuild(function, item, named) for item in tree]
        if hasattr(tree, "_fields"):
            return named(type(tree), items)
        return items if isinstance(tree, list) else tuple(items)
    if type(tree) is dict:
        return {key: rebuild(function, item, named) for key, item in tree.items()}
    if isinstance(tree, slice):
        return slice(*(rebuild(function, part, named) for part in (tree.start, tree.stop, tree.step)))
    return function(tree)


def replace(function: Callable[[Tensor], Any], tree: Any) -> Any:  # noqa: ANN401 - a tree of anything
    """The tree with ``function`` applied to each tensor in it."""
    return rebuild(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def holds(value: Any, kinds: Any) -> bool:  # noqa: ANN401 - anything
    """Whether a value is of some kinds, or a container of such values, as keys of dicts too."""
    if isinstance(value, dict):
        return any(holds(item, kinds) for pair in value.items() for item in pair)
    if isinstance(value, tuple | list | set | frozenset):
        return any(holds(item, kinds) for item in value)
    return isinstance(value, kinds)


def fields_of(tree: object) -> tuple[type, tuple[Any, ...], dict[str, Any]] | None:
    """How to build a dataclass or a dict of a kind of its own again: class, args and kwargs; None for anything else."""
    if isinstance(tree, defaultdict):
        return dict, (dict(tree),), {}
    if isinstance(tree, dict) and type(tree) is not dict:
        own = dataclasses.is_dataclass(tree)
        return (type(tree), (), dict(tree)) if own else (type(tree), (dict(tree),), {})
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return type(tree), (), {f.name: getattr(tree, f.name) for f in dataclasses.fields(tree) if f.init}
    return None


def tensors_in(tree: Any) -> Iterator[Tensor]:  # noqa: ANN401 - a tree of anything
    """All tensors in nested tuples, lists, dicts and dataclasses, in order."""
    if isinstance(tree, Tensor):
        yield tree
        return
    fields = fields_of(tree)
    items = (fields[1], fields[2]) if fields is not None else tree
    for item in items.values() if isinstance(items, dict) else items if isinstance(items, tuple | list) else ():
        yield from tensors_in(item)
