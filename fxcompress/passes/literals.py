"""Sizes written into the graph as numbers: what they must be once channels are gone.

Each function proposes new arguments for one kind of node. A proposal is only that: the rewrite runs the node on packed
labels and takes the proposal if the result is what is left of the original.
"""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from fxcompress.channels.factories import SIZES, kind_of, padded_dims, sizes_of
from fxcompress.channels.layers import support
from fxcompress.channels.rules.group_sums import left_of
from fxcompress.channels.rules.reductions import reduced
from fxcompress.channels.survivors import has_own_labels, kept_masks, kept_shape
from fxcompress.channels.values import Value, find
from fxcompress.passes.means import (
    Sizes,
    extreme_over,
    group_norm_over,
    layer_norm_over,
    mean_over,
    mean_square_over,
    rms_norm_over,
    std_mean_over,
    std_over,
    var_mean_over,
    var_over,
)
from fxcompress.trace.graph.calls import function_name


@dataclass(frozen=True, slots=True)
class Proposal:
    """New target and arguments of a node."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


Propose = Callable[[fx.Node, Value, Any, np.ndarray], Proposal | None]


def propose(
    node: fx.Node, source: Value | None, result: object, alive: np.ndarray, moves: Callable[[fx.Node], bool]
) -> Proposal | None:
    """New arguments for ``node``, or None where there is nothing to propose.

    Args:
        node: of any kind; there is something to propose for call_function and call_method nodes.
        source: its first argument before the cut.
        result: its result before the cut, Values in place of tensors.
        alive: bool (atoms,).
        moves: whether what a node computes comes from sizes of the inputs. No number can take its place.
    """
    if node.op not in {"call_function", "call_method"}:
        return None
    if kind_of(node):
        return _made(node, result, alive)
    rule = _RULES.get(function_name(node))
    if rule is None or source is None:
        return None
    if rule is _sizes:
        return _sizes(node, source, result, alive, moves)
    found, moving = rule(node, source, result, alive), {used for used in node.all_input_nodes if moves(used)}
    return found if found is None or moving <= set(find(fx.Node, (found.args, found.kwargs))) else None


_VIEWS = frozenset({"view", "reshape"})
"""They put the same entries into other dims, so one of these may be -1."""


def _sizes(
    node: fx.Node,
    source: Value,
    result: object,
    alive: np.ndarray,
    moves: Callable[[fx.Node], bool] = lambda size: False,
) -> Proposal | None:
    """view, reshape, expand: the size of each output dim that is cut, also where it was computed.

    Where each entry of a dim has a label of its own, the size is a matter of the network and never of the input: a
    number will do. It may take one even if it stays: it was computed, perhaps, from the size of another tensor that is
    cut. Along ``batch * heads``, where labels repeat, or would for more than one sample, what is computed stays
    computed. A dim of a view that must be another there is what the others leave.
    """
    if not isinstance(result, Value):
        return None
    old, new = tuple(result.shape), kept_shape(result, alive)
    shape = node.kwargs.get("shape", node.kwargs.get("size", node.args[1:]))
    flat = list(shape[0]) if len(shape) == 1 and isinstance(shape[0], tuple | list) else list(shape)  # type: ignore[arg-type,index]
    if len(flat) != len(old):
        return None
    computed = {d for layer in result.layers for d in support(layer) if isinstance(flat[d], fx.Node)}
    free = {d for d in computed if moves(flat[d]) or not has_own_labels(result, d)}
    cut = [
        n != -1 and d not in free and (a != b or d in computed)
        for d, (n, a, b) in enumerate(zip(flat, old, new, strict=True))
    ]
    sizes = [new[d] if cut[d] else flat[d] for d in range(len(old))]
    rest = sorted({d for d in free if old[d] != new[d]} or {d for d in computed if cut[d] and old[d] != new[d]})
    if rest and -1 not in sizes and function_name(node) in _VIEWS:
        sizes[rest[0]] = -1
    return Proposal(node.target, (node.args[0], tuple(sizes)), {})


def _repeats(node: fx.Node, source: Value, result: object, alive: np.ndarray) -> Proposal | None:
    """repeat: how often, along the dims of size 1 that have labels in the result."""
    times = node.args[1:]
    flat = list(times[0]) if len(times) == 1 and isinstance(times[0], tuple | list) else list(times)
    if not isinstance(result, Value) or len(flat) != result.rank:
        return None
    before, new = (1,) * (result.rank - source.rank) + tuple(source.shape), kept_shape(result, alive)
    cut = {d for layer in result.layers for d in support(layer) if before[d] == 1 and type(flat[d]) is int}
    return Proposal(node.target, (node.args[0], tuple(new[d] if d in cut else n for d, n in enumerate(flat))), {})


def _made(node: fx.Node, result: object, alive: np.ndarray) -> Proposal | None:
    """zeros, ones and the like: the sizes that are left."""
    sizes = sizes_of(node)
    if not isinstance(result, Value) or sizes is None or len(sizes) != result.rank:  # a shape that a node computes
        return None
    new = tuple(n if type(s) is int else s for s, n in zip(sizes, kept_shape(result, alive), strict=True))
    start = SIZES[kind_of(node)]
    rest = node.args[start + 1 :] if "full" in kind_of(node) else ()
    kwargs = {key: value for key, value in node.kwargs.items() if key != "size"}
    return Proposal(node.target, (*node.args[:start], new, *rest), kwargs)


def _unflatten(node: fx.Node, source: Value, result: object, alive: np.ndarray) -> Proposal | None:
    dim, sizes = _argument(node, 1, "dim"), _argument(node, 2, "sizes")
    if not isinstance(result, Value) or not isinstance(dim, int) or not isinstance(sizes, Sequence):
        return None
    start = dim % source.rank
    old, new = result.shape[start : start + len(sizes)], kept_shape(result, alive)[start : start + len(sizes)]
    patched = tuple(n if n != o and s != -1 else s for s, o, n in zip(sizes, old, new, strict=True))
    return Proposal(node.target, (node.args[0], dim, patched), {})


def _split(node: fx.Node, source: Value, result: object, alive: np.ndarray) -> Proposal | None:
    """Chunk and split: the sizes that are left of each part."""
    dim, sizes = _argument(node, 2, "dim", 0), _part_sizes(node, source, result, alive)
    target = "split" if isinstance(node.target, str) else torch.split
    return Proposal(target, (node.args[0], sizes, dim), {}) if sizes else None


def _tensor_split(node: fx.Node, source: Value, result: object, alive: np.ndarray) -> Proposal | None:
    """tensor_split: the places at which the parts begin now."""
    dim, sizes = _argument(node, 2, "dim", 0), _part_sizes(node, source, result, alive)
    places = tuple(int(n) for n in np.cumsum(sizes)[:-1])
    return Proposal(node.target, (node.args[0], places, dim), {}) if sizes else None


def _part_sizes(node: fx.Node, source: Value, result: object, alive: np.ndarray) -> list[int]:
    """What is left of each part along the dim that is divided; empty where that is not known."""
    dim = _argument(node, 2, "dim", 0)
    return [kept_shape(part, alive)[dim % source.rank] for part in find(Value, result)] if isinstance(dim, int) else []


def _getitem(node: fx.Node, source: Value, result: object, alive: np.ndarray) -> Proposal | None:
    """Slices and numbers: where the entries that they name are now.

    Entries that are no slice any more are named one by one. That makes a copy of a view; where one of both is written
    to later, the check finds that the other one is not, and keeps the channels.
    """
    return Proposal(operator.getitem, (node.args[0], _index(node.args[1], source, alive)), {})


def _setitem(node: fx.Node, source: Value, result: object, alive: np.ndarray) -> Proposal | None:
    """The same where something is written there."""
    return Proposal(operator.setitem, (node.args[0], _index(node.args[1], source, alive), node.args[2]), {})


def _index(given: Any, source: Value, alive: np.ndarray) -> tuple[Any, ...]:  # noqa: ANN401 - any index of a tensor
    index = given if isinstance(given, tuple) else (given,)
    masks, patched, dim = kept_masks(source, alive), [], 0
    for item in index:
        if item is Ellipsis:
            dim = source.rank - sum(1 for i in index[index.index(item) + 1 :] if i is not None)
        patched.append(_position(item, masks[dim]) if dim in masks else item)
        dim += item is not None and item is not Ellipsis
    return tuple(patched)


def _position(item: Any, kept: np.ndarray) -> Any:  # noqa: ANN401 - whatever a tensor can be indexed with
    if isinstance(item, slice):
        return _slice(item, kept)
    if type(item) is int and kept[item]:
        return int(kept[: item % len(kept)].sum())
    if isinstance(item, list) and all(type(i) is int for i in item):
        return [_position(i, kept) for i in item if kept[i]]
    return item


def _slice(item: slice, kept: np.ndarray) -> slice | list[int]:
    """The slice that names what is left of the entries; all of them where there is none, each by its number.

    An end that is open stays open: along a dim that is joined with a size of the inputs there may be more.
    """
    if any(isinstance(n, fx.Node) for n in (item.start, item.stop, item.step)):
        return item
    chosen = np.arange(len(kept))[item]
    positions = (np.cumsum(kept) - 1)[chosen[kept[chosen]]]
    if not len(positions):
        return item
    steps = np.unique(np.diff(positions))
    if len(steps) > 1:
        return [int(i) for i in positions]
    step = int(steps[0]) if len(steps) else 1
    whole = item.stop is None and item.step in {None, 1}
    return slice(int(positions[0]), None if whole else int(positions[-1]) + 1, None if step == 1 else step)


def _pad(node: fx.Node, source: Value, result: object, alive: np.ndarray) -> Proposal | None:
    """pad: how many of the entries that were put at both ends are left."""
    dims = padded_dims(node, result) if isinstance(result, Value) else {}
    if not isinstance(result, Value) or not dims:
        return None
    masks, amounts = kept_masks(result, alive), list(_argument(node, 1, "pad"))
    for dim, (before, behind) in dims.items():
        kept, place = masks[dim], 2 * (result.rank - 1 - dim)
        amounts[place : place + 2] = int(kept[:before].sum()), int(kept[len(kept) - behind :].sum())
    kwargs = {key: value for key, value in node.kwargs.items() if key != "pad"}
    return Proposal(node.target, (node.args[0], tuple(amounts), *node.args[2:]), kwargs)


def _narrow(node: fx.Node, source: Value, result: object, alive: np.ndarray) -> Proposal | None:
    dim, start, length = (_argument(node, i, n) for i, n in ((1, "dim"), (2, "start"), (3, "length")))
    masks = kept_masks(source, alive)
    if not all(isinstance(n, int) for n in (dim, start, length)) or dim % source.rank not in masks:
        return None
    kept = masks[dim % source.rank]
    start %= len(kept)
    args = (node.args[0], dim, int(kept[:start].sum()), int(kept[start : start + length].sum()))
    return Proposal(node.target, args, {})


def _select(node: fx.Node, source: Value, result: object, alive: np.ndarray) -> Proposal | None:
    dim, index = _argument(node, 1, "dim"), _argument(node, 2, "index")
    masks = kept_masks(source, alive)
    if not isinstance(dim, int) or dim % source.rank not in masks:
        return None
    return Proposal(node.target, (node.args[0], dim, _position(index, masks[dim % source.rank])), {})


def _groups(node: fx.Node, source: Value, result: object, alive: np.ndarray) -> Proposal | None:
    """Functional convolutions: the number of groups that are left."""
    position = 6
    groups = _argument(node, position, "groups", 1)
    if not isinstance(groups, int) or groups == 1:
        return None
    new = groups * kept_shape(source, alive)[1] // source.shape[1]
    if len(node.args) > position:
        args = (*node.args[:position], new, *node.args[position + 1 :])
        return Proposal(node.target, args, dict(node.kwargs))
    return Proposal(node.target, node.args, {**node.kwargs, "groups": new})


def _norm_groups(node: fx.Node, source: Value, result: object, alive: np.ndarray) -> Proposal | None:
    """group_norm: the groups that are left, divided by as many channels as they had."""
    groups = _argument(node, 1, "num_groups")
    if not isinstance(groups, int):
        return None
    names = ((2, "weight", None), (3, "bias", None), (4, "eps", 1e-5))
    kwargs = {name: _argument(node, i, name, default) for i, name, default in names}
    if groups == 1:
        return Proposal(group_norm_over, (node.args[0], _before(source, tuple(range(1, source.rank)))), kwargs)
    channels = source.shape[1]
    each = channels // groups
    left = left_of([each] * groups, kept_masks(source, alive).get(1, np.ones(channels, dtype=bool)))
    if len(left) > 1 and set(left) == {each}:  # the others have gone as a whole
        args = (node.args[0], len(left), *node.args[2:])
        return Proposal(node.target, args, {k: v for k, v in node.kwargs.items() if k != "num_groups"})
    return Proposal(group_norm_over, (node.args[0], ((1, each),)), {**kwargs, "groups": left})


def _groups_again(node: fx.Node, source: Value, result: object, alive: np.ndarray) -> Proposal | None:
    """The function that takes its place: the groups that are left now."""
    groups = node.kwargs.get("groups")
    if not isinstance(groups, tuple | list):
        return None
    left = left_of(groups, kept_masks(source, alive).get(1, np.ones(source.shape[1], dtype=bool)))
    return Proposal(node.target, node.args, {**node.kwargs, "groups": left})


def _attention(node: fx.Node, source: Value, result: object, alive: np.ndarray) -> Proposal | None:
    """Attention: the default scale is a matter of the head's size, and must stay what it was."""
    if node.kwargs.get("scale") is not None:
        return None
    return Proposal(node.target, node.args, {**node.kwargs, "scale": 1 / math.sqrt(source.shape[-1])})


def _mean(node: fx.Node, source: Value, result: object, alive: np.ndarray) -> Proposal | None:
    """mean: divide by as many entries as there were."""
    dim = node.kwargs.get("axis", _argument(node, 1, "dim"))
    keepdim = node.kwargs.get("keepdims", _argument(node, 2, "keepdim", default=False))
    given = dim if isinstance(dim, tuple | list) else [dim]
    if not isinstance(keepdim, bool) or any(isinstance(d, fx.Node) for d in given):
        return None
    dims = tuple(sorted(reduced(dim, source.rank)))
    kwargs = {"keepdim": keepdim, "dtype": node.kwargs.get("dtype")}
    return Proposal(mean_over, (node.args[0], dims, _before(source, dims)), kwargs)


def _spread(node: fx.Node, source: Value, result: object, alive: np.ndarray) -> Proposal | None:
    """Variances and deviations: the same. ``var(unbiased)`` begins with a flag, ``var(dim, unbiased, keepdim)`` not."""
    given, named = list(node.args[1:]), dict(node.kwargs)
    dim: Any = named.get("dim", named.get("axis"))
    if given and not isinstance(given[0], bool):
        dim = given.pop(0)
    unbiased, keepdim = [*given, None, None][:2]
    unbiased = named.get("correction", named.get("unbiased", unbiased))
    keepdim = named.get("keepdim", named.get("keepdims", keepdim))
    correction = 1 if unbiased is None else unbiased
    numbers = [*(dim if isinstance(dim, tuple | list) else [dim]), keepdim]
    if any(isinstance(n, fx.Node) for n in numbers) or not isinstance(correction, int | float) or "out" in named:
        return None
    dims = tuple(sorted(reduced(dim, source.rank)))
    over = _OVER[function_name(node)]
    number = correction if isinstance(correction, float) else int(correction)
    return Proposal(over, (node.args[0], dims, _before(source, dims), number), {"keepdim": bool(keepdim)})


_OVER: dict[str, Any] = {"var": var_over, "std": std_over, "var_mean": var_mean_over, "std_mean": std_mean_over}


def _extreme(node: fx.Node, source: Value, result: object, alive: np.ndarray) -> Proposal | None:
    """Maxima and minima: zero is one of the numbers."""
    name = function_name(node)
    dim, keepdim = _argument(node, 1, "dim"), _argument(node, 2, "keepdim", default=False)
    given = dim if isinstance(dim, tuple | list) else [dim]
    if any(isinstance(n, fx.Node) for n in (*given, keepdim)) or "out" in node.kwargs:
        return None
    dims = tuple(sorted(reduced(dim, source.rank)))
    largest = node.kwargs.get("largest", name == "amax")
    kwargs = {"keepdim": keepdim, "largest": largest, "picks": name == "extreme"}
    return Proposal(extreme_over, (node.args[0], dims), kwargs)


def _mean_square(node: fx.Node, source: Value, result: object, alive: np.ndarray) -> Proposal | None:
    """A variance that was written by hand: the same."""
    dims = tuple(sorted(reduced(node.args[1], source.rank)))
    return Proposal(mean_square_over, (node.args[0], dims, _before(source, dims)), dict(node.kwargs))


def _rms_norm(node: fx.Node, source: Value, result: object, alive: np.ndarray) -> Proposal | None:
    """rms_norm: the same, whose shape is that of the dims now."""
    shape = _argument(node, 1, "normalized_shape")
    if not isinstance(shape, tuple | list):
        return None
    dims = tuple(range(source.rank - len(shape), source.rank))
    kwargs = {"weight": _argument(node, 2, "weight"), "eps": _argument(node, 3, "eps")}
    return Proposal(rms_norm_over, (node.args[0], dims, _before(source, dims)), kwargs)


def _layer_norm(node: fx.Node, source: Value, result: object, alive: np.ndarray) -> Proposal | None:
    """layer_norm: the same."""
    shape = _argument(node, 1, "normalized_shape")
    if not isinstance(shape, tuple | list):
        return None
    dims = tuple(range(source.rank - len(shape), source.rank))
    names = ((2, "weight", None), (3, "bias", None), (4, "eps", 1e-5))
    kwargs = {name: _argument(node, i, name, default) for i, name, default in names}
    return Proposal(layer_norm_over, (node.args[0], dims, _before(source, dims)), kwargs)


def _before(source: Value, dims: tuple[int, ...]) -> Sizes:
    """The sizes of the ``dims`` with labels."""
    labelled = {d for layer in source.layers for d in support(layer)}
    return tuple((d, source.shape[d]) for d in dims if d in labelled)


def _argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:  # noqa: ANN401
    return node.args[position] if position < len(node.args) else node.kwargs.get(name, default)


_RULES: dict[str, Propose] = {
    **dict.fromkeys(("view", "reshape", "expand", "view_copy", "broadcast_to"), _sizes),
    "repeat": _repeats,
    "unflatten": _unflatten,
    **dict.fromkeys(("chunk", "split", "split_with_sizes"), _split),
    "tensor_split": _tensor_split,
    "getitem": _getitem,
    "setitem": _setitem,
    "group_norm": _norm_groups,
    "group_norm_over": _groups_again,
    "scaled_dot_product_attention": _attention,
    "mean": _mean,
    **dict.fromkeys(("var", "std", "var_mean", "std_mean"), _spread),
    "mean_square": _mean_square,
    **dict.fromkeys(("extreme", "amax", "amin"), _extreme),
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "narrow": _narrow,
    "pad": _pad,
    "select": _select,
    **dict.fromkeys((f"conv{n}d" for n in (1, 2, 3)), _groups),
    **dict.fromkeys((f"conv_transpose{n}d" for n in (1, 2, 3)), _groups),
}
