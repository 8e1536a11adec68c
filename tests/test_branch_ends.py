"""What is left of a network is the same function of the parameters that are left, wherever training takes them."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from tests.exactness import difference, tensors


class Net(nn.Module):
    """One of its layers starts as zeros, and is read in one way or another."""

    def __init__(self, join: Callable[["Net", Tensor], object]) -> None:
        super().__init__()
        self.first, self.zero, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.gate = nn.Parameter(torch.zeros(6))
        self.register_buffer("mask", torch.zeros(6))
        self.mask: Tensor
        nn.init.zeros_(self.zero.weight)
        nn.init.zeros_(self.zero.bias)
        self.join = join

    def forward(self, x: Tensor) -> object:
        return self.join(self, x)


def coupling(net: Net, x: Tensor) -> object:
    h = torch.tanh(net.first(x))
    scale = net.zero(h)
    return x * scale.exp(), x.sum(1) + scale.sum(1), net.last(h)


def two_calls(net: Net, x: Tensor) -> object:
    h = net.first(x)
    return net.last(h + torch.tanh(net.zero(h))), torch.cos(net.zero(x))


def two_gates(net: Net, x: Tensor) -> object:
    h = net.first(x)
    return net.last(h + net.gate * torch.tanh(h)), net.gate.exp()


def two_modes(net: Net, x: Tensor) -> object:
    h = net.first(x)
    return net.last(h + net.zero(h) if net.training else h + torch.sin(net.zero(h)) * 2)


def one_mode(net: Net, x: Tensor) -> object:
    h = net.first(x)
    return net.last(h + net.zero(h) if net.training else h + torch.cos(net.zero(h)))


def kept_elsewhere(net: Net, x: Tensor) -> object:
    return net.last(net.gate + net.gate * x)


def residual(net: Net, x: Tensor) -> object:
    h = net.first(x)
    return net.last(h + net.zero(torch.relu(h)) + net.gate)


def shared_branch(net: Net, x: Tensor) -> object:
    h = net.first(x)
    branch = net.zero(h)
    h = torch.sin(h) + branch
    return net.last(torch.tanh(h) - torch.relu(branch) + net.zero(torch.cos(h)))


def masked(net: Net, x: Tensor) -> object:
    h = net.first(x)
    return net.last(h + net.mask * net.zero(h)), net.mask + x


STAYING = [coupling, two_calls, two_gates, one_mode, kept_elsewhere]
GOING: dict[Callable[[Net, Tensor], object], int] = {residual: 2, shared_branch: 3, two_modes: 2, masked: 2}
"""How many branches go from each, in all modes."""


def read_by(net: nn.Module, x: Tensor) -> set[str]:
    """The parameters that a network reads, in any mode."""
    own = copy.deepcopy(net)
    for training in (False, True):
        torch.stack([output.sum() for output in tensors(own.train(training)(x))]).sum().backward()
    return {name for name, parameter in own.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("join", [*STAYING, *GOING])
@pytest.mark.parametrize("training", [False, True])
def test_what_is_left_is_read_wherever_it_was(join: Callable[[Net, Tensor], object], *, training: bool) -> None:
    torch.manual_seed(0)
    net, x = Net(join).double().train(training), torch.randn(3, 6).double()
    result = fxc.prune(net, x)
    assert len(result.report.branches) == GOING.get(join, 0)
    small, moved = result.module, copy.deepcopy(net)
    left = {name: small.get_parameter(name) for name in read_by(small, x)}
    with torch.no_grad():
        for name, parameter in left.items():
            parameter.add_(torch.randn_like(parameter) / 3)
            moved.get_parameter(name).copy_(parameter)
    for mode in (False, True):
        assert difference(moved.train(mode)(x), small.train(mode)(x)) <= 1e-12
