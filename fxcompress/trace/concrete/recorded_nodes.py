"""What the nodes of a graph are that was recorded in a run: numbers, checks, or steps that compute tensors."""

import operator
from collections.abc import Iterator

from torch import fx

from fxcompress.trace.concrete.sizes import FUNCTIONS
from fxcompress.trace.graph.autocast import autocast_is_on
from fxcompress.trace.graph.guards import check, check_argument, shape_of

_TENSORS = {"T", "mT", "H", "mH", "data", "grad", "real", "imag"}


def is_number(node: fx.Node) -> bool:
    """Whether a node of a recorded graph reads a size or the like off a tensor, or computes with such numbers."""
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] not in _TENSORS
    if node.target in {shape_of, len, autocast_is_on}:
        return True
    computed = node.target is operator.getitem or node.target in FUNCTIONS
    return computed and all(map(is_number, node.all_input_nodes)) and bool(node.all_input_nodes)


def steps_of(graph: fx.Graph) -> Iterator[fx.Node]:
    """All nodes of a recorded graph but numbers and checks."""
    return (n for n in graph.nodes if n.target not in {check, check_argument} and not is_number(n))
