"""The demo's network for three seeds: accuracy and size against the float baseline.

The settings were chosen on images drawn from the training part (``--validation``); the table is on the test images.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console

from benchmarks.record import Claim, Column, Record, Table, write
from fxcompress.demo.digits import load_digits
from fxcompress.demo.run import Recipe, compare

COLUMNS = (
    Column("seed", "seed"),
    Column("baseline", "float accuracy", ".2%"),
    Column("compressed", "compressed accuracy", ".2%"),
    Column("fractional", "bits, fractional", ".2%"),
    Column("stored", "bits, stored", ".2%"),
    Column("file", "file", ".2%"),
    Column("weights", "weights left", ".1%"),
    Column("macs", "multiply-adds left", ".1%"),
    Column("latency", "latency, batch of 64", ".0%"),
    Column("seconds", "seconds for both", ".0f"),
)


def measure(seed: int, epochs: int, *, validation: bool) -> dict[str, Any]:
    """One row: both networks of a seed."""
    data = load_digits(100 + seed if validation else None)
    with tempfile.TemporaryDirectory() as folder:
        comparison, _ = compare(Recipe(epochs=epochs, seed=seed), data, Path(folder), Console())
    a, b = comparison.baseline, comparison.compressed
    return {
        "seed": seed,
        "baseline": a.accuracy,
        "compressed": b.accuracy,
        "fractional": b.sizes.fractional,
        "stored": b.sizes.stored,
        "file": b.sizes.file,
        "weights": b.weights / a.weights,
        "macs": b.multiply_adds / a.multiply_adds,
        "latency": comparison.latency[-1].ratio,
        "seconds": comparison.seconds["total"],
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.digits", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for the results (benchmarks/results and docs/results)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=Recipe().epochs)
    parser.add_argument("--validation", action="store_true", help="on images from the training part; writes nothing")
    options = parser.parse_args(arguments)
    rows = []
    for seed in options.seeds:
        rows.append(measure(seed, options.epochs, validation=options.validation))
        print({key: round(value, 4) for key, value in rows[-1].items()}, flush=True)
    average = {column.key: mean(row[column.key] for row in rows) for column in COLUMNS[1:]} | {"seed": "mean"}
    if options.validation:
        print({key: value if isinstance(value, str) else round(value, 4) for key, value in average.items()})
        return
    loss = 100 * (average["baseline"] - average["compressed"])
    claims = [
        Claim("points of accuracy lost, mean of the seeds", loss, 0.5),
        Claim("share of the bits, fractional", average["fractional"], 0.02),
        Claim("share of the weights", average["weights"], 0.25),
    ]
    seeds = " ".join(map(str, options.seeds))
    settings = {"seeds": options.seeds, "epochs": options.epochs, "gamma": Recipe().gamma, "lr": Recipe().lr}
    command = f"python -m benchmarks.digits --seeds {seeds} --epochs {options.epochs}"
    table = Table("Baseline against compressed, test images", COLUMNS, [*rows, average])
    print(
        write(
            Record("digits", "Digits: a network that compresses itself", command, settings, [table], claims),
            options.out,
        )
    )


if __name__ == "__main__":
    main(sys.argv[1:])
