"""Tensors that a graph makes out of nothing: zeros for the first state of a cell, a frame of ones.

Where their size is written as a number, that number can follow the channels that they meet. So each such dim gets
labels of its own, which belong to no parameter, and the rewrite changes the number.
"""

import torch
from torch import Tensor, fx

from fxcompress.channels.layers import Layers
from fxcompress.channels.rules.registry import Known, OpClass, unknown
from fxcompress.channels.space import Space
from fxcompress.channels.values import Call, LabelTensor, Step

SIZES = {"zeros": 0, "ones": 0, "full": 0, "new_zeros": 1, "new_ones": 1, "new_full": 1}
"""Functions that fill a tensor, and the position of their sizes."""
_FILLED = {"zeros": 0.0, "ones": 1.0, "new_zeros": 0.0, "new_ones": 1.0}


def kind_of(node: fx.Node) -> str:
    """Which of these functions a node calls; "" for none."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    own = node.op == "call_method" or getattr(torch, str(name), None) is node.target
    return str(name) if name in SIZES and own else ""


def sizes_of(node: fx.Node) -> list[object] | None:
    """The sizes as they stand in the graph: numbers, or nodes where they are computed; None for another form."""
    start = SIZES[kind_of(node)]
    given = node.args[start:] or (node.kwargs.get("size"),)
    if isinstance(given[0], tuple | list):
        return list(given[0])
    return list(given) if all(isinstance(n, int | fx.Node) for n in given) and "full" not in kind_of(node) else None


def written_dims(node: fx.Node, result: object) -> list[int]:
    """The dims of the result of a factory whose size is a number of the graph's, above 1."""
    plain = isinstance(result, Tensor) and not isinstance(result, LabelTensor) and result.is_floating_point()
    if not plain or not kind_of(node) or "out" in node.kwargs:
        return []
    sizes = sizes_of(node)
    return [] if sizes is None else [d for d, n in enumerate(sizes) if type(n) is int and n > 1]


def filled_with(node: fx.Node) -> float | None:
    """The number in every entry; None where it is computed."""
    kind = kind_of(node)
    value = _FILLED.get(
        kind, node.kwargs.get("fill_value", node.args[-1] if len(node.args) > SIZES[kind] + 1 else None)
    )
    return float(value) if isinstance(value, int | float) else None


def _labels(call: Call, space: Space) -> tuple[Layers, ...]:
    return (call.args[0],)


def _constants(step: Step, known: Known) -> list[Tensor]:
    (out,), value = step.outputs, step.call.args[1]
    return [unknown(out) if value is None else torch.full((1,) * out.rank, value, dtype=torch.float64)]


FILL = OpClass("fill", _labels, _constants)
"""Arguments: the layers of the result, and the number in every entry."""
