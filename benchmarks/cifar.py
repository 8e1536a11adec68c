"""A whole run of the paper's network on CIFAR-10, removing what dies as it goes, beside the same run without removal.

The two runs take turns, an epoch each, on the same batches. The paper is arXiv 2301.13142.
"""

import argparse
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
import torch.nn.functional as F

import fxcompress as fxc
from benchmarks.data import Cropped, cifar10, folder
from benchmarks.record import Claim, Column, Record, Table, write
from benchmarks.resnet9 import ResNet9, accuracy
from benchmarks.timing import settle
from fxcompress.training.controller import TargetSize
from fxcompress.training.history import EpochRecord
from fxcompress.training.schedule import cosine
from fxcompress.training.trainer import Trainer

mpl.use("Agg")
from matplotlib import pyplot as plt

KINDS = ("removing", "not removing")
COLUMNS = (
    Column("run", "run"),
    Column("accuracy", "accuracy", ".1%"),
    Column("finalized", "finalized", ".1%"),
    Column("size", "bits left", ".2%"),
    Column("weights", "weights left", ".1%"),
    Column("first", "first epoch, s", ".1f"),
    Column("last", "last epoch, s", ".1f"),
    Column("seconds", "all epochs, s", ".0f"),
)
EPOCHS = (
    Column("epoch", "epoch", "d"),
    Column("size", "bits left", ".2%"),
    Column("weights", "weights left", ".1%"),
    Column("accuracy", "accuracy", ".1%"),
    Column("removing", "removing, s", ".1f"),
    Column("not removing", "not removing, s", ".1f"),
)


@dataclass(slots=True)
class Contestant:
    """A network in training.

    Attributes:
        net: the network.
        trainer: of it.
        data: its batches.
        history: of its epochs.
    """

    net: fxc.CompressedModule
    trainer: Trainer
    data: Cropped
    history: list[EpochRecord]


def contestant(options: argparse.Namespace, kind: str, x: torch.Tensor, y: torch.Tensor) -> Contestant:
    """The run of a kind, before its first epoch."""
    torch.manual_seed(options.seed)
    net = fxc.compress(ResNet9.of_width(options.width), x[:2], objective=options.objective)
    data = Cropped(x, y, options.batch, torch.Generator().manual_seed(options.seed))
    optimizer = torch.optim.Adam(net.param_groups(options.lr, weight_decay=5e-4))
    steps = options.epochs * len(data)
    trainer = Trainer(
        net, optimizer, cosine(optimizer, steps, steps // 20), F.cross_entropy,
        TargetSize(options.target, arrival=options.arrival), steps,
        policy=fxc.PrunePolicy() if kind == "removing" else None,
    )  # fmt: skip
    return Contestant(net, trainer, data, [])


def epoch(run: Contestant, number: int, test: tuple[torch.Tensor, torch.Tensor]) -> None:
    """One epoch; only the training is timed."""
    settle()
    start = time.perf_counter()
    loss = run.trainer.epoch(run.data)
    seconds = time.perf_counter() - start
    net = run.net.eval()
    with torch.no_grad():
        metric = accuracy(net, *test)
    run.history.append(
        EpochRecord(
            number, loss, metric, net.fractional_size(), net.weights_left(), net.channels_left(),
            run.trainer.last_gamma, seconds,
        )
    )  # fmt: skip
    print(f"{run.history[-1]}, {seconds:.1f} s", flush=True)


def row(kind: str, run: Contestant, test: tuple[torch.Tensor, torch.Tensor]) -> dict[str, Any]:
    """What became of a run."""
    last = run.history[-1]
    with torch.no_grad():
        finalized = accuracy(run.net.finalize().eval(), *test)
    seconds = [record.seconds for record in run.history]
    return {
        "run": kind, "accuracy": last.metric, "finalized": finalized, "size": last.size, "weights": last.weights,
        "first": seconds[0], "last": seconds[-1], "seconds": sum(seconds),
    }  # fmt: skip


def draw(runs: dict[str, Contestant], path: Path) -> None:
    """Size, accuracy and time over the epochs, as in the paper's figures 1 and 2."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12.5, 3.7), layout="constrained")
    history = runs[KINDS[0]].history
    epochs = [record.epoch for record in history]
    left.plot(epochs, [100 * record.weights for record in history], color="#7a8aa0", label="weights left")
    left.plot(epochs, [100 * record.size for record in history], color="#c4501b", label="bits left")
    left.set(yscale="log", xlabel="epoch", ylabel="% of the original")
    middle.plot(epochs, [100 * (record.metric or 0) for record in history], color="#1b62a5", label="removing")
    others = runs[KINDS[1]].history
    middle.plot(epochs, [100 * (record.metric or 0) for record in others], color="#9db8d2", label="not removing")
    middle.set(xlabel="epoch", ylabel="accuracy on test images, %")
    for kind, color in zip(KINDS, ("#1b62a5", "#9db8d2"), strict=True):
        right.plot(epochs, [record.seconds for record in runs[kind].history], color=color, label=kind)
    right.set(xlabel="epoch", ylabel="seconds of an epoch", ylim=(0, None))
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.cifar", description=__doc__)
    parser.add_argument("--data", help="folder with the data (or the environment variable FXCOMPRESS_DATA)")
    parser.add_argument("--out", type=Path, help="folder for the results (benchmarks/results and docs/results)")
    for name, default in (("width", 16), ("epochs", 30), ("batch", 256), ("images", 10_000), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--target", type=float, default=0.03, help="share of the bits to end at")
    parser.add_argument("--objective", default="macs", help="what the pressure is on; the target is of the bits")
    parser.add_argument("--arrival", type=float, default=0.4, help="share of the training after which it is reached")
    parser.add_argument("--lr", type=float, default=5e-3, help="of the weights")
    options = parser.parse_args(arguments)
    root = folder(options.data)
    x, y = cifar10(root, "train", options.images)
    test = cifar10(root, "test", 1000)
    runs = {kind: contestant(options, kind, x, y) for kind in KINDS}
    for number in range(1, options.epochs + 1):
        for kind in KINDS if number % 2 else KINDS[::-1]:
            epoch(runs[kind], number, test)
    rows = [row(kind, run, test) for kind, run in runs.items()]
    first, second = (runs[kind].history for kind in KINDS)
    epochs = [
        {"epoch": a.epoch, "size": a.size, "weights": a.weights, "accuracy": a.metric, "removing": a.seconds,
         "not removing": b.seconds}
        for a, b in zip(first, second, strict=True)
    ]  # fmt: skip
    chosen = {name: value for name, value in vars(options).items() if name not in {"out", "data"}}
    record = Record(
        "cifar", "CIFAR-10: a whole run, with removal and without",
        "python -m benchmarks.cifar " + " ".join(f"--{name} {value}" for name, value in chosen.items()), chosen,
        [Table("Both runs", COLUMNS, rows), Table("Epoch by epoch", EPOCHS, epochs)],
        [
            Claim("time of the whole run over that without removal", rows[0]["seconds"] / rows[1]["seconds"], 0.7),
            Claim("distance from the target size, relative", abs(rows[0]["size"] / options.target - 1), 0.05),
        ],
        [{"run": kind, **asdict(found)} for kind, run in runs.items() for found in run.history],
    )  # fmt: skip
    page = write(record, options.out)
    draw(runs, (options.out or page.parents[1] / "images") / "cifar.png")
    print(page)


if __name__ == "__main__":
    main(sys.argv[1:])
