"""Tensors that a graph makes out of nothing: zeros for the first state of a cell, a frame of ones.

Where their size is written as a number, that number can follow the channels that they meet. So each such dim gets
labels of its own, which belong to no parameter, and the rewrite changes the number. Where it is read off another
tensor, the dim has the labels of that one, and follows it by itself. The same holds for the channels that a tensor is
padded with.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxcompress.channels.layers import Layers, support, vector
from fxcompress.channels.rules.registry import Known, OpClass, unknown
from fxcompress.channels.size_reads import labels_of_sizes
from fxcompress.channels.space import Space
from fxcompress.channels.values import Call, LabelTensor, Step, Value
from fxcompress.trace.graph.calls import function_name

SIZES = {
    "zeros": 0, "ones": 0, "full": 0, "empty": 0, "new_zeros": 1, "new_ones": 1, "new_full": 1, "new_empty": 1,
}  # fmt: skip
"""Functions that make a tensor, and the position of their sizes."""
_FILLED = {"zeros": 0.0, "ones": 1.0, "new_zeros": 0.0, "new_ones": 1.0, "empty": 0.0, "new_empty": 0.0}
"""The number in every entry. In what nobody has filled there may be any, so zero as well."""
_SPREADING = frozenset({"expand", "expand_as", "repeat"})
"""Methods that repeat a tensor along dims of size 1."""


def kind_of(node: fx.Node) -> str:
    """Which of these functions a node calls; "" for none."""
    name = function_name(node)
    own = node.op == "call_method" or getattr(torch, str(name), None) is node.target
    return str(name) if name in SIZES and own else ""


def sizes_of(node: fx.Node) -> list[object] | None:
    """The sizes as they stand in the graph; None for another form.

    Numbers, or nodes where they are computed. One node may compute all of them (``x.shape``).
    """
    start = SIZES[kind_of(node)]
    given = node.args[start:] or (node.kwargs.get("size"),)
    if isinstance(given[0], tuple | list):
        return list(given[0])
    if "full" in kind_of(node):  # behind its sizes stands what it is filled with
        given = given[:1] if isinstance(given[0], fx.Node) else (None,)
    return list(given) if all(isinstance(n, int | fx.Node) for n in given) else None


def made_sizes(node: fx.Node, result: object) -> list[object]:
    """The sizes of the result of a factory as they stand in the graph; none for another node."""
    plain = isinstance(result, Tensor) and not isinstance(result, LabelTensor)
    if not plain or not kind_of(node) or "out" in node.kwargs:
        return []
    return sizes_of(node) or [] if result.is_floating_point() or result.is_complex() else []  # type: ignore[attr-defined]


def written_dims(sizes: list[object]) -> list[int]:
    """The dims whose size is a number of the graph's, above 1."""
    return [d for d, n in enumerate(sizes) if type(n) is int and n > 1]


def copied_layers(sizes: list[object], values: Mapping[str, Any]) -> Layers:
    """Labels along the dims whose size is read off a tensor with labels there: they stay as many as those."""
    found = labels_of_sizes(sizes, values)
    return tuple(vector(labels, len(found), d) for d, labels in enumerate(found) if labels is not None)


def filled_with(node: fx.Node) -> float | None:
    """The number in every entry; None where it is computed."""
    kind = kind_of(node)
    value = _FILLED.get(
        kind, node.kwargs.get("fill_value", node.args[-1] if len(node.args) > SIZES[kind] + 1 else None)
    )
    return float(value) if isinstance(value, int | float) else None


def spread_layers(node: fx.Node, values: Mapping[str, Any], rank: int) -> Layers | None:
    """For a node that repeats a tensor along dims of size 1: labels where it takes the size of a tensor with labels.

    None for another node.
    """
    before = _before(node, values, rank)
    if before is None:
        return None
    if node.target == "expand_as":
        other = values.get(str(node.args[1]))
        found = tuple(_vectors(other.layers)) if isinstance(other, Value) and other.rank == rank else ()
    else:
        found = tuple(layer for layer in copied_layers(_given_sizes(node), values) if layer.ndim == rank)
    return tuple(layer for layer in found if all(before[d] == 1 for d in support(layer)))


def spread_dims(node: fx.Node, values: Mapping[str, Any], rank: int) -> list[int]:
    """The dims of size 1 along which a node repeats a tensor as often as a number of the graph's says."""
    before, sizes = _before(node, values, rank), _given_sizes(node)
    if before is None or len(sizes) != rank:
        return []
    return [d for d in written_dims(sizes) if before[d] == 1]


def _before(node: fx.Node, values: Mapping[str, Any], rank: int) -> tuple[int, ...] | None:
    """The sizes of the tensor that a node repeats, with 1 for dims that are new; None for another node."""
    source = values.get(str(node.args[0])) if node.args and node.target in _SPREADING else None
    return (1,) * (rank - len(source.shape)) + tuple(source.shape) if isinstance(source, Value | Tensor) else None


def _given_sizes(node: fx.Node) -> list[object]:
    given = node.args[1:]
    return list(given[0]) if len(given) == 1 and isinstance(given[0], tuple | list) else list(given)


def padded_dims(node: fx.Node, value: Value) -> dict[int, tuple[int, int]]:
    """How many entries a node puts before and behind those of a tensor, by the dim, where these have labels.

    Args:
        node: there are none unless it pads with a constant, by numbers of the graph's.
        value: its result.
    """
    if node.target is not torch.nn.functional.pad:
        return {}
    amounts, mode = node.args[1] if len(node.args) > 1 else node.kwargs.get("pad"), node.kwargs.get("mode", "constant")
    mode = node.args[2] if len(node.args) > 2 else mode
    if mode != "constant" or not isinstance(amounts, tuple | list):
        return {}
    if not all(type(n) is int and n >= 0 for n in amounts):
        return {}
    labelled = {min(support(layer)) for layer in _vectors(value.layers)}
    pairs = zip(amounts[::2], amounts[1::2], strict=False)
    dims = {value.rank - 1 - i: (int(lo), int(hi)) for i, (lo, hi) in enumerate(pairs)}
    return {d: pair for d, pair in dims.items() if d in labelled}


def bordered(layer: Tensor, border: Tensor, before: int) -> Tensor:
    """A layer along one dim with other labels at both ends.

    Args:
        layer: n labels, of any rank.
        border: int64 (k,), the first ``before`` of them for the start and the others for the end.
        before: how many.
    """
    flat = layer.reshape(-1)
    inner = flat[before : flat.numel() - border.numel() + before]
    return torch.cat([border[:before], inner, border[before:]]).reshape(layer.shape)


def _vectors(layers: Layers) -> Iterator[Tensor]:
    return (layer for layer in layers if len(support(layer)) == 1)


def _spread_labels(call: Call, space: Space) -> tuple[Layers, ...]:
    return ((*call.args[0].layers, *call.args[1]),)


def _spread_constants(step: Step, known: Known) -> list[Tensor]:
    return [known.of(step.call.args[0])]


def _labels(call: Call, space: Space) -> tuple[Layers, ...]:
    return (call.args[0],)


def _constants(step: Step, known: Known) -> list[Tensor]:
    (out,), value = step.outputs, step.call.args[1]
    value = None if value and out.meta.is_complex() else value  # a map holds one number where a complex entry has two
    return [unknown(out) if value is None else torch.full((1,) * out.rank, value, dtype=torch.float64, device="cpu")]


SPREAD = OpClass("spread", _spread_labels, _spread_constants)
"""Arguments: a tensor that was repeated along dims of size 1, and the labels that these have now."""
FILL = OpClass("fill", _labels, _constants)
"""Arguments: the layers of the result, and the number in every entry."""
