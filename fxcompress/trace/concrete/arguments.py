"""The arguments of forward in a concrete trace: placeholders, checks, and what stands behind each tensor and number."""

import copy
import inspect
import operator
from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx

from fxcompress.errors import TraceError
from fxcompress.trace.concrete.recorder import Recorder
from fxcompress.trace.concrete.writer import Writer
from fxcompress.trace.graph.guards import check_argument, form_of
from fxcompress.trace.graph.plain_values import is_plain
from fxcompress.trace.inputs import ExampleInputs

_POSITIONAL = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}
_VARIADIC = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
_MISSING = inspect.Parameter.empty


class Arguments:
    """Writes the placeholders of a graph, in the order of forward's signature.

    Args:
        signature: of forward.
        inputs: fake tensors among them; arguments that are left out keep their default.
        writer: of the graph.
        recorder: of the run.

    Attributes:
        args: what to call forward with.
        kwargs: the same, by keyword.

    Raises:
        TraceError: an argument is of a kind that cannot be traced.
    """

    def __init__(self, signature: inspect.Signature, inputs: ExampleInputs, writer: Writer, recorder: Recorder) -> None:
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self._writer = writer
        self._recorder = recorder
        given = _given(signature, inputs)
        placed = list(_entries(signature, set(given)))
        nodes = {name: writer.graph.placeholder(name, default_value=default) for name, default in placed}
        for name, node in nodes.items():
            if name in given:
                writer.node("call_function", check_argument, (node, form_of(given[name]), name))
            else:
                default = form_of(dict(placed)[name], exact=True)
                writer.node("call_function", check_argument, (node, default, name), {"exact": True})
        replaced = {name: self._tree(name, value, nodes[name]) for name, value in given.items()}
        self.args = tuple(replaced.values())[: len(inputs.args)]
        self.kwargs = {name: replaced[name] for name in inputs.kwargs}

    def _tree(self, name: str, value: Any, node: fx.Node) -> Any:  # noqa: ANN401
        """The value with its tensors and numbers bound to ``node``, where it comes from."""
        if isinstance(value, Tensor):
            return self._recorder.bind(value, node)
        if isinstance(value, dict):
            items = {key: self._tree(name, item, self._item(node, key)) for key, item in value.items()}
            return items if type(value) is dict else _like(value, items)
        if isinstance(value, tuple | list):
            parts = [self._tree(name, item, self._item(node, i)) for i, item in enumerate(value)]
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        if type(value) in {int, float}:
            return self._recorder.number(value, self._writer.result(node))
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


def _given(signature: inspect.Signature, inputs: ExampleInputs) -> dict[str, Any]:
    """Each argument that is given, by the name of its placeholder; positional ones first."""
    names = [p.name for p in signature.parameters.values() if p.kind in _POSITIONAL][: len(inputs.args)]
    signature.bind(*inputs.args, **inputs.kwargs)  # raises where they do not fit
    rest = [f"{_variadic(signature)}_{i}" for i in range(len(inputs.args) - len(names))]
    return dict(zip([*names, *rest], inputs.args, strict=True)) | inputs.kwargs


def _variadic(signature: inspect.Signature) -> str:
    return next((p.name for p in signature.parameters.values() if p.kind is inspect.Parameter.VAR_POSITIONAL), "")


def _entries(signature: inspect.Signature, given: set[str]) -> Iterator[tuple[str, Any]]:
    """Name and default of each placeholder, in an order that Python allows."""
    known = [p for p in signature.parameters.values() if p.kind not in _VARIADIC]
    yield from ((p.name, _MISSING) for p in known if p.default is _MISSING)
    extra = sorted(given - set(signature.parameters))
    rest = _variadic(signature)
    yield from ((name, _MISSING) for name in extra if rest and name.startswith(f"{rest}_"))
    for p in known:
        if p.default is not _MISSING and (p.name in given or is_plain(p.default)):
            yield p.name, p.default if is_plain(p.default) else None
    yield from ((name, None) for name in extra if not (rest and name.startswith(f"{rest}_")))
