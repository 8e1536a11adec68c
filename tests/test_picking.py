"""Channels that are picked by stepped slices and uneven parts: what is left of them need not be a slice any more."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxcompress as fxc
from tests.exactness import difference

C = 12
X = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
OTHER = torch.randn(3, 3, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def turned(h: Tensor) -> Tensor:
    """Each pair of channels is turned, as by a rotary embedding."""
    h = h.movedim(1, -1)
    return torch.cat([-h[..., 1::2], h[..., ::2]], -1).movedim(-1, 1)


def written(h: Tensor) -> Tensor:
    part = h[:, ::2]
    part.mul_(2)
    return h * 3


def written_around(h: Tensor) -> Tensor:
    part = h[:, ::2]
    h.mul_(2)
    return torch.cat([part, h[:, 1::2]], 1)


def squashed(h: Tensor) -> Tensor:
    part = nn.functional.relu(h[:, 1::2], inplace=True)
    return h + torch.cat([part, part], 1)


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "even and odd": lambda h: torch.cat([h[:, ::2], h[:, 1::2]], 1),
    "by threes": lambda h: torch.cat([h[:, 2::3], h[:, 1::3, ...], h[:, 0:C:3]], 1),
    "one half": lambda h: torch.cat([h[:, :8:2] * 2, h[:, 8:], h[:, 1:8:2]], 1),
    "turned": turned,
    "tensor_split": lambda h: torch.cat(torch.tensor_split(h, 5, 1)[::-1], 1),
    "tensor_split at places": lambda h: torch.cat(h.tensor_split((3, 5), dim=1)[::-1], 1),
}
IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "the part is written to": written,
    "the whole is written to": written_around,
    "an activation in place": squashed,
}


class Net(nn.Module):
    def __init__(self, way: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.way, self.first, self.last = way, nn.Conv2d(3, C, 3, padding=1), nn.Conv2d(C, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.way(self.first(x)))  # type: ignore[no-any-return]


def build(way: Callable[[Tensor], Tensor], dead: list[int]) -> Net:
    torch.manual_seed(0)
    net = Net(way).double()
    with torch.no_grad():
        for parameter in net.first.parameters():
            parameter[dead] = 0
    return net


@pytest.mark.parametrize("name", WAYS)
@given(dead=st.sets(st.sampled_from([0, 3, 6, 8, 11]), max_size=4))  # some of each part stay
@settings(deadline=None, max_examples=15)
def test_any_few_channels_go(name: str, dead: set[int]) -> None:
    net = build(WAYS[name], sorted(dead))
    module = fxc.prune(net, X).module
    assert module.get_parameter("first.weight").shape[0] == C - len(dead)
    for images in (X, OTHER):
        assert difference(net(images), module(images)) <= 1e-12
    assert not fxc.prune(module, X).report.modified


@pytest.mark.parametrize("name", IN_PLACE)
@given(dead=st.sets(st.integers(0, C - 1), max_size=6))
@settings(deadline=None, max_examples=15)
def test_a_part_that_is_memory_of_the_whole_stays_one(name: str, dead: set[int]) -> None:
    net = build(IN_PLACE[name], sorted(dead))
    module = fxc.prune(net, X).module
    for images in (X, OTHER):
        assert difference(net(images), module(images)) <= 1e-12
