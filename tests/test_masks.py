"""Entries that are chosen by masks whose numbers are known: buffers, and what is made of sizes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
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

SCALING: dict[str, Callable[[Net, Tensor, Tensor], Tensor]] = {
    "numbers": lambda net, h, g: h * net.mask.to(h.dtype) + g * net.mask.double(),
    "flags": lambda net, h, g: h * net.mask + g * ~net.mask,
    "a choice": lambda net, h, g: torch.where(net.mask, h, g),
    "filled": lambda net, h, g: h.masked_fill(~net.mask.unsqueeze(0), 0.0) + g.masked_fill(net.mask, 0.0),
    "a part": lambda net, h, g: torch.cat([h[:, :4] * net.mask[:4], g[:, 4:] * net.mask[4:].type_as(g)], 1),
    "of weights": lambda net, h, g: F.linear(h, net.b.weight[:, :1] * (net.mask & net.mask[:, None]).to(h.dtype)) + g,
}
"""Masks that pick nothing, so that they are as long as what they lie on."""


def killed(name: str) -> Net:
    """A net whose first layers have dead channels."""
    torch.manual_seed(0)
    net = Net((OF_ROWS | OF_CHANNELS | SCALING)[name]).double().eval()
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


@pytest.mark.parametrize("name", SCALING)
def test_a_mask_that_picks_nothing_goes_with_the_channels(name: str, tmp_path: Path) -> None:
    net, x = killed(name), torch.randn(6, 3, dtype=torch.float64)
    module = fxc.prune(net, x).module
    assert module.get_parameter("a.weight").shape[0] < WIDTH
    assert module.get_buffer("mask").shape[0] < WIDTH
    assert module.get_buffer("mask").dtype == torch.bool
    for training in (False, True):
        assert difference(net.train(training)(x), module.train(training)(x)) <= 1e-9
    fxc.save(module, tmp_path / "net.fxc")
    fresh = Net(SCALING[name]).double()
    fresh(x)
    assert torch.equal(fxc.load(tmp_path / "net.fxc", fresh, x)(x), module(x))


def test_a_mask_that_also_picks_keeps_its_channels() -> None:
    net = killed("flags")
    net.way = lambda net, h, g: h * net.mask + F.pad(g[:, net.mask], (0, WIDTH - int(net.mask.sum())))
    x = torch.randn(6, 3, dtype=torch.float64)
    module = fxc.prune(net, x).module
    assert module.get_buffer("mask").shape[0] == WIDTH
    assert difference(net(x), module(x)) <= 1e-9


class Causal(nn.Module):
    """A mask of flags for sequences of up to 16, of which each input reads a part."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 2)
        self.mask: Tensor
        self.register_buffer("mask", torch.ones(16, 16, dtype=torch.bool).tril())

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = (q @ k.mT).masked_fill(~self.mask[: x.shape[1], : x.shape[1]], -1e9)
        return self.out(scores.softmax(-1) @ v)  # type: ignore[no-any-return]


def test_entries_of_a_mask_that_no_example_reaches_stay() -> None:
    net = Causal().double()
    with torch.no_grad():
        net.qkv.weight[DEAD] = net.qkv.weight[[d + WIDTH for d in DEAD]] = 0
        net.qkv.bias[DEAD] = net.qkv.bias[[d + WIDTH for d in DEAD]] = 0
    module = fxc.prune(net, torch.randn(2, 5, WIDTH, dtype=torch.float64)).module
    assert module.get_parameter("qkv.weight").shape[0] == 3 * WIDTH - 2 * len(DEAD)
    assert module.get_buffer("mask").shape == (16, 16)
    for length in (5, 3, 16):
        x = torch.randn(1, length, WIDTH, dtype=torch.float64)
        assert difference(net(x), module(x)) <= 1e-9


def test_the_places_of_flags_keep_their_channels() -> None:
    net = killed("flags")
    net.way = lambda net, h, g: h[:, torch.where(net.mask)[0]] * g[:, torch.where(net.mask)[0]]
    net.add_module("last", nn.Linear(int(net.mask.sum()), 2).double())
    x = torch.randn(6, 3, dtype=torch.float64)
    module = fxc.prune(net, x).module
    assert module.get_buffer("mask").shape[0] == WIDTH
    assert difference(net(x), module(x)) <= 1e-9
