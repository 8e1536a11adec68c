"""Which nodes read the size of a tensor, and of which of its dims."""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxcompress.channels.survivors import has_own_labels
from fxcompress.channels.values import Value
from fxcompress.trace.graph.guards import shape_of


def read_of(node: fx.Node) -> tuple[fx.Node, fx.Node | None, Any] | None:
    """The tensor whose sizes a node reads, the node that reads its shape, and which of its dims; None for another."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or any(isinstance(item, fx.Node) for item in node.args[1:]):
        return None
    if reads_shape(node):
        return source, node, slice(None)
    if node.op == "call_method" and node.target == "size":
        return source, None, node.args[1] if len(node.args) > 1 else node.kwargs["dim"]
    if node.target is operator.getitem and reads_shape(source):
        return source.args[0], source, node.args[1]  # type: ignore[return-value]
    return None


def counted_by(node: fx.Node) -> fx.Node | None:
    """The tensor, or the shape, whose entries a node counts: ``h.numel()``; None for another node."""
    counts = node.op == "call_method" and node.target in {"numel", "nelement"}
    counts |= node.op == "call_function" and node.target in _COUNTS
    source = node.args[0] if counts and len(node.args) == 1 else None
    return source if isinstance(source, fx.Node) else None


_COUNTS = (torch.numel, Tensor.numel, Tensor.nelement)


def reads_shape(node: fx.Node) -> bool:
    """Whether a node reads the whole shape of a tensor, which is its first argument."""
    if node.op == "call_method":
        return node.target == "size" and len(node.args) == 1 and not node.kwargs
    return node.target is shape_of or bool(node.target is getattr and node.args[1] == "shape")


def labels_of_sizes(sizes: Sequence[object], values: Mapping[str, Any]) -> list[Tensor | None]:
    """Of each dim of a tensor that is made, the labels of the dim whose size it takes, (size,); None where it has none.

    Args:
        sizes: arguments of the node that makes it: numbers, nodes that compute one, or a node that computes all of
            them (``x.shape``, ``x.shape[:-1] + (3,)``).
        values: the results of the nodes, by name.
    """
    return [labels for size in sizes for labels in _labels_of(size, values)]


def _labels_of(size: object, values: Mapping[str, Any]) -> list[Tensor | None]:
    if not isinstance(size, fx.Node):
        return labels_of_sizes(size, values) if isinstance(size, tuple | list) else [None]
    result = values.get(size.name)
    several = isinstance(result, tuple | list)
    if several and size.target is operator.add:  # x.shape[:1] + (3,)
        return labels_of_sizes(size.args, values)
    read = read_of(size)
    value = None if read is None else values[read[0].name]
    if read is None or not isinstance(value, Value) or not isinstance(read[2], int | slice):
        return [None] * (len(result) if several else 1)  # type: ignore[arg-type]
    dims = range(value.rank)[read[2]]
    return [_labels_along(value, dim) for dim in ([dims] if isinstance(dims, int) else dims)]


def _labels_along(value: Value, dim: int) -> Tensor | None:
    if not has_own_labels(value, dim):
        return None
    layer = next(layer for layer in value.layers if layer.shape[dim] > 1)
    return layer.reshape(-1) if layer.numel() == layer.shape[dim] else None
