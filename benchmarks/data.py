"""Real data for benchmarks.

The folder is named by ``--data`` or the environment variable ``FXCOMPRESS_DATA``. It holds a ``load.py`` with functions
such as ``cifar10("train")`` that give images as uint8 (N, H, W, C) and labels; or it is where torchvision keeps, or
puts, its copy of CIFAR-10.
"""

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def folder(named: str | None) -> Path:
    """The data folder.

    Raises:
        SystemExit: none is named, or there is no such folder.
    """
    path = Path(named or os.environ.get("FXCOMPRESS_DATA", ""))
    if not str(named or os.environ.get("FXCOMPRESS_DATA", "")) or not path.is_dir():
        raise SystemExit("name a folder with the data: --data FOLDER, or the environment variable FXCOMPRESS_DATA")
    return path


def module(root: Path, name: str) -> ModuleType:
    """A Python file of the data folder, as a module."""
    spec = importlib.util.spec_from_file_location(f"fxcompress_data_{name}", root / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def cifar10(root: Path, split: str, count: int | None = None) -> tuple[Tensor, Tensor]:
    """CIFAR-10 as float32 (N, 3, 32, 32), normalised, and labels (N,).

    Args:
        root: the data folder.
        split: ``"train"`` or ``"test"``.
        count: only so many, from the start.
    """
    if (root / "load.py").is_file():
        images, labels = module(root, "load").cifar10(split, count)
    else:
        datasets: Any = importlib.import_module("torchvision.datasets")
        found = datasets.CIFAR10(root, train=split == "train", download=True)
        images, labels = found.data[:count], found.targets[:count]
    pixels = torch.as_tensor(images).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return ((pixels - mean) / std).contiguous(), torch.as_tensor(labels, dtype=torch.long)


@dataclass(frozen=True, slots=True)
class Cropped:
    """Batches in random order, each image shifted by up to four pixels and half of them mirrored.

    Attributes:
        x, y: all images (N, 3, 32, 32) and labels (N,).
        size: images of a batch.
        generator: of the order, the shifts and the mirrors.
    """

    x: Tensor
    y: Tensor
    size: int
    generator: torch.Generator

    def __len__(self) -> int:
        return len(self.x) // self.size

    def __iter__(self) -> Any:  # noqa: ANN401
        order = torch.randperm(len(self.x), generator=self.generator)
        for i in range(len(self)):
            chosen = order[i * self.size : (i + 1) * self.size]
            yield self._moved(self.x[chosen]), self.y[chosen]

    def _moved(self, x: Tensor) -> Tensor:
        """One shift for each eighth of a batch, which is as good and much faster than one for each image."""
        padded = torch.nn.functional.pad(x, (4, 4, 4, 4))
        parts = []
        for part in padded.chunk(8):
            top, left, flip = (int(n) for n in torch.randint(0, 9, (3,), generator=self.generator))
            moved = part[:, :, top : top + x.shape[2], left : left + x.shape[3]]
            parts.append(moved.flip(3) if flip % 2 else moved)
        return torch.cat(parts)
