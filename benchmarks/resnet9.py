"""The network of the paper (arXiv 2301.13142): David Page's ResNet-9 for CIFAR-10, at any width."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


def conv_norm(inputs: int, outputs: int) -> nn.Sequential:
    """3 x 3 convolution without bias, batch norm, ReLU."""
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class ResNet9(nn.Module):
    """Takes (N, 3, 32, 32) and gives logits (N, 10).

    Args:
        prep, layer1, layer2, layer3: channels; by default those of the paper, 64 to 512.
        inner1, inner3: channels between the two convolutions of the residual branches.
    """

    def __init__(self, prep: int, layer1: int, layer2: int, layer3: int, inner1: int, inner3: int) -> None:
        super().__init__()
        self.prep = conv_norm(3, prep)
        self.layer1 = conv_norm(prep, layer1)
        self.branch1 = nn.Sequential(conv_norm(layer1, inner1), conv_norm(inner1, layer1))
        self.layer2 = conv_norm(layer1, layer2)
        self.layer3 = conv_norm(layer2, layer3)
        self.branch3 = nn.Sequential(conv_norm(layer3, inner3), conv_norm(inner3, layer3))
        self.linear = nn.Linear(layer3, 10, bias=False)

    @classmethod
    def of_width(cls, width: int) -> "ResNet9":
        """The network of the paper with ``width`` channels in place of its first 64."""
        return cls(width, 2 * width, 4 * width, 8 * width, 2 * width, 8 * width)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = F.max_pool2d(self.layer1(self.prep(x)), 2)
        x = F.max_pool2d(self.layer2(x + self.branch1(x)), 2)
        x = F.max_pool2d(self.layer3(x), 2)
        x = F.max_pool2d(x + self.branch3(x), 4).flatten(1)
        result: Tensor = self.linear(x) * 0.125
        return result


def accuracy(net: nn.Module, x: Tensor, y: Tensor, batch: int = 500) -> float:
    """Share of the images that ``net``, in the mode that it is in, gets right."""
    right: Any = sum((net(x[i : i + batch]).argmax(1) == y[i : i + batch]).sum() for i in range(0, len(x), batch))
    return float(right) / len(x)
