"""Diagonals pair the entries of one dim with those of another: both lose the same ones, or none."""

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
        self.table = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.way(self, torch.tanh(self.a(x)), torch.tanh(self.b(x))))  # type: ignore[no-any-return]


def products(h: Tensor, g: Tensor) -> Tensor:
    """Outer products (N, C, C) of two (N, C)."""
    return h.unsqueeze(2) * g.unsqueeze(1)


SAME: dict[str, Callable[[Net, Tensor, Tensor], Tensor]] = {
    "of products": lambda _, h, g: torch.diagonal(products(h, g), dim1=1, dim2=2),
    "the dims swapped": lambda _, h, g: torch.diagonal(products(h, g), 0, -1, 1),
    "of sums": lambda _, h, g: torch.diagonal(h.unsqueeze(-1) + g.unsqueeze(1), 0, 1, 2).flip(1),
    "of a matrix product": lambda _, h, g: torch.diagonal(h.mT @ g)[None],
    "in einsum": lambda _, h, g: torch.einsum("ncc->nc", products(h, g)),
    "trace in einsum": lambda _, h, g: torch.einsum("ncc->n", products(h, g))[:, None],
    "of a table in einsum": lambda net, h, g: torch.einsum("cc,nc->nc", net.table, h) + g,
    "of a table": lambda net, h, g: h * torch.diagonal(net.table) + g,
    "beside the middle": lambda _, h, g: torch.diagonal(products(h, g), 1, 1, 2),
    "below the middle": lambda _, h, g: torch.diagonal(products(h, g), -3, 1, 2),
    "of a part": lambda _, h, g: torch.diagonal(products(h, g[:, :5]), 0, 1, 2),
    "of labels and positions": lambda _, h, g: (
        torch.diagonal(h.unsqueeze(2) * torch.arange(1.0, WIDTH + 1).to(h), 0, 1, 2) + g
    ),
    "of a product with itself": lambda _, h, g: torch.diagonal(products(h, h), 0, 1, 2) + g,
    "of itself turned": lambda _, h, g: torch.diagonal(products(h, h.flip(1)), 0, 1, 2) + g,
    "of blocks": lambda _, h, g: torch.diagonal(products(h, g).unflatten(2, (4, 2)), 0, 1, 2).flatten(1),
}


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("dead", ["ab", "a", "b"])
def test_the_output_stays(name: str, dead: str) -> None:
    torch.manual_seed(0)
    net, x = Net(SAME[name]).double().eval(), torch.randn(6, 3, dtype=torch.float64)
    net(x)
    with torch.no_grad():
        for layer in dead:
            for parameter in getattr(net, layer).parameters():
                parameter[DEAD] = 0
    module = fxc.prune(net, x).module
    assert difference(net(x), module(x)) <= 1e-9
    other = torch.randn(6 if "matrix" in name else 4, 3, dtype=torch.float64)
    assert difference(net(other), module(other)) <= 1e-9


@pytest.mark.parametrize("name", list(SAME)[:6])
def test_dead_channels_go(name: str) -> None:
    torch.manual_seed(0)
    net, x = Net(SAME[name]).double().eval(), torch.randn(6, 3, dtype=torch.float64)
    net(x)
    with torch.no_grad():
        for parameter in (*net.a.parameters(), *net.b.parameters()):
            parameter[DEAD] = 0
    module = fxc.prune(net, x).module
    assert module.get_parameter("a.weight").shape[0] == WIDTH - len(DEAD)
    assert module.get_parameter("b.weight").shape[0] == WIDTH - len(DEAD)
