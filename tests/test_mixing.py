"""Layers whose channels are no channels of the network: those lie in the rows of a matrix, or among the samples."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress as fxc
from tests.exactness import TOLERANCE, difference, outputs
from tests.nets import set_bits

TOKENS, DEAD = 6, [2, 3, 5]


class Mixer(nn.Module):
    """Tokens of (N, T, 4) are mixed in each of 8 channels, and added to what they were.

    Args:
        mix: of (N, C, T), and the network for its layers.
        bias: whether a channel of zeros becomes one of constants when it is mixed.
    """

    def __init__(self, mix: Callable[["Mixer", Tensor], Tensor], *, bias: bool = False) -> None:
        super().__init__()
        self.mix = mix
        self.first, self.last = nn.Linear(4, 8, bias=False), nn.Linear(8, 3)
        self.tokens = nn.Sequential(nn.Linear(TOKENS, 7, bias=bias), nn.Tanh(), nn.Linear(7, TOKENS, bias=bias))
        self.blur = nn.Conv1d(1, 1, 3, padding=1, bias=bias)
        self.spread = nn.ConvTranspose1d(1, 1, 3, padding=1, bias=bias)
        self.pair = nn.Conv1d(2, 2, 3, padding=1, groups=2, bias=bias)
        self.table: Tensor
        self.register_buffer("table", torch.randn(TOKENS, TOKENS))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).mT
        return self.last((h + self.mix(self, h)).mT)  # type: ignore[no-any-return]


MIXES: dict[str, Callable[[Mixer, Tensor], Tensor]] = {
    "layers": lambda net, h: net.tokens(h),
    "a matrix": lambda net, h: h @ net.table.T,
    "an einsum": lambda net, h: torch.einsum("nct,ts->ncs", h, net.table),
    "samples": lambda net, h: net.blur(h.flatten(0, 1)[:, None]).view_as(h),
    "two convolutions": lambda net, h: net.spread(net.blur(h.reshape(-1, 1, h.shape[-1])).tanh()).view_as(h),
    "pairs": lambda net, h: net.pair(torch.stack([h, -h], 2).flatten(0, 1)).sum(1).view_as(h),
    "a kernel": lambda net, h: F.conv1d(h.flatten(0, 1)[:, None], net.table[None, :1, :3], padding=1).view_as(h),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", MIXES)
def test_zeros_stay_zeros_where_nothing_is_added(name: str, *, bias: bool) -> None:
    net, x = Mixer(MIXES[name], bias=bias).double(), torch.randn(2, TOKENS, 4, dtype=torch.float64)
    with torch.no_grad():
        net.first.weight[DEAD] = 0
    for fold in (False, True):
        result = fxc.prune(net, x, fold=fold).module
        for inputs in (x, torch.randn(3, TOKENS, 4, dtype=torch.float64)):
            assert difference(outputs(net, (inputs,)), outputs(result, (inputs,))) <= TOLERANCE
        kept = bias and name not in {"a matrix", "an einsum", "a kernel"}
        assert kept or result.get_parameter("first.weight").shape[0] == 8 - len(DEAD)


@pytest.mark.parametrize("name", MIXES)
def test_what_is_alive_stays(name: str) -> None:
    net, x = Mixer(MIXES[name]).double(), torch.randn(2, TOKENS, 4, dtype=torch.float64)
    with torch.no_grad():
        net.first.weight[DEAD, 1:] = 0
    assert not fxc.prune(net, x).report.modified


@pytest.mark.parametrize("dead", [[2], [0, 1, 5, 7], [0, 1, 2, 3, 5, 6]])
def test_a_dead_channel_is_no_token_of_a_layer_that_mixes_them(dead: list[int]) -> None:
    """No objective counts it before it is removed, as none does after that."""
    net = fxc.compress(Mixer(MIXES["layers"]).double(), torch.randn(2, TOKENS, 4, dtype=torch.float64))
    set_bits(net, "first.weight", dead)
    net.step()
    objectives = ("eq4", "eq5", "macs", "activations")
    before = [net.size(objective).item() for objective in objectives]
    assert net.prune().modified
    assert net.get_parameter("first.weight").shape[0] == 8 - len(dead)
    assert [net.size(objective).item() for objective in objectives] == pytest.approx(before, rel=1e-9)
