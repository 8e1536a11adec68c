"""Tensors that are repeated along the channels: the index of a gather, noise, positions."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from tests.exactness import TOLERANCE, difference

WIDTH, KEPT = 16, 3
Use = Callable[[Tensor, Tensor], Tensor]


def drawn(h: Tensor, x: Tensor) -> Tensor:
    """The places of the lowest random numbers, (N, KEPT, 1)."""
    return torch.rand(h.shape[0], h.shape[1]).argsort(1)[:, :KEPT, None]


def scored(h: Tensor, x: Tensor) -> Tensor:
    """The places of the highest scores."""
    return x.sum(-1).topk(KEPT, dim=1).indices.unsqueeze(-1)


def counted(h: Tensor, x: Tensor) -> Tensor:
    """The first places."""
    return torch.arange(KEPT).view(1, KEPT, 1).expand(h.shape[0], KEPT, 1)


PLACES = [drawn, scored, counted]
REPEATED: dict[str, Use] = {
    "repeat by a size": lambda i, h: i.repeat(1, 1, h.shape[-1]),
    "repeat by a number": lambda i, h: i.repeat(1, 1, WIDTH),
    "repeat by numbers in a tuple": lambda i, h: i.repeat((1, 1, WIDTH)),
    "expand to a size": lambda i, h: i.expand(h.shape[0], KEPT, h.shape[-1]),
    "expand to a number": lambda i, h: i.expand(-1, -1, WIDTH),
    "expand as": lambda i, h: i.expand_as(h[:, :KEPT]),
}


def gathered(i: Tensor, h: Tensor) -> Tensor:
    return h.gather(1, i)


def taken(i: Tensor, h: Tensor) -> Tensor:
    return torch.take_along_dim(h, i, 1)


def scattered(i: Tensor, h: Tensor) -> Tensor:
    return h.scatter(1, i, h[:, :KEPT] * 2)


def put_together(i: Tensor, h: Tensor) -> Tensor:
    """Tokens that are left out, and put back in the old order, as masked autoencoders do."""
    shown = h.gather(1, i)
    whole = torch.cat([shown, torch.zeros_like(h[:, KEPT:])], 1)
    order = i[..., :1].expand(-1, -1, h.shape[-1])
    return whole.scatter_add(1, order, shown)


USES: list[Use] = [gathered, taken, scattered, put_together]


class Net(nn.Module):
    """Picks tokens between two layers."""

    def __init__(self, step: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.step = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 4), step

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.step(torch.relu(self.first(x)), x))
        return y


def checked(step: Callable[[Tensor, Tensor], Tensor], *, gone: int = 5) -> None:
    """Channels go, and the result computes what the network does, with the graph and with its own code."""
    torch.manual_seed(0)
    net, x = Net(step).double().eval(), torch.randn(2, 5, 6).double()
    with torch.no_grad():
        for parameter in net.first.parameters():
            parameter[2:7] = 0
    small = fxc.prune(net, (x,)).module.eval()
    assert small.get_parameter("first.weight").shape == (WIDTH - gone, 6)
    again = fxc.prune(net, (x,), keep_code=True).module.eval()
    for other in (x, torch.randn(3, 7, 6).double(), torch.randn(1, KEPT, 6).double()):
        for result in (small, again):
            expected, found = (_seeded(one, other) for one in (net, result))
            assert difference(expected, found) <= TOLERANCE


def _seeded(net: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(1)
    result: Tensor = net(x)
    return result


@pytest.mark.sampled(3)
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("repeated", REPEATED)
@pytest.mark.parametrize("places", PLACES)
def test_an_index_that_is_repeated_along_the_channels(places: Use, repeated: str, use: Use) -> None:
    checked(lambda h, x: use(REPEATED[repeated](places(h, x), h), h))


FACTORS: dict[str, Use] = {
    "noise to a size": lambda h, x: h * torch.rand(h.shape[0], h.shape[1], 1).double().expand(h.shape),
    "noise repeated": lambda h, x: h * torch.rand(1, 1, 1).double().repeat(1, 1, h.shape[-1]),
    "places to a size": lambda h, x: h * torch.arange(h.shape[1]).view(1, -1, 1).expand(*h.shape[:2], h.shape[2]),
    "places to a number": lambda h, x: h * torch.arange(h.shape[1]).view(1, -1, 1).expand(-1, -1, WIDTH),
    "a mask": lambda h, x: h.masked_fill((torch.rand(h.shape[0], h.shape[1], 1) < 0.5).expand(h.shape), 0.0),
    "a mask and a number": lambda h, x: torch.where((torch.rand(*h.shape[:2], 1) < 0.5).repeat(1, 1, WIDTH), h, 0.0),
}


@pytest.mark.parametrize("name", FACTORS)
def test_factors_that_are_repeated_along_the_channels(name: str) -> None:
    checked(FACTORS[name])


KEEPS: dict[str, Use] = {
    "adds noise": lambda h, x: h + torch.rand(h.shape[0], h.shape[1], 1).double().expand(h.shape),
    "counts": lambda h, x: h + torch.ones(1).double().expand(h.shape[-1]).sum() * h.sum(-1, keepdim=True),
}


@pytest.mark.parametrize("name", KEEPS)
def test_what_is_repeated_is_no_zero(name: str) -> None:
    checked(KEEPS[name], gone=0)
