"""A model traced in both modes, on a copy of it, whichever way a graph is made.

Tracing reads flags such as ``self.training`` once and bakes them in. So the model is traced in evaluation and, where it
may do something else there, in training; where the two graphs differ, the traced module keeps both.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Protocol
from unittest.mock import patch

import torch
import torch.distributions
from torch import fx, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

from fxcompress.errors import TraceError
from fxcompress.trace.basics.modules import modules_in
from fxcompress.trace.code.locations import place
from fxcompress.trace.concrete.leftovers import clean_caches
from fxcompress.trace.effects.randomness import same_randomness
from fxcompress.trace.forward_hooks import remove_hooks
from fxcompress.trace.graph.calls import put_first
from fxcompress.trace.graph.checkpoints import copy_marks, marked_checkpoints
from fxcompress.trace.graph.extremes import call_extremes
from fxcompress.trace.graph.guards import asks_for_gradients
from fxcompress.trace.graph.same_graph import same_graph
from fxcompress.trace.graph.variances import call_variances
from fxcompress.trace.model.lowering import drop_averages, lower
from fxcompress.trace.model.mode_switches import switches, watched_switches
from fxcompress.trace.model.own_modes import forget_runs, own_modes
from fxcompress.trace.model.skeleton import skeleton
from fxcompress.trace.traced import TracedModule
from fxcompress.trace.weights.norm import make_weights_plain
from fxcompress.trace.weights.opened import close, open_hooks


class GraphOf(Protocol):
    """A way to trace one mode."""

    def __call__(self, root: nn.Module, readers: set[int], *, training: bool) -> fx.Graph:
        """The graph of ``root`` in a mode; the ids of the modules whose code reads the mode go into ``readers``."""
        ...


def in_evaluation(run: GraphOf, root: nn.Module, readers: set[int], *, training: bool) -> fx.Graph:
    """A way to trace that gives the graph of evaluation in both modes, if its first argument is filled in."""
    return run(root, readers, training=False)


def in_both_modes(model: nn.Module, graph_of: GraphOf) -> TracedModule:
    """Trace a copy of ``model``, which shares its tensors.

    Args:
        model: any module that can be traced.
        graph_of: makes the graph of a copy in one mode.

    Raises:
        TraceError: of ``graph_of``, or the code does what no graph can do.
    """
    root = skeleton(model)
    forget_runs(root)
    make_weights_plain(root)
    open_hooks(root)
    lower(root)
    modes = [(module, module.training) for module in modules_in(root)]
    train_graph = None

    def graph_in(*, training: bool) -> fx.Graph:
        graph = graph_of(root, readers, training=training)
        for tidy in (drop_averages, put_first, call_variances, call_extremes, _share_annotations):
            tidy(graph)
        return graph

    outside = (
        clean_caches(model), same_randomness(), marked_checkpoints(), _unchecked_distributions(), _no_hooks_on_saved(),
    )  # fmt: skip
    with ExitStack() as stack, watched_switches() as switched, _reads_of_mode() as readers:
        for context in outside:
            stack.enter_context(context)
        graph = graph_in(training=False)
        asked = any(map(asks_for_gradients, graph.nodes))
        if readers or asked or switched.found or any(_knows_its_mode(module) for module, _ in modes):
            train_graph = graph_in(training=True)
    for module, training in modes:
        module.training = training
    remove_hooks(root)  # what they do is in the graph
    close(root)
    if train_graph is not None and same_graph(graph, train_graph):
        copy_marks(train_graph, graph)
        train_graph = None
    traced = TracedModule(root, graph, train_graph, type(model).__name__, compiled=False)
    if readers:
        traced.mode_readers = tuple(name for name, module in root.named_modules() if id(module) in readers)
    if not isinstance(model, TracedModule):  # which has those that it was made with
        own = own_modes(model)
        traced.other_modes = switched.modes(own) if switched.found else own
    traced.meta = dict(model.meta) if isinstance(model, fx.GraphModule) else {}
    return traced


def _share_annotations(graph: fx.Graph) -> None:
    """Let inputs with equal annotations have the same one: older torch.fx writes no code of ``Tensor | None`` twice."""
    found: list[object] = []
    for node in graph.find_nodes(op="placeholder"):
        node.type = next((kind for kind in found if kind == node.type), node.type)
        found.append(node.type)


def _knows_its_mode(module: nn.Module) -> bool:
    """Whether a module may do something else in training though no code of it reads ``training``."""
    kind = type(module)
    own = kind.train is not nn.Module.train or kind.eval is not nn.Module.eval
    return own or (isinstance(module, TracedModule) and module.train_graph is not None)


@contextmanager
def _unchecked_distributions() -> Iterator[None]:
    """Within it, torch.distributions do not look at their values to see whether they are valid: a graph cannot."""
    with patch.object(torch.distributions.Distribution, "_validate_args", new=False):
        yield


@contextmanager
def _no_hooks_on_saved() -> Iterator[None]:
    """Within it, code must not change what autograd saves for the backward pass, as no graph does. It may move that."""
    enter = saved_tensors_hooks.__enter__

    def entered(self: saved_tensors_hooks) -> None:
        if not isinstance(self, save_on_cpu):
            raise TraceError(f"it has hooks on what autograd saves{place()}, which a graph does not have")
        enter(self)

    with patch.object(saved_tensors_hooks, "__enter__", entered):
        yield


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
        switches().wrote()
        self.__dict__["training"] = value

    with patch.object(nn.Module, "training", property(read, write), create=True):
        yield readers
