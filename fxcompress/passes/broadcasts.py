"""Which operands of a sum have the shape of the sum on inputs of all sizes, and not on those of the example alone.

    y = positions + branch(x)            positions (1, T, C); one sample in the example, three in the next run

Each sum is looked at on a few other sizes, once: what is taken out of a graph later on changes no shape in it.
"""

import operator
from collections import defaultdict
from typing import Any

import torch
from torch import fx

from fxcompress.channels.analysis import Analysis
from fxcompress.channels.values import Value
from fxcompress.trace.retrace.other_shapes import Shapes, shapes_elsewhere

SUMS = {operator.add, operator.iadd, torch.add, "add", "add_"}
DIFFERENCES = {operator.sub, operator.isub, torch.sub, "sub", "sub_"}
IN_PLACE = {operator.iadd, operator.isub, "add_", "sub_"}
"""Those among both that write to their first operand."""
_KEY = "fxcompress_narrower"


def has_shape_of_sum(analysis: Analysis, mode: str, node: fx.Node, kept: int) -> bool:
    """Whether an operand has the shape and type of a sum.

    Args:
        analysis: of the network.
        mode: of the graph.
        node: adds two tensors.
        kept: the position of the operand.
    """
    values = analysis.trails[mode].values
    operand: Any = node.args[kept]
    whole, part = values[node.name], values[operand.name]
    if not isinstance(whole, Value) or not isinstance(part, Value):
        return False
    if whole.shape != part.shape or whole.meta.dtype != part.meta.dtype:
        return False
    if _KEY not in node.meta:
        _look(analysis, mode)
    return kept not in node.meta[_KEY]


def _look(analysis: Analysis, mode: str) -> None:
    """Note for all sums of a graph which operands have another shape than the sum somewhere."""
    graph = analysis.module.graphs[mode]
    sums = [node for node in graph.nodes if node.target in SUMS | DIFFERENCES or node.op == "call_module"]
    narrower: dict[fx.Node, set[int]] = defaultdict(set)
    for shapes in shapes_elsewhere(analysis.module, analysis.inputs, mode):
        for node in sums:
            narrower[node].update(_narrower(node, shapes))
    for node in sums:
        node.meta[_KEY] = frozenset(narrower[node])


def _narrower(node: fx.Node, shapes: Shapes) -> list[int]:
    whole = shapes.get(node.name)
    parts = [(i, shapes.get(arg.name)) for i, arg in enumerate(node.args) if isinstance(arg, fx.Node)]
    return [i for i, part in parts if part is not None and part != whole]
