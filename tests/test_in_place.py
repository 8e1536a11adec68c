"""Which nodes write to what they are given: all parts of the compiler go by the same answer."""

import operator

import pytest
import torch
from torch import Tensor, fx, nn

from fxcompress.trace.graph.calls import writes_in_place
from fxcompress.trace.inputs import ExampleInputs
from fxcompress.trace.tracer import trace


class Sums(nn.Module):
    """Adds to a tensor of its own, in each way that Python has; sizes of one may decide something."""

    def __init__(self, *, decides: bool) -> None:
        super().__init__()
        self.decides = decides

    def forward(self, x: Tensor) -> Tensor:
        if self.decides and x.shape[0] > 100:
            return x
        y = x * 2
        y += x
        y[0] = 1.0
        y.mul_(3)
        return y + x


@pytest.mark.parametrize("decides", [False, True])
def test_writes_are_known_however_the_graph_was_made(*, decides: bool) -> None:
    graph = trace(Sums(decides=decides), ExampleInputs.of(torch.randn(4, 3))).graph
    assert len([node for node in graph.nodes if writes_in_place(node)]) == 3


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (operator.iadd, True),
        (operator.setitem, True),
        (operator.invert, False),
        (operator.add, False),
        (torch.relu_, True),
        (torch.relu, False),
        ("add_", True),
        ("__iadd__", True),
        ("__setitem__", True),
        ("__add__", False),
        ("add", False),
    ],
)
def test_writes_are_known_by_what_is_called(target: object, *, expected: bool) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x_")
    kind = "call_method" if isinstance(target, str) else "call_function"
    assert writes_in_place(graph.create_node(kind, target, (x,))) is expected  # type: ignore[arg-type]


def test_layers_and_inputs_write_to_nothing_whatever_they_are_called() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x_")
    assert not any(writes_in_place(node) for node in (x, graph.get_attr("bias_"), graph.call_module("conv_", (x,))))
