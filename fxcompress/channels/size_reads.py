"""Which nodes read the size of a tensor, and of which of its dims."""

import operator
from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx

from fxcompress.channels.survivors import has_own_labels
from fxcompress.channels.values import Value
from fxcompress.trace.guards import shape_of


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


def reads_shape(node: fx.Node) -> bool:
    """Whether a node reads the whole shape of a tensor, which is its first argument."""
    if node.op == "call_method":
        return node.target == "size" and len(node.args) == 1 and not node.kwargs
    return node.target is shape_of or bool(node.target is getattr and node.args[1] == "shape")


def labels_of_size(size: object, values: Mapping[str, Any]) -> Tensor | None:
    """The labels of the dim whose size ``size`` reads, shape (size,); None where it is no such node, or there are none.

    Args:
        size: an argument of a node that makes a tensor.
        values: the results of the nodes, by name.
    """
    read = read_of(size) if isinstance(size, fx.Node) else None
    value = None if read is None else values[read[0].name]
    if read is None or not isinstance(value, Value) or not isinstance(read[2], int):
        return None
    dim = read[2] % value.rank
    if not has_own_labels(value, dim):
        return None
    layer = next(layer for layer in value.layers if layer.shape[dim] > 1)
    return layer.reshape(-1) if layer.numel() == layer.shape[dim] else None
