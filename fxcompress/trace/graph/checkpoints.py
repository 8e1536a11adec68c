"""torch.utils.checkpoint, which forgets activations and runs its code again when gradients are needed.

A graph has no such regions. While a model is traced, the code inside is traced as if it were called directly, and its
nodes are marked. Passes rewrite the graph as any other. The code that is made of it in the end runs what lies between
the first and the last node with one mark as a function of its own, under a checkpoint again::

    a = first(x)                                     a = self.first(x)
    b = block(a)      marked               ->        c = self._fxc_checkpoint_eval_0(a)
    c = relu(b)       marked                         return self.head(c)
    return head(c)
"""

import copy
import operator
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import count
from typing import Any
from unittest.mock import patch

import torch.utils.checkpoint
from torch import fx, nn

from fxcompress.trace.graph.names import compiled

MARK = "fxcompress_checkpoint"
"""In the metadata of a node, the number of the checkpoint that it was called in."""

_GENERATORS = {"_checkpoint_without_reentrant_generator", "_checkpoint_without_reentrant_generator_impl"}
"""What torch takes for checkpoints that are not reentrant; the name depends on its version."""

_NUMBERS = count()
_inside: list[int] = []


@contextmanager
def marked_checkpoints() -> Iterator[None]:
    """Within it, checkpoints call their functions and do nothing else, but for :func:`mark`."""

    class Reentrant:
        """In place of the autograd function, which runs its code with gradients off."""

        @staticmethod
        def apply(function: Callable[..., Any], _preserve: bool, *args: Any) -> Any:  # noqa: ANN401, FBT001
            with _region():
                return function(*args)

    def around(*_args: object, **_options: object) -> Iterator[None]:
        """In place of the generator that runs until the function is called, and then goes on."""
        with _region():
            yield

    module = torch.utils.checkpoint
    with ExitStack() as stack:
        stack.enter_context(patch.object(module, "CheckpointFunction", Reentrant))
        for name in _GENERATORS & set(dir(module)):
            stack.enter_context(patch.object(module, name, around))
        yield
    _inside.clear()  # a generator that an error has left behind


@contextmanager
def _region() -> Iterator[None]:
    _inside.append(next(_NUMBERS))
    try:
        yield
    finally:
        _inside[-1:] = []


def mark(node: fx.Node) -> None:
    """Note on a node that is being made in which checkpoint that is; in the outermost one, where they are nested."""
    if _inside and node.op.startswith("call_"):
        node.meta[MARK] = _inside[0]


def copy_marks(source: fx.Graph, target: fx.Graph) -> None:
    """Take over the marks of a graph with the same nodes: models have checkpoints in training alone."""
    for old, new in zip(source.nodes, target.nodes, strict=True):
        if MARK in old.meta:
            new.meta.setdefault(MARK, old.meta[MARK])


def with_checkpoints(module: nn.Module, graph: fx.Graph, mode: str) -> dict[str, Callable[..., Any]]:
    """The methods that run a graph with its checkpoints: ``forward``, and one for each; empty where it has none.

    Args:
        module: that the graph runs in.
        graph: stays as it is.
        mode: a word that sets these methods apart from those of another graph.
    """
    regions = _regions(list(graph.nodes))
    if not regions:
        return {}
    methods: dict[str, Callable[..., Any]] = {}
    whole = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    region_at = {region[0]: region for region in regions}
    inside = {node for region in regions for node in region}
    for node in graph.nodes:
        if node in region_at:
            given, segment, results = _cut_out(region_at[node])
            name = f"_fxc_checkpoint_{mode}_{len(methods)}"
            methods[name] = _under_checkpoint(compiled(module, segment))
            call = whole.create_node("call_module", name, tuple(made[source] for source in given))
            made |= {old: whole.call_function(operator.getitem, (call, i)) for i, old in enumerate(results)}
        elif node not in inside:
            made[node] = whole.node_copy(node, made.__getitem__)
    whole._codegen = copy.copy(graph._codegen)
    for name, method in methods.items():
        setattr(type(module), name, method)  # the class is that of this instance alone
    return {"forward": compiled(module, whole), **methods}


def _regions(nodes: list[fx.Node]) -> list[list[fx.Node]]:
    """The nodes between the first and the last one of each mark, those of no mark included, where these lie apart."""
    places: dict[int, list[int]] = {}
    for place, node in enumerate(nodes):
        if MARK in node.meta:
            places.setdefault(node.meta[MARK], []).append(place)
    found: list[list[fx.Node]] = []
    end = -1
    for first, last in sorted((own[0], own[-1]) for own in places.values()):
        if first > end:
            found.append(nodes[first : last + 1])
        end = max(end, last)
    return found


def _cut_out(region: list[fx.Node]) -> tuple[list[fx.Node], fx.Graph, list[fx.Node]]:
    """What a region reads, the region as a graph of its own, and what others read of it."""
    own = set(region)
    given = list(dict.fromkeys(source for node in region for source in node.all_input_nodes if source not in own))
    results = [node for node in region if any(user not in own for user in node.users)]
    segment = fx.Graph()
    made = {source: segment.placeholder(f"given_{number}") for number, source in enumerate(given)}
    for node in region:
        made[node] = segment.node_copy(node, made.__getitem__)
    segment.output(tuple(made[node] for node in results))
    return given, segment, results


def _under_checkpoint(segment: Callable[..., Any]) -> Callable[..., Any]:
    def run(self: nn.Module, *given: Any) -> Any:  # noqa: ANN401
        if not torch.is_grad_enabled():
            return segment(self, *given)
        return torch.utils.checkpoint.checkpoint(partial(segment, self), *given, use_reentrant=False)

    return run
