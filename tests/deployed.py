"""Finalized networks that have lost a part of their channels, as they go to other runtimes."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.quantizer import Quantizer
from tests.nets import ResidualNet


class Rms(nn.Module):
    """The residual stream loses channels, so that the mean under the norm has another number to divide by."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.out = nn.Linear(8, 16), nn.RMSNorm(16), nn.Linear(16, 4)
        self.inner = nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        h = h + self.inner(self.norm(h))
        return self.out(h * (h.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt())  # type: ignore[no-any-return]


class Lstm(nn.Module):
    """A recurrent layer between two linear ones."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn, self.out = nn.Linear(8, 12), nn.LSTM(12, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(F.relu(self.embed(x)))[0].mean(1))  # type: ignore[no-any-return]


class Run(nn.Module):
    """Decides on sizes, so that its graph comes from a run and holds checks."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 8, 3, stride=2), nn.ConvTranspose2d(8, 3, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(F.relu(self.down(x)))
        if y.shape[-2:] != x.shape[-2:]:
            y = F.pad(y, (0, x.shape[-1] - y.shape[-1], 0, x.shape[-2] - y.shape[-2]))
        joined: Tensor = x + y
        return joined


class Modes(nn.Module):
    """Asks whether it is in training, so that it has a graph for each mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(F.relu(self.first(x)), 0.3, self.training)
        return self.last(h * 2 if self.training else h)  # type: ignore[no-any-return]


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "sum": (ResidualNet, (3, 10, 10)),
    "rms": (Rms, (8,)),
    "heads": (encoder, (6, 16)),
    "lstm": (Lstm, (5, 8)),
    "run": (Run, (3, 11, 11)),
    "modes": (Modes, (8,)),
}


def finished(name: str, *, narrow: bool = False) -> tuple[nn.Module, Tensor]:
    """A finalized network that has lost a part of its channels, and a batch of two."""
    make, shape = NETS[name]
    torch.manual_seed(0)
    x = torch.randn(2, *shape)
    net = fxc.compress(make(), x)
    with torch.no_grad():
        for quantizer in (m for m in net.modules() if isinstance(m, Quantizer)):
            quantizer.bits[torch.rand_like(quantizer.bits) < 0.3] = 0
        for key, parameter in net.named_parameters():
            if key.endswith("bias"):
                parameter.zero_()
    net.step()
    net.prune()
    assert net.weights_left() < 1
    return net.finalize(narrow=narrow).eval(), x
