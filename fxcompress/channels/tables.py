"""Parameters of which an input reads as many rows as it is long, such as a table of position embeddings.

A row that the example inputs do not reach looks unused. A longer input reads it.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import fx

from fxcompress.channels.rules.indexing import INDEX
from fxcompress.channels.rules.movement import MOVEMENT
from fxcompress.channels.space import Space
from fxcompress.channels.values import LabelTensor, Step, Value, find


def reads_a_size(node: fx.Node, env: Mapping[fx.Node, Any], fixed: Callable[[fx.Node], bool]) -> bool:
    """Whether what ``node`` does depends on a number, or on a tensor without labels that the graph makes of one.

    The number of channels is none of these: ``a[: h.shape[1]]`` reads the same entries for all inputs.

    Args:
        node: of the graph.
        env: the results of the nodes before it.
        fixed: whether what a node computes is the same for all inputs.
    """
    return any(not fixed(used) and _is_of_a_size(env[used]) for used in node.all_input_nodes)


def _is_of_a_size(value: object) -> bool:
    if isinstance(value, torch.Tensor):
        return not isinstance(value, LabelTensor)
    return isinstance(value, int | torch.Size)


def pin_rows(steps: Iterable[Step], tables: set[int], space: Space) -> None:
    """Pin the dims of parameters from which a node takes some entries only.

    Args:
        steps: of a node that reads a size.
        tables: keys of the values that hold a parameter, see :func:`follow`.
        space: where the pins go.
    """
    for step in steps:
        source = step.call.args[0] if step.call.args else None
        if step.op not in {MOVEMENT, INDEX} or not isinstance(source, Value) or source.key not in tables:
            continue
        left = [layer.reshape(-1) for value in step.outputs for layer in value.layers]
        read = torch.cat(left) if left else torch.zeros(0, dtype=torch.int64, device="cpu")
        for layer in source.layers:
            if not bool(torch.isin(layer, read).all()):
                space.pin(layer, "input-size", "how many of its entries are read depends on the size of the input")


def follow(steps: Iterable[Step], tables: set[int]) -> None:
    """Add the values that are computed from tables alone: one in another form, scaled, quantized."""
    for step in steps:
        source = step.call.args[0] if step.call.args else None
        if not isinstance(source, Value) or source.key not in tables:  # most are activations
            continue
        values = find(Value, (step.call.args, step.call.kwargs))
        if tables.issuperset(value.key for value in values):
            tables.update(value.key for value in step.outputs)
