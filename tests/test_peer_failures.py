"""Networks on which other libraries that prune structures crash, do not finish, or change what is computed.

Of each network 30 % of what may go is made dead. Then it goes, and the output stays what it was; and when the same
channels go while they are alive, the output changes.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.maxvit import MaxVit
from torchvision.models.shufflenetv2 import InvertedResidual

import fxcompress as fxc
from fxcompress.channels.analysis import Analysis
from fxcompress.channels.prepare import prepare
from fxcompress.passes.rewrite import carry_out
from tests.exactness import TOLERANCE, atoms_of, difference, forced, kill, outputs, removable_units
from tests.networks import randomise

C = 16


class Between(nn.Module):
    """conv - an op - conv.

    Args:
        op: takes (N, 16, 8, 8); may use what else the network has.
        width: of what the op returns.
    """

    def __init__(self, op: Callable[["Between", Tensor], Tensor], width: int = C) -> None:
        super().__init__()
        self.op = op
        self.first, self.last = nn.Conv2d(3, C, 3, padding=1), nn.Conv2d(width, 5, 3)
        self.perm = torch.randperm(C).tolist()
        self.parts = nn.ModuleList(nn.Conv2d(C // 4, C // 4, 3, padding=1) for _ in range(3))
        self.square = nn.Parameter(torch.randn(C, C))
        self.gain = nn.Parameter(torch.rand(C, 1, 1) + 0.5)
        self.norm, self.deep = nn.GroupNorm(8, C), nn.Conv2d(C, 2 * C, 3, padding=1, groups=C)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.op(self, self.first(x)))  # type: ignore[no-any-return]


def shuffle(net: Between, h: Tensor) -> Tensor:
    n, c, height, width = h.shape
    return h.view(n, 4, c // 4, height, width).transpose(1, 2).reshape(n, c, height, width)


def res2net(net: Between, h: Tensor) -> Tensor:
    """Each part is added to the next one before its convolution."""
    first, *rest = h.chunk(4, 1)
    done = [first]
    for conv, part in zip(net.parts, rest, strict=True):
        done.append(conv(part + done[-1]).relu())
    return torch.cat(done, 1)


def grow(net: Between, h: Tensor) -> Tensor:
    """A loop that concatenates to what it has."""
    for conv in net.parts:
        h = torch.cat([h, conv(h[:, -C // 4 :]).relu()], 1)
    return h


OPS: dict[str, tuple[Callable[[Between, Tensor], Tensor], int]] = {
    "channel shuffle by hand": (shuffle, C),
    "pad of the channels": (lambda net, h: F.pad(h, (0, 0, 0, 0, 2, 3)), C + 5),
    "group norm": (lambda net, h: F.relu(net.norm(h)), C),
    "flip": (lambda net, h: F.relu(h.flip(1)), C),
    "slice": (lambda net, h: h[:, 3:13], 10),
    "permuted index": (lambda net, h: h[:, net.perm], C),
    "pixel shuffle": (lambda net, h: F.pixel_shuffle(h, 2), C // 4),
    "parts of a Res2Net": (res2net, C),
    "concatenation in a loop": (grow, C + 3 * (C // 4)),
    "a parameter without a module": (lambda net, h: F.relu(h * net.gain), C),
    "einsum": (lambda net, h: torch.einsum("nchw,ck->nkhw", h, net.square), C),
    "depthwise multiplier": (lambda net, h: net.deep(h), 2 * C),
}


class Heads(nn.Module):
    """The attention of a ViT as timm writes it: one layer for q, k and v, and a size in the forward."""

    def __init__(self, dim: int = 24, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.embed, self.qkv, self.proj = nn.Linear(6, dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        n, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(n, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        attention = ((q @ k.transpose(-2, -1)) * self.scale).softmax(-1)
        return self.proj((attention @ v).transpose(1, 2).reshape(n, tokens, -1))  # type: ignore[no-any-return]


def image(size: int, seed: int = 0) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def swin(version: int) -> nn.Module:
    parts = torchvision.models.swin_transformer
    options = {"block": parts.SwinTransformerBlockV2, "downsample_layer": parts.PatchMergingV2} if version == 2 else {}
    net: nn.Module = parts.SwinTransformer(
        [2, 2], 16, [2, 1], [2, 4], [4, 4], stochastic_depth_prob=0.0, num_classes=5, **options
    )
    return net


def shufflenet() -> nn.Module:
    blocks = (InvertedResidual(8, 16, 2), InvertedResidual(16, 16, 1))
    return nn.Sequential(nn.Conv2d(3, 8, 3), *blocks, nn.Conv2d(16, 5, 1))


def vit() -> nn.Module:
    net: nn.Module = torchvision.models.VisionTransformer(16, 4, 2, 2, 16, 32, num_classes=5)
    return net


class Sequence(nn.Module):
    """linear - a recurrent layer - linear."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.embed, self.layer, self.read = nn.Linear(6, 12), layer, nn.Linear(C, 5)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.layer(self.embed(x))
        return self.read(out)  # type: ignore[no-any-return]


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    name: ((lambda op=op, width=width: Between(op, width)), lambda seed: image(8, seed))
    for name, (op, width) in OPS.items()
} | {
    "shufflenet": (shufflenet, lambda seed: image(16, seed)),
    "heads of a ViT by hand": (Heads, lambda seed: image(6, seed)[:, 0]),
    "lstm": (lambda: Sequence(nn.LSTM(12, C, batch_first=True)), lambda seed: image(6, seed)[:, 0]),
    "gru": (lambda: Sequence(nn.GRU(12, C, batch_first=True)), lambda seed: image(6, seed)[:, 0]),
    "heads of torchvision's ViT": (vit, lambda seed: image(16, seed)),
    "swin": (lambda: swin(1), lambda seed: image(16, seed)),
    "swin v2": (lambda: swin(2), lambda seed: image(16, seed)),
    "maxvit": (
        lambda: MaxVit((16, 16), 8, 2, [8], [1], 4, 0.0, num_classes=5),
        lambda seed: image(16, seed),
    ),
}


def build(name: str) -> tuple[nn.Module, Callable[[int], Tensor], Analysis, np.ndarray]:
    """A network, its inputs, its analysis, and 30 % of what may go."""
    torch.manual_seed(0)
    new, inputs = NETWORKS[name]
    net = randomise(new().double()).eval()
    with torch.no_grad():
        for parameter in net.parameters():  # also what starts as zero, and would be seen to be dead
            parameter.add_(0.1 * torch.randn_like(parameter))
    analysis = prepare(net, inputs(0))
    units = removable_units(analysis)
    chosen = np.random.default_rng(0).choice(units, max(1, round(0.3 * len(units))), replace=False)
    return net, inputs, analysis, chosen


def size(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_dead_channels_go_and_the_output_stays(name: str) -> None:
    net, inputs, analysis, chosen = build(name)
    check_live(net, inputs(0), analysis, chosen[:2])
    whole = size(net)
    kill(analysis, atoms_of(analysis, chosen))
    module = fxc.prune(net, inputs(0)).module
    assert size(module) < 0.95 * whole
    assert list(module.state_dict()) == list(net.state_dict())
    for x in (inputs(0), inputs(1)[:1]):
        assert difference(outputs(net, (x,)), outputs(module, (x,))) <= TOLERANCE


def check_live(net: nn.Module, x: Tensor, analysis: Analysis, chosen: np.ndarray) -> None:
    """The negative control: the same rewrite on channels that are alive goes through, and changes the output."""
    changed = [
        difference(outputs(net, (x,)), outputs(carry_out(analysis, forced(analysis, np.array([unit]))).module, (x,)))
        for unit in chosen
    ]
    assert max(changed) > 1e-5


CONSTANT: dict[str, Callable[[Between, Tensor], Tensor]] = {
    "sigmoid": lambda net, h: torch.sigmoid(h),
    "group norm": lambda net, h: net.norm(h),
    "sigmoid, padded": lambda net, h: F.pad(torch.sigmoid(h), (0, 0, 0, 0, 2, 3)),
}


@pytest.mark.parametrize("name", CONSTANT)
def test_constants_are_not_dropped(name: str) -> None:
    """A dead channel that is constant, and not zero, where it is read: it goes when it is folded, and only then."""
    torch.manual_seed(0)
    net = Between(CONSTANT[name], C + 5 if "padded" in name else C).double().eval()
    with torch.no_grad():
        for parameter in net.first.parameters():
            parameter[:4] = 0
        net.norm.bias.normal_()
    for fold, left in ((False, C), (True, C - 4)):
        module = fxc.prune(net, image(8), fold=fold).module
        assert difference(net(image(8, 1)), module(image(8, 1))) <= TOLERANCE
        assert module.get_parameter("first.weight").shape[0] == left
