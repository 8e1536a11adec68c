"""Widths of dims whose entries have labels: some follow a size of the inputs, and what reads those is no constant."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress as fxc
from tests.exactness import TOLERANCE, atoms_of, compared_on, difference, kill, outputs, removable_units
from tests.networks import randomise

C, EXAMPLE = 6, 4
OTHERS = (1, 2, 3, 5, 6)
Way = Callable[["Net", Tensor, int], Tensor]


class Net(nn.Module):
    """Reads a width of what a way makes of hidden channels and a size, and so many channels of others.

    That is the width itself, or how much it is beyond all of the channels, and one.
    """

    def __init__(self, way: Way, *, beyond: bool = False) -> None:
        super().__init__()
        self.way, self.beyond = way, beyond
        self.first, self.second, self.third = nn.Linear(3, C), nn.Linear(3, C), nn.Linear(3, C)
        self.table = nn.Parameter(torch.randn(C, C))
        self.conv = nn.Conv1d(C, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.way(self, self.first(x), x.shape[0])
        count = h.shape[-1] - C + 1 if self.beyond else h.shape[-1]
        y: Tensor = h.sum(-1) + self.second(x)[:, :count].sum(-1) + self.third(x)[:, -count:].sum(-1)
        return y


WAYS: dict[str, Way] = {
    "slice": lambda m, h, n: h[:, :n],
    "slice from the end": lambda m, h, n: h[:, -n:],
    "of what a slice gives": lambda m, h, n: h[:, :n].relu() * 2,
    "narrow": lambda m, h, n: h.narrow(1, 0, n),
    "split": lambda m, h, n: h.split(n, 1)[0],
    "cat": lambda m, h, n: torch.cat([h[:, : n // 2], h[:, : n - n // 2]], 1),
    "product with a slice": lambda m, h, n: h @ m.table[:, :n],
    "a layer with a sliced weight": lambda m, h, n: F.linear(h, m.table[:n]),
    "a convolution with a sliced weight": lambda m, h, n: F.conv1d(h[..., None], m.conv.weight[:n])[..., 0],
    "turned": lambda m, h, n: h[:, :n].t().relu().t(),
    "turned by reshaping": lambda m, h, n: h[:, :n].reshape(-1, 1, n).transpose(1, 2).flatten(1),
    "reduced beside it": lambda m, h, n: h[:, None, :n].expand(-1, 3, -1).mean(1),
    "summed with others": lambda m, h, n: h[:, :n] + m.table[0, :n],
    "softmax": lambda m, h, n: h[:, :n].softmax(1),
    "largest": lambda m, h, n: h.topk(n, 1).values,
    "index": lambda m, h, n: h.index_select(1, torch.arange(n)),
    "gather": lambda m, h, n: h.gather(1, torch.arange(n).expand(n, -1)),
    "take": lambda m, h, n: h.take_along_dim(torch.arange(n)[None], 1),
    "pool": lambda m, h, n: F.adaptive_avg_pool1d(h[:, None], n)[:, 0],
    "written to": lambda m, h, n: h.new_zeros(h.shape[0], n).copy_(h[:, :n]),
    "made": lambda m, h, n: h[:, :n] * torch.ones(n, dtype=h.dtype),
    "every so many": lambda m, h, n: h[:, :: C // n],
    "mask": lambda m, h, n: h[:, torch.arange(C) < n],
    "diagonal": lambda m, h, n: (h[:, :, None] * h[:, None])[:, :n].diagonal(0, 1, 2),
}


WIDER: dict[str, Way] = {
    "repeat": lambda m, h, n: h.repeat(1, n),
    "repeat, then more": lambda m, h, n: h.repeat(1, n).relu() + 1,
    "repeat_interleave": lambda m, h, n: h.repeat_interleave(n, 1),
    "tile": lambda m, h, n: h.tile(n),
    "border": lambda m, h, n: F.pad(h, (0, n - 1)),
    "border, turned": lambda m, h, n: F.pad(h, (0, n - 1)).t().exp().t(),
    "border, turned by reshaping": lambda m, h, n: F.pad(h, (n - 1, 0))[:, None].transpose(1, 2).flatten(1),
    "border, in one of two": lambda m, h, n: F.pad(h, (n - 1, 0)).unsqueeze(1).expand(-1, 2, -1)[:, 0],
    "border of a weight": lambda m, h, n: F.linear(h, F.pad(m.table, (0, 0, 0, n - 1))),
    "border of a kernel": lambda m, h, n: F.conv1d(h[..., None], F.pad(m.conv.weight, (0, 0, 0, 0, n - 1, 0)))[..., 0],
    "border of a matrix": lambda m, h, n: h @ F.pad(m.table, (0, n - 1)),
    "border of a matrix in a batch": lambda m, h, n: (h[:, None] @ F.pad(m.table, (0, n - 1)).expand(n, -1, -1))[:, 0],
    "softmax": lambda m, h, n: F.pad(h, (0, n - 1)).softmax(1),
    "mean": lambda m, h, n: F.pad(h, (0, n - 1))[:, None].mean(1),
    "beside nothing": lambda m, h, n: torch.cat([h, h.new_zeros(n, n - 1)], 1),
    "beside nothing, copied": lambda m, h, n: torch.cat([h, h.new_zeros(n, C)[:, : n - 1]], 1),
    "beside none of its own": lambda m, h, n: torch.cat([h, h[:, : n - 1]], 1),
    "beside none of a weight": lambda m, h, n: torch.cat([m.table[:1].expand(n, -1), h.new_ones(n, n - 1)], 1),
    "beside nothing, then more": lambda m, h, n: (
        torch.cat([h, h.new_zeros(n, n - 1)], 1).relu().unsqueeze(1).flatten(1)
    ),
    "size of an image": lambda m, h, n: F.interpolate(h[:, None], size=C + n - 1)[:, 0],
}


@pytest.mark.parametrize("name", WIDER)
def test_a_width_that_is_that_of_all_channels_by_chance_is_another_one_for_other_sizes(name: str) -> None:
    net = randomise(Net(WIDER[name], beyond=True).double()).eval()
    pruned = fxc.prune(net, torch.randn(1, 3, dtype=torch.float64)).module
    assert compared_on(net, pruned, [torch.randn(n, 3, dtype=torch.float64) for n in OTHERS]) == len(OTHERS)


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("example", [EXAMPLE, C])
def test_channels_that_a_width_picks_are_others_for_other_sizes(name: str, example: int) -> None:
    """With as many as there are channels, a slice leaves no trace in the graph."""
    net = randomise(Net(WAYS[name]).double()).eval()
    pruned = fxc.prune(net, torch.randn(example, 3, dtype=torch.float64)).module
    assert compared_on(net, pruned, [torch.randn(n, 3, dtype=torch.float64) for n in OTHERS]) == len(OTHERS)


class Rotary(nn.Module):
    """A decoder block that turns queries and keys by angles of their places, all sizes read where they are needed."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.heads = nn.Embedding(11, 16), 2
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16, bias=False) for _ in range(4))
        self.head = nn.Linear(16, 5)

    def turn(self, x: Tensor, angles: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return x * angles.cos() + torch.cat([-x[..., half:], x[..., :half]], -1) * angles.sin()

    def block(self, h: Tensor) -> Tensor:
        batch, count = h.shape[:2]
        q, k, v = (layer(h).view(batch, count, -1, 8).transpose(1, 2) for layer in (self.q, self.k, self.v))
        angles = torch.arange(count, dtype=h.dtype)[:, None] * 0.1
        q, k = self.turn(q, angles), self.turn(k, angles)
        mask = torch.ones(count, count, dtype=torch.bool).tril()
        h = h + self.o(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).reshape(batch, count, -1))
        return h

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.head(self.block(self.block(self.embed(ids))))
        return y


class SplitAttention(nn.Module):
    """Two branches side by side, weighed by a softmax over both of what all of them hold on average."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.squeeze, self.weigh = nn.Conv2d(3, 16, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 16, 1)
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x).relu()
        batch, channels, high, wide = h.shape
        h = h.reshape(batch, 2, channels // 2, high, wide)
        a = self.weigh(self.squeeze(h.sum(1).mean((2, 3), keepdim=True)).relu())
        a = a.view(batch, 1, 2, -1).transpose(1, 2).softmax(1).reshape(batch, -1).view(batch, -1, 1, 1)
        y: Tensor = self.head((h * a.reshape(batch, 2, channels // 2, 1, 1)).sum(1))
        return y


def test_pairs_of_a_rotation_can_go() -> None:
    """The half of a head is a matter of the network, though its shape is read beside those of the words."""
    net = randomise(Rotary().double()).eval()
    gone = [1, 5]  # of each head, both of a pair
    with torch.no_grad():
        for name in "qk":
            net.get_parameter(f"{name}.weight").view(2, 8, 16)[:, gone] = 0
    ids = torch.randint(11, (2, 7))
    pruned = fxc.prune(net, ids).module
    assert [pruned.get_parameter(f"{name}.weight").shape[0] for name in "qk"] == [12, 12]
    assert compared_on(net, pruned, [torch.randint(11, shape) for shape in ((1, 4), (3, 9))])


def test_channels_that_a_softmax_weighs_branch_by_branch_can_go() -> None:
    net = randomise(SplitAttention().double()).eval()
    with torch.no_grad():
        net.get_parameter("conv.weight").view(2, 8, 3, 3, 3)[:, 2] = 0
        net.get_parameter("conv.bias").view(2, 8)[:, 2] = 0
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    pruned = fxc.prune(net, x).module
    assert [pruned.get_parameter(f"{name}.weight").shape[0] for name in ("conv", "weigh", "head")] == [14, 14, 3]
    assert difference(outputs(net, (x,)), outputs(pruned, (x,))) <= TOLERANCE
    assert compared_on(net, pruned, [torch.randn(n, 3, 9, 7, dtype=torch.float64) for n in (1, 3)])


class Shuffled(nn.Module):
    """Takes channels apart by half of their number, which it reads, and shuffles them."""

    def __init__(self, half: Callable[[int], int]) -> None:
        super().__init__()
        self.count, self.own = half, nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        kept, changed = x[:, : self.count(c)], x[:, self.count(c) :]
        y = torch.cat([kept, self.own(changed).relu()], 1)
        return y.view(n, 2, c // 2, height, width).permute(0, 2, 1, 3, 4).reshape(n, c, height, width)


@pytest.mark.parametrize("half", [lambda c: c // 2, lambda c: int(c * 0.5), lambda c: 4])
def test_a_width_that_is_read_of_channels_in_another_order_is_theirs(half: Callable[[int], int]) -> None:
    """What puts the same entries into other memory makes a tensor no wider, whatever sizes it is told."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), *(Shuffled(half) for _ in range(3)), nn.Conv2d(8, 2, 1)).double()
    analysis = fxc.ChannelGraph.of(net, torch.randn(2, 3, 6, 6).double()).analysis
    kill(analysis, atoms_of(analysis, removable_units(analysis)[::5]))
    result = fxc.prune(net, torch.randn(2, 3, 6, 6).double())
    assert result.module.get_parameter("0.weight").shape[0] < 8
    assert compared_on(net, result.module, [torch.randn(n, 3, h, 7).double() for n, h in ((1, 6), (3, 4), (2, 9))]) == 3
