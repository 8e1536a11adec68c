"""Networks that lose nearly all: torch computes by other paths on few channels, and that must keep nothing."""

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.channels.prepare import prepare
from tests.attention import Attention, Form
from tests.exactness import TOLERANCE, atoms_of, difference, kill, outputs, removable_units


def attention(form: Form) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 12, 1), Attention(12, form, 64), nn.ReLU(), nn.Conv2d(12, 4, 1))


def swin() -> nn.Module:
    net: nn.Module = torchvision.models.SwinTransformer(
        patch_size=[4, 4], embed_dim=24, depths=[2, 2], num_heads=[2, 4], window_size=[4, 4], num_classes=5
    )
    return net


def maxvit() -> nn.Module:
    net: nn.Module = torchvision.models.MaxVit(
        input_size=(32, 32),
        stem_channels=8,
        partition_size=4,
        block_channels=[16, 24],
        block_layers=[1, 1],
        head_dim=8,
        stochastic_depth_prob=0.0,
        num_classes=5,
    )
    return net


class Turned(nn.Module):
    """A linear layer over the channels of an image that was turned, as norms and mixers of channels read them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mix, self.last = nn.Conv2d(3, 12, 3), nn.Linear(12, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.mix(self.first(x).permute(0, 2, 3, 1)).relu().flatten(1, 2))  # type: ignore[no-any-return]


NETS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "swin": (swin, 32),
    "maxvit": (maxvit, 32),
    "turned": (Turned, 8),
    "attention": (lambda: attention(Form(4, 6, 5)), 8),
    "attention by einsum": (lambda: attention(Form(4, 6, 5, "einsum")), 8),
    "attention over channels": (lambda: attention(Form(4, 6, 6, "cross")), 8),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", NETS)
def test_nothing_stays_because_of_how_torch_computes_it(name: str, seed: int) -> None:
    make, size = NETS[name]
    torch.manual_seed(seed)
    net, x = make().double().eval(), torch.randn(2, 3, size, size, dtype=torch.float64)
    analysis = prepare(net, x)
    units = removable_units(analysis)
    kill(analysis, atoms_of(analysis, units[np.random.default_rng(seed).random(len(units)) < 0.93]))
    result = fxc.prune(net, x)
    assert difference(outputs(net, (x,)), outputs(result.module, (x,))) <= TOLERANCE
    assert "rewritten" not in str(result.report)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (net, result.module))
    assert after < 0.5 * before


class AmongDims(nn.Module):
    """Attention among the dims of each head, over the tokens: all dims of several heads stay, those of one may go."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 9) for _ in range(3))
        self.out = nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, 3)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = v @ (k.transpose(-1, -2) @ q).softmax(-2)
        return self.out(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class BehindOthers(AmongDims):
    """The same behind an attention that keeps all of its heads."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, 2)).transpose(1, 2) for layer in self.before)
        return super().forward(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("make", [AmongDims, BehindOthers])
def test_what_went_one_after_the_other_is_loaded(make: type[AmongDims], tmp_path: Path) -> None:
    """Of a fresh network not all of it may go at once: two heads, and then dims of the one that is left."""
    model, x = make().double().eval(), torch.randn(2, 5, 4, dtype=torch.float64)
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        for layer in (model.q, model.k, model.v):
            assert layer.bias is not None
            layer.weight[3:], layer.bias[3:] = 0, 0
        model.out.weight[:, 3:] = 0
    first = fxc.prune(model, x).module
    assert first.get_parameter("q.weight").shape == (3, 4)
    with torch.no_grad():
        for name in ("q.weight", "q.bias"):
            first.get_parameter(name)[1:] = 0
        first.get_parameter("out.weight")[:, 1:] = 0
    second = fxc.prune(first, x).module
    assert second.get_parameter("q.weight").shape == (1, 4)
    assert difference(second(x), first(x)) <= 1e-9
    fxc.save(second, tmp_path / "net.fxc")
    loaded = fxc.load(tmp_path / "net.fxc", fresh, (x,))
    assert torch.equal(loaded(x), second(x))


class Rotary(nn.Module):
    """Four heads of queries share the keys and values of two, the dims of which a rotation ties together."""

    def __init__(self, repeat: str) -> None:
        super().__init__()
        self.repeat = repeat
        self.q, self.out = nn.Linear(6, 16), nn.Linear(16, 3)
        self.k, self.v = nn.Linear(6, 8), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        angles = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * torch.tensor([1.0, 0.1, 1.0, 0.1], dtype=x.dtype)
        q, k = (t * angles.cos() + torch.cat([-t[..., 2:], t[..., :2]], -1) * angles.sin() for t in (q, k))
        if self.repeat == "grouped":
            q = q.unflatten(1, (2, 2))
            k, v = k[:, :, None], v[:, :, None]
        elif self.repeat == "interleaved":
            k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        elif self.repeat == "expanded":
            k, v = (t[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for t in (k, v))
        if self.repeat == "fused":
            y = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        else:
            y = (q @ k.mT / 2).softmax(-1) @ v
        y = y.flatten(1, 2) if self.repeat == "grouped" else y
        return self.out(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


@pytest.mark.parametrize("dead", [[0, 1, 2, 3], [4, 5, 6, 7], [1, 2, 4, 5, 6, 7], [0, 1, 2, 3, 5, 6, 7]])
@pytest.mark.parametrize("repeat", ["interleaved", "expanded", "grouped", "fused"])
def test_one_head_may_be_left_that_others_share(repeat: str, dead: list[int], tmp_path: Path) -> None:
    """Its dims go together only, and so the last of the heads are several channels, and no single one."""
    net, x = Rotary(repeat).double().eval(), torch.randn(2, 5, 6, dtype=torch.float64)
    with torch.no_grad():
        net.v.weight[dead], net.v.bias[dead] = 0, 0
    result = fxc.prune(net, x).module
    for inputs in (x, torch.randn(3, 7, 6, dtype=torch.float64)):
        assert difference(outputs(net, (inputs,)), outputs(result, (inputs,))) <= TOLERANCE
    left = [result.get_parameter(f"{name}.weight").shape[0] for name in "qkv"]
    assert left == [8, 4, 8 - len(dead)]
    fxc.save(result, tmp_path / "net.fxc")
    loaded = fxc.load(tmp_path / "net.fxc", model=Rotary(repeat).double())
    assert torch.equal(loaded(x), result(x))


@pytest.mark.parametrize("turn", [1, 2, 3])
def test_heads_that_meet_others_are_not_mistaken(turn: int) -> None:
    """Queries meet the keys of another head: what is left must meet the same, or stay."""

    class Rolled(Rotary):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (layer(x).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
            q = torch.cat([q[..., 2:], q[..., :2]], -1) + q
            k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
            y = (q.roll(turn, 1) @ k.mT).softmax(-1) @ v
            return self.out(y.roll(turn, 1).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    for dead in ([0, 1, 2, 3], [4, 5, 6, 7]):
        net, x = Rolled("").double().eval(), torch.randn(2, 5, 6, dtype=torch.float64)
        with torch.no_grad():
            net.v.weight[dead], net.v.bias[dead] = 0, 0
        result = fxc.prune(net, x).module
        assert difference(outputs(net, (x,)), outputs(result, (x,))) <= TOLERANCE
