"""Networks of residual blocks, some channels of which are zero on one path into the sum and not on the other."""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.exactness import TOLERANCE, difference, outputs
from tests.networks import randomise

Sum = Callable[[Tensor, Tensor], Tensor]


def in_place(x: Tensor, b: Tensor, *, minus: bool = False) -> Tensor:
    """``x += b`` or ``x -= b``."""
    if minus:
        x -= b
    else:
        x += b
    return x


SUMS: dict[str, Sum] = {
    "x + b": operator.add,
    "b + x": lambda x, b: b + x,
    "torch.add": torch.add,
    "add": lambda x, b: b.add(x),
    "alpha": lambda x, b: torch.add(x, b, alpha=0.5),
    "x - b": operator.sub,
    "sub": lambda x, b: torch.sub(x, b, alpha=2),
    "iadd": lambda x, b: in_place(x * 2, b),
    "add_": lambda x, b: b.add_(x),
    "isub": lambda x, b: in_place(x * 2, b, minus=True),
}


@dataclass
class Form:
    """What a block looks like.

    Attributes:
        join: how the paths are added.
        dead: the channels of the second path that are zero.
        last: what stands behind the last layer of that path.
        tokens: linear layers on channels that come last, behind a layer norm; otherwise convolutions.
        skip: the first path passes through a layer, too.
    """

    join: str
    dead: list[int]
    last: str = "norm"
    tokens: bool = False
    skip: bool = False


class Residual(nn.Module):
    """One block: a sum of two paths."""

    def __init__(self, channels: int, form: Form) -> None:
        super().__init__()
        self.form = form
        self.before = nn.LayerNorm(channels) if form.tokens else nn.BatchNorm2d(channels)
        layer: Any = nn.Linear if form.tokens else lambda i, o: nn.Conv2d(i, o, 3, padding=1)
        self.first, self.last = layer(channels, 5), layer(5, channels)
        self.skip = layer(channels, channels) if form.skip else nn.Identity()
        self.norm = nn.BatchNorm2d(channels) if form.last == "norm" and not form.tokens else nn.Identity()
        depthwise = form.last == "depthwise" and not form.tokens
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels) if depthwise else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W)."""
        if self.form.tokens:
            return self.sum(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return F.relu(self.sum(x))

    def sum(self, x: Tensor) -> Tensor:
        b = self.depthwise(self.norm(self.last(F.relu(self.first(self.before(x))))))
        b = F.gelu(b) if self.form.last == "activation" else b
        return SUMS[self.form.join](self.skip(x), b)

    def kill(self) -> None:
        """Zero the dead channels of the path, in both modes, and nothing else."""
        dead = self.form.dead
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            module, _, leaf = name.partition(".")
            if module in {"last", "norm", "depthwise"} and leaf in {"weight", "bias", "running_mean"}:
                tensor.data[dead] *= float(module != "last" and leaf == "weight")


class Residuals(nn.Module):
    """A stem, blocks, and a classifier."""

    def __init__(self, *forms: Form, channels: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3)
        self.blocks = nn.ModuleList(Residual(channels, form) for form in forms)
        self.fc = nn.Linear(channels, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def build(*forms: Form, seed: int = 0) -> Residuals:
    torch.manual_seed(seed)
    net = randomise(Residuals(*forms).double())
    assert isinstance(net, Residuals)
    with torch.no_grad():
        for block in net.blocks:
            assert isinstance(block, Residual)
            block.kill()
    return net


def image(n: int = 2, size: int = 7, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def zero(net: nn.Module, rows: list[int], *names: str) -> None:
    """Zero some entries along the first dim of parameters and buffers."""
    tensors = dict((*net.named_parameters(), *net.named_buffers()))
    with torch.no_grad():
        for name in names:
            tensors[name][rows] = 0


def widths(net: nn.Module) -> list[int]:
    """The channels of the second path of each block."""
    return [p.shape[0] for name, p in net.named_parameters() if name.endswith(".last.weight")]


def check_same(net: nn.Module, other: nn.Module, *inputs: Tensor) -> None:
    """The same outputs in both modes, of other batches and images too."""
    for x in inputs or (image(), image(1), image(3, 9)):
        for training in (False, True):
            expected = outputs(net, (x,), training=training)
            assert difference(expected, outputs(other, (x,), training=training)) <= TOLERANCE
