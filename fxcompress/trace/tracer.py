"""From a model to its graph.

Symbolic tracing reads flags such as ``self.training`` once and bakes them in. So the model is traced in both modes;
where the two graphs differ, the traced module keeps both.
"""

import inspect
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import fx, nn

from fxcompress.errors import TraceError
from fxcompress.trace.concrete import check_runs, run_model
from fxcompress.trace.inputs import ExampleInputs
from fxcompress.trace.skeleton import skeleton
from fxcompress.trace.state import same_randomness
from fxcompress.trace.support import check_supported
from fxcompress.trace.traced import TracedModule, copy_graph


def trace(model: nn.Module, inputs: ExampleInputs | None = None) -> TracedModule:
    """Trace ``model`` in both modes; the model itself is not touched, and the result shares its tensors.

    Symbolic tracing comes first. Where it fails, and there are inputs, the model is traced by running it on them, see
    :mod:`fxcompress.trace.concrete`.

    Args:
        model: any module, a GraphModule among them.
        inputs: arguments of ``forward`` that have a default and are not given here keep that default.

    Raises:
        TraceError: neither way works.
        UnsupportedModelError: see :func:`fxcompress.trace.support.check_supported`.
    """
    check_supported(model)
    try:
        return _trace_symbolically(model, inputs)
    except TraceError as error:
        if inputs is None:
            raise TraceError(f"{error}\n  or pass example_inputs: it is then traced by running it on them") from error
        return trace_by_running(model, inputs, error)


def _trace_symbolically(model: nn.Module, inputs: ExampleInputs | None) -> TracedModule:
    """Trace with buffers as they are; where forward writes to one, once more with buffers that are symbols."""
    before = [(buffer, buffer._version, buffer.clone()) for buffer in model.buffers()]  # noqa: SLF001
    written = False
    for symbols in (False, True):
        graph_of = partial(_symbolic_graph, inputs=inputs, symbols=symbols)
        try:
            result = _traced(model, graph_of)
        finally:
            for buffer, version, value in before:
                if buffer._version != version and not symbols:  # noqa: SLF001
                    written = True
                    buffer.copy_(value)
        if not written:
            break
    return result


def trace_by_running(model: nn.Module, inputs: ExampleInputs, why: TraceError) -> TracedModule:
    """Trace ``model`` by running it on ``inputs``, first with arithmetic on sizes, then with each size as it is.

    Args:
        model: as for :func:`trace`.
        inputs: to run on.
        why: symbolic tracing has failed.

    Raises:
        TraceError: with both reasons.
        ExampleInputError: the model does not run on them, traced or not.
    """
    reasons = []
    for keep_sizes in (True, False):
        run = partial(_run, inputs=inputs, keep_sizes=keep_sizes)
        try:
            return _traced(model, run)
        except TraceError as error:
            reasons.append(error)
    check_runs(skeleton(model), inputs)
    raise TraceError(f"{why}\nNor can it be traced by running it on the example inputs: {reasons[0]}") from reasons[0]


def _symbolic_graph(
    root: nn.Module,
    readers: set[int],
    training: bool,  # noqa: FBT001
    *,
    inputs: ExampleInputs | None,
    symbols: bool,
) -> fx.Graph:
    return _graph(root, _defaults(root, inputs), training=training, symbols=symbols)


def _run(
    root: nn.Module,
    readers: set[int],
    training: bool,  # noqa: FBT001
    *,
    inputs: ExampleInputs,
    keep_sizes: bool,
) -> fx.Graph:
    return run_model(root, inputs, _Tracer().is_leaf_module, readers, training=training, keep_sizes=keep_sizes)


def _traced(model: nn.Module, graph_of: Callable[[nn.Module, set[int], bool], fx.Graph]) -> TracedModule:
    root = skeleton(model)
    modes = [(module, module.training) for module in root.modules()]
    with _reads_of_mode() as readers, same_randomness():
        graph = graph_of(root, readers, False)
        train_graph: fx.Graph | None = graph_of(root, readers, True)
    for module, training in modes:
        module.training = training
    if train_graph is not None and _same(graph, train_graph):
        train_graph = None
    traced = TracedModule(root, graph, train_graph, type(model).__name__)
    if readers:
        traced.mode_readers = tuple(name for name, module in root.named_modules() if id(module) in readers)
    traced.meta = dict(model.meta) if isinstance(model, fx.GraphModule) else {}
    return traced


@contextmanager
def _reads_of_mode() -> Iterator[set[int]]:
    """Collects the ids of the modules whose code reads ``self.training``.

    A property on nn.Module sees the reads; the flag itself stays where it is, in the ``__dict__`` of each module.
    """
    readers: set[int] = set()

    def read(self: nn.Module) -> object:
        readers.add(id(self))
        return self.__dict__["training"]

    def write(self: nn.Module, value: object) -> None:
        self.__dict__["training"] = value

    with patch.object(nn.Module, "training", property(read, write), create=True):
        yield readers


class _Proxy(fx.Proxy):
    """fx.Proxy that keeps ``x += y`` in place; torch.fx makes ``x = x + y`` of it, which other names of x miss."""


def _in_place(function: Callable[..., object]) -> Callable[[fx.Proxy, object], fx.Proxy]:
    def record(self: fx.Proxy, other: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow"):
    setattr(_Proxy, f"__{_name}__", _in_place(getattr(operator, _name)))


class _Tracer(fx.Tracer):
    """fx.Tracer that leaves quantizers and everything of torch.nn whole."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """What stands for the result of ``node`` while tracing."""
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        leaf = type(m).__module__.split(".")[0] in {"torch", "fxcompress"} and not isinstance(m, fx.GraphModule)
        return (leaf and not isinstance(m, nn.Sequential)) or super().is_leaf_module(m, module_qualified_name)


def _graph(root: nn.Module, constants: dict[str, Any], *, training: bool, symbols: bool) -> fx.Graph:
    if isinstance(root, fx.GraphModule) and not constants:
        train_graph = root.train_graph if isinstance(root, TracedModule) and training else None
        return copy_graph(train_graph or root.graph)
    tracer = _Tracer()
    tracer.proxy_buffer_attributes = symbols
    tracer.record_stack_traces = not training
    root.train(training)
    try:
        graph = tracer.trace(root, concrete_args=constants or None)
    except Exception as error:
        raise TraceError(_trace_message(root, error)) from error
    _restore_names(graph, constants)
    return graph


def _trace_message(root: nn.Module, error: Exception) -> str:
    frames = inspect.getinnerframes(error.__traceback__) if error.__traceback__ else []
    user = [f for f in frames if "site-packages/torch/" not in f.filename and "fxcompress" not in f.filename]
    where = f" at {user[-1].filename}:{user[-1].lineno}" if user else ""
    line = f"\n    {user[-1].code_context[0].strip()}" if user and user[-1].code_context else ""
    return (
        f"torch.fx cannot trace {type(root).__name__}: {error}{where}{line}\n"
        "  control flow that depends on values or shapes cannot become a graph: move it into a function marked with "
        "torch.fx.wrap, or out of the model"
    )


def _defaults(root: nn.Module, inputs: ExampleInputs | None) -> dict[str, Any]:
    """Arguments of forward that keep their default value: those with one that the example inputs leave out."""
    if isinstance(root, fx.GraphModule):
        return {}
    parameters = list(inspect.signature(root.forward).parameters.values())
    given = inputs.names([p.name for p in parameters]) if inputs is not None else frozenset()
    skip = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    return {
        p.name: p.default
        for p in parameters
        if p.kind not in skip and p.default is not inspect.Parameter.empty and p.name not in given
    }


def _restore_names(graph: fx.Graph, constants: dict[str, Any]) -> None:
    """concrete_args renames the placeholders that it fixes (``mask`` to ``mask_1``); calls by keyword need the name."""
    for node in graph.find_nodes(op="placeholder"):
        name = node.target.rpartition("_")[0]
        if name in constants:
            node.target = name


def _same(a: fx.Graph, b: fx.Graph) -> bool:
    return len(a.nodes) == len(b.nodes) and all(map(_same_node, a.nodes, b.nodes))


def _same_node(a: fx.Node, b: fx.Node) -> bool:
    def key(node: fx.Node) -> tuple[object, ...]:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: _Name(n.name))
        return node.op, node.target, _plain(args), _plain(kwargs)

    return a.name == b.name and key(a) == key(b)


class _Name(str):
    """The name of a node, standing in for it."""

    __slots__ = ()


def _plain(value: object) -> object:
    """``value`` in a form that compares with ==, whatever it holds."""
    if isinstance(value, tuple | list):
        return tuple(_plain(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _plain(v)) for k, v in value.items())
    if isinstance(value, slice):
        return ("slice", _plain(value.start), _plain(value.stop), _plain(value.step))
    return (id(value),) if isinstance(value, torch.Tensor) else value
