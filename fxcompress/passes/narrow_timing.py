"""Whether a narrow path pays: the nodes that it makes smaller, and the join, timed in both networks in turn."""

import copy
import time
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxcompress.channels.values import find, replace
from fxcompress.trace.basics.generators import generators_kept
from fxcompress.trace.graph.autocast import closing
from fxcompress.trace.graph.names import past_class
from fxcompress.trace.inputs import ExampleInputs
from fxcompress.trace.traced import TracedModule

_ROUNDS = 7
_LEAST_ROUNDS = 3
_PATIENCE = 5.0
"""Seconds after which fewer rounds must do."""


class _Timed(fx.Interpreter):
    """Runs the graph of evaluation node by node.

    Attributes:
        seconds: the least time that each node has taken, by its name.
    """

    def __init__(self, module: TracedModule) -> None:
        own = copy.deepcopy(module).eval()
        super().__init__(past_class(own), graph=own.graph)
        self.seconds: dict[str, float] = {}

    def run(self, *args: Any, **options: Any) -> Any:  # noqa: ANN401 - as torch.fx has it
        """Run all of it; an error leaves autocast as it was."""
        return closing(super().run, self.graph)(*args, **options)

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:  # noqa: ANN401 - as torch.fx has it
        """The next of the arguments, that of ``*rest`` and ``**rest`` too."""
        return next(self.args_iter)

    def run_node(self, n: fx.Node) -> Any:  # noqa: ANN401 - whatever a node returns
        """Run a node, and note how long it took."""
        start = time.perf_counter()
        result = super().run_node(n)
        for device in {t.device for t in find(Tensor, result)}:
            if device.type != "cpu":
                getattr(torch, device.type).synchronize(device)
        took = time.perf_counter() - start
        self.seconds[n.name] = min(took, self.seconds.get(n.name, took))
        return result


def speedups(
    wide: TracedModule, narrow: TracedModule, inputs: ExampleInputs, groups: Mapping[str, Collection[str]]
) -> dict[str, float]:
    """How many times faster some nodes of one network are than those of the same names in another.

    Args:
        wide: the network as it is; neither network is changed.
        narrow: the other one.
        inputs: that both run on, with their values.
        groups: names of nodes of the graph of evaluation, by whatever they are the nodes of.

    Returns:
        seconds in ``wide`` by seconds in ``narrow``, the least of a few runs, for each group.
    """
    runs = [_Timed(wide), _Timed(narrow)]
    arguments = inputs.in_order(wide.graph)
    start = time.perf_counter()
    with torch.no_grad(), generators_kept():
        for done in range(_ROUNDS + 1):
            for run in runs:
                run.run(*_copies(arguments))
                if not done:
                    run.seconds.clear()  # the first run warms up
            if done >= _LEAST_ROUNDS and time.perf_counter() - start > _PATIENCE:
                break
    before, after = (run.seconds for run in runs)
    return {
        name: sum(before.get(n, 0.0) for n in nodes) / max(sum(after.get(n, 0.0) for n in nodes), 1e-12)
        for name, nodes in groups.items()
    }


def _copies(arguments: list[Any]) -> Any:  # noqa: ANN401 - a list as it was given
    """A network may write to what it is given."""
    return replace(lambda tensor: tensor.detach().clone(), Tensor, arguments)
