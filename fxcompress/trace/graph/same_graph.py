"""Whether two graphs are the same, node by node."""

from torch import Tensor, fx


def same_graph(a: fx.Graph, b: fx.Graph) -> bool:
    """Whether two graphs have the same nodes, by name, target and arguments.

    >>> same_graph(fx.symbolic_trace(lambda x: x + 1).graph, fx.symbolic_trace(lambda x: x + 2).graph)
    False
    """
    return len(a.nodes) == len(b.nodes) and all(map(_same_node, a.nodes, b.nodes))


def _same_node(a: fx.Node, b: fx.Node) -> bool:
    def key(node: fx.Node) -> tuple[object, ...]:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: _Name(n.name))
        return node.op, node.target, _plain(args), _plain(kwargs)

    return a.name == b.name and key(a) == key(b)


class _Name(str):
    """The name of a node, standing in for it."""

    __slots__ = ()


def _plain(value: object) -> object:
    """``value`` in a form that compares with ==, whatever it holds."""
    if isinstance(value, tuple | list):
        return tuple(_plain(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _plain(v)) for k, v in value.items())
    if isinstance(value, slice):
        return ("slice", _plain(value.start), _plain(value.stop), _plain(value.step))
    return (id(value),) if isinstance(value, Tensor) else value
