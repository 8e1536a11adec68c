"""How the time of pruning grows: with the depth of a network, and with its width.

Networks of one family run in turn, in one process, one thread; the fastest of several rounds counts. A straight line is
fitted to the logarithms of CPU time and of size: its slope is the exponent of the growth, 1 where time is proportional
to size.
"""

import argparse
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.dead import network, parameters_of, randomise, zero_share
from benchmarks.latency import ResNet18
from benchmarks.record import Claim, Column, Record, Table, command, parser, settings, write
from benchmarks.speed import by_passes
from benchmarks.timing import Stopwatch, rotated, settle, threads
from fxcompress.trace.tracer import trace

LIMIT = 1.1
SHARE = 0.5
IMAGE, TEXT = (1, 3, 64, 64), (1, 16, 128)
PHASES = ("trace", "analyse", "constants", "plan", "rewrite")


@dataclass(frozen=True, slots=True)
class Family:
    """Networks that differ in one respect.

    Attributes:
        name: in words.
        key: for the table.
        shape: of the example input.
        sizes: of the members, smallest first.
        build: the network of a size.
        growths: the sums of phases that are fitted, each against a column of the table.
    """

    name: str
    key: str
    shape: tuple[int, ...]
    sizes: tuple[float, ...]
    build: Callable[[float], nn.Module]
    growths: tuple[tuple[tuple[str, ...], str], ...]


def encoder(layers: float) -> nn.Module:
    """A pre-norm transformer of width 128."""
    layer = nn.TransformerEncoderLayer(128, 4, 256, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, int(layers), enable_nested_tensor=False).eval()


FAMILIES = (
    Family(
        "resnet18 to resnet152", "resnet", IMAGE, (18, 34, 50, 101, 152),
        lambda size: network(f"resnet{size:.0f}", 0), ((PHASES, "nodes"),),
    ),
    Family("transformer encoders", "layers", TEXT, (12, 24, 48), encoder, ((PHASES, "nodes"),)),
    Family(
        "resnet18 at other widths", "width", IMAGE, (0.5, 1, 2), lambda size: ResNet18(size).eval(),
        ((("trace", "analyse", "plan"), "channels"), (("constants", "rewrite"), "parameters")),
    ),
)  # fmt: skip


def prepared(family: Family, size: float, seed: int) -> nn.Module:
    """A member of a family, half of whose channels are dead."""
    torch.manual_seed(seed)
    model = family.build(size)
    randomise(model, seed)
    zero_share(model, torch.zeros(family.shape), SHARE)
    return model


def measure(family: Family, options: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A row for each member, and all samples."""
    example = torch.randn(family.shape, generator=torch.Generator().manual_seed(options.seed))
    models = {f"{family.key} {size:g}": prepared(family, size, options.seed) for size in family.sizes}
    watches: dict[str, list[Stopwatch]] = {name: [] for name in models}
    for turn in range(options.repeats + 1):
        for name in rotated(list(models), turn):
            watch = once(models[name], example)
            if turn:  # everybody has run once before
                watches[name].append(watch)
    rows = [{"network": name, **_size(model), **fastest(watches[name])} for name, model in models.items()]
    return rows, {name: [w.laps["cpu"] for w in found] for name, found in watches.items()}


def once(model: nn.Module, example: Tensor) -> Stopwatch:
    """Prune a copy."""
    own, watch = copy.deepcopy(model), Stopwatch()
    settle()
    by_passes(own, example, watch)
    return watch


def _size(model: nn.Module) -> dict[str, int]:
    return {
        "nodes": len(trace(model).graph.nodes),
        "channels": sum(p.shape[0] for p in model.parameters() if p.ndim > 1),
        "parameters": parameters_of(model),
    }


def fastest(watches: Sequence[Stopwatch]) -> dict[str, float]:
    """The least CPU time of each phase, and of all together."""
    found = {phase: min(w.laps["cpu"][phase] for w in watches) for phase in PHASES}
    return found | {"total": sum(found.values())}


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The p of the power law ``seconds ~ sizes ** p`` that fits best, by least squares on logarithms."""
    slope, _ = np.polyfit(np.log(sizes), np.log(seconds), 1)
    return float(slope)


def claims(family: Family, rows: list[dict[str, Any]]) -> list[Claim]:
    """One for each growth: its exponent."""
    found = []
    for phases, against in family.growths:
        seconds = [sum(row[phase] for phase in phases) for row in rows]
        what = "pruning" if phases == PHASES else ", ".join(phases)
        text = f"{family.name}: CPU time of {what} grows with {against} to the power of"
        found.append(Claim(text, exponent([row[against] for row in rows], seconds), LIMIT))
    return found


def table(family: Family, rows: list[dict[str, Any]]) -> Table:
    """What the page shows of a family."""
    sizes = tuple(Column(key, key, ",d") for key in ("nodes", "channels", "parameters"))
    seconds = tuple(Column(phase, phase, ".3f") for phase in (*PHASES, "total"))
    text = "CPU seconds, the fastest of the rounds; the total is the sum of these."
    return Table(family.name, (Column("network", "network"), *sizes, *seconds), rows, text)


def main(arguments: list[str] | None = None) -> None:
    options = parser("growth", __doc__, repeats=5)
    options.set_defaults(threads=[1])
    options.add_argument("--families", nargs="+", default=[f.key for f in FAMILIES], choices=[f.key for f in FAMILIES])
    chosen = options.parse_args(arguments)
    found: list[tuple[Family, list[dict[str, Any]]]] = []
    samples = []
    with threads(chosen.threads[0]):
        for family in (f for f in FAMILIES if f.key in chosen.families):
            rows, timed = measure(family, chosen)
            found.append((family, rows))
            samples.append(timed)
    record = Record(
        "growth", "Growth of the time of pruning", command("growth", chosen), settings(chosen),
        [table(*pair) for pair in found], [claim for pair in found for claim in claims(*pair)], samples,
    )  # fmt: skip
    print(write(record, chosen.out).read_text("utf-8"))


if __name__ == "__main__":
    main()
