"""Whether inputs of other sizes take the path of a graph, asked without the model and without any values."""

import operator
from collections.abc import Iterator
from functools import cached_property
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcompress.errors import PathError
from fxcompress.trace.concrete.recorded_nodes import is_number
from fxcompress.trace.effects.randomness import same_randomness
from fxcompress.trace.graph.autocast import switches_autocast
from fxcompress.trace.graph.guards import asks_for_mode, check
from fxcompress.trace.graph.names import past_class
from fxcompress.trace.inputs import ExampleInputs
from fxcompress.trace.model.flat_weights import renew_weights
from fxcompress.trace.model.skeleton import skeleton
from fxcompress.trace.traced import TracedModule


class PathProbe:
    """Asks the graphs of a network which inputs take its path, on tensors without values.

    Attributes:
        checks: on sizes, in all graphs.
        effort: how many nodes it has run.
    """

    def __init__(self, traced: TracedModule) -> None:
        graphs = traced.graphs.values()
        self.checks = [n for g in graphs for n in g.find_nodes(op="call_function", target=check) if decides_on_sizes(n)]
        self.effort = 0
        self._traced = traced
        self._sizes: dict[fx.Node, set[tuple[Any, ...]]] = {node: set() for node in self.checks}

    @cached_property
    def _meta(self) -> TracedModule:
        return without_values(self._traced)

    def parts_at(self, inputs: ExampleInputs) -> fx.Node | bool:
        """The check at which inputs part from the path; else whether they can take it at all."""
        ends = [self._end(mode, inputs) for mode in self._traced.graphs]
        return next((end for end in ends if isinstance(end, fx.Node)), any(ends))

    def _end(self, mode: str, inputs: ExampleInputs) -> fx.Node | bool:
        run = _Run(self._meta.train(mode == "train"), self._traced.graphs[mode])
        try:
            with torch.device("meta"), torch.no_grad(), same_randomness(allowed=True):
                run.run(*inputs.converted(empty).in_order(run.graph))
        except PathError:
            return run.at if run.at is not None and decides_on_sizes(run.at) else False
        except Exception:  # noqa: BLE001 - inputs that do not fit: any failure is what was asked for
            return False
        finally:
            self.effort += run.effort
        for node, sizes in run.sizes.items():
            if node in self._sizes:
                self._sizes[node].add(sizes)
        return True

    @property
    def undecided(self) -> list[str]:
        """The lines of decisions that came out the same on different sizes."""
        return [str(node.args[3]) for node, sizes in self._sizes.items() if len(sizes) > 1]

    @property
    def compared_with(self) -> set[int]:
        """The numbers that decisions are made with that came out the same on different sizes."""
        nodes = [node for node, sizes in self._sizes.items() if len(sizes) > 1]
        sizes = {size for node in nodes for size in set.intersection(*map(set, self._sizes[node]))}
        for node in nodes:  # t // 8 > 16 as well
            own = list(_numbers(node))
            sizes |= {*own, *(a * b for a, b in combinations(own, 2))}
        return sizes


class _Run(fx.Interpreter):
    """Runs a graph up to a check that comes out in another way.

    Attributes:
        at: the last check that was made.
        sizes: what each check was made on.
        effort: how many nodes it has run.
    """

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        super().__init__(past_class(module), graph=graph)
        self.at: fx.Node | None = None
        self.sizes: dict[fx.Node, tuple[Any, ...]] = {}
        self.effort = 0

    def run_node(self, n: fx.Node) -> Any:  # noqa: ANN401 - whatever it returns
        """What a node returns."""
        self.effort += 1
        if n.target is check:
            self.at = n
            sizes: Any = n.args[2]
            self.sizes[n] = fx.node.map_arg(sizes, lambda used: self.env[used])
        return None if asks_for_mode(n) or switches_autocast(n) else super().run_node(n)


def without_values(traced: TracedModule) -> TracedModule:
    """A copy of a network the tensors of which have shapes and nothing else."""
    copy = skeleton(traced, compiled=False)
    for module in copy.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, module.__dict__)
        for table in tables:
            table.update({key: empty(tensor) for key, tensor in table.items() if isinstance(tensor, Tensor)})
        renew_weights(module)
    return copy


def empty(tensor: Tensor) -> Tensor:
    """A tensor like another one, without values."""
    bare = tensor.detach().to("meta").requires_grad_(tensor.requires_grad)
    return nn.Parameter(bare, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else bare


def decides_on_sizes(node: fx.Node) -> bool:
    """Whether a check is of a decision that was taken on sizes."""
    return bool(node.args[2]) and not asks_for_mode(node)


def _numbers(node: fx.Node) -> Iterator[int]:
    """The numbers that are written in a decision."""
    open_: list[Any] = [node.args[0]]
    for value in open_:
        if isinstance(value, fx.Node) and value.target is operator.getitem:
            continue  # which size of a shape
        if isinstance(value, fx.Node) and is_number(value):
            open_ += [item for item in value.args if item not in open_]
        elif type(value) in {int, float} and value == int(value):
            yield int(value)
