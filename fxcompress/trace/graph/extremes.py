"""Maxima and minima of which nobody asks where they stood: as one call, in whose place a rewrite can put another.

values, _ = x.max(1)      ->      values = extreme(x, 1)
"""

import operator

import torch
from torch import Tensor, fx

_LARGEST: set[object] = {torch.max, "max"}
_SMALLEST: set[object] = {torch.min, "min"}


@fx.wrap
def extreme(x: Tensor, dim: int, *, keepdim: bool = False, largest: bool = True) -> Tensor:
    """The largest entry along a dim, or the smallest.

    Args:
        x: of any shape.
        dim: where to look.
        keepdim: whether the dim stays, of size 1.
        largest: or else the smallest.

    >>> extreme(torch.tensor([[1.0, 3.0]]), 1)
    tensor([3.])
    """
    found: Tensor = (torch.max if largest else torch.min)(x, dim, keepdim)[0]
    return found


def call_extremes(graph: fx.Graph) -> None:
    """Put :func:`extreme` in the place of calls that return places as well, which nobody reads."""
    for node in list(graph.nodes):
        read = _read(node)
        if read is None or not node.users or not all(map(_takes_values, node.users)):
            continue
        x, dim, keepdim = read
        with graph.inserting_before(node):
            new = graph.call_function(extreme, (x, dim), {"keepdim": keepdim, "largest": node.target in _LARGEST})
        new.meta = dict(node.meta)
        for user in list(node.users):
            user.replace_all_uses_with(new)
            graph.erase_node(user)
        graph.erase_node(node)


def _read(node: fx.Node) -> tuple[fx.Node, int, bool] | None:
    """The tensor, the dim, and whether it stays; None for another node."""
    if node.op not in {"call_function", "call_method"} or node.target not in _LARGEST | _SMALLEST or not node.args:
        return None
    named, x = dict(node.kwargs), node.args[0]
    dim, keepdim = [*node.args[1:], None, None][:2]
    dim, keepdim = named.pop("dim", dim), named.pop("keepdim", keepdim)
    if named or len(node.args) > 3 or not isinstance(x, fx.Node) or type(dim) is not int:
        return None
    return (x, dim, bool(keepdim)) if keepdim is None or isinstance(keepdim, bool) else None


def _takes_values(user: fx.Node) -> bool:
    named = user.target is getattr and user.args[1:] == ("values",)
    return named or (user.target is operator.getitem and type(user.args[1]) is int and user.args[1] == 0)
