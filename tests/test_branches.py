"""Branches of a sum that are zero disappear, and nothing that reads or writes the same memory notices."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxcompress as fxc
from tests.exactness import Fingerprint, difference, outputs
from tests.nets import ResidualNet, quantizer, set_bits

Function = Callable[["Sum", Tensor], Tensor]


class Sum(nn.Module):
    """``zero`` makes zeros, ``live`` does not; ``function`` puts them together."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function
        self.zero, self.live, self.last = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1)
        self.relu, self.drop = nn.ReLU(inplace=True), nn.Dropout(0.0)
        nn.init.zeros_(self.zero.weight)
        nn.init.zeros_(self.zero.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self, x))  # type: ignore[no-any-return]


def image() -> Tensor:
    return torch.randn(2, 3, 6, 6, dtype=torch.float64)


def prune(net: nn.Module, *inputs: Tensor) -> Any:  # noqa: ANN401 - a PruneResult
    """Prune, and check that the caller's model is as it was and both compute the same, in both modes."""
    x = inputs or (image(),)
    visit = Fingerprint(net)
    result = fxc.prune(net, x)
    visit.check()
    for training in (False, True):
        expected = outputs(net, x, training=training)
        assert difference(expected, outputs(result.module, x, training=training)) <= 1e-9
    assert isinstance(result.module, fx.GraphModule)
    result.module.graph.lint()
    return result


def test_a_residual_branch_disappears() -> None:
    net = ResidualNet().double()
    nn.init.zeros_(net.block1.bn2.weight)
    result = prune(net, torch.randn(2, 3, 10, 10, dtype=torch.float64))
    assert result.report.branches == ("eval:add",)
    assert result.report.gone == tuple(sorted(name for name in net.state_dict() if name.startswith("block1.")))
    assert [n for n, _ in result.module.named_children()] == ["stem", "block2", "fc"]
    assert "  the branch into add in block1 at tests/nets.py:" in str(result.report)
    assert "block1" not in result.module.code


def test_a_branch_with_a_shift_stays() -> None:
    net = ResidualNet().double()
    nn.init.zeros_(net.block1.bn2.weight)
    nn.init.ones_(net.block1.bn2.bias)
    assert prune(net, torch.randn(2, 3, 10, 10, dtype=torch.float64)).report.branches == ()


def late_write(net: Sum, x: Tensor) -> Tensor:
    zero, live = net.zero(x), net.live(x)
    total = zero.add_(live)
    result: Tensor = zero + total
    return result


def early_write(net: Sum, x: Tensor) -> Tensor:
    zero, live = net.zero(x), net.live(x)
    zero.add_(live)
    result: Tensor = live * 2 + zero
    return result


def through_a_view(net: Sum, x: Tensor) -> Tensor:
    zero, live = net.zero(x), net.live(x)
    view = zero.view(zero.shape)
    zero += live
    result: Tensor = zero + view
    return result


def through_a_module(net: Sum, x: Tensor) -> Tensor:
    """Without noise, dropout returns its argument."""
    live = net.live(x)
    total = net.drop(live) + net.zero(x)
    result: Tensor = net.relu(total) + live
    return result


def shared_with_a_reader(net: Sum, x: Tensor) -> Tensor:
    live = net.live(x)
    total = live + net.zero(x)
    result: Tensor = net.relu(total) - live
    return result


def in_its_own_memory(net: Sum, x: Tensor) -> Tensor:
    live = net.live(x)
    total = live.add_(net.zero(x))
    net.relu(total)
    result: Tensor = live * 3
    return result


def half_of_it(net: Sum, x: Tensor) -> Tensor:
    """An in-place op whose result nobody reads, on a view."""
    live = net.live(x)
    F.relu_(live[:, :3])
    result: Tensor = live + net.zero(x)
    return result


GONE: dict[str, Function] = {
    "x + 0": lambda net, x: net.live(x) + net.zero(x),
    "0 + x": lambda net, x: net.zero(x) + net.live(x),
    "x - 0": lambda net, x: net.live(x) - net.zero(x),
    "torch.add": lambda net, x: torch.add(net.zero(x), net.live(x)),
    "torch.sub": lambda net, x: torch.sub(net.live(x), net.zero(x)),
    "add_": lambda net, x: net.live(x).add_(net.zero(x)),
    "0 add_": lambda net, x: net.zero(x).add_(net.live(x)),
    "zero of a product": lambda net, x: net.live(x) + net.zero(x) * torch.sigmoid(net.live(x)),
    "through a module": through_a_module,
    "shared with a reader": shared_with_a_reader,
    "in its own memory": in_its_own_memory,
    "half of it": half_of_it,
}
STAYS: dict[str, Function] = {
    "0 - x": lambda net, x: net.zero(x) - net.live(x),
    "not a number": lambda net, x: torch.add(net.live(x), net.zero(x), alpha=2),
    "broadcast": lambda net, x: net.zero(x) + net.live(x).mean((2, 3), keepdim=True),
    "type": lambda net, x: net.live(x).float() + net.zero(x),
    "late write": late_write,
    "early write": early_write,
    "through a view": through_a_view,
}


@pytest.mark.parametrize("name", GONE)
def test_gone(name: str) -> None:
    assert len(prune(Sum(GONE[name]).double()).report.branches) == 1


@pytest.mark.parametrize("name", STAYS)
def test_stays(name: str) -> None:
    net = Sum(STAYS[name]).double()
    if name == "type":
        net.last = net.last.double()
    assert prune(net).report.branches == ()


class OneMode(nn.Module):
    """The branch is multiplied by zero in one of the modes."""

    def __init__(self, *, zero_in_training: bool) -> None:
        super().__init__()
        self.zero_in_training = zero_in_training
        self.conv1, self.conv2, self.last = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(x)
        branch = self.conv2(x)
        if self.training == self.zero_in_training:
            branch = branch * torch.zeros_like(branch)
        return self.last(F.relu(h + branch))  # type: ignore[no-any-return]


@pytest.mark.parametrize("zero_in_training", [False, True])
def test_a_branch_that_is_zero_in_one_mode_stays_in_the_other(zero_in_training: bool) -> None:  # noqa: FBT001
    result = prune(OneMode(zero_in_training=zero_in_training).double())
    assert "conv2.weight" in result.module.state_dict()


def test_a_constant_that_noise_moves_is_no_zero() -> None:
    class Noise(Sum):
        def forward(self, x: Tensor) -> Tensor:
            h = torch.sigmoid(self.zero(x))
            return self.last(self.live(x) + (self.drop(h) - h))  # type: ignore[no-any-return]

    net = Noise(lambda net, x: x).double()
    assert fxc.prune(net, image()).report.branches == ("eval:add",)
    net.drop.p = 0.5
    assert fxc.prune(net, image()).report.branches == ()


def test_what_is_left_of_a_module_keeps_its_parts() -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.conv = nn.Parameter(torch.zeros(6, 1, 1)), nn.Conv2d(3, 6, 1)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part, self.last = Part(), nn.Conv2d(6, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = self.part.conv(x)
            return self.last(h + torch.sigmoid(h) * self.part.scale)  # type: ignore[no-any-return]

    result = prune(Whole().double())
    assert result.report.branches == ("eval:add",)
    assert "part.conv.weight" in result.module.state_dict()


class Inside(nn.Module):
    """A sum inside of a branch goes before the branch does, and others after it; all leave copies, as one op writes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.branch, self.last = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 2, 1)
        self.shifts = nn.ParameterList([nn.Parameter(torch.zeros(6, 1, 1)) for _ in range(3)])
        nn.init.zeros_(self.branch.weight)
        nn.init.zeros_(self.branch.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        inside = x.exp() + self.shifts[0]
        x = x + self.branch(inside * x)
        x = (x + self.shifts[1]) + self.shifts[2]
        return self.last(x.relu_()) + x.mean()  # type: ignore[no-any-return]


def test_copies_are_called_alike_when_a_file_is_loaded(tmp_path: Path) -> None:
    """Names that a branch has taken along are free again, in a copy of the graph."""
    torch.manual_seed(0)
    net = Inside().double().eval()
    fresh = copy.deepcopy(net)
    module = prune(net).module
    assert module.code.count("clone") >= 2
    fxc.save(module, tmp_path / "net.fxc")
    loaded = fxc.load(tmp_path / "net.fxc", model=fresh)
    x = image()
    assert torch.equal(module(x), loaded(x))


class Places(nn.Module):
    """A parameter beside what is computed, and a weight that is computed from two readings of one."""

    def __init__(self) -> None:
        super().__init__()
        self.place, self.square = nn.Parameter(torch.randn(5, 8)), nn.Parameter(torch.randn(8, 8))
        self.first, self.other = nn.Linear(6, 8, bias=False), nn.Linear(6, 8)
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = (self.place + self.first(x)) * self.other(x)
        y: Tensor = self.last(F.linear(h, (self.square + self.square.T) / 2))
        return y


@pytest.mark.parametrize("dead", ["first.weight", "place", "square"])
@pytest.mark.parametrize("late", [False, True])
def test_an_operand_that_is_a_parameter_is_found_again(dead: str, late: bool, tmp_path: Path) -> None:  # noqa: FBT001
    net, x = Places(), torch.randn(5, 6)
    original = copy.deepcopy(net)
    if dead == "square":
        nn.init.zeros_(net.square)
    compressed = fxc.compress(net, x)
    set_bits(compressed, dead, list(range(len(quantizer(compressed, dead).bits))))
    compressed.step()
    if not late:
        compressed.prune()
    again = fxc.compress(original, x)
    again.load_state_dict(compressed.state_dict())
    final = compressed.finalize().eval()
    gone = "add" not in {node.name for node in final.graph.nodes}
    assert gone == (dead == "first.weight")  # with one row in x, the result has the five of the table all the same
    fxc.save(final, tmp_path / "net.fxc")
    assert torch.equal(fxc.load(tmp_path / "net.fxc", original)(x), final(x))
    assert torch.equal(again.finalize().eval()(x), final(x))
