"""Maxima and minima over channels: channels that are zero go, and zero goes on being one of the numbers."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import fxcompress as fxc
from fxcompress.passes.means import extreme_over
from tests.exactness import difference

C = 8
X = torch.randn(2, 3, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
OTHER = torch.randn(3, 3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "max": lambda x: x.max(1)[0].unsqueeze(1),
    "torch.max": lambda x: torch.max(x, dim=1, keepdim=True).values,
    "min": lambda x: torch.min(x, -3, True)[0],
    "amax": lambda x: x.amax(1, keepdim=True),
    "amin": lambda x: torch.amin(x, dim=(1,), keepdim=True),
    "places as well": lambda x: x.amax((1, 2, 3), keepdim=True),
    "far below zero": lambda x: (x * 3).amax(1, keepdim=True),
}


def by_its_place(x: Tensor) -> Tensor:
    found = x.max(1, keepdim=True)
    return found[0] * found[1]


STAY: dict[str, Callable[[Tensor], Tensor]] = {
    "where it stood": by_its_place,
    "of all": lambda x: x.max(),
    "not zero": lambda x: (x - 1).amax(1, keepdim=True),
}


class Gated(nn.Module):
    """The spatial attention of CBAM: a gate of the largest channel and the mean channel."""

    def __init__(self, form: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.form = form
        self.stem, self.gate, self.last = (
            nn.Conv2d(3, C, 3, padding=1),
            nn.Conv2d(2, 1, 3, padding=1),
            nn.Conv2d(C, 2, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        pooled = torch.cat([self.form(x).expand_as(x[:, :1]), x.mean(1, keepdim=True)], 1)
        return self.last(x * torch.sigmoid(self.gate(pooled)))  # type: ignore[no-any-return]


def build(form: Callable[[Tensor], Tensor], dead: list[int]) -> Gated:
    """The channels that are alive are far from zero: below it for a maximum, as a rule, and above for a minimum."""
    torch.manual_seed(0)
    net = Gated(form).double()
    with torch.no_grad():
        net.stem.bias.fill_(-1.0)  # type: ignore[union-attr]
    kill(net, dead)
    return net


def kill(net: nn.Module, dead: list[int]) -> None:
    with torch.no_grad():
        for name in ("stem.weight", "stem.bias"):
            net.get_parameter(name)[dead] = 0


def width(net: nn.Module) -> int:
    return net.get_parameter("stem.weight").shape[0]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_zero_channels_go_and_go_again(name: str, *, training: bool) -> None:
    net = build(FORMS[name], [2, 5, 7]).train(training)
    module = fxc.prune(net, X).module
    assert width(module) == C - 3
    for images in (X, OTHER):
        assert difference(net(images), module(images)) <= 1e-12
    assert not fxc.prune(module, X).report.modified
    kill(module, [1])
    expected = module(OTHER)
    again = fxc.prune(module, X).module
    assert width(again) == C - 4
    assert difference(expected, copy.deepcopy(again)(OTHER)) <= 1e-12


@pytest.mark.parametrize("name", STAY)
def test_what_asks_for_more_keeps_the_channels(name: str) -> None:
    net = build(STAY[name], [2, 5, 7])
    module = fxc.prune(net, X).module
    assert width(module) == C
    assert difference(net(X), module(X)) == 0


@pytest.mark.parametrize("name", ["max", "min", "amax"])
def test_without_dead_channels_there_is_no_zero(name: str) -> None:
    net = build(FORMS[name], [])
    module = fxc.prune(net, X).module
    assert width(module) == C
    assert difference(net(X), module(X)) == 0


@pytest.mark.parametrize("name", ["max", "amax"])
def test_the_result_is_stored_compiled_and_exported(name: str, tmp_path: Path) -> None:
    module = fxc.prune(build(FORMS[name], [2, 5, 7]).eval(), X).module
    assert isinstance(module, fx.GraphModule)
    fxc.save(module, tmp_path / "net.fxc")
    loaded = fxc.load(tmp_path / "net.fxc", Gated(FORMS[name]).double(), X)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    exported = torch.export.export(module, (X,)).module()
    for other in (loaded, compiled, exported):
        assert difference(module(X), other(X)) <= 1e-12


class Heads(nn.Module):
    """The largest dim of each head: heads may lose other dims than the next one, as long as they lose as many."""

    def __init__(self, *, across: bool) -> None:
        super().__init__()
        self.first, self.last, self.across = nn.Linear(4, 12), nn.Linear(12, 2), across

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).unflatten(-1, (3, 4))
        return self.last((y * y.amax(-2 if self.across else -1, keepdim=True)).flatten(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("across", [False, True])
@given(dead=st.sets(st.integers(0, 11), max_size=11))
@settings(deadline=None, max_examples=25)
def test_any_set_of_dims_of_heads(dead: set[int], *, across: bool) -> None:
    torch.manual_seed(0)
    net, x = Heads(across=across).double(), torch.randn(5, 4, dtype=torch.float64)
    with torch.no_grad():
        for parameter in net.first.parameters():
            parameter[sorted(dead)] = 0
    assert difference(net(x), fxc.prune(net, x).module(x)) <= 1e-12


@pytest.mark.parametrize("picks", [False, True])
@pytest.mark.parametrize("largest", [False, True])
@given(left=st.integers(1, 5), shift=st.sampled_from([-3.0, 0.0, 3.0]))
@settings(deadline=None, max_examples=10)
def test_the_function_is_that_of_the_whole_tensor(left: int, shift: float, *, largest: bool, picks: bool) -> None:
    full = torch.zeros(4, 6, 2, dtype=torch.float64)
    full[:, :left] = torch.randn(4, left, 2, dtype=torch.float64) + shift
    wide, narrow = full.clone().requires_grad_(), full[:, :left].clone().requires_grad_()
    one, all_ = (wide.max, wide.amax) if largest else (wide.min, wide.amin)
    expected = one(1)[0] if picks else all_(1)
    found = extreme_over(narrow, (1,), largest=largest, picks=picks)
    assert difference(expected, found) == 0
    expected.sum().backward()
    found.sum().backward()
    assert wide.grad is not None
    assert difference(wide.grad[:, :left], narrow.grad) == 0
