"""How near to its target a run ends: ``fit(target_size=...)`` on digits and on CIFAR-10."""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fxcompress as fxc
from benchmarks.data import Cropped, cifar10, folder
from benchmarks.record import Claim, Column, Record, Table, write
from benchmarks.resnet9 import ResNet9, accuracy
from fxcompress.demo.digits import Batches, DigitsNet, load_digits

COLUMNS = (
    Column("network", "network"),
    Column("target", "target", ".1%"),
    Column("size", "bits left", ".3%"),
    Column("distance", "distance, relative", "+.1%"),
    Column("weights", "weights left", ".1%"),
    Column("accuracy", "accuracy", ".1%"),
)


def measure(
    name: str, model: nn.Module, loader: Iterable[Any], target: float, options: dict[str, Any]
) -> dict[str, Any]:
    """One run."""
    result = fxc.fit(model, loader, nn.CrossEntropyLoss(), target_size=target, lr=5e-3, progress=False, **options)
    last = result.history[-1]
    return {
        "network": name, "target": target, "size": last.size, "distance": last.size / target - 1,
        "weights": last.weights, "accuracy": last.metric,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.targets", description=__doc__)
    parser.add_argument("--data", help="folder with CIFAR-10 (or the environment variable FXCOMPRESS_DATA)")
    parser.add_argument("--out", type=Path, help="folder for the results (benchmarks/results and docs/results)")
    parser.add_argument("--targets", type=float, nargs="+", default=[0.3, 0.1, 0.03, 0.01])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    digits = load_digits()
    root = folder(options.data)
    x, y = cifar10(root, "train", 5000)
    test = cifar10(root, "test", 1000)
    rows = []
    for target in options.targets:
        torch.manual_seed(options.seed)
        settings: dict[str, Any] = {"epochs": 30, "validate": digits.accuracy}
        rows.append(measure("demo, digits", DigitsNet(), Batches(digits.x, digits.y), target, settings))
        print(rows[-1], flush=True)
        torch.manual_seed(options.seed)
        settings = {"epochs": 8, "validate": lambda net: accuracy(net, *test)}
        images = Cropped(x, y, 128, torch.Generator().manual_seed(options.seed))
        rows.append(measure("ResNet-9 of width 16, 5,000 images", ResNet9.of_width(16), images, target, settings))
        print(rows[-1], flush=True)
    worst = max(abs(row["distance"]) for row in rows)
    chosen = {"targets": options.targets, "seed": options.seed}
    command = f"python -m benchmarks.targets --targets {' '.join(map(str, options.targets))} --seed {options.seed}"
    claims = [Claim("largest distance from the target, relative", worst, 0.05)]
    table = Table("Where runs end", COLUMNS, rows)
    print(write(Record("targets", "Runs with a target size", command, chosen, [table], claims), options.out))


if __name__ == "__main__":
    main(sys.argv[1:])
