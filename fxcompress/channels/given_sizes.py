"""The sizes that a node is given which reshapes a tensor, one by one."""

import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fxcompress.channels.size_reads import read_of
from fxcompress.channels.values import Value
from fxcompress.trace.graph.calls import function_name

_ENDS = (1, "start_dim", 0), (2, "end_dim", -1)
_MOST_DIMS = 64
"""As many as a tensor of torch can have."""
Free = Callable[[Value], list[bool]]
"""Of each dim of a value, whether its size may be another one for other inputs."""


@dataclass(frozen=True, slots=True)
class GivenSize:
    """A size that a tensor is to have along a dim.

    Attributes:
        stated: the number that stands in the graph; None for another, or -1.
        follows: whether it comes from sizes of the inputs; None for -1.
        part: the product of those factors of one that follows which do not: 8 of ``n * 8``.
    """

    stated: int | None
    follows: bool | None
    part: int = 1


def given_sizes(
    node: fx.Node, results: Mapping[str, Any], fixed: Callable[[fx.Node], bool], free: Free
) -> list[GivenSize]:
    """Those of each dim of what a node reshapes a tensor to; none for another node.

    Args:
        node: a call.
        results: those of the nodes before, by name; a Value in the place of each tensor with labels.
        fixed: whether the numbers that a node computes are the same for all inputs.
        free: see there.
    """
    name = function_name(node)

    def same(size: fx.Node) -> bool:
        return fixed(size) or _is_unpacked(size, results, free)

    if name in {"view_as", "reshape_as"} and isinstance(node.args[1], fx.Node):
        return _sizes_of(results[node.args[1].name], slice(None), free)
    if name == "unflatten":
        return _unflattened(node, results, same, free)
    if name not in {"view", "reshape"} or node.kwargs or isinstance(node.args[1], torch.dtype):
        return []
    return list(_each(node.args[1:], results, same, free))


def _unflattened(
    node: fx.Node, results: Mapping[str, Any], fixed: Callable[[fx.Node], bool], free: Free
) -> list[GivenSize]:
    """Those of ``h.unflatten(1, (heads, -1))``: beside what it is given the other sizes stay what they are."""
    source = results[node.args[0].name] if isinstance(node.args[0], fx.Node) else None
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    sizes = node.args[2] if len(node.args) > 2 else node.kwargs.get("sizes")
    if not isinstance(source, Value) or type(dim) is not int or sizes is None:
        return []
    own, dim = _sizes_of(source, slice(None), free), dim % source.rank
    return [*own[:dim], *_each((sizes,), results, fixed, free), *own[dim + 1 :]]


def repeated_dims(
    node: fx.Node, results: Mapping[str, Any], fixed: Callable[[fx.Node], bool], free: Free
) -> list[bool]:
    """Of each of the last dims of what a node repeats, whether it does so as often for all inputs; none for another.

    The arguments are those of :func:`given_sizes`.
    """
    name = function_name(node)
    if name == "repeat_interleave":
        times = node.args[1] if len(node.args) > 1 else node.kwargs.get("repeats")
        return [fixed(times) if isinstance(times, fx.Node) else type(times) is int] * _MOST_DIMS
    if name not in {"expand", "repeat", "tile", "broadcast_to"} or node.kwargs:
        return []
    return [size.follows is False for size in _each(node.args[1:], results, fixed, free)]


def flattened(node: fx.Node, layer: object, rank: int) -> range | None:
    """The dims of its first argument that a node makes one of; None for one that is no ``flatten``.

    Args:
        node: a call.
        layer: that it calls, if any.
        rank: of the first argument.
    """
    if isinstance(layer, nn.Flatten):
        ends: Any = layer.start_dim, layer.end_dim
    elif node.op != "call_module" and function_name(node) == "flatten":
        ends = [node.args[i] if len(node.args) > i else node.kwargs.get(name, default) for i, name, default in _ENDS]
    else:
        return None
    return range(ends[0] % rank, ends[1] % rank + 1) if rank and all(type(n) is int for n in ends) else None


def _is_unpacked(size: fx.Node, results: Mapping[str, Any], free: Free) -> bool:
    """Whether a size is one of several read at once, and the same for all inputs: C of ``B, C = h.shape[:2]``."""
    if size.target is not operator.getitem or not isinstance(size.args[0], fx.Node) or type(size.args[1]) is not int:
        return False
    read = read_of(size.args[0])
    if read is None or not isinstance(read[2], slice):
        return False
    tensor = results[read[0].name]
    return isinstance(tensor, Value) and not free(tensor)[read[2]][size.args[1]]


def _each(sizes: Any, results: Mapping[str, Any], fixed: Callable[[fx.Node], bool], free: Free) -> Iterator[GivenSize]:  # noqa: ANN401 - arguments of a node
    for size in sizes:
        if isinstance(size, tuple | list):
            yield from _each(size, results, fixed, free)
        elif not isinstance(size, fx.Node):
            yield GivenSize(size if size >= 0 else None, None if size == -1 else False)
        elif not isinstance(results[size.name], tuple | list):
            yield GivenSize(None, not fixed(size), _fixed_part(size, results, fixed))
        elif size.target is operator.add:  # x.shape[:1] + (3,)
            yield from _each(size.args, results, fixed, free)
        elif (read := read_of(size)) is not None and isinstance(read[2], slice):
            yield from _sizes_of(results[read[0].name], read[2], free)
        else:
            yield from [GivenSize(None, not fixed(size))] * len(results[size.name])


def _fixed_part(size: Any, results: Mapping[str, Any], fixed: Callable[[fx.Node], bool]) -> int:  # noqa: ANN401 - an argument
    """The product of those factors of a size that are the same for all inputs."""
    if not isinstance(size, fx.Node):
        return size if type(size) is int else 1
    if fixed(size):
        return results[size.name] if type(results[size.name]) is int else 1
    return math.prod(_fixed_part(a, results, fixed) for a in size.args) if size.target is operator.mul else 1


def _sizes_of(tensor: Any, which: slice, free: Free) -> list[GivenSize]:  # noqa: ANN401 - the result of a node
    """The sizes of a tensor, along some of its dims."""
    follows = free(tensor) if isinstance(tensor, Value) else [True] * tensor.ndim
    return [GivenSize(None, own) for own in follows[which]]
