"""Variances written by hand: as one call, in whose place a rewrite can put another.

    mean = x.mean(1, keepdim=True)
    variance = (x - mean).pow(2).mean(1, keepdim=True)      ->      variance = mean_square(x, (1,), keepdim=True)

Either mean may be one of another, over other dims.
A channel that is zero is none in ``x - mean``: of the mean of squares alone nobody could tell what it is without it.
"""

import operator
from typing import Any

import torch
from torch import Tensor, fx

_MEAN: set[object] = {torch.mean, "mean"}
_DIFFERENCE: set[object] = {operator.sub, torch.sub, torch.subtract, "sub", "subtract"}
_SQUARE: set[object] = {torch.square, "square"}
_POWER: set[object] = {operator.pow, torch.pow, "pow"}
_PRODUCT: set[object] = {operator.mul, torch.mul, "mul"}


@fx.wrap
def mean_square(x: Tensor, dims: tuple[int, ...], *, keepdim: bool, power: bool = True) -> Tensor:
    """The mean of the squared distances from the mean.

    Args:
        x: of any shape.
        dims: that both means are taken over.
        keepdim: whether the dims stay, of size 1.
        power: by ``pow``, which autocast computes in float32, and not by a product.

    >>> mean_square(torch.tensor([[1.0, 3.0]]), (1,), keepdim=False)
    tensor([1.])
    """
    distance = x - x.mean(dims, keepdim=True)
    return squared(distance, power=power).mean(dims, keepdim=keepdim)


def squared(x: Tensor, *, power: bool) -> Tensor:
    """The square, see :func:`mean_square`."""
    return x.pow(2) if power else x * x


def call_variances(graph: fx.Graph) -> None:
    """Put :func:`mean_square` in the place of what computes the same, where nothing else happens meanwhile."""
    for node in list(graph.nodes):
        chain = _chain(node)
        if not chain or not _uninterrupted(chain):
            continue
        square = next(used for used in chain if not _is(used, _MEAN))
        _, dims, keepdim, _ = _means(node) or (None, (), False, ())
        node.op, node.target, node.args = "call_function", mean_square, (chain[-1].args[0], dims)
        node.kwargs = {"keepdim": keepdim, "power": _is(square, _POWER)}
        for used in chain[1:]:
            if not used.users:
                graph.erase_node(used)


def _chain(node: fx.Node) -> tuple[fx.Node, ...]:
    """The means of squares, the square, the distance and the means, last ones first; () for another node."""
    outer = _means(node)
    square = outer[0] if outer is not None else None
    distance = _root(square) if square is not None else None
    if outer is None or square is None or distance is None or not _is(distance, _DIFFERENCE):
        return ()
    if len(distance.args) != 2 or distance.kwargs:
        return ()
    x, mean = distance.args
    inner = _means(mean) if isinstance(mean, fx.Node) else None
    if not isinstance(x, fx.Node) or inner is None or inner[0] is not x:
        return ()
    same = sorted(outer[1]) == sorted(inner[1]) and inner[2]
    return (*outer[3], square, distance, *inner[3]) if same else ()


def _means(node: fx.Node) -> tuple[fx.Node, tuple[int, ...], bool, tuple[fx.Node, ...]] | None:
    """What a node is the mean of, over which dims, whether these stay, and the nodes that take one mean of another.

    ``x.mean(1, keepdim=True).mean(2, keepdim=True)`` is one over both dims: there are as many entries in each part.
    """
    found, first = _mean(node), _first(node)
    if found is None or first is None:
        return None
    dims, stay = found
    inner = _means(first)
    if inner is None or not (stay and inner[2]):
        return first, dims, stay, (node,)
    joined = (*inner[1], *dims)
    plain = len(set(joined)) == len(joined) and len({d < 0 for d in joined}) == 1
    return (inner[0], joined, True, (node, *inner[3])) if plain else (first, dims, stay, (node,))


def _root(square: fx.Node) -> fx.Node | None:
    """What a node is the square of."""
    first, second = [*square.args, None, None][:2]
    one = _is(square, _SQUARE) and len(square.args) == 1
    two = _is(square, _POWER) and type(second) in {int, float} and second == 2
    three = _is(square, _PRODUCT) and first is second
    return first if (one or two or three) and isinstance(first, fx.Node) and not square.kwargs else None


def _mean(node: fx.Node) -> tuple[tuple[int, ...], bool] | None:
    """The dims of a mean, and whether they stay; None for another node, and for a form that is not written out."""
    if not _is(node, _MEAN):
        return None
    named: dict[str, Any] = dict(node.kwargs)
    names = (("dim", "axis"), ("keepdim", "keepdims"))
    given = [*node.args[1:], None, None][:2]
    dim, keepdim = (
        next((named.pop(name) for name in pair if name in named), own) for pair, own in zip(names, given, strict=True)
    )
    dims = (dim,) if type(dim) is int else dim
    if named or len(node.args) > 3 or not isinstance(dims, tuple | list) or not dims:
        return None
    plain = all(type(d) is int for d in dims) and (keepdim is None or isinstance(keepdim, bool))
    return (tuple(dims), bool(keepdim)) if plain else None


def _is(node: fx.Node, targets: set[object]) -> bool:
    return node.op in {"call_function", "call_method"} and node.target in targets


def _first(node: fx.Node) -> fx.Node | None:
    first = node.args[0] if node.args else None
    return first if isinstance(first, fx.Node) else None


def _uninterrupted(chain: tuple[fx.Node, ...]) -> bool:
    """Whether no other node runs meanwhile, which might write to the tensor."""
    last, *_, first = chain
    node = first
    while node is not last:
        if node not in chain and node.op != "get_attr":
            return False
        node = node.next
    return True
