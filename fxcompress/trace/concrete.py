"""Tracing by running: for models that symbolic tracing cannot do.

The model runs once, on fake tensors (with shapes, without values), and every torch function and leaf module that it
calls is written down. Python sees real shapes, so loops over sizes, branches on shapes and containers of any kind work.
What makes it safe on other inputs is that sizes are numbers of our own (sizes.py): arithmetic on them becomes part of
the graph, and each decision on them becomes a check in it (guards.py).
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx import _symbolic_trace

from fxcompress.errors import TraceError
from fxcompress.trace.arguments import Arguments
from fxcompress.trace.inputs import ExampleInputs
from fxcompress.trace.places import place, place_of
from fxcompress.trace.recorder import Recorder
from fxcompress.trace.skeleton import skeleton
from fxcompress.trace.state import State, carries_over, unchanged_randomness
from fxcompress.trace.state import unset as forget
from fxcompress.trace.writer import Writer

IsLeaf = Callable[[nn.Module, str], bool]


def run_model(
    root: nn.Module, inputs: ExampleInputs, is_leaf: IsLeaf, readers: set[int], *, training: bool, keep_sizes: bool
) -> fx.Graph:
    """The graph that running ``root`` on the inputs leaves. ``root`` itself does not run: a copy on fake tensors does.

    Args:
        root: a skeleton of the model; tensors that are neither inputs nor attributes become attributes of it.
        inputs: only their shapes and types count.
        is_leaf: which modules become one node.
        readers: ids of the modules of ``root`` whose code reads ``self.training`` are added.
        training: the mode to run in.
        keep_sizes: see :class:`fxcompress.trace.recorder.Recorder`.

    Raises:
        TraceError: the run fails, or does what no graph can do.
    """
    new = partial(_Run, root, is_leaf, readers, training=training, keep_sizes=keep_sizes)
    run = new()
    changed = _go(run, inputs)
    if changed:
        # What a run sets before it reads it is nothing but a scratch pad. So: does it run without the old values?
        run = new(unset=changed)
        try:
            again = _go(run, inputs)
        except TraceError as error:
            raise carries_over(changed) from error
        if again - changed:
            raise carries_over(again - changed)
    run.writer.graph.lint()
    return run.writer.graph


def _go(run: "_Run", inputs: ExampleInputs) -> frozenset[str]:
    """Run; which attributes have been set."""
    before = set(run.readers)
    try:
        return run.go(inputs)
    except TraceError:
        raise
    except Exception as error:
        raise TraceError(f"it fails with {type(error).__name__}: {error}{place_of(error)}") from error
    finally:
        own = run.readers - before
        run.readers -= own
        run.readers |= {id(run.root.get_submodule(p)) for p, m in run.model.named_modules() if id(m) in own}


class _Run:
    """One run of a model."""

    def __init__(
        self,
        root: nn.Module,
        is_leaf: IsLeaf,
        readers: set[int],
        *,
        training: bool,
        keep_sizes: bool,
        unset: frozenset[str] = frozenset(),
    ) -> None:
        self.root = root
        self.is_leaf = is_leaf
        self.readers = readers
        self.model = skeleton(root).train(training)
        self.paths = {id(module): path for path, module in self.model.named_modules()}
        self.fakes = FakeTensorMode(allow_non_fake_inputs=True)
        self.writer = Writer(self._constant)
        self.recorder = Recorder(self.writer, self.fakes, keep_sizes=keep_sizes)
        self._fake_the_tensors()
        forget(self.model, unset)

    def go(self, inputs: ExampleInputs) -> frozenset[str]:
        """Write the graph; names of the attributes that the run has set."""
        with self.fakes, torch.enable_grad(), unchanged_randomness():
            signature = inspect.signature(self.model.forward)
            arguments = Arguments(signature, inputs, self.writer, self._input, self.recorder.number)
            state = State(self.model)
            with self._watched(), self.recorder:
                result = self.model(*arguments.args, **arguments.kwargs)
            changed = state.changed()
            self.writer.graph.output(self.writer.written(result))
        _tidy(self.writer.graph)
        return changed

    def _fake_the_tensors(self) -> None:
        """Put fake tensors in place of all that hang on the modules, and tell the writer their names."""
        for path, module in self.model.named_modules():
            prefix = f"{path}." if path else ""
            for table in (module._parameters, module._buffers, module.__dict__):
                for name, tensor in table.items():
                    if isinstance(tensor, Tensor):
                        table[name] = self.fakes.from_tensor(tensor)
                        self.writer.name(table[name], f"{prefix}{name}")

    def _input(self, tensor: Tensor, node: fx.Node) -> Tensor:
        return self.recorder.bind(self.fakes.from_tensor(tensor), node)

    def _constant(self, tensor: Tensor) -> str:
        """Keep a tensor on the root, under a name of its own."""
        taken = self.root.__dict__
        known = next((n for n, t in taken.items() if t is tensor), None)
        name = known or next(n for i in range(len(taken) + 1) if not hasattr(self.root, n := f"_tensor_constant{i}"))
        taken[name] = tensor
        return name

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """See the calls of leaf modules, of functions marked by torch.fx.wrap, and of autograd functions."""
        with ExitStack() as stack:
            enter = stack.enter_context
            enter(patch.object(nn.Module, "__call__", self._module_call(nn.Module.__call__)))
            enter(patch.object(FakeTensor, "device", property(self._device_of(FakeTensor.device))))
            enter(patch.object(torch.autograd.Function, "apply", classmethod(self._autograd_call())))
            for (_, name), scope in _symbolic_trace._wrapped_fns_to_patch.items():
                if name in scope and not scope.get("__name__", "").startswith("fxcompress."):
                    enter(patch.dict(scope, {name: self._opaque(scope[name])}))
            yield

    def _device_of(self, own: Any) -> Callable[[FakeTensor], torch.device]:  # noqa: ANN401 - a property
        """A fake tensor answers this question itself, and torch does not show it."""
        return lambda tensor: own.fget(tensor) if self.recorder.paused else self.recorder.device(tensor)

    def _module_call(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(module: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            path = self.paths.get(id(module))
            if self.recorder.paused:
                return call(module, *args, **kwargs)
            if path is None:
                if module._parameters or module._buffers:
                    raise TraceError(
                        f"it makes a module ({type(module).__name__}) while it runs{place()}; make it in __init__"
                    )
                return call(module, *args, **kwargs)
            if module is self.model or not self.is_leaf(module, path):
                return call(module, *args, **kwargs)
            readers = set(self.readers)
            result = self.recorder.call(("call_module", path), args, kwargs, lambda *a, **k: call(module, *a, **k))
            self.readers &= readers
            return result

        return watched

    def _opaque(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that becomes one node whatever it does inside."""

        def watched(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            if self.recorder.paused:
                return function(*args, **kwargs)
            return self.recorder.call(("call_function", function), args, kwargs, function)

        return watched

    def _autograd_call(self) -> Callable[..., Any]:
        apply = inspect.getattr_static(torch.autograd.Function, "apply")

        def watched(cls: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            own = apply.__get__(None, cls)
            if self.recorder.paused:
                return own(*args, **kwargs)
            return self.recorder.call(("call_function", own), args, kwargs, own)

        return watched


def _tidy(graph: fx.Graph) -> None:
    """Erase reads of shapes and items that nothing uses."""
    for node in reversed(graph.nodes):
        if not node.users and node.op == "call_function" and getattr(node.target, "__name__", "") in {"getattr", "getitem"}:
            graph.erase_node(node)
