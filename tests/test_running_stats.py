"""What norms count and average in training is no constant for whoever else reads it."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress as fxc
from tests.exactness import difference

Read = Callable[["Net", Tensor], Any]


class Net(nn.Module):
    """A convolution and its norm, the statistics of which are read by hand as well."""

    norm: Any

    def __init__(self, norm: Any, read: Read) -> None:  # noqa: ANN401 - a norm
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 8, 3, bias=False), norm, nn.Conv2d(8, 2, 1)
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(torch.relu(self.read(self, x)))
        return found


def spread(values: Tensor) -> Tensor:
    return values[:, None, None]


def fused(net: Net, x: Tensor) -> Any:  # noqa: ANN401 - a tensor
    if net.training:
        return net.norm(net.conv(x))
    scale = net.norm.weight / (net.norm.running_var + net.norm.eps).sqrt()
    shift = net.norm.bias - net.norm.running_mean * scale
    return F.conv2d(x, net.conv.weight * scale.view(-1, 1, 1, 1), shift)


def mean_taken_off(net: Net, x: Tensor) -> Any:  # noqa: ANN401 - a tensor
    h = net.norm(net.conv(x))
    return h - net.norm.running_mean.view(1, -1, 1, 1) / 3


def mean_as_a_gate(net: Net, x: Tensor) -> Any:  # noqa: ANN401 - a tensor
    h = net.norm(net.conv(x))
    return h + torch.cos(h) * spread(net.norm.running_mean)


def distance_of_the_variance(net: Net, x: Tensor) -> Any:  # noqa: ANN401 - a tensor
    before = spread(net.norm.running_var - 1)
    return net.norm(net.conv(x)) * before + before


def counted(net: Net, x: Tensor) -> Any:  # noqa: ANN401 - a tensor
    h = net.norm(net.conv(x))
    return h + h.cos() * net.norm.num_batches_tracked


def by_function(net: Net, x: Tensor) -> Any:  # noqa: ANN401 - a tensor
    norm = net.norm
    h = F.batch_norm(net.conv(x), norm.running_mean, norm.running_var, norm.weight, norm.bias, net.training)
    return h + spread(norm.running_mean)


def in_a_row(net: Net, x: Tensor) -> Any:  # noqa: ANN401 - a tensor
    norm = net.norm
    mean, h = norm.running_mean.view(-1), net.conv(x)
    h = F.batch_norm(h, mean, norm.running_var, norm.weight, norm.bias, net.training)
    return h + h.sin() * spread(mean)


READS: list[Read] = [
    fused, mean_taken_off, mean_as_a_gate, distance_of_the_variance, counted, by_function, in_a_row,
]  # fmt: skip
NORMS: list[Callable[[], Any]] = [
    lambda: nn.BatchNorm2d(8),
    lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
    lambda: nn.SyncBatchNorm(8),
]

CASES = [
    (read, norm) for read in READS for norm in range(len(NORMS)) if norm != 1 or read not in {by_function, in_a_row}
]


@pytest.mark.parametrize("keep_code", [False, True])
@pytest.mark.parametrize(("read", "norm"), CASES)
def test_training_moves_them(read: Read, norm: int, *, keep_code: bool) -> None:
    torch.manual_seed(0)
    net = Net(NORMS[norm](), read).double()
    dead = [0, 3, 4, 7]
    with torch.no_grad():
        net.norm.weight[dead] = 0
        net.norm.bias[dead] = 0
        net.conv.weight[dead[:2]] = 0
    x = torch.randn(4, 3, 6, 6).double()
    small = fxc.prune(net, x[:2], keep_code=keep_code).module
    whole = copy.deepcopy(net)
    for step in range(3):
        for training in (True, False):
            whole.train(training), small.train(training)
            assert difference(whole(x + step), small(x + step)) <= 1e-10


@pytest.mark.parametrize("read", [fused, mean_taken_off, by_function])
def test_in_a_network_that_trains(read: Read) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 6, 6).double()
    net = fxc.compress(Net(nn.BatchNorm2d(8), read).double(), x[:2])
    with torch.no_grad():
        net.get_parameter("conv.weight_quantizer.bits")[2:5] = 0
        net.get_parameter("norm.bias")[2:5] = 0
    net.step()
    whole = copy.deepcopy(net)
    net.prune()
    for step in range(3):
        for training in (True, False):
            whole.train(training), net.train(training)
            assert difference(whole(x + step), net(x + step)) <= 1e-10


def test_a_norm_by_itself_still_goes_by_them() -> None:
    for make in NORMS:
        torch.manual_seed(0)
        first = nn.Conv2d(3, 8, 3)
        net = nn.Sequential(first, make(), nn.ReLU(), nn.Conv2d(8, 2, 1)).double()
        with torch.no_grad():
            for parameter in first.parameters():
                parameter[3:] = 0
        assert fxc.prune(net, torch.randn(2, 3, 6, 6).double()).module.get_parameter("0.weight").shape[0] == 3
