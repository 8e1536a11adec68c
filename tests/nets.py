"""Small networks for the tests of training."""

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcompress.quantizer import Quantizer
from fxcompress.training.compressed import CompressedModule

N = TypeVar("N", bound=nn.Module)


def made_dead(net: N) -> N:
    """``net`` in float64, in evaluation, with channel 1 of its layer ``first`` at zero."""
    net = net.double().eval()
    with torch.no_grad():
        for parameter in net.get_submodule("first").parameters():
            parameter[1] = 0
    return net


class Block(nn.Module):
    """x + bn2(conv2(relu(bn1(conv1(x)))))."""

    def __init__(self, channels: int, *, bias: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=bias)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=bias)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))  # type: ignore[no-any-return]


class ResidualNet(nn.Module):
    """A stem, two blocks and a classifier."""

    def __init__(self, channels: int = 8, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, bias=False), nn.BatchNorm2d(channels), nn.ReLU())
        self.block1 = Block(channels)
        self.block2 = Block(channels, bias=True)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.block2(F.relu(self.block1(self.stem(x)))))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def quantizer(net: nn.Module, weight: str) -> Quantizer:
    """The quantizer of a weight."""
    found = net.get_submodule(f"{weight}_quantizer")
    assert isinstance(found, Quantizer)
    return found


def set_bits(net: nn.Module, weight: str, channels: list[int], bits: float = 0.0) -> None:
    """Set the bits of some channels of a weight."""
    with torch.no_grad():
        quantizer(net, weight).bits[channels] = bits


def kill(net: CompressedModule) -> None:
    """Channels of a ResidualNet die that can go at once; the last convolution of a block takes its branch along."""
    set_bits(net, "stem.0.weight", [1])
    set_bits(net, "block1.conv1.weight", [0, 3])
    set_bits(net, "block2.conv2.weight", list(range(8)))
    for name in ("stem.1", "block1.bn1", "block1.bn2", "block2.bn1", "block2.bn2", "block2.conv1", "block2.conv2"):
        nn.init.zeros_(net.get_parameter(f"{name}.bias"))
    net.step()


def lose(net: CompressedModule, seed: int, share: float) -> None:
    """A share of all bits, and most biases, become zero; and a step is made."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, Quantizer):
                module.bits[torch.rand(module.bits.shape, generator=generator) < share] = 0.0
        for name, parameter in net.named_parameters():
            if name.endswith("bias"):
                parameter[torch.rand(parameter.shape, generator=generator) < 0.8] = 0.0
    net.step()


def batch(classes: int = 5, size: int = 32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs (N, 3, 10, 10) in float64 with labels that can be learnt from them."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(classes, (size,), generator=generator)
    patterns = torch.randn(classes, 3, 10, 10, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    noise = torch.randn(size, 3, 10, 10, generator=generator, dtype=torch.float64)
    return patterns[target] + 0.3 * noise, target


class Pick(nn.Module):
    """Reads values, so that it can only be compressed in pieces."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3))
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        found = self.body(x).mean((2, 3))
        return self.head(found[found.sum(1) >= float(found.min())])  # type: ignore[no-any-return]
