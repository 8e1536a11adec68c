"""Numbers that a model computes from sizes: those of widths stay what they were, whatever is removed."""

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from tests.exactness import difference

WIDTHS: dict[str, Callable[[Tensor], Tensor]] = {
    "shape[1]": lambda x: x * (x.shape[1] // 2) ** -0.5,
    "shape[-3]": lambda x: x + 1 / x.shape[-3] - 0.125,
    "size(1)": lambda x: x / math.sqrt(x.size(1)),
    "size(dim=1)": lambda x: x.div(x.size(dim=1)),
    "size()[1]": lambda x: x * float(x.size()[1]),
}
ALL = {
    **WIDTHS,
    "unpacked": lambda x: _unpacked(x) * x,
    "height": lambda x: x / x.shape[2],
    "height, channels": lambda x: x / x.shape[2] * x.shape[1],
    "twice": lambda x: x * torch.cat([x, x], 1).shape[1],
    "both in one": lambda x: x / (x.shape[1] * x.shape[2]),
}


def _unpacked(x: Tensor) -> float:
    _, channels, _, _ = x.shape
    return 1 / channels


class Net(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor], *, decides: bool) -> None:
        super().__init__()
        self.decides = decides
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        if self.decides and x.shape[0] > 64:  # so that it is traced by running it
            return self.first(x)  # type: ignore[no-any-return]
        return self.second(self.function(self.first(x)))  # type: ignore[no-any-return]


def build(name: str, *, decides: bool = False) -> Net:
    torch.manual_seed(0)
    net = Net(ALL[name], decides=decides).double()
    kill(net, [1, 4])
    return net


def kill(net: nn.Module, dead: list[int]) -> None:
    with torch.no_grad():
        net.get_parameter("first.weight")[dead] = 0
        net.get_parameter("first.bias")[dead] = 0


def image(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("name", ALL)
def test_the_output_stays_on_other_images_and_when_more_goes(name: str) -> None:
    net = build(name)
    module = fxc.prune(net, image(2, 3, 9, 9)).module
    for x in (image(2, 3, 9, 9), image(3, 3, 12, 10)):
        assert difference(net(x), module(x)) <= 1e-12
    kill(module, [0])
    expected = module(image(1, 3, 9, 11))
    again = fxc.prune(module, image(2, 3, 9, 9)).module
    assert difference(expected, again(image(1, 3, 9, 11))) <= 1e-12


@pytest.mark.parametrize("name", [*WIDTHS, "unpacked", "height", "height, channels", "both in one"])
@pytest.mark.parametrize("decides", [False, True])
def test_the_channels_go(name: str, *, decides: bool) -> None:
    net = build(name, decides=decides)
    module = fxc.prune(net, image(2, 3, 9, 9)).module
    assert module.get_parameter("first.weight").shape[0] == 6
    assert difference(net(image(3, 3, 8, 9)), module(image(3, 3, 8, 9))) <= 1e-12


class Groups(nn.Module):
    """A group norm as a function, with the number of its groups written into the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 64, 1), nn.GroupNorm(4, 64), nn.Conv2d(64, 2, 1)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.group_norm(self.first(x), 4, self.norm.weight, self.norm.bias)
        return self.last(y.relu())  # type: ignore[no-any-return]


@pytest.mark.parametrize("dead", [1, 2])
def test_a_number_of_groups_that_still_divides_what_is_left(dead: int) -> None:
    """The call would run on 48 or 32 channels as it stands, in 4 groups, and mix those of different ones."""
    net, x = Groups(), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        net.norm.bias.uniform_(-1, 1)
        for tensor in (net.first.weight, net.first.bias, net.norm.bias):
            assert tensor is not None
            tensor[16 : 16 + 16 * dead] = 0
    module = fxc.prune(net, x).module
    assert module.get_parameter("first.weight").shape == (64 - 16 * dead, 3, 1, 1)
    assert difference(net(x), module(x)) <= 1e-12


@pytest.mark.parametrize("make", [lambda: nn.InstanceNorm2d(8), lambda: nn.InstanceNorm2d(8, affine=True)])
def test_a_norm_without_tensors_expects_what_is_left(make: Callable[[], nn.Module]) -> None:
    """It would warn of another width in each call, and could not be compiled for that."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), make(), nn.ReLU(), nn.Conv2d(8, 2, 1)).double().eval()
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    with torch.no_grad():
        for parameter in (*net[0].parameters(), *net[1].parameters()):
            parameter[[1, 4, 6]] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module = fxc.prune(net, x).module
        assert difference(net(x), module(x)) <= 1e-12
    assert module.get_submodule("1").num_features == 5 == module.get_parameter("3.weight").shape[1]
    assert net[1].num_features == 8


class ChosenBySize(nn.Module):
    """A number that is zero on the example's size, and on no other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(torch.where(h > 0.5, h, x.shape[2] - 9))  # type: ignore[no-any-return]


def test_a_number_that_is_zero_on_the_size_of_the_example() -> None:
    net = ChosenBySize().double().eval()
    with torch.no_grad():
        net.first.weight[[1, 4]] = 0
        net.first.bias[[1, 4]] = 0  # type: ignore[index]
    module = fxc.prune(net, image(2, 3, 9, 9)).module
    assert difference(net(image(1, 3, 7, 9)), module(image(1, 3, 7, 9))) <= 1e-12
