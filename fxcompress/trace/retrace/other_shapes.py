"""The shapes of what a graph computes on inputs of other sizes than those of the example."""

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx

from fxcompress.trace.effects.randomness import same_randomness
from fxcompress.trace.graph.autocast import switches_autocast
from fxcompress.trace.graph.guards import asks_for_mode
from fxcompress.trace.graph.names import past_class
from fxcompress.trace.inputs import ExampleInputs
from fxcompress.trace.retrace.path_probe import empty, without_values
from fxcompress.trace.retrace.resized_inputs import resized
from fxcompress.trace.traced import TracedModule

Shapes = dict[str, torch.Size]
"""The shape of each tensor that a graph computes, by the name of the node."""


def shapes_elsewhere(traced: TracedModule, inputs: ExampleInputs, mode: str) -> Iterator[Shapes]:
    """What shapes there are on the example inputs, and on inputs of a few other sizes that a graph takes.

    It runs on tensors without values, unless it reads some.

    Args:
        traced: a network; it stays as it is.
        inputs: that it was traced on.
        mode: which of its graphs.
    """
    run = _Runner(without_values(traced), traced.graphs[mode], mode, without=True)
    example = run.shapes(inputs)
    if example is None:
        run = _Runner(copy.deepcopy(traced), traced.graphs[mode], mode, without=False)
        example = run.shapes(inputs)
    if example is None:
        return
    yield example
    yield from (found for other in resized(inputs) if (found := run.shapes(other)) is not None)


class _Runner:
    """Runs a graph for the shapes of what it computes.

    Args:
        module: holds the tensors of the graph, and may be changed.
        graph: of the module, in a mode.
        mode: the mode.
        without: whether tensors have no values.
    """

    def __init__(self, module: TracedModule, graph: fx.Graph, mode: str, *, without: bool) -> None:
        self._module, self._graph, self._without = module.train(mode == "train"), graph, without

    def shapes(self, inputs: ExampleInputs) -> Shapes | None:
        """The shapes on some inputs; None where the graph does not run on them."""
        run = _Run(self._module, self._graph)
        device = torch.device("meta") if self._without else nullcontext()
        try:
            with device, torch.no_grad(), same_randomness(allowed=True):
                run.run(*(inputs.converted(empty) if self._without else inputs).in_order(self._graph))
        except Exception:  # noqa: BLE001 - inputs that do not fit: any failure is what was asked for
            return None
        return run.found


class _Run(fx.Interpreter):
    def __init__(self, module: TracedModule, graph: fx.Graph) -> None:
        super().__init__(past_class(module), graph=graph)
        self.found: Shapes = {}

    def run_node(self, n: fx.Node) -> Any:  # noqa: ANN401 - whatever it returns
        """What a node returns; its shape is noted."""
        result = None if asks_for_mode(n) or switches_autocast(n) else super().run_node(n)
        if isinstance(result, Tensor):
            self.found[n.name] = result.shape
        return result
