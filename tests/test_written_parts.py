"""Dead channels beside what has no channels of its own: positions, and parts of a tensor that are written to."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress as fxc
from tests.exactness import difference

WIDTH, DEAD = 8, [1, 4, 6]


def grid(h: Tensor) -> Tensor:
    """Where each pixel is, as CoordConv adds it: (N, 2, H, W)."""
    rows = torch.linspace(-1, 1, h.shape[2], dtype=torch.float64)
    columns = torch.linspace(0, 1, h.shape[3], dtype=torch.float64)
    places = torch.stack([rows[:, None].expand(-1, h.shape[3]), columns.expand(h.shape[2], -1)])
    return places.expand(h.shape[0], -1, -1, -1)


def written(h: Tensor, write: Callable[[Tensor], object]) -> Tensor:
    """A copy of ``h`` after ``write``."""
    h = h.clone()
    write(h)
    return h


def put(h: Tensor, numbers: list[int] | int, values: Tensor | float) -> None:
    """Write to some channels."""
    h[:, numbers] = values


def read_later(h: Tensor, g: Tensor) -> Tensor:
    """A part that was taken before the whole is written to."""
    part = h[:, :, 1:]
    return h.add_(g) + F.pad(part, (0, 0, 1, 0))


def shifted(h: Tensor, g: Tensor) -> Tensor:
    """Some channels are moved by one along another dim, and some back: a temporal shift module."""
    out = torch.zeros_like(h)
    out[:, :2, :-1] = h[:, :2, 1:]
    out[:, 2:4, 1:] = h[:, 2:4, :-1]
    out[:, 4:] = h[:, 4:]
    return out * g


def in_pairs(h: Tensor, g: Tensor) -> Tensor:
    """Two halves of the channels in turn, as a rotation of pairs writes them."""
    out = torch.empty_like(h)
    out[:, ::2] = h[:, ::2]
    out[:, 1::2] = -h[:, 1::2]
    return out * g


def put_together(h: Tensor, g: Tensor) -> Tensor:
    """Channels of both in a tensor that was zero."""
    out = torch.zeros(h.shape[0], 2 * WIDTH, h.shape[2], h.shape[3], dtype=h.dtype)
    out[:, :WIDTH] = h
    out[:, WIDTH:] = g.flip(1)
    return out[:, :WIDTH] + out[:, WIDTH:].flip(1)


WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "joined with positions": lambda h, g: torch.cat([h, grid(h), g], 1)[:, :WIDTH],
    "positions first": lambda h, g: torch.cat([grid(h), h], 1)[:, 2:] + g,
    "times a position": lambda h, g: h * grid(h)[:, :1] + g,
    "chosen by position": lambda h, g: torch.where(grid(h)[:, 1:] > 0.5, h, g),
    "a part is added to": lambda h, g: written(h, lambda y: y[:, :, 1:].add_(g[:, :, 1:])),
    "a part is replaced": lambda h, g: written(h, lambda y: y[:, :, :2].copy_(g[:, :, 2:4])),
    "a part of a part": lambda h, g: written(h, lambda y: y[:, :, 1:][..., 1:].mul_(g[:, :, 1:, 1:])),
    "by an index": lambda h, g: written(h, lambda y: y.__setitem__((slice(None), slice(None), 0), g[:, :, 1])),
    "some channels are added to": lambda h, g: written(h, lambda y: y[:, 3:].add_(g[:, 3:])),
    "some channels of a part are replaced": lambda h, g: written(h, lambda y: y[:, :, 1:][:, 2:5].copy_(g[:, 2:5, 1:])),
    "each other channel": lambda h, g: written(h, lambda y: y[:, ::2].copy_(g[:, ::2])),
    "channels by their numbers": lambda h, g: written(h, lambda y: put(y, [0, 4, 6, -1], g[:, [0, 4, 6, -1]])),
    "channels by their numbers are added to": lambda h, g: written(
        h, lambda y: put(y, [3, 4], y[:, [3, 4]] + g[:, 3:5])
    ),
    "a shift in time": shifted,
    "in pairs, into what nobody has filled": in_pairs,
    "two in one": put_together,
    "the whole, and a part is read": lambda h, g: read_later(h.clone(), g),
}


class Net(nn.Module):
    def __init__(self, way: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.last = nn.Conv2d(3, WIDTH, 1), nn.Conv2d(3, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, 2, 1)
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.way(torch.tanh(self.a(x)), torch.tanh(self.b(x))))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", WAYS)
def test_dead_channels_go(name: str) -> None:
    torch.manual_seed(0)
    net, x = Net(WAYS[name]).double().eval(), torch.randn(2, 3, 5, 6, dtype=torch.float64)
    with torch.no_grad():
        for parameter in (*net.a.parameters(), *net.b.parameters()):
            parameter[DEAD] = 0
    module = fxc.prune(net, x).module
    assert module.get_parameter("last.weight").shape[1] == WIDTH - len(DEAD)
    assert module.get_parameter("a.weight").shape[0] == WIDTH - len(DEAD)
    for size in ((2, 3, 5, 6), (1, 3, 7, 9)):
        other = torch.randn(size, dtype=torch.float64)
        assert difference(net(other), module(other)) <= 1e-9


ONE_OF_BOTH = [
    "a part is added to",
    "a part is replaced",
    "a part of a part",
    "by an index",
    "some channels are added to",
    "some channels of a part are replaced",
    "each other channel",
    "channels by their numbers",
    "channels by their numbers are added to",
    "two in one",
]


@pytest.mark.parametrize("name", ONE_OF_BOTH)
@pytest.mark.parametrize("alive", ["a", "b"])
def test_what_one_of_both_makes_stays(name: str, alive: str) -> None:
    """Unless both are zero: what is written is read, or what was there before is."""
    torch.manual_seed(0)
    net, x = Net(WAYS[name]).double().eval(), torch.randn(2, 3, 5, 6, dtype=torch.float64)
    with torch.no_grad():
        for parameter in (net.b if alive == "a" else net.a).parameters():
            parameter[DEAD] = 0
    module = fxc.prune(net, x).module
    assert difference(net(x), module(x)) <= 1e-12


@pytest.mark.parametrize("other", [0, 3])
def test_a_part_that_is_written_elsewhere(other: int) -> None:
    """Of channels that lie elsewhere nothing is known by the place alone."""
    torch.manual_seed(0)

    def way(h: Tensor, g: Tensor) -> Tensor:
        return written(h, lambda y: y[:, other : other + 4].copy_(g[:, 4:].flip(1)))

    net, x = Net(way).double().eval(), torch.randn(2, 3, 5, 6, dtype=torch.float64)
    with torch.no_grad():
        for parameter in (*net.a.parameters(), *net.b.parameters()):
            parameter[DEAD] = 0
    module = fxc.prune(net, x).module
    assert difference(net(x), module(x)) <= 1e-12


class Crossed(nn.Module):
    """Both dims of a tensor have the labels of the same channels: they do not say along which a part lies."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, WIDTH, bias=False), nn.Linear(WIDTH, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        z = 0 * (y[:, :, None] * y[:, None])
        z[:, :, 1] = y
        return self.last(z.transpose(1, 2).sum(2))  # type: ignore[no-any-return]


def test_a_part_of_a_tensor_whose_dims_have_the_same_labels() -> None:
    torch.manual_seed(0)
    net, x = Crossed().double().eval(), torch.randn(3, 4, dtype=torch.float64)
    with torch.no_grad():
        net.first.weight[DEAD] = 0
    assert difference(net(x), fxc.prune(net, x).module(x)) <= 1e-12


NOTHING_OF_ITS_OWN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "zeros in a channel": lambda h, g: written(h, lambda y: put(y, 2, 0.0)),
    "an input in a channel": lambda h, g: written(h, lambda y: put(y, 2, grid(h)[:, 0])),
    "a channel of another tensor": lambda h, g: written(h, lambda y: put(y, 2, g[:, 5])),
    "a number in some channels": lambda h, g: written(h, lambda y: put(y, [0, 2], 0.5)),
    "a channel of a part": lambda h, g: written(h, lambda y: put(y[:, 1:], 1, 0.0)),
}
"""What is written does not have the channels of the other tensor; none of the dead ones is written to."""


@pytest.mark.parametrize("name", NOTHING_OF_ITS_OWN)
def test_the_other_channels_go_where_some_are_written_to(name: str) -> None:
    torch.manual_seed(0)
    net, x = Net(NOTHING_OF_ITS_OWN[name]).double().eval(), torch.randn(2, 3, 5, 6, dtype=torch.float64)
    with torch.no_grad():
        for parameter in net.a.parameters():
            parameter[DEAD] = 0
    module = fxc.prune(net, x).module
    assert module.get_parameter("last.weight").shape[1] == WIDTH - len(DEAD)
    for size in ((2, 3, 5, 6), (1, 3, 7, 9)):
        other = torch.randn(size, dtype=torch.float64)
        assert difference(net(other), module(other)) <= 1e-9


@pytest.mark.parametrize("number", DEAD)
@pytest.mark.parametrize("listed", [False, True])
def test_a_dead_channel_that_is_written_to_stays(number: int, *, listed: bool) -> None:
    torch.manual_seed(0)

    def way(h: Tensor, g: Tensor) -> Tensor:
        return written(h, lambda y: put(y, [number, 0], g[:, 2:4]) if listed else put(y, number, g[:, 3]))

    net, x = Net(way).double().eval(), torch.randn(2, 3, 5, 6, dtype=torch.float64)
    with torch.no_grad():
        for parameter in net.a.parameters():
            parameter[DEAD] = 0
    module = fxc.prune(net, x).module
    assert module.get_parameter("last.weight").shape[1] == WIDTH - len(DEAD) + 1
    assert difference(net(x), module(x)) <= 1e-12


WRITES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "a slice": lambda z, h: z[:, :1].copy_(h),
    "a number": lambda z, h: z[:, 0].copy_(h[:, 0]),
    "a list": lambda z, h: z.__setitem__((slice(None), [0]), h),
    "index_add": lambda z, h: z.index_add_(1, torch.tensor([0]), h),
    "index_copy": lambda z, h: z.index_copy_(1, torch.tensor([0]), h),
    "scatter": lambda z, h: z.scatter_(1, torch.zeros_like(h, dtype=torch.int64), h),
}


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("read", [-1, 1])
def test_which_word_it_is_depends_on_how_many_there_are(name: str, read: int) -> None:
    """The last of two words is not written to, the last of one is."""

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3)

        def forward(self, x: Tensor) -> Tensor:
            z = torch.zeros(x.shape[0], x.shape[1], WIDTH, dtype=x.dtype)
            WRITES[name](z, torch.tanh(self.first(x))[:, :1])
            return self.last(z[:, read])  # type: ignore[no-any-return]

    torch.manual_seed(0)
    net = Words().double().eval()
    module = fxc.prune(net, torch.randn(2, 2, 5, dtype=torch.float64)).module
    for words in (1, 2, 3) if read < 0 else (2, 3):
        x = torch.randn(2, words, 5, dtype=torch.float64)
        assert difference(net(x), module(x)) <= 1e-12


@pytest.mark.parametrize(
    "write",
    [
        lambda y: y.__setitem__((slice(None), 4), 0.5),
        lambda y: y.transpose(1, 3).__setitem__((..., 4), 0.5),
        lambda y: y[:, 2:].__iadd__(0.5),
    ],
)
def test_what_is_written_stays_where_a_branch_goes(write: Callable[[Tensor], object]) -> None:
    """A call by the name of a method has no users, and is no leftover."""
    torch.manual_seed(0)

    def way(h: Tensor, g: Tensor) -> Tensor:
        return written(h + g, write)

    net, x = Net(way).double().eval(), torch.randn(2, 3, 5, 6, dtype=torch.float64)
    with torch.no_grad():
        for parameter in net.a.parameters():
            parameter.zero_()
        for parameter in net.b.parameters():
            parameter[DEAD] = 0
    result = fxc.prune(net, x)
    assert "is gone" in str(result.report)
    assert difference(net(x), result.module(x)) <= 1e-12
