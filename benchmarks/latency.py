"""How fast a pruned network runs: beside the unpruned one, and beside a network that was built at its widths.

The built one is independent of fxcompress: an ordinary module of the widths that are left, with new parameters. It is
as fast as the pruned network can hope to be, which runs as a graph and, with ``keep_code=True``, with its own code. All
run in turn, in one process, on the same input. Before that, the outputs of the pruned networks are compared with those
of the unpruned one, and the built one, given the pruned weights, must compute the same.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fxcompress as fxc
from benchmarks.dead import CLASSES, EXAMPLE, difference, network, parameters_of, randomise, zero_share
from benchmarks.record import Claim, Column, Record, Table, command, parser, settings, write
from benchmarks.timing import paired_ratio, rotated, settle, threads

TOLERANCE = 1e-5
LEAST = 0.05  # seconds: several calls make one sample where a single one is shorter
LIMIT = 1.05


class ResNet18(nn.Module):
    """resnet18 at any share of its widths, from torchvision's blocks; the names are those of torchvision.

    Args:
        kept: the share of the channels that is left.
    """

    def __init__(self, kept: float) -> None:
        super().__init__()
        from torchvision.models.resnet import BasicBlock

        first, *widths = (int(width * kept) for width in (64, 64, 128, 256, 512))
        self.conv1 = nn.Conv2d(3, first, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layers: list[nn.Sequential] = []
        for i, (before, width) in enumerate(zip([first, *widths], widths, strict=False)):
            shortcut = None
            if i > 0:
                shortcut = nn.Sequential(nn.Conv2d(before, width, 1, stride=2, bias=False), nn.BatchNorm2d(width))
            layer = nn.Sequential(BasicBlock(before, width, min(i + 1, 2), shortcut), BasicBlock(width, width))
            self.add_module(f"layer{i + 1}", layer)
            self.layers.append(layer)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[-1], CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """As in torchvision."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for layer in self.layers:
            x = layer(x)
        return self.fc(self.avgpool(x).flatten(1))  # type: ignore[no-any-return]


def mobilenet_v2(kept: float) -> nn.Module:
    """The mobilenet_v2 of torchvision at a share of its widths; only its last one never falls below 1280 there."""
    from torchvision.models import MobileNetV2
    from torchvision.ops import Conv2dNormActivation

    net = MobileNetV2(width_mult=kept, round_nearest=1)
    last = int(1280 * kept)
    net.features[-1] = Conv2dNormActivation(int(320 * kept), last, kernel_size=1, activation_layer=nn.ReLU6)
    net.classifier[1] = nn.Linear(last, CLASSES)
    return net  # type: ignore[no-any-return]


BUILT: dict[str, Callable[[float], nn.Module]] = {"resnet18": ResNet18, "mobilenet_v2": mobilenet_v2}


def contestants(name: str, kept: float, seed: int) -> tuple[dict[str, nn.Module], dict[str, Any]]:
    """The unpruned, the pruned (in both forms) and the built network, and what is known of them."""
    dense, example = network(name, seed), torch.zeros(EXAMPLE)
    randomise(dense, seed)
    groups = zero_share(dense, example, 1 - kept)
    pruned = fxc.prune(dense, example).module.eval()
    own = fxc.prune(dense, example, keep_code=True).module.eval()
    torch.manual_seed(seed + 1)
    built = BUILT[name](kept).eval()
    shapes = [{k: tuple(v.shape) for k, v in net.state_dict().items()} for net in (pruned, own, built)]
    assert shapes[0] == shapes[1] == shapes[2], f"{name} at {kept}: other widths than expected"
    twin = BUILT[name](kept).eval()
    twin.load_state_dict(pruned.state_dict())
    x = torch.randn((2, *EXAMPLE[1:]), generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        expected = dense(x)
        found = {"error": pruned, "own error": own, "twin": twin}
        errors = {key: difference(expected, net(x)) for key, net in found.items()}
    assert max(errors.values()) < TOLERANCE, f"{name} at {kept}: the output has changed: {errors}"
    left = {"parameters": parameters_of(dense), "left": parameters_of(pruned), "dead groups": groups}
    return {"dense": dense, "pruned": pruned, "own": own, "built": built}, left | errors


def measure(nets: dict[str, nn.Module], x: Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds of one call, for each network and round."""
    calls = {name: max(1, round(LEAST / _seconds(net, x, 2))) for name, net in nets.items()}
    times: dict[str, list[float]] = {name: [] for name in nets}
    settle()
    for turn in range(rounds):
        for name in rotated(list(nets), turn):
            times[name].append(_seconds(nets[name], x, calls[name]))
    return times


def _seconds(net: nn.Module, x: Tensor, calls: int) -> float:
    with torch.inference_mode():
        net(x)  # brings its weights back into the caches, after another network ran
        start = time.perf_counter()
        for _ in range(calls):
            net(x)
        return (time.perf_counter() - start) / calls


def row_of(times: dict[str, list[float]]) -> dict[str, float]:
    """Medians in milliseconds, and ratios within rounds."""
    row = {name: 1000 * statistics.median(found) for name, found in times.items()}
    row["speedup"] = paired_ratio(times["dense"], times["pruned"])
    row["against built"] = paired_ratio(times["pruned"], times["built"])
    row["own against built"] = paired_ratio(times["own"], times["built"])
    return row


def table(rows: list[dict[str, Any]]) -> Table:
    """What the page shows."""
    columns = (
        Column("model", "network"),
        Column("kept", "kept", ".0%"),
        Column("batch", "batch", "d"),
        Column("threads", "threads", "d"),
        Column("dense", "unpruned", ".2f"),
        Column("pruned", "pruned", ".2f"),
        Column("own", "its code", ".2f"),
        Column("built", "built", ".2f"),
        Column("speedup", "unpruned / pruned", ".2f"),
        Column("against built", "pruned / built", ".2f"),
        Column("own against built", "its code / built", ".2f"),
        Column("left", "parameters left", ",d"),
        Column("error", "off by", ".1e"),
    )
    text = (
        "Milliseconds for one call, medians of the rounds; ratios are medians of the ratios within a round. *kept* is "
        "the share of the channels of each layer. *pruned* runs as a graph, *its code* with the model's own, by "
        "`keep_code=True`. *built* is an ordinary module of the same widths with new weights. "
        "*off by* is the largest difference between the outputs of the pruned and the unpruned network, relative to "
        "the largest entry."
    )
    return Table("Latency", columns, rows, text)


def claims(rows: list[dict[str, Any]]) -> list[Claim]:
    """A pruned network is as fast as one that was built at its widths, and faster than the unpruned one."""
    ratios = [row["against built"] for row in rows]
    own = [row["own against built"] for row in rows]
    halves = [1 / row["speedup"] for row in rows]
    return [
        Claim("pruned / built, median of all rows", statistics.median(ratios), LIMIT),
        Claim("pruned / built, the worst row", max(ratios), LIMIT),
        Claim("pruned, with its own code / built, median of all rows", statistics.median(own), LIMIT),
        Claim("pruned, with its own code / built, the worst row", max(own), LIMIT),
        Claim("pruned / unpruned, the worst row", max(halves), 1.0),
    ]


def run(options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """All rows, and the samples behind them."""
    rows, samples = [], []
    for name in options.models:
        for kept in options.kept:
            nets, facts = contestants(name, kept, options.seed)
            for batch in options.batches:
                x = torch.randn((batch, *EXAMPLE[1:]), generator=torch.Generator().manual_seed(options.seed))
                for count in options.threads:
                    with threads(count) as used:
                        times = measure(nets, x, options.repeats)
                    case = {"model": name, "kept": kept, "batch": batch, "threads": used}
                    rows.append(case | facts | row_of(times))
                    samples.append(case | times)
                    print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    return rows, samples


def main(arguments: list[str] | None = None) -> None:
    options = parser("latency", __doc__, repeats=15)
    add = partial(options.add_argument, nargs="+")
    add("--models", default=list(BUILT), choices=list(BUILT), help="of torchvision")
    add("--kept", type=float, default=[0.75, 0.5, 0.25], help="shares of the channels (0.75 0.5 0.25)")
    add("--batches", type=int, default=[1, 8], help="batch sizes (1 and 8)")
    chosen = options.parse_args(arguments)
    rows, samples = run(chosen)
    record = Record(
        "latency", "Latency of pruned networks", command("latency", chosen), settings(chosen), [table(rows)],
        claims(rows), samples,
    )  # fmt: skip
    print(write(record, chosen.out).read_text("utf-8"))


if __name__ == "__main__":
    main()
