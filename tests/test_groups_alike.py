"""Grouped convolutions whose groups read the same channels: a batch of samples, each with its own weight."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress as fxc
from tests.exactness import difference, outputs

WIDTH, DEAD = 8, [1, 4, 6]


class Modulated(nn.Module):
    """As in StyleGAN2: a weight for each sample, scaled by a style and divided by its length."""

    def __init__(self, *, transposed: bool = False, by_hand: bool = False) -> None:
        super().__init__()
        self.first, self.style, self.last = nn.Conv2d(3, WIDTH, 1), nn.Linear(4, WIDTH), nn.Conv2d(6, 2, 1)
        self.weight = nn.Parameter(torch.randn(6, WIDTH, 3, 3))
        self.transposed, self.by_hand = transposed, by_hand

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        n, c, height, width = h.shape
        if self.by_hand and n > 100:  # control flow on sizes: traced by running
            raise ValueError("too many")
        weight = self.weight * self.style(z)[:, None, :, None, None]
        weight = weight * (weight.square().sum((2, 3, 4), keepdim=True) + 1e-6).rsqrt()
        h = h.reshape(1, n * c, height, width)
        if self.transposed:
            h = F.conv_transpose2d(h, weight.transpose(1, 2).reshape(n * c, 6, 3, 3), padding=1, groups=n)
        else:
            h = F.conv2d(h, weight.view(n * 6, c, 3, 3), padding=1, groups=n)
        return self.last(torch.tanh(h.view(n, 6, height, width)))  # type: ignore[no-any-return]


def samples(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 3, 5, 6, dtype=torch.float64), torch.randn(n, 4, dtype=torch.float64)


@pytest.mark.parametrize("example", [2, 1])
@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_weight_for_each_sample(*, transposed: bool, by_hand: bool, example: int) -> None:
    torch.manual_seed(0)
    net = Modulated(transposed=transposed, by_hand=by_hand).double().eval()
    with torch.no_grad():
        for parameter in (*net.first.parameters(), *net.style.parameters()):
            parameter[DEAD] = 0
        net.weight[[2, 3]] = 0
    module = fxc.prune(net, samples(example)).module
    assert module.get_parameter("first.weight").shape[0] == WIDTH - len(DEAD)
    assert module.get_parameter("style.weight").shape[0] == WIDTH - len(DEAD)
    assert module.get_parameter("weight").shape == (4, WIDTH - len(DEAD), 3, 3)
    for n in (2, 1, 3):
        inputs = samples(n)
        assert difference(net(*inputs), module(*inputs)) <= 1e-9


class Mixed(nn.Module):
    """A mixture of kernels for each sample, made flat (CondConv); their outputs may go."""

    def __init__(self) -> None:
        super().__init__()
        self.choice, self.last = nn.Linear(3, 2), nn.Conv2d(WIDTH, 2, 1)
        self.weight = nn.Parameter(torch.randn(2, WIDTH, 3, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        weight = self.choice(x.mean((2, 3))).softmax(1) @ self.weight.flatten(1)
        h = F.conv2d(x.reshape(1, n * c, height, width), weight.view(n * WIDTH, c, 3, 3), padding=1, groups=n)
        return self.last(torch.tanh(h.view(n, WIDTH, height, width)))  # type: ignore[no-any-return]


def test_a_mixture_for_each_sample() -> None:
    torch.manual_seed(0)
    net = Mixed().double().eval()
    with torch.no_grad():
        net.weight[:, DEAD] = 0
    module = fxc.prune(net, samples(2)[0]).module
    assert module.get_parameter("weight").shape[1] == WIDTH - len(DEAD)
    for n in (2, 1, 3):
        x = samples(n)[0]
        assert difference(net(x), module(x)) <= 1e-9


class Layers(nn.Module):
    """A layer with groups that read the same channels, or nearly."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, kind = how, nn.ConvTranspose2d if "transposed" in how else nn.Conv2d
        groups = 3 if "three" in how else 2
        self.first, self.other = nn.Conv2d(3, WIDTH, 1), nn.Conv2d(3, WIDTH, 1)
        self.mid = kind(groups * WIDTH, 6, 3, padding=1, groups=groups)
        self.norm, self.last = nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        h, g = torch.tanh(self.first(x)), torch.tanh(self.other(x))
        parts = [h, h.flip(1)] if "turned" in self.how else [h, h]
        both = torch.cat([*parts, g] if "three" in self.how else parts, 1) + (
            g.repeat(1, 2, 1, 1) if self.how == "sum" else 0
        )
        return self.last(torch.relu(self.norm(self.mid(both))))  # type: ignore[no-any-return]


@pytest.mark.parametrize("how", ["alike", "transposed", "sum", "turned", "turned transposed", "three"])
def test_layers(how: str) -> None:
    torch.manual_seed(0)
    net, x = Layers(how).double().eval(), samples(2)[0]
    with torch.no_grad():
        for layer in (net.first, net.other):
            for parameter in layer.parameters():
                parameter[DEAD] = 0
    module = fxc.prune(net, x).module
    if how in {"alike", "sum"}:
        assert module.get_parameter("first.weight").shape[0] == WIDTH - len(DEAD)
    other = torch.randn(3, 3, 7, 6, dtype=torch.float64)
    assert difference(net(other), module(other)) <= 1e-9
    trained = (outputs(each, (other,), training=True, calls=2) for each in (net, module))
    assert difference(*trained) <= 1e-9


def test_a_layer_that_compresses_itself() -> None:
    torch.manual_seed(0)
    x = samples(2)[0]
    net = fxc.compress(Layers("alike").double(), x)
    with torch.no_grad():
        net.get_parameter("first.weight_quantizer.bits")[DEAD] = 0
        net.get_parameter("first.bias")[DEAD] = 0
        net.get_parameter("mid.weight_quantizer.bits")[:2] = 0
    net.step()
    net.eval()
    before = net(x)
    net.prune()
    assert net.get_parameter("first.weight").shape[0] == WIDTH - len(DEAD)
    assert difference(before, net(x)) <= 1e-9
    final = net.finalize()
    assert difference(before, final(x)) <= 1e-9
