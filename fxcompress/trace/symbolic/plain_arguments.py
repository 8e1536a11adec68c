"""Arguments that are no tensors: what code can ask of them without torch.fx seeing it.

``mask is None`` is False of a stand-in, whatever the stand-in is for, and nobody is told that it was asked. So a graph
that torch.fx made is right only where the code has had no stand-in for such a value in its hands.
"""

import operator
from enum import Enum
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.utils.rnn import PackedSequence

from fxcompress.errors import TraceError
from fxcompress.trace.inputs import ExampleInputs

NULLABLE = frozenset({"grad", "grad_fn", "_base"})
"""Attributes of tensors that may be None."""
_SINGLE = (bool, str, bytes, Enum, type, torch.dtype, torch.device, torch.layout, torch.memory_format)
"""Of these, as of None, there may be one object for each value, which code asks for by ``is``."""
_WITHOUT = (Tensor, PackedSequence, int, float, complex)
"""What holds none of these."""


def refuse_plain_reads(graph: fx.Graph, inputs: ExampleInputs) -> None:
    """Check that the code has read no None, flag or name from its arguments.

    Args:
        graph: as torch.fx made it, with all that the code has read.
        inputs: what its placeholders stand for.

    Raises:
        TraceError: it has. Where the model is traced by running it, it sees such values as they are.
    """
    given = _given(graph, inputs)
    known: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "placeholder" and str(node.target) in given:
            _keep(known, node, given[str(node.target)])
        elif node.op == "call_method" and node.args and node.args[0] in known:
            raise _called(node, node.target)
        elif node.op == "call_function" and node.target in {operator.getitem, getattr} and len(node.args) == 2:
            source, key = node.args
            if node.target is getattr and key in NULLABLE:
                raise TraceError(f"it reads {key} of a tensor, and torch.fx hides whether that is None")
            if source in known and not isinstance(key, fx.Node):
                value = node.target(known[source], key)
                if callable(value) and not isinstance(value, type):
                    raise _called(node, key)
                _keep(known, node, value)


def _given(graph: fx.Graph, inputs: ExampleInputs) -> dict[str, Any]:
    """The values of the placeholders that are given, and have not kept their default."""
    targets = [str(node.target) for node in graph.find_nodes(op="placeholder")]
    names = inputs.names(targets)
    return {name: value for name, value in inputs.bind(graph).items() if name.startswith("*") or name in names}


def _keep(known: dict[fx.Node, Any], node: fx.Node, value: object) -> None:
    if value is None or isinstance(value, _SINGLE):
        raise TraceError(f"the argument {_origin(node)} is or holds {value!r}, and torch.fx hides that from the code")
    if not isinstance(value, _WITHOUT):
        known[node] = value


def _called(node: fx.Node, method: object) -> TraceError:
    return TraceError(f"it calls {method}() of the argument {_origin(node)}, and torch.fx hides what that returns")


def _origin(node: fx.Node) -> str:
    while node.op != "placeholder":
        node = node.all_input_nodes[0]
    return str(node.target)
