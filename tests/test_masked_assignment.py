"""``x[mask] = number`` chooses for each entry between what it was and the number: channels go through it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.errors import TraceError
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


def kept(net: Net, h: Tensor, x: Tensor) -> Tensor:
    y: Tensor = net.other(h)
    mask = h > 0.1
    y[mask] = h[mask]
    return y


def picked_rows(net: Net, h: Tensor, x: Tensor) -> Tensor:
    y: Tensor = net.other(h)
    rows = x[..., 0] > 0
    with torch.no_grad():
        y[rows] = h[rows]
    return y


def farthest(net: Net, h: Tensor, x: Tensor) -> Tensor:
    """As in PointNet++: the least of all distances so far."""
    least = x.new_full(x.shape[:2], 1e10)
    for _ in range(2):
        far = least.max(-1)[1]
        found = (x - x.gather(1, far[:, None, None].expand(-1, -1, 3))).square().sum(-1)
        nearer = found < least
        least[nearer] = found[nearer]
    return h * least.unsqueeze(-1)


DEAD = [1, 2, 5, 6]
LEFT: dict[Assign, int] = {
    own: 4,
    others: 4,
    constant: 8,
    rows: 4,
    scores: 4,
    new: 4,
    view: 4,
    size: 8,
    kept: 4,
    picked_rows: 4,
    farthest: 4,
}


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


def test_gradients_are_those_of_what_is_picked() -> None:
    torch.manual_seed(0)
    net, x = randomise(Net(kept).double()), torch.randn(2, 5, 3, dtype=torch.float64)
    pruned = fxc.prune(net, x).module
    for each in (net, pruned):
        outputs_of = each.train()(x)
        outputs_of.square().sum().backward()
    for name, parameter in net.named_parameters():
        other = pruned.get_parameter(name).grad
        assert parameter.grad is not None
        assert other is not None
        assert torch.allclose(parameter.grad, other, atol=1e-12)


def length(net: Net, h: Tensor, x: Tensor) -> Tensor:
    return h * len(h[h > 0])


def mean(net: Net, h: Tensor, x: Tensor) -> Tensor:
    y: Tensor = h * h[h > 0].mean() if len(x) < 9 else h
    return y


def layer(net: Net, h: Tensor, x: Tensor) -> Tensor:
    try:
        y: Tensor = net.other(h[h[..., 0] > 0]).mean(0) + h if len(x) < 9 else h
    except TraceError:
        return h
    return y


def later(net: Net, h: Tensor, x: Tensor) -> Tensor:
    y: Tensor = net.other(h)
    mask = h > 0.1
    found = h[mask]
    h.add_(1)
    y[mask] = found
    return y


def elsewhere(net: Net, h: Tensor, x: Tensor) -> Tensor:
    y: Tensor = net.other(h)
    mask = h > 0
    y[mask.clone()] = h[mask]
    return y


@pytest.mark.parametrize("assign", [length, mean, layer, later, elsewhere])
def test_what_is_picked_goes_nowhere_else(assign: Assign) -> None:
    with pytest.raises(TraceError, match=r"reads values out of a tensor at .*test_masked_assignment\.py:"):
        fxc.ChannelGraph.of(Net(assign), torch.randn(2, 5, 3))
