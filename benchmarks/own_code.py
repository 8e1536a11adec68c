"""What ``keep_code=True`` costs: networks that lose the same channels with their own code, and as graphs.

In each, 30 % of the groups that can go are dead, at random. What is compared is what is left, and how far the outputs
of the network with its own code are off.
"""

import argparse
import gc
import time
from pathlib import Path
from typing import Any

import numpy as np

import fxcompress as fxc
from benchmarks.record import Claim, Column, Record, Table, write
from benchmarks.zoo_checks import all_cases
from benchmarks.zoo_groups import SHARE, chosen_units
from benchmarks.zoo_models import Case
from benchmarks.zoo_subject import TOLERANCE, build, outputs
from fxcompress.channels.analysis import Analysis
from fxcompress.channels.prepare import prepare
from fxcompress.errors import FxCompressError
from tests.exactness import atoms_of, difference, kill

TORCHVISION = (
    "alexnet", "vgg11_bn", "resnet18", "resnet50", "wide_resnet50_2", "mobilenet_v2", "mobilenet_v3_small",
    "densenet121", "googlenet", "inception_v3", "squeezenet1_1", "mnasnet1_0", "efficientnet_b0", "regnet_y_400mf",
    "shufflenet_v2_x1_0", "convnext_tiny", "vit_b_16", "swin_t", "swin_v2_t", "maxvit_t", "lraspp_mobilenet_v3_large",
    "deeplabv3_resnet50", "r3d_18",
)  # fmt: skip
EXTRA = ("timm", "transformers")


def measure(case: Case, seed: int) -> dict[str, Any]:
    """One row."""
    row: dict[str, Any] = {"model": case.name, "family": case.family}
    net, arguments = build(case), case.example(seed)
    try:
        analysis = prepare(net, arguments, plain=False)
    except FxCompressError as error:
        return row | {"note": f"no graph of the whole: {str(error).splitlines()[0][:80]}"}
    kill(analysis, _dead(analysis, seed))
    expected = outputs(net, arguments)
    start = time.perf_counter()
    graph = fxc.prune(net, arguments)
    middle = time.perf_counter()
    own = fxc.prune(net, arguments, keep_code=True)
    end = time.perf_counter()
    before, left = graph.report.parameters
    held = [kept.reason.partition("another number: ")[2] for kept in own.report.kept]
    return row | {
        "graph": left / before, "own": own.report.parameters[1] / before,
        "error": difference(expected, outputs(own.module, arguments)),
        "same class": type(own.module) is type(net), "seconds": end - middle, "graph seconds": middle - start,
        "note": next((f"held by {place}" for place in held if place), ""),
    }  # fmt: skip


def _dead(analysis: Analysis, seed: int) -> np.ndarray:
    return atoms_of(analysis, chosen_units(analysis, seed))


def tables(rows: list[dict[str, Any]]) -> list[Table]:
    """One for each family."""
    columns = (
        Column("model", "network"), Column("graph", "left as a graph", ".1%"),
        Column("own", "left with its code", ".1%"), Column("error", "off by", ".1e"),
        Column("graph seconds", "seconds, graph", ".1f"), Column("seconds", "seconds, code", ".1f"),
        Column("note", "the first that holds channels"),
    )  # fmt: skip
    families = dict.fromkeys(row["family"] for row in rows)
    return [Table(family, columns, [row for row in rows if row["family"] == family]) for family in families]


def claims(rows: list[dict[str, Any]]) -> list[Claim]:
    """What is true of all networks that have a graph."""
    found = [row for row in rows if "own" in row]
    return [
        Claim("largest difference of the outputs, relative", max(row["error"] for row in found), TOLERANCE),
        Claim("share that is of the model's class", sum(r["same class"] for r in found) / len(found), 1, at_least=True),
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.own_code", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for the results (benchmarks/results and docs/results)")
    parser.add_argument("--models", nargs="+", default=[], help="measure these only")
    parser.add_argument("--extra", nargs="*", default=[], choices=EXTRA, help="other libraries")
    parser.add_argument("--seed", type=int, default=0, help="of what is dead")
    options = parser.parse_args(arguments)
    rows = []
    for case in all_cases(options.extra):
        if case.name in options.models or (not options.models and (case.name in TORCHVISION or case.family in EXTRA)):
            rows.append(measure(case, options.seed))
            print(rows[-1], flush=True)
            gc.collect()
    words = ["python -m benchmarks.own_code --seed", str(options.seed)]
    words += ["--extra", *options.extra] if options.extra else []
    settings = {"seed": options.seed, "dead": f"{SHARE:.0%} of the removable groups", "extra": options.extra}
    record = Record(
        "own_code", "Networks that keep their code", " ".join(words), settings, tables(rows), claims(rows), rows
    )
    print(write(record, options.out).read_text("utf-8"))


if __name__ == "__main__":
    main()
