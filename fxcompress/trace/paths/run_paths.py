"""Tracing by running, more than once where another batch or other gradients would take another path.

Code that asks for the size of the batch often does so for nothing: it expands what has one row, and leaves it alone
where the batch has one row as well. A model that is traced with two images should take one, and the other way round. So
where a decision compares sizes, the model runs a second time with another batch, and where one of the two graphs
computes what both do (same_path.py), it stands for both. The same goes for code that asks whether a tensor requires
gradients, which it may do under ``torch.no_grad()`` and may not in training: where the two paths differ, the graph of
evaluation takes that without gradients, and the graph of training the other. What code asks about precision is left to
precisions.py.
"""

import operator
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, fx, nn

from fxcompress.errors import TraceError
from fxcompress.trace.basics.trees import tensors_in
from fxcompress.trace.concrete.cached_calls import without_caches
from fxcompress.trace.concrete.run import RunSettings, run_model
from fxcompress.trace.concrete.size_conversions import kept_conversions
from fxcompress.trace.graph.guards import asks_for_gradients, check
from fxcompress.trace.inputs import ExampleInputs
from fxcompress.trace.paths.precisions import Recording, decisions_of, hold_in_other_precisions
from fxcompress.trace.paths.same_path import joined

_Run = Callable[[set[int], set[str]], fx.Graph]
"""Runs the model; told where to note the modules that read their mode, and the attributes that the run sets."""


def run_paths(
    root: nn.Module, inputs: ExampleInputs, settings: RunSettings, readers: set[int], kept: set[str]
) -> fx.Graph:
    """The graph of :func:`run_model`, without those checks on batches, gradients and autocast that it can spare.

    The arguments are those of :func:`run_model`.

    Raises:
        TraceError: as there.
    """
    recordings: dict[fx.Graph, Recording] = {}

    def record(given: ExampleInputs, own: RunSettings, more: set[int], changed: set[str]) -> fx.Graph:
        graph = run_model(root, given, own, more, changed)
        recordings[graph] = Recording(partial(run_model, root, given), own, decisions_of(graph))
        return graph

    def for_batches(more: set[int], changed: set[str], gradients: bool | None = None) -> fx.Graph:  # noqa: FBT001
        own = replace(settings, gradients=gradients)
        graph = record(inputs, own, more, changed)
        other = _another_batch(inputs) if settings.keep_sizes and any(map(_compares, _checks(graph))) else None
        if other is None:
            return graph
        return _for_both(graph, partial(record, other, own), root, more, changed)

    before = set(vars(root))
    with without_caches(), kept_conversions(root):
        graph = for_batches(readers, kept)
        asked = next((node.args[1] for node in _checks(graph) if asks_for_gradients(node)), None)
        if asked is not None:
            graph = _for_both(graph, partial(for_batches, gradients=not asked), root, readers, kept)
            if asked is not settings.training and any(map(asks_for_gradients, _checks(graph))):
                graph = _with_gradients_of_mode(graph, for_batches, readers, kept, training=settings.training)
        hold_in_other_precisions(graph, recordings[graph], root, readers, kept)
    used = {str(node.target) for node in graph.find_nodes(op="get_attr")}
    for name in vars(root).keys() - before - used:  # constants of a run that is not kept
        del vars(root)[name]
    return graph


def _for_both(graph: fx.Graph, run: _Run, root: nn.Module, readers: set[int], kept: set[str]) -> fx.Graph:
    """A graph that stands for what ``graph`` does and for what a second run leaves; ``graph`` where none does."""
    more, changed = set(readers), set(kept)
    try:
        other = run(more, changed)
    except TraceError:
        return graph
    for long, short in ((graph, other), (other, graph)):
        if joined(long, short, root):
            readers |= more
            kept |= changed
            return long
    return graph


def _with_gradients_of_mode(
    graph: fx.Graph, run: Callable[..., fx.Graph], readers: set[int], kept: set[str], *, training: bool
) -> fx.Graph:
    """The path that the model takes with gradients in training, and without in evaluation; ``graph`` if it cannot."""
    more, changed = set(readers), set(kept)
    try:
        other = run(more, changed, gradients=training)
    except TraceError:
        return graph
    readers |= more
    kept |= changed
    return other


def _checks(graph: fx.Graph) -> list[fx.Node]:
    return list(graph.find_nodes(op="call_function", target=check))


def _compares(node: fx.Node) -> bool:
    decision = node.args[0]
    return isinstance(decision, fx.Node) and decision.target in {operator.eq, operator.ne}


def _another_batch(inputs: ExampleInputs) -> ExampleInputs | None:
    """The same inputs with one row, or with two where there is one; None where they have no rows in common."""
    sizes = [tensor.shape[0] for tensor in tensors_in([inputs.args, inputs.kwargs]) if tensor.dim()]
    if not sizes or min(sizes) < 1:
        return None

    def resized(tensor: Tensor) -> Tensor:
        if not tensor.dim() or tensor.shape[0] != sizes[0] or tensor.layout != torch.strided:
            return tensor
        rows = tensor.detach()
        rows = rows[:1] if sizes[0] > 1 else rows.expand(2, *tensor.shape[1:])
        return rows.clone().requires_grad_(tensor.requires_grad)

    return inputs.converted(resized)
