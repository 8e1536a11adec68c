"""What low bits gain where a network runs: ONNX files of trained networks, with floats, with integers, and in integers.

Of each network: the file of torch's own exporter, `export_onnx`, and `export_onnx` with calibration. All run in ONNX
Runtime, on the same test data; times are taken in turn, in one process.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from onnxruntime import InferenceSession, SessionOptions
from torch import Tensor, nn

import fxcompress as fxc
from benchmarks.data import folder, module
from benchmarks.pretrained import fine_tuned, images
from benchmarks.record import Claim, Column, Record, Table, write
from benchmarks.timing import paired_ratio, rotated, settle

FILES = ("floats", "integers", "activations")
LABELS = {
    "floats": "torch.onnx.export",
    "integers": "export_onnx",
    "activations": "export_onnx, calibrated",
}
BATCHES = (1, 32)
CALIBRATION, TESTED = 256, 744
LEAST = 0.02  # seconds: several calls make one sample where a single one is shorter
COLUMNS = (
    Column("network", "network"),
    Column("label", "file"),
    Column("bytes", "bytes", ",d"),
    Column("share", "of the float file", ".1%"),
    Column("accuracy", "accuracy", ".1%"),
    Column("agree", "same answers as floats", ".1%"),
    *(Column(f"ms {batch}", f"ms, batch {batch}", ".2f") for batch in BATCHES),
    *(Column(f"ratio {batch}", f"time / floats, batch {batch}", ".2f") for batch in BATCHES),
)


@dataclass(frozen=True, slots=True)
class Contestant:
    """One file, as ONNX Runtime runs it."""

    path: Path
    session: InferenceSession

    @classmethod
    def of(cls, path: Path) -> "Contestant":
        """Load a file, as a user would, but for one thread."""
        options = SessionOptions()
        options.intra_op_num_threads = 1
        return cls(path, InferenceSession(str(path), options, providers=["CPUExecutionProvider"]))

    def __call__(self, x: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The first output."""
        found: npt.NDArray[Any] = self.session.run(None, {self.session.get_inputs()[0].name: x})[0]
        return found


def files(original: nn.Module, final: nn.Module, x: Tensor, folder: Path) -> dict[str, Contestant]:
    """The three files; the float one is of the network before it was compressed."""
    free = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(
        original.eval(), (x[:2],), str(folder / "floats.onnx"), dynamo=True, external_data=False, verbose=False,
        dynamic_shapes=free,
    )  # fmt: skip
    print(fxc.export_onnx(final, folder / "integers.onnx", x[:2]), flush=True)
    batches = x[:CALIBRATION].split(32)
    print(fxc.export_onnx(final, folder / "activations.onnx", x[:2], calibration=batches), flush=True)
    fxc.save(final, folder / "net.fxc")
    return {name: Contestant.of(folder / f"{name}.onnx") for name in FILES}


def seconds(run: Callable[[], object]) -> float:
    """Of one call."""
    calls, start = 0, time.perf_counter()
    while calls == 0 or time.perf_counter() - start < LEAST:
        run()
        calls += 1
    return (time.perf_counter() - start) / calls


def timed(contestants: dict[str, Contestant], x: npt.NDArray[Any], rounds: int) -> dict[str, list[float]]:
    """Seconds of a call of each, in turn."""
    found: dict[str, list[float]] = {name: [] for name in contestants}
    settle()
    for turn in range(-1, rounds):  # the first warms up
        for name in rotated(list(contestants), turn):
            sample = seconds(lambda one=contestants[name]: one(x))  # type: ignore[misc]
            found[name] += [sample] if turn >= 0 else []
    return found


@dataclass(frozen=True, slots=True)
class Data:
    """Test data (N, ...) and labels (N,), and inputs to calibrate with, which are none of these."""

    x: Tensor
    y: Tensor
    calibration: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> "Data":
        """Calibrate with the first ones, test on the others."""
        return cls(x[CALIBRATION:][:TESTED], y[CALIBRATION:][:TESTED], x[:CALIBRATION])


def measure(name: str, original: nn.Module, final: nn.Module, data: Data, rounds: int) -> list[dict[str, Any]]:
    """The rows of one network."""
    with tempfile.TemporaryDirectory() as place:
        found = files(original, final, data.calibration, Path(place))
        sizes = {key: each.path.stat().st_size for key, each in found.items()}
        packed = (Path(place) / "net.fxc").stat().st_size
        parts = [part.numpy() for part in data.x.split(100)]
        answers = {key: np.concatenate([each(part) for part in parts]).argmax(1) for key, each in found.items()}
        times = {batch: timed(found, data.x[:batch].numpy(), rounds) for batch in BATCHES}
    rows = []
    for key in FILES:
        row = {"network": name, "label": LABELS[key], "bytes": sizes[key], "share": sizes[key] / sizes["floats"]}
        row |= {
            "accuracy": float((answers[key] == data.y.numpy()).mean()),
            "agree": float((answers[key] == answers["floats"]).mean()),
        }
        for batch, samples in times.items():
            row[f"ms {batch}"] = 1000 * statistics.median(samples[key])
            row[f"ratio {batch}"] = paired_ratio(samples[key], samples["floats"])
        rows.append(row)
        print(row, flush=True)
    return [*rows, {"network": name, "label": "save", "bytes": packed, "share": packed / sizes["floats"]}]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.deployment", description=__doc__)
    parser.add_argument("--data", help="the data folder (or the environment variable FXCOMPRESS_DATA)")
    parser.add_argument("--out", type=Path, help="folder for the results (benchmarks/results and docs/results)")
    parser.add_argument("--epochs", type=int, default=6, help="of fine-tuning resnet20; 0 for none")
    parser.add_argument("--target", type=float, default=0.15, help="share of the bits to fine-tune it to")
    parser.add_argument("--repeats", type=int, default=15, help="rounds of measurement (15)")
    options = parser.parse_args(arguments)
    root = folder(options.data)
    sys.path.insert(0, str(root))  # its models.py and load.py import each other
    load, models = module(root, "load"), module(root, "models")
    rows = []
    for name, data in images(load, root).items():
        net = models.pretrained(name).eval()
        rows += measure(name, net, fxc.compress(net, data[0][:2]).finalize(), Data.of(*data), options.repeats)
    if options.epochs:
        net = models.pretrained("resnet20").eval()
        tuned = fine_tuned(models.pretrained("resnet20"), root, options.target, options.epochs)
        title = f"resnet20, fine-tuned to {options.target:.0%} of the bits"
        rows += measure(title, net, tuned.module, Data.of(*images(load, root)["resnet20"]), options.repeats)
    write_page(rows, options)


def _median(rows: list[dict[str, Any]]) -> float:
    return float(statistics.median(row[f"ratio {BATCHES[-1]}"] for row in rows))


def write_page(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """The record, with what it is measured for."""
    taken_up = [row for row in rows if "fine-tuned" not in row["network"]]
    exact, whole = ([row for row in taken_up if row["label"] == LABELS[key]] for key in ("integers", "activations"))
    floats = {row["network"]: row["accuracy"] for row in rows if row["label"] == LABELS["floats"]}
    lost = [100 * (floats[row["network"]] - row["accuracy"]) for row in whole]
    claims = [
        Claim("time with integer weights / with floats, batch 32, median", _median(exact), 1.05),
        Claim("time in integers / in floats, batch 32, median", _median(whole), 1),
        Claim("points of accuracy lost in integers, at most", max(lost), 1),
    ]
    text = (
        "*torch.onnx.export* is of the network before it was compressed; the others are of the compressed one, at 8 "
        f"bits where nothing else is said. Calibrated with {CALIBRATION} samples, tested on {TESTED} others. Times are "
        "of one thread, medians; ratios are medians of those within a round. *save*: what `fxcompress.save` writes."
    )
    flags = f"--epochs {options.epochs} --target {options.target} --repeats {options.repeats}"
    record = Record(
        "deployment", "ONNX files", f"python -m benchmarks.deployment {flags}",
        {"epochs": options.epochs, "target": options.target, "repeats": options.repeats},
        [Table("Trained networks in ONNX Runtime", COLUMNS, rows, text)], claims,
    )  # fmt: skip
    print(write(record, options.out))


if __name__ == "__main__":
    main()
