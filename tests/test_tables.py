"""Tables of which an input reads as many rows as it is long: a longer one than the example reads more of them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from tests.exactness import difference


class Text(nn.Module):
    """Words, positions, and a linear layer on their sum."""

    def __init__(self, positions: Callable[["Text", int], Tensor]) -> None:
        super().__init__()
        self.words, self.places, self.fc = nn.Embedding(50, 8), nn.Embedding(32, 8), nn.Linear(8, 4)
        self.table = nn.Parameter(torch.randn(1, 8, 32))
        self.register_buffer("order", torch.arange(32))
        self.positions = positions

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.words(x) + self.positions(self, x.shape[1]))  # type: ignore[no-any-return]


POSITIONS: dict[str, Callable[[Text, int], Tensor]] = {
    "arange": lambda net, n: net.places(torch.arange(n)),
    "buffer": lambda net, n: net.places(net.order[:n]),  # type: ignore[index]
    "slice": lambda net, n: net.table.transpose(1, 2)[:, :n],
    "narrow": lambda net, n: net.table.narrow(2, 0, n).mT,
    "last rows": lambda net, n: net.places.weight[-n:],
    "scaled": lambda net, n: (net.places.weight * 0.5)[:n],
    "computed from two": lambda net, n: (net.places.weight + net.table[0].t())[:n],
    "squeezed": lambda net, n: net.table.tanh().squeeze(0)[:, :n].t(),
}


@pytest.mark.parametrize("name", POSITIONS)
def test_rows_that_a_longer_input_reads_stay(name: str) -> None:
    model = Text(POSITIONS[name]).double()
    result = fxc.prune(model, torch.zeros(2, 12, dtype=torch.int64))
    for length in (1, 12, 20, 32):
        x = torch.randint(50, (3, length))
        assert difference(model(x), result.module(x)) == 0


@pytest.mark.parametrize("name", POSITIONS)
def test_they_stay_while_the_network_trains_its_bits(name: str) -> None:
    net = fxc.compress(Text(POSITIONS[name]).double(), torch.zeros(2, 12, dtype=torch.int64))
    sizes, longer = net.places.weight.shape + net.table.shape, torch.randint(50, (3, 32))
    before = net(longer)
    net.prune()
    assert net.places.weight.shape + net.table.shape == sizes
    assert difference(before, net(longer)) == 0


def test_rows_that_no_input_reads_still_go() -> None:
    model = Text(lambda net, n: net.places.weight[:3].sum(0))
    result = fxc.prune(model, torch.zeros(2, 12, dtype=torch.int64))
    assert result.module.get_parameter("places.weight").shape == (3, 8)
