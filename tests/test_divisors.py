"""Channels that are divided by a number which the graph holds as a tensor, or written to at an index of numbers."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from tests.exactness import difference


class Net(nn.Module):
    """Two layers with an op between them; half of the channels of the first are zero."""

    def __init__(self, op: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.op = op
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 2)
        with torch.no_grad():
            self.first.weight[::2] = 0
            self.first.bias[::2] = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.op(self.first(x).relu()))  # type: ignore[no-any-return]


def left(op: Callable[[Tensor], Tensor]) -> int:
    """How many channels stay, in a network that computes what it did."""
    torch.manual_seed(0)
    net, x = Net(op).double(), torch.randn(3, 5, dtype=torch.float64)
    small = fxc.prune(net, x).module
    assert difference(small(x), net(x)) < 1e-12
    return len(small.get_parameter("first.weight"))


NUMBERS: dict[str, Callable[[Tensor], Tensor]] = {
    "number": lambda h: h / torch.tensor(8.0),
    "root": lambda h: h / torch.sqrt(torch.tensor(8, dtype=h.dtype)),
    "rounded": lambda h: torch.div(h, torch.tensor(0.5), rounding_mode="floor"),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_zeros_over_a_number_are_zeros(name: str) -> None:
    assert left(NUMBERS[name]) == 4


@pytest.mark.parametrize("number", [0.0, torch.nan])
def test_zeros_over_zero_are_none(number: float) -> None:
    torch.manual_seed(0)
    net = Net(lambda h: h / torch.tensor(number))
    assert len(fxc.prune(net, torch.randn(3, 5)).module.get_parameter("first.weight")) == 8


def exchange(h: Tensor) -> Tensor:
    h[:, torch.tensor([True, False] * 4)] = 1.0
    return h


def test_what_is_written_to_at_an_index_is_named_as_that() -> None:
    report = str(fxc.prune(Net(exchange), torch.randn(3, 5)).report)
    assert "it is written to at an index" in report
    assert "that the network computes" not in report
