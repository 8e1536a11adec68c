"""What copies where memory is not in order: whether it does depends on sizes, and writing in place tells."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxcompress as fxc
from tests.exactness import TOLERANCE, difference

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "slice": lambda h: h[..., :6],
    "turned": lambda h: h.transpose(1, 2),
    "permuted": lambda h: h.permute(1, 0, 2),
    "whole": lambda h: h,
    "expanded": lambda h: h.unsqueeze(1).expand(-1, 2, -1, -1).select(1, 0),
    "step": lambda h: h[:, ::2],
}
COPIES: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda v: v.contiguous(),
    "reshape": lambda v: v.reshape(v.shape[0], -1),
    "flatten": lambda v: v.flatten(1),
    "ravel": lambda v: v.ravel(),
    "to": lambda v: v.to(memory_format=torch.contiguous_format),
    "module": nn.Flatten(),
    "clone": lambda v: v.clone(),
}
WRITES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "copy": lambda h, g: g.add_(1),
    "source": lambda h, g: h.mul_(2).add_(1),
    "relu": lambda h, g: torch.relu_(g),
    "nothing": lambda h, g: None,
}


class Net(nn.Module):
    def __init__(self, view: str, copy: str, write: str) -> None:
        super().__init__()
        self.made, self.out = nn.Linear(4, 12), nn.Linear(12, 3)
        self.copy: Any = COPIES[copy]
        self.how = view, write

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        view, write = self.how
        h = self.made(x)
        g = self.copy(VIEWS[view](h))
        WRITES[write](h, g)
        return self.out(h), g.square().sum()


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(sorted(VIEWS)),
    st.sampled_from(sorted(COPIES)),
    st.sampled_from(sorted(WRITES)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_writing_after_it_computes_the_same_at_all_sizes(
    view: str,
    copy: str,
    write: str,
    sizes: tuple[int, int],
    fold: bool,  # noqa: FBT001
    seed: int,
) -> None:
    torch.manual_seed(seed)
    net = Net(view, copy, write).double()
    dead = torch.rand(12, device="cpu") < 0.7
    with torch.no_grad():
        net.made.weight[dead] = 0
        net.made.bias[dead] = 0
    small = fxc.prune(net, torch.randn(*sizes, 4, dtype=torch.float64), fold=fold).module
    for batch, length in ((1, 1), (1, 2), (2, 1), (2, 3), sizes):
        x = torch.randn(batch, length, 4, dtype=torch.float64)
        assert difference(small(x), net(x)) < TOLERANCE


@pytest.mark.parametrize(("view", "left"), [("turned", (4, 4)), ("whole", (4, 4))])
def test_channels_go_where_nobody_writes(view: str, left: tuple[int, int]) -> None:
    net = Net(view, "contiguous", "nothing")
    with torch.no_grad():
        net.made.weight[4:] = 0
        net.made.bias[4:] = 0
    assert fxc.prune(net, torch.randn(2, 3, 4)).module.get_parameter("made.weight").shape == left


UNREAD: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda v: v.contiguous(),
    "reshape": lambda v: v.reshape(-1, v.shape[-1]),
    "flatten": lambda v: v.flatten(0, 1),
    "module": nn.Flatten(0, 1),
    "twice": lambda v: v.reshape(-1, v.shape[-1]).contiguous(),
    "view": lambda v: v[None].squeeze(0),
}


class Unread(nn.Module):
    """Writes to a tensor that may share its memory with others, which no line reads after that."""

    def __init__(self, view: str, copy: str, *, read: bool) -> None:
        super().__init__()
        self.made, self.out, self.copy = nn.Linear(4, 12), nn.Linear(12, 3), UNREAD[copy]
        self.shift = nn.Parameter(torch.randn(12))
        self.view, self.read = view, read

    def forward(self, x: Tensor) -> Tensor:
        h = self.made(x)
        g = self.copy(VIEWS[self.view](h))
        g += self.shift
        g.clamp_(-1, 1).mul_(2)
        return self.out(g).sum(0) + (h.square().sum() if self.read else 0)  # type: ignore[no-any-return]


@pytest.mark.parametrize("read", [False, True])
@pytest.mark.parametrize("copy", UNREAD)
@pytest.mark.parametrize("view", ["permuted", "step", "whole", "expanded"])
def test_what_nobody_reads_any_more_keeps_nothing(view: str, copy: str, *, read: bool) -> None:
    net = Unread(view, copy, read=read).double()
    with torch.no_grad():
        net.made.weight[4:] = 0
        net.made.bias[4:] = 0
        net.shift[4:] = 0
    small = fxc.prune(net, torch.randn(2, 3, 4, dtype=torch.float64)).module
    if not read:
        assert small.get_parameter("made.weight").shape == (4, 4)
    for batch, length in ((1, 1), (1, 2), (2, 1), (2, 3), (3, 5)):
        x = torch.randn(batch, length, 4, dtype=torch.float64)
        try:
            expected = net(x)
        except RuntimeError:
            continue
        assert difference(small(x), expected) < TOLERANCE
