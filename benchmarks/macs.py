"""Trained networks led to a share of their multiply-adds, or of their time, beside channels of least magnitude at once.

ResNet-20 and ResNet-8 for CIFAR-10, in all ways with the same images, epochs, learning rates and teacher (the
original). The other way is the usual one: in each layer the same share of channels goes, those that hold the smallest
weights (Li et al., Pruning Filters for Efficient ConvNets, arXiv 1608.08710; here the squares of all that goes with a
channel count), and what is left is trained on in floats.

The test images at hand are few, so accuracy is also that on the last 10,000 images of the training set, which the
networks were trained on once, and no way has seen since.
"""

import argparse
import copy
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fxcompress as fxc
from benchmarks.data import MEAN, STD, Cropped, cifar10, folder, module
from benchmarks.pretrained import taught
from benchmarks.record import Column, Record, Table, write
from benchmarks.resnet9 import accuracy
from fxcompress.training.costs import Macs
from fxcompress.training.importance import Importance

COLUMNS = (
    Column("target", "target", ".0%"),
    Column("way", "way"),
    Column("macs", "multiply-adds left", ".1%"),
    Column("weights", "weights left", ".1%"),
    Column("before", "float accuracy", ".1%"),
    Column("at_once", "accuracy before training on", ".1%"),
    Column("after", "accuracy", ".1%"),
    Column("others_before", "float accuracy, 10,000 others", ".1%"),
    Column("others", "accuracy, 10,000 others", ".1%"),
    Column("one", "time, one image", ".2f"),
    Column("many", "time, 64 images", ".2f"),
    Column("seconds", "CPU seconds", ".0f"),
)
ROUNDS = 31
"""Calls that are timed."""
OTHERS = 10_000
"""Images of the end of the training set, which no way is given: the networks have seen them long before."""
FINE = 24
"""Bits at which a weight is what it is as a float."""


def macs(net: nn.Module, x: Tensor) -> int:
    """Multiply-adds of one image, as torch counts them, in whatever precision."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.eval()(x[:1])
    total: int = counter.get_total_flops()
    return total // 2


@torch.inference_mode()
def time_left(net: nn.Module, found: nn.Module, x: Tensor) -> float:
    """The time of a call, over that of the original; both in turn, the median of the ratios."""
    ratios = []
    for _ in range(ROUNDS):
        seconds = []
        for each in (net, found):
            start = time.perf_counter()
            each(x)
            seconds.append(time.perf_counter() - start)
        ratios.append(seconds[1] / seconds[0])
    return median(ratios)


def images(root: Path, name: str, split: str, count: int | None) -> tuple[Tensor, Tensor]:
    """Of CIFAR-10, as a network takes them."""
    x, y = cifar10(root, split, count)
    if name == "resnet8":
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
        x = ((x * std + mean) * 255).round()
    return x, y


def batches(root: Path, name: str) -> Cropped:
    """To train on, the same in each run."""
    torch.manual_seed(0)
    return Cropped(*images(root, name, "train", 10_000), 128, torch.Generator().manual_seed(0))


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters() if p.ndim > 1)


def of_least_magnitude(net: nn.Module, x: Tensor, target: float) -> nn.Module:
    """A network without the same share of the channels of each layer, with so many of its multiply-adds at most."""
    compressed = fxc.compress(net, x[:2], bits=FINE)
    importance = Importance(compressed)
    with torch.no_grad():
        for parameter in compressed.parameters():
            parameter.grad = torch.ones_like(parameter)  # so that the square of (w dL/dw) is that of w
        length = importance.now().numpy()
    unit, counts = importance.unit, [len(b) for b in compressed.fxc_bits]
    layer = np.repeat(np.arange(len(counts)), counts)
    first = {one: layer[unit == one].min() for one in np.unique(unit[unit >= 0])}  # sets belong to their first layer
    rank = dict[int, float]()
    for which in set(first.values()):
        sets = sorted((one for one in first if first[one] == which), key=lambda one: length[unit == one][0])
        for place, one in enumerate(sets):
            rank[one] = (place + 1) / len(sets)
    counted = Macs(compressed.fxc_all_terms(), unit)
    order = sorted(rank, key=lambda one: rank[one])
    count = next(n for n in range(len(order)) if counted.left(~np.isin(unit, order[:n])) <= target)
    gone_by_now = np.isin(unit, order[:count])
    with torch.no_grad():
        for bits, gone in zip(compressed.fxc_bits, np.split(gone_by_now, np.cumsum(counts)[:-1]), strict=True):
            bits[torch.from_numpy(gone)] = 0
        dead = {name: torch.from_numpy(~(b > 0).numpy()) for name, b in _named_bits(compressed)}
        for name, parameter in compressed.named_parameters():  # the biases of what has gone
            if name.endswith("bias") and (own := dead.get(_weight_before(compressed, name))) is not None:
                parameter[own] = 0
    compressed.step()
    return compressed.finalize()


def _named_bits(net: fxc.CompressedModule) -> list[tuple[str, Tensor]]:
    return [(name, bits.detach()) for name, bits in net.liveness.named_bits()]


def _weight_before(net: nn.Module, bias: str) -> str:
    """The bits of the convolution that a batch norm of a residual net follows."""
    return bias.replace("bn", "conv").removesuffix("bias") + "weight_quantizer.bits"


def trained_on(net: nn.Module, teacher: nn.Module, data: Cropped, epochs: int) -> nn.Module:
    """In floats, by the loop, the optimizer and the learning rates of ``fit``."""
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    steps = epochs * len(data)
    scheduler = fxc.cosine(optimizer, steps, min(steps // 20, 100))
    for _ in range(epochs):
        net.train()
        for x, y in data:
            with torch.no_grad():
                answer = teacher(x)
            loss = taught(net(x), y, answer)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
    return net.eval()


def compare(name: str, net: nn.Module, root: Path, target: float, epochs: int) -> list[dict[str, Any]]:
    """All ways to one target."""
    x, y = images(root, name, "test", 1000)
    seen, answers = images(root, name, "train", None)
    others = seen[-OTHERS:], answers[-OTHERS:]
    rows = []
    for way in ("target_macs", "target_latency", "magnitude, at once"):
        torch.manual_seed(0)
        start = time.process_time()
        if way.startswith("target"):
            batch = x[:64] if way == "target_latency" else x[:2]
            aim: dict[str, Any] = {way: target}
            result = fxc.fit(
                copy.deepcopy(net), batches(root, name), taught, teacher=net, epochs=epochs, lr=1e-3, fine_tune=True,
                progress=False, validate=lambda found: accuracy(found, x, y), example_inputs=batch,
                on_epoch=lambda record: print(record, flush=True), **aim,
            )  # fmt: skip
            found, at_once = result.module, None
        else:
            found = of_least_magnitude(net, x, target)
            with torch.no_grad():
                at_once = accuracy(found.eval(), x, y)
            found = trained_on(found, net, batches(root, name), epochs)
        seconds = time.process_time() - start
        with torch.no_grad():
            measured = accuracy(net.eval(), x, y), accuracy(found.eval(), x, y)
            apart = accuracy(net, *others), accuracy(found, *others)
        row = {
            "target": target, "way": way, "macs": macs(found, x) / macs(net, x),
            "weights": parameters(found) / parameters(net), "before": measured[0], "at_once": at_once,
            "after": measured[1], "others_before": apart[0], "others": apart[1],
            "seconds": seconds, "one": time_left(net, found, x[:1]),
            "many": time_left(net, found, x[:64]),
        }  # fmt: skip
        print(row, flush=True)
        rows.append(row)
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.macs", description=__doc__)
    parser.add_argument("--data", help="the data folder (or the environment variable FXCOMPRESS_DATA)")
    parser.add_argument("--out", type=Path, help="folder for the results (benchmarks/results and docs/results)")
    parser.add_argument("--targets", type=float, nargs="+", default=[0.7, 0.5, 0.35], help="shares to end at")
    parser.add_argument("--networks", nargs="+", default=["resnet20", "resnet8"], help="pretrained ones")
    parser.add_argument("--epochs", type=int, default=6, help="of 10,000 images")
    options = parser.parse_args(arguments)
    root = folder(options.data)
    sys.path.insert(0, str(root))  # its models.py and load.py import each other
    tables = []
    for name in options.networks:
        net = module(root, "models").pretrained(name).eval()
        rows = [row for target in options.targets for row in compare(name, net, root, target, options.epochs)]
        tables.append(Table(f"{name}, {options.epochs} epochs of 10,000 images", COLUMNS, rows))
    targets, networks = " ".join(map(str, options.targets)), " ".join(options.networks)
    command = f"python -m benchmarks.macs --targets {targets} --networks {networks} --epochs {options.epochs}"
    chosen = {"targets": options.targets, "networks": options.networks, "epochs": options.epochs}
    print(write(Record("macs", "A share of the multiply-adds, or of the time", command, chosen, tables), options.out))


if __name__ == "__main__":
    main(sys.argv[1:])
