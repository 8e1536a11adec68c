"""The demo's data and network: scikit-learn's bundled digits, 8 x 8 pixels, and a small residual conv net."""

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcompress.errors import FxCompressError


@dataclass(frozen=True, slots=True)
class Digits:
    """Images (n, 1, 8, 8) float32 in [-1, 1] with labels (n,) int64: to train on and to test on."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor

    def accuracy(self, net: nn.Module) -> float:
        """Share of the test images that the network gets right."""
        return float((net(self.test_x).argmax(1) == self.test_y).float().mean())


def load_digits(validation: int | None = None) -> Digits:
    """A quarter of the images, drawn evenly over the classes and always the same, is for testing.

    Args:
        validation: leave the test images out altogether, and draw another quarter from the rest by this seed, to choose
            settings by.

    Raises:
        FxCompressError: scikit-learn is missing.
    """
    try:
        datasets: Any = importlib.import_module("sklearn.datasets")
        selection: Any = importlib.import_module("sklearn.model_selection")
    except ImportError as error:
        raise FxCompressError('the demo needs scikit-learn: pip install "fxcompress[demo]"') from error
    data = datasets.load_digits()
    x = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    y = torch.tensor(data.target)
    train, test = selection.train_test_split(range(len(x)), test_size=0.25, random_state=0, stratify=data.target)
    if validation is not None:
        train, test = selection.train_test_split(
            train, test_size=0.25, random_state=validation, stratify=data.target[train]
        )
    return Digits(x[train], y[train], x[test], y[test])


@dataclass(frozen=True, slots=True)
class Batches:
    """Batches in random order, most images turned, scaled, sheared and shifted a little."""

    x: Tensor
    y: Tensor
    size: int = 96

    def __len__(self) -> int:
        return len(self.x) // self.size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.x))
        for i in range(len(self)):
            chosen = order[i * self.size : (i + 1) * self.size]
            yield warp(self.x[chosen]), self.y[chosen]


def warp(x: Tensor) -> Tensor:
    """Images (n, 1, 8, 8) under random affine maps: +-0.2 rad, +-12 % in size, +-0.2 of shear, +-0.8 pixels.

    Four in ten stay as they are, since such are what the network is tested on: the statistics of batch norm ought to be
    theirs too.
    """
    angle, shear = _spread(len(x)) * 0.2, _spread(len(x)) * 0.2
    width, height = 1 + _spread(len(x)) * 0.12, 1 + _spread(len(x)) * 0.12
    shift_x, shift_y = _spread(len(x)) * 0.2, _spread(len(x)) * 0.2
    first = torch.stack([width * angle.cos(), shear - angle.sin(), shift_x], 1)
    second = torch.stack([angle.sin(), height * angle.cos(), shift_y], 1)
    grid = F.affine_grid(torch.stack([first, second], 1), list(x.shape), align_corners=False)
    as_is = torch.rand(len(x), 1, 1, 1) < 0.4
    return torch.where(as_is, x, F.grid_sample(x + 1, grid, align_corners=False) - 1)


def _spread(count: int) -> Tensor:
    return torch.rand(count) * 2 - 1


class ConvNorm(nn.Sequential):
    """3 x 3 convolution, batch norm, ReLU. The statistics follow fast, as bits change what they are statistics of."""

    def __init__(self, inputs: int, outputs: int) -> None:
        conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outputs, momentum=0.25), nn.ReLU())


class DigitsNet(nn.Module):
    """Seven convolutions of 24 to 96 channels, two of them in a residual branch, and a linear layer.

    Takes (N, 1, H, W) and gives (N, 10).
    """

    def __init__(self) -> None:
        super().__init__()
        self.prep, self.layer1, self.layer2 = ConvNorm(1, 24), ConvNorm(24, 32), ConvNorm(32, 64)
        self.branch = nn.Sequential(ConvNorm(64, 64), ConvNorm(64, 64))
        self.layer3, self.layer4 = ConvNorm(64, 96), ConvNorm(96, 96)
        self.linear = nn.Linear(96, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = self.layer2(F.max_pool2d(self.layer1(self.prep(x)), 2))
        x = self.layer4(self.layer3(F.max_pool2d(x + self.branch(x), 2)))
        result: Tensor = self.linear(F.adaptive_max_pool2d(x, 1).flatten(1))
        return result
