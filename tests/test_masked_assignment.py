"""``x[mask] = number`` chooses for each entry between what it was and the number: channels go through it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from tests.exactness import TOLERANCE, difference, outputs
from tests.networks import randomise

C = 8
Assign = Callable[["Net", Tensor, Tensor], Tensor]


class Net(nn.Module):
    def __init__(self, assign: Assign) -> None:
        super().__init__()
        self.assign = assign
        self.first, self.other, self.last = nn.Linear(3, C), nn.Linear(C, C), nn.Linear(C, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.assign(self, self.first(x).clone(), x))
        return y


def own(net: Net, h: Tensor, x: Tensor) -> Tensor:
    h[h < 0] = 0.0
    y: Tensor = net.other(h).relu() * h
    return y


def others(net: Net, h: Tensor, x: Tensor) -> Tensor:
    h[net.other(h) < 0] = 0
    return h


def constant(net: Net, h: Tensor, x: Tensor) -> Tensor:
    h[h > -1] = 0.5
    return h


def rows(net: Net, h: Tensor, x: Tensor) -> Tensor:
    h[x[..., 0] > 0] = 0
    return h


def scores(net: Net, h: Tensor, x: Tensor) -> Tensor:
    q = h.unflatten(-1, (2, 4)).transpose(1, 2)
    a = q @ q.mT
    a[a < 0] = -1e9
    y: Tensor = (a.softmax(-1) @ q).transpose(1, 2).flatten(2)
    return y


def new(net: Net, h: Tensor, x: Tensor) -> Tensor:
    gate = torch.zeros_like(h)
    gate[h > 0] = 1
    return h * gate


def view(net: Net, h: Tensor, x: Tensor) -> Tensor:
    half = h[..., : C // 2]
    half[half > 0] = 0
    return h


def size(net: Net, h: Tensor, x: Tensor) -> Tensor:
    h[h <= 0] = x.shape[0] - 2
    return h


DEAD = [1, 2, 5, 6]
LEFT: dict[Assign, int] = {own: 4, others: 4, constant: 8, rows: 4, scores: 4, new: 4, view: 4, size: 8}


@pytest.mark.parametrize("assign", LEFT)
def test_channels_go(assign: Assign) -> None:
    torch.manual_seed(0)
    net, x = randomise(Net(assign).double()), torch.randn(2, 5, 3, dtype=torch.float64)
    with torch.no_grad():
        for name in ("first", "other"):
            for parameter in net.get_submodule(name).parameters():
                parameter[DEAD] = 0
    for fold in (False, True):
        pruned = fxc.prune(net, x, fold=fold).module
        assert fold or pruned.get_parameter("first.weight").shape[0] == LEFT[assign]
        for inputs in (x, torch.randn(3, 7, 3, dtype=torch.float64)):
            assert difference(outputs(net, (inputs,)), outputs(pruned, (inputs,))) <= TOLERANCE
