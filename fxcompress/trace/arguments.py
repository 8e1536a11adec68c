"""The arguments of forward in a concrete trace: placeholders, checks, and fake tensors in place of real ones."""

import copy
import inspect
import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from fxcompress.errors import TraceError
from fxcompress.trace.guards import check_argument, form_of, is_plain
from fxcompress.trace.inputs import ExampleInputs
from fxcompress.trace.sizes import Recipe
from fxcompress.trace.writer import Writer

Fake = Callable[[Tensor, fx.Node], Tensor]
"""Makes a fake tensor that stands for the result of a node."""
Measure = Callable[[Any, Recipe], Any]
"""Makes a number whose use is seen."""

_POSITIONAL = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}
_VARIADIC = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
_MISSING = inspect.Parameter.empty


class Arguments:
    """Writes the placeholders of a graph, in the order of forward's signature.

    Args:
        signature: of forward.
        inputs: arguments that are left out keep their default.
        writer: of the graph.
        fake: see :data:`Fake`.
        number: see :data:`Measure`.

    Attributes:
        args: what to call forward with.
        kwargs: the same, by keyword.

    Raises:
        TraceError: an argument is of a kind that cannot be traced.
    """

    def __init__(self, signature: inspect.Signature, inputs: ExampleInputs, writer: Writer, fake: Fake, number: Measure) -> None:
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self._writer = writer
        self._fake = fake
        self._number = number
        bound = signature.bind(*inputs.args, **inputs.kwargs)
        found = [entry for p in signature.parameters.values() for entry in _entries(p, bound.arguments)]
        nodes = [writer.graph.placeholder(name, default_value=default) for name, _, default, _ in found]
        for (name, value, _, kind), node in zip(found, nodes, strict=True):
            self._add(name, self._replaced(name, value, node), kind)

    def _add(self, name: str, value: Any, kind: object) -> None:  # noqa: ANN401
        if kind in _POSITIONAL or kind is inspect.Parameter.VAR_POSITIONAL:
            self.args += (value,)
        else:
            self.kwargs[name] = value

    def _replaced(self, name: str, value: Any, node: fx.Node) -> Any:  # noqa: ANN401
        self._writer.node("call_function", check_argument, (node, form_of(value), name))
        return self._tree(name, value, node)

    def _tree(self, name: str, value: Any, node: fx.Node) -> Any:  # noqa: ANN401
        """The value with fake tensors in it; ``node`` is where it comes from."""
        if isinstance(value, Tensor):
            return self._fake(value, node)
        if isinstance(value, dict):
            items = {key: self._tree(name, item, self._item(node, key)) for key, item in value.items()}
            return items if type(value) is dict else _like(value, items)
        if isinstance(value, tuple | list):
            parts = [self._tree(name, item, self._item(node, i)) for i, item in enumerate(value)]
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        if type(value) in {int, float}:
            return self._number(value, self._writer.result(node))
        if is_plain(value):
            return value
        kind = type(value).__name__
        raise TraceError(
            f"argument {name} is a {kind}: only tensors, numbers, strings, and tuples, lists and dicts of them can be "
            "arguments of a traced network"
        )

    def _item(self, node: fx.Node, key: object) -> fx.Node:
        return self._writer.node("call_function", operator.getitem, (node, key))


def _like(value: Any, items: dict[Any, Any]) -> Any:  # noqa: ANN401 - a dict of a kind of its own
    own = copy.copy(value)
    own.update(items)
    return own


def _entries(p: inspect.Parameter, given: dict[str, Any]) -> list[tuple[str, Any, Any, Any]]:
    """Name, value, default and kind of each placeholder that a parameter becomes."""
    if p.kind is inspect.Parameter.VAR_POSITIONAL:
        return [(f"{p.name}_{i}", value, _MISSING, p.kind) for i, value in enumerate(given.get(p.name, ()))]
    if p.kind is inspect.Parameter.VAR_KEYWORD:
        return [(name, value, None, p.kind) for name, value in given.get(p.name, {}).items()]
    if p.name not in given and not is_plain(p.default):
        return []
    return [(p.name, given.get(p.name, p.default), p.default if is_plain(p.default) else _MISSING, p.kind)]
