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


class Channels(nn.Module):
    """A parameter of which as many rows are read as there are channels, as those of an attention on graphs."""

    def __init__(self, read: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.read = nn.Linear(5, 8), nn.Linear(8, 3), read
        self.pair = nn.Parameter(torch.randn(20, 2))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.last(h) + self.read(h, self.pair)  # type: ignore[no-any-return]


OF_CHANNELS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a slice": lambda h, pair: (h @ pair[: h.size(1)] + h @ pair[h.size(1) : 2 * h.size(1)]).sum(1, keepdim=True),
    "the whole shape": lambda h, pair: (h @ pair[: h.shape[-1]]).sum(1, keepdim=True),
    "narrow": lambda h, pair: (h @ pair.narrow(0, 2, h.shape[1])).sum(1, keepdim=True),
}
OF_NO_CHANNELS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "other rows": lambda h, pair: pair[: h.size(1)].sum(),
    "the last rows": lambda h, pair: pair[-h.size(1) :].sum(),
    "one row": lambda h, pair: pair[h.size(1)].sum(),
    "as many rows as samples": lambda h, pair: pair[: h.size(0)].sum(),
}


@pytest.mark.parametrize("name", [*OF_CHANNELS, *OF_NO_CHANNELS])
def test_as_many_rows_as_there_are_channels(name: str) -> None:
    """They go with the channels that they meet; where they meet none, those stay that were read before."""
    torch.manual_seed(0)
    model = Channels((OF_CHANNELS | OF_NO_CHANNELS)[name]).double()
    with torch.no_grad():
        for parameter in model.first.parameters():
            parameter[[1, 2, 6]] = 0
    result = fxc.prune(model, torch.randn(4, 5, dtype=torch.float64))
    assert result.module.get_parameter("first.weight").shape[0] == 5
    for rows in (1, 4, 9):
        x = torch.randn(rows, 5, dtype=torch.float64)
        assert difference(model(x), result.module(x)) <= 1e-12
