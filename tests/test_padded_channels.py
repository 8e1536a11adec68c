"""Channels that a tensor is padded with: shortcuts without parameters, and whatever else reads them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

import fxcompress as fxc
from fxcompress.channels.prepare import prepare
from fxcompress.quantizer import Quantizer
from tests.exactness import TOLERANCE, atoms_of, difference, kill, outputs, removable_units
from tests.networks import randomise

X = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
OTHER = torch.randn(3, 3, 12, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, before: int, value: float) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.norm2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.amounts, self.value = (0, 0, 0, 0, before, outputs - inputs - before), value

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return (h + pad(x[:, :, ::2, ::2], self.amounts, "constant", self.value)).relu()


class ShortcutNet(nn.Module):
    """As the residual networks for CIFAR-10 are: what is missing in a shortcut is zero."""

    def __init__(self, before: int = 4, value: float = 0.0) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.first, self.second = Block(8, 16, before, value), Block(16, 32, 2 * before, value)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(self.first(self.norm(self.stem(x)).relu()))
        return self.head(h.mean((2, 3)))  # type: ignore[no-any-return]


def build(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return randomise(make().double()).eval()


def dead(net: nn.Module, share: float, seed: int) -> nn.Module:
    """The network with a share of its removable units dead."""
    analysis = prepare(net, X)
    units = removable_units(analysis)
    chosen = units[np.random.default_rng(seed).random(len(units)) < share]
    kill(analysis, atoms_of(analysis, chosen))
    return net


def alive_rows(net: nn.Module, name: str) -> int:
    return int((net.get_parameter(name).detach().flatten(1) != 0).any(dim=1).sum())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("before", [4, 0, 8, 1])
def test_padded_shortcuts_lose_channels(before: int, seed: int, tmp_path: Path) -> None:
    net = dead(build(lambda: ShortcutNet(before)), 0.4, seed)
    result = fxc.prune(net, X).module
    for training in (False, True):
        for x in (X, OTHER):
            assert difference(outputs(net, (x,), training=training), outputs(result, (x,), training=training)) <= 1e-9
    for name in ("stem.weight", "first.conv2.weight", "second.conv2.weight"):
        left = alive_rows(net, name)
        assert 0 < left == result.get_parameter(name).shape[0] < net.get_parameter(name).shape[0]
    fxc.save(result, tmp_path / "net.fxc")
    assert torch.equal(fxc.load(tmp_path / "net.fxc", ShortcutNet(before).double())(X), result(X))


def test_all_parameters_are_in_removable_groups() -> None:
    graph = fxc.ChannelGraph.of(ShortcutNet(), X.float())
    assert "padded" not in str(graph)
    assert graph.share >= 0.999


@pytest.mark.parametrize("seed", range(3))
def test_step_by_step(seed: int) -> None:
    net = build(ShortcutNet)
    dead(net, 0.3, seed)
    once = fxc.prune(net, X).module
    assert isinstance(once, nn.Module)
    dead(once, 0.3, seed + 10)
    twice = fxc.prune(once, X).module
    assert difference(outputs(once, (OTHER,)), outputs(twice, (OTHER,))) <= TOLERANCE
    for name in ("stem.weight", "first.conv2.weight", "second.conv2.weight"):
        assert twice.get_parameter(name).shape[0] == alive_rows(once, name)


def test_a_single_channel_is_left_to_pad() -> None:
    """A dim of one entry has no labels."""
    net = build(ShortcutNet)
    analysis = prepare(net, X)
    kill(analysis, atoms_of(analysis, np.unique(analysis.component[analysis.atoms["stem.weight"][0].numpy()[1:]])))
    assert alive_rows(net, "stem.weight") == 1
    result = fxc.prune(net, X).module
    assert result.get_parameter("stem.weight").shape[0] == 1
    assert result.get_parameter("first.conv2.weight").shape[0] == 9
    assert difference(outputs(net, (OTHER,)), outputs(result, (OTHER,))) <= TOLERANCE


@pytest.mark.parametrize("fold", [False, True])
def test_what_is_padded_with_another_number_is_no_zero(*, fold: bool) -> None:
    net = dead(build(lambda: ShortcutNet(4, 0.5)), 0.4, 0)
    result = fxc.prune(net, X, fold=fold).module
    assert difference(outputs(net, (OTHER,)), outputs(result, (OTHER,))) <= TOLERANCE


class Reads(nn.Module):
    """A convolution that reads what was made of a padded tensor."""

    def __init__(self, op: Callable[[Tensor], Tensor], width: int) -> None:
        super().__init__()
        self.first, self.op, self.second, self.last = nn.Conv2d(3, 8, 1), op, nn.Conv2d(width, 6, 3), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.op(self.first(x))).relu())  # type: ignore[no-any-return]


OPS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "plain": (lambda h: pad(h, (0, 0, 0, 0, 2, 3)), 13),
    "channels and borders": (lambda h: pad(h, (1, 2, 0, 1, 2, 3)), 13),
    "after an activation": (lambda h: pad(h, (0, 0, 0, 0, 2, 3)).relu() * 2, 13),
    "a constant of an activation": (lambda h: torch.sigmoid(pad(h, (0, 0, 0, 0, 2, 3))), 13),
    "slices": (lambda h: pad(h, (0, 0, 0, 0, 2, 3))[:, 1:11], 10),
    "flip": (lambda h: pad(h, (0, 0, 0, 0, 2, 3)).flip(1), 13),
    "cat": (lambda h: torch.cat([pad(h, (0, 0, 0, 0, 1, 0)), h], 1), 17),
    "twice": (lambda h: pad(pad(h, (0, 0, 0, 0, 1, 0)), (0, 0, 0, 0, 2, 2)), 13),
    "cropped": (lambda h: pad(h, (0, 0, 0, 0, -1, 2)), 9),
    "by sizes": (lambda h: pad(h, (0, 0, 0, 0, 0, h.shape[1] // 2)), 12),
    "last dim": (lambda h: pad(h.permute(0, 2, 3, 1), (2, 3)).permute(0, 3, 1, 2), 13),
    "positional mode": (lambda h: pad(h, (0, 0, 0, 0, 2, 3), "constant"), 13),
    "repeated borders": (lambda h: pad(h, (1, 1, 1, 1), mode="reflect"), 8),
    "shifted sum": (lambda h: pad(h, (0, 0, 0, 0, 0, 1)) + pad(h, (0, 0, 0, 0, 1, 0)), 9),
    "outer sum": (lambda h: pad(h, (0, 0, 0, 0, 0, 8)) + pad(h, (0, 0, 0, 0, 8, 0)), 16),
}


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("options", [{}, {"fold": True}])
def test_whoever_reads_them_reads_the_same(name: str, options: dict[str, bool]) -> None:
    op, width = OPS[name]
    net = build(lambda: Reads(op, width))
    with torch.no_grad():
        for tensor in (net.get_parameter("first.weight"), net.get_parameter("first.bias")):
            tensor[[0, 3, 4, 7]] = 0
    result = fxc.prune(net, X, **options).module  # type: ignore[arg-type]
    for x in (X, OTHER):
        assert difference(outputs(net, (x,)), outputs(result, (x,))) <= TOLERANCE
    if name in {"plain", "channels and borders", "after an activation", "twice", "last dim", "flip", "outer sum"}:
        columns = 2 * 4 if name == "outer sum" else 4  # what is padded goes as well
        assert result.get_parameter("first.weight").shape[0] == 4
        assert result.get_parameter("second.weight").shape[1] == columns


def test_they_go_in_training() -> None:
    torch.manual_seed(0)
    net = fxc.compress(ShortcutNet(), X.float())
    optimizer = torch.optim.Adam(net.param_groups())
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, Quantizer) and module.bits.numel() > 6:
                module.bits[1::2] = 0
        for name, parameter in net.named_parameters():
            if name.endswith("bias") and "head" not in name:
                parameter.zero_()
    net.step()
    net.eval()
    before = net(X.float())
    assert net.prune(optimizer).modified
    assert difference(before, net(X.float())) <= 1e-5
    net.train()
    net(X.float()).sum().backward()
    optimizer.step()
    net.step()
    assert net.get_parameter("first.conv2.weight").shape[0] < 16


class Windows(nn.Module):
    """Pads places up to whole windows, as many as it takes: on the example along one of two dims, and along none."""

    def __init__(self, beside: str) -> None:
        super().__init__()
        self.beside = beside
        self.made, self.out = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.made(x)
        rows, columns = (-h.shape[1]) % 4, (-h.shape[2]) % 4
        value = {"zero": 0.0, "left out": None, "rows": rows}[self.beside]
        more = {} if value is None else {"value": value}
        result: Tensor = self.out(pad(h, (0, 0, 0, columns, 0, rows), **more))
        return result


@pytest.mark.parametrize("beside", ["zero", "left out", "rows"])
@pytest.mark.parametrize("size", [(4, 4), (4, 6), (5, 7)])
def test_amounts_that_sizes_decide_say_nothing_of_what_is_put_there(beside: str, size: tuple[int, int]) -> None:
    """One of them may be 0 as well."""
    torch.manual_seed(0)
    net = Windows(beside).double()
    with torch.no_grad():
        net.made.weight[:3] = 0
        net.made.bias[:3] = 0
    small = fxc.prune(net, torch.randn(2, *size, 3, dtype=torch.float64)).module
    assert small.get_parameter("made.weight").shape[0] == (8 if beside == "rows" else 5)
    for other in [(4, 4), (5, 7), (3, 2)]:
        x = torch.randn(2, *other, 3, dtype=torch.float64)
        assert difference(small(x), net(x)) < 1e-9


class Gated(nn.Module):
    """A gate reads zeros beside channels of which nothing is known, and multiplies them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down, self.up = nn.Conv2d(3, 7, 1), nn.Conv2d(10, 4, 1), nn.Conv2d(4, 10, 1)
        self.last = nn.Conv2d(10, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = pad(self.first(x), (0, 0, 0, 0, 1, 2))
        gate = self.up(self.down(h.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.last(gate * h)  # type: ignore[no-any-return]


def test_zeros_beside_channels_that_are_alive_are_known() -> None:
    torch.manual_seed(0)
    net = Gated().double().eval()
    pruned = fxc.prune(net, X).module
    assert pruned.get_parameter("last.weight").shape[1] == 7
    assert pruned.get_parameter("up.weight").shape[0] == 7
    for x in (X, OTHER):
        assert difference(outputs(net, (x,)), outputs(pruned, (x,))) <= TOLERANCE
