"""Entries that are chosen by masks whose numbers are known: buffers, and what is made of sizes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from tests.exactness import difference

WIDTH, DEAD = 8, [1, 4, 6]


class Net(nn.Module):
    def __init__(self, way: Callable[["Net", Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.last = nn.Linear(3, WIDTH), nn.Linear(3, WIDTH), nn.LazyLinear(2)
        self.mask: Tensor
        self.register_buffer("mask", torch.arange(WIDTH) % 3 != 1)
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.way(self, torch.tanh(self.a(x)), torch.tanh(self.b(x))))  # type: ignore[no-any-return]


def others(h: Tensor, g: Tensor) -> Tensor:
    """How alike each row is to each other one, as contrastive losses ask: (N, C) and (N, C) to (N, C)."""
    alike = (h @ g.T)[~torch.eye(h.shape[0], dtype=torch.bool)].view(h.shape[0], -1)
    return h * alike.logsumexp(1, keepdim=True)


OF_ROWS: dict[str, Callable[[Net, Tensor, Tensor], Tensor]] = {
    "all but the diagonal": lambda _, h, g: others(h, g),
    "masked_select": lambda _, h, g: h * (h @ g.T).masked_select(torch.eye(h.shape[0], dtype=torch.bool)).unsqueeze(1),
    "every other row": lambda _, h, g: h[torch.arange(h.shape[0]) % 2 == 0] + g[::2],
}
OF_CHANNELS: dict[str, Callable[[Net, Tensor, Tensor], Tensor]] = {
    "a buffer": lambda net, h, g: h[:, net.mask] + g[:, net.mask],
    "a tensor": lambda _, h, g: h[:, torch.tensor([True, False] * 4)] + g[:, :4],
    "the first ones": lambda _, h, g: h[:, torch.arange(WIDTH) < 5] + g[:, :5],
    "of two dims": lambda _, h, g: (h.unsqueeze(2) * g.unsqueeze(1))[:, torch.ones(WIDTH, WIDTH).triu(1).bool()],
    "bytes": lambda net, h, g: (h + g)[..., net.mask.byte().bool()],
}


def killed(name: str) -> Net:
    """A net whose first layers have dead channels."""
    torch.manual_seed(0)
    net = Net((OF_ROWS | OF_CHANNELS)[name]).double().eval()
    net(torch.randn(6, 3, dtype=torch.float64))
    with torch.no_grad():
        for parameter in (*net.a.parameters(), *net.b.parameters()):
            parameter[DEAD] = 0
    return net


@pytest.mark.parametrize("name", OF_ROWS)
def test_dead_channels_go_where_rows_are_chosen(name: str) -> None:
    net = killed(name)
    module = fxc.prune(net, torch.randn(6, 3, dtype=torch.float64)).module
    assert module.get_parameter("a.weight").shape[0] == WIDTH - len(DEAD)
    for rows in (6, 4):
        x = torch.randn(rows, 3, dtype=torch.float64)
        assert difference(net(x), module(x)) <= 1e-9


@pytest.mark.parametrize("name", OF_CHANNELS)
def test_the_output_stays_where_channels_are_chosen(name: str) -> None:
    """Nobody rewrites a mask: it fits the channels that it was made for."""
    net = killed(name)
    result = fxc.prune(net, torch.randn(6, 3, dtype=torch.float64))
    x = torch.randn(4, 3, dtype=torch.float64)
    assert difference(net(x), result.module(x)) <= 1e-9
    assert fxc.ChannelGraph.of(net, x).groups
