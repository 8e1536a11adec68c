"""Numbers that a network computes from its own widths, such as ``channels ** -0.5``: they stay what they were."""

import operator
from typing import Any

from torch import fx

from fxcompress.channels.layers import support
from fxcompress.channels.values import Value
from fxcompress.trace.guards import shape_of

_COMPUTED_BY = ("_operator", "math", "builtins")


def as_they_were(node: fx.Node, values: dict[str, Any]) -> tuple[Any, Any] | None:
    """The arguments of ``node`` with a number for each node that computes one from widths alone; None if there is none.

    A dim that can be cut has labels, so its size is a matter of the network and never of the input.

    Args:
        node: of a graph.
        values: the result of each node before the cut, Values in place of tensors.
    """
    found = {used: values[used.name] for used in node.all_input_nodes if _of_widths(used, values)}
    if not found:
        return None
    return fx.node.map_arg((node.args, node.kwargs), lambda used: found.get(used, used))


def _of_widths(node: fx.Node, values: dict[str, Any]) -> bool:
    if not isinstance(values[node.name], int | float):
        return False
    if node.target in {"size", operator.getitem}:
        return _is_width(node, values)
    module = getattr(node.target, "__module__", "")
    inputs = node.all_input_nodes
    return module in _COMPUTED_BY and bool(inputs) and all(_of_widths(used, values) for used in inputs)


def _is_width(node: fx.Node, values: dict[str, Any]) -> bool:
    """Whether a node reads the size of a dim with labels: ``x.size(1)``, ``x.size()[1]``, ``x.shape[1]``."""
    source, *rest = node.args
    if node.target is operator.getitem:
        if not isinstance(source, fx.Node) or source.target not in {"size", getattr, shape_of}:
            return False
        source = source.args[0]
    dim = rest[0] if rest else node.kwargs.get("dim")
    value = values.get(source.name) if isinstance(source, fx.Node) else None
    if not isinstance(value, Value) or not isinstance(dim, int):
        return False
    return dim % max(value.rank, 1) in {d for layer in value.layers for d in support(layer)}
