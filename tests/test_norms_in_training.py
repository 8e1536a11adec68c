"""Channels in front of norms that take the mean of all channels off: they die with the norm's weight and bias."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress as fxc
from tests.exactness import TOLERANCE, difference
from tests.test_fit import digits

Make = Callable[[], nn.Module]


class Tokens(nn.Module):
    """Channels last, with a residual stream under layer norm."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.first, self.places = nn.Linear(8, 16), nn.Parameter(torch.randn(8, 16))
        self.norm1, self.up, self.down = norm(16), nn.Linear(16, 24), nn.Linear(24, 16)
        self.norm2, self.out = norm(16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x.flatten(1, 2)) + self.places
        h = h + self.down(self.up(self.norm1(h)).relu())
        result: Tensor = self.out(self.norm2(h).mean(1))
        return result


def images(norm: Callable[[int], nn.Module]) -> nn.Module:
    layers = [nn.Conv2d(1, 16, 3, padding=1), norm(16), nn.GELU(), nn.Conv2d(16, 16, 3), norm(16), nn.GELU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


NETS: dict[str, Make] = {
    "group norm": lambda: images(lambda c: nn.GroupNorm(4, c)),
    "group norm of one group": lambda: images(lambda c: nn.GroupNorm(1, c)),
    "instance norm": lambda: images(lambda c: nn.InstanceNorm2d(c, affine=True)),
    "instance norm that runs": lambda: images(lambda c: nn.InstanceNorm2d(c, affine=True, track_running_stats=True)),
    "layer norm": Tokens,
    "layer norm without bias": lambda: Tokens(lambda c: nn.LayerNorm(c, bias=False)),
    "root mean square norm": lambda: Tokens(nn.RMSNorm),
}
X = torch.randn(3, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def without_bits(net: fxc.CompressedModule, *weights: str) -> None:
    """Let a third of the channels of some weights have no bits."""
    with torch.no_grad():
        for name in weights:
            net.get_parameter(f"{name}_quantizer.bits")[::3] = 0


@pytest.mark.parametrize("name", NETS)
def test_a_channel_without_bits_goes_and_nothing_changes(name: str) -> None:
    torch.manual_seed(0)
    net = fxc.compress(NETS[name]().double(), X, bias_shrink=0.05)
    makers = ["first.weight", "places", "down.weight"] if "first.weight" in net.state_dict() else ["0.weight"]
    without_bits(net, *makers)
    optimizer = torch.optim.Adam(net.param_groups(lr=1e-3, bits_lr=0.0))
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(net(X), torch.tensor([1, 2, 3])).backward()
        optimizer.step()
        net.step()
    before = copy.deepcopy(net)
    assert net.channels_left() < sum(len(b) for b in net.fxc_bits)
    net.prune(optimizer)
    assert net.get_parameter(makers[0]).shape[0] == 10
    for mode in (False, True):
        assert difference(net.train(mode)(X), before.train(mode)(X)) < TOLERANCE
    assert difference(net.eval().finalize()(X), net(X)) < TOLERANCE


@pytest.mark.parametrize("name", NETS)
def test_it_makes_no_difference_when_they_are_removed(name: str) -> None:
    torch.manual_seed(0)
    start = fxc.compress(NETS[name]().double(), X, bias_shrink=0.05)
    with torch.no_grad():
        for bits in start.fxc_bits[:-1]:  # some die soon, one after the other
            bits[::3] = torch.linspace(0.01, 0.4, len(bits[::3]), dtype=bits.dtype)
    found, removals = [], 0
    for every in (4, 0):
        net = copy.deepcopy(start)
        optimizer = torch.optim.SGD(net.param_groups(lr=1e-2, bits_lr=0.5, exponents_lr=0.0))
        for step in range(80):
            optimizer.zero_grad()
            (F.cross_entropy(net(X), torch.tensor([1, 2, 3])) + net.size()).backward()
            optimizer.step()
            net.step()
            if every and step % every == 0:
                removals += net.prune(optimizer).modified
        net.prune(optimizer)
        found.append(net)
    assert removals > 1
    first, second = (dict(net.named_parameters()) for net in found)
    assert first.keys() == second.keys()
    for key, value in first.items():
        torch.testing.assert_close(value, second[key], rtol=1e-6, atol=1e-9, msg=key)


@pytest.mark.parametrize("name", NETS)
def test_a_share_of_the_multiply_adds_is_reached(name: str) -> None:
    torch.manual_seed(0)
    x, y = digits()[0][0]
    data = [(x, y)] * 60
    result = fxc.fit(NETS[name](), data, F.cross_entropy, epochs=2, target_macs=0.5, lr=2e-3, progress=False)
    assert 0.3 < result.net.macs_left() <= 0.51
    assert difference(result.module(x), result.net.eval()(x)) < 1e-3


def test_the_weight_of_a_norm_stays_while_something_writes_to_the_channel() -> None:
    net = fxc.compress(Tokens().double(), X, bias_shrink=0.05)
    without_bits(net, "first.weight", "down.weight")  # and not the places
    before = net.get_parameter("norm1.weight").clone()
    for _ in range(30):
        net.step()
    assert torch.equal(net.get_parameter("norm1.weight"), before)
