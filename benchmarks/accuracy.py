"""The smallest ResNet-20 for CIFAR-10 that loses no more accuracy than was asked for, from pretrained weights."""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

import fxcompress as fxc
from benchmarks.data import cifar10, folder, module
from benchmarks.pretrained import batches, taught
from benchmarks.record import Claim, Column, Record, Table, write
from benchmarks.resnet9 import accuracy

FOUND = (
    Column("lost", "may be lost", ".1%"),
    Column("bits", "bits left", ".2%"),
    Column("weights", "weights left", ".1%"),
    Column("seen before", "float accuracy", ".1%"),
    Column("seen", "accuracy", ".1%"),
    Column("fresh before", "float accuracy, other images", ".1%"),
    Column("fresh", "accuracy, other images", ".1%"),
)
ROUNDS = (
    Column("lost", "may be lost", ".1%"),
    Column("round", "round", "d"),
    Column("target", "target", ".2%"),
    Column("bits", "bits left", ".2%"),
    Column("after", "accuracy", ".1%"),
    Column("kept", "kept"),
)
HALF = 500
"""Images that the search measures accuracy on; as many others have the last word."""


def searched(root: Path, lost: float, options: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rounds of one search, and what the network that it found is worth on images that it has not looked at."""
    net = module(root, "models").pretrained("resnet20").eval()
    x, y = cifar10(root, "test", 2 * HALF)

    def seen(found: torch.nn.Module) -> float:
        return accuracy(found, x[:HALF], y[:HALF])

    with torch.no_grad():
        before = seen(net)
        fresh = accuracy(net, x[HALF:], y[HALF:])
    found = fxc.fit_to_accuracy(
        net, batches(root, options.images), taught, min_accuracy=before - lost, validate=seen, teacher=net,
        epochs=options.epochs, rounds=options.rounds, lr=1e-3, progress=False,
        on_epoch=lambda record: print(record, flush=True),
    )  # fmt: skip
    print(found, flush=True)
    rows = [
        {"lost": lost, "round": i, "target": r.target, "bits": r.size, "after": r.metric, "kept": r.kept}
        for i, r in enumerate(found.rounds)
    ]
    with torch.no_grad():
        after = accuracy(found.module, x[HALF:], y[HALF:])
    last = {
        "lost": lost, "bits": found.size, "weights": found.net.weights_left(), "seen before": before,
        "seen": found.metric, "fresh before": fresh, "fresh": after,
    }  # fmt: skip
    return rows, last


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.accuracy", description=__doc__)
    parser.add_argument("--data", help="the data folder (or the environment variable FXCOMPRESS_DATA)")
    parser.add_argument("--out", type=Path, help="folder for the results (benchmarks/results and docs/results)")
    parser.add_argument("--lost", type=float, nargs="+", default=[0.01], help="shares of accuracy to give up")
    parser.add_argument("--images", type=int, default=10_000, help="to train on in an epoch")
    parser.add_argument("--epochs", type=int, default=6, help="of each round")
    parser.add_argument("--rounds", type=int, default=6, help="at most")
    options = parser.parse_args(arguments)
    root = folder(options.data)
    sys.path.insert(0, str(root))  # its models.py and load.py import each other
    found = [searched(root, lost, options) for lost in options.lost]
    tables = [
        Table("What was found", FOUND, [last for _, last in found]),
        Table("Rounds", ROUNDS, [row for rows, _ in found for row in rows]),
    ]
    claims = []
    for _, last in found:
        text = f"points lost where the search looked, of {100 * last['lost']:g}"
        claims.append(Claim(text, 100 * (last["seen before"] - last["seen"]), 100 * last["lost"] + 1e-9))
    chosen = {name: getattr(options, name) for name in ("lost", "images", "epochs", "rounds")}
    flags = [f"--{k} {' '.join(map(str, v)) if isinstance(v, list) else v}" for k, v in chosen.items()]
    command = " ".join(["python -m benchmarks.accuracy", *flags])
    record = Record("accuracy", "The smallest network that keeps its accuracy", command, chosen, tables, claims)
    print(write(record, options.out))


if __name__ == "__main__":
    main(sys.argv[1:])
