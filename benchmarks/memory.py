"""How much memory pruning needs at its peak, beside Torch-Pruning.

Each contestant runs in a process of its own, which has the model in memory already, and has pruned a small network
before. What counts is the peak of the resident memory above what the process holds when it starts. Linux only.
"""

import argparse
import ctypes
import gc
import multiprocessing as mp
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.dead import EXAMPLE, network, parameters_of
from benchmarks.record import Claim, Column, Record, Table, command, parser, settings, write
from benchmarks.speed import LABELS, MODELS, RUNS, prepared
from benchmarks.timing import Stopwatch, threads

OURS, THEIRS = "prune", ("pruner", "groups")
MIB = 1 << 20


def resident() -> int:
    """Bytes of this process that are in memory now."""
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    return pages * resource.getpagesize()


def peak() -> int:
    """The most bytes of this process that have been in memory at once, since :func:`forget_peak`."""
    status = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024


def forget_peak() -> None:
    """Start again from what is in memory now; what has been freed before would hide what is taken next."""
    Path("/proc/self/clear_refs").write_text("5", "ascii")


def tidy() -> None:
    """Give back to the system what is free: taking it again must show."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def run(name: str, model: nn.Module) -> dict[str, Any]:
    """Prune ``model`` in this process, and say what that took; a failure is a result like any other."""
    example = torch.zeros(EXAMPLE)
    try:
        RUNS[name](network("resnet18", 0), torch.zeros(1, 3, 32, 32), Stopwatch())
        tidy()
        forget_peak()
        before = resident()
        result = RUNS[name](model, example, Stopwatch())
        return {"peak": (peak() - before) / MIB, "left": parameters_of(result)}
    except Exception as error:  # noqa: BLE001 - any
        return {"failure": f"{type(error).__name__}: {error}".splitlines()[0]}


def _child(name: str, model: nn.Module, answer: Any) -> None:  # noqa: ANN401 - a connection
    answer.send(run(name, model))


def apart(name: str, model: nn.Module) -> dict[str, Any]:
    """The same in a process of its own, a copy of this one: it has the model, and has imported what it needs."""
    tidy()
    context = mp.get_context("fork")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(name, model, there))
    child.start()
    there.close()
    try:
        found: dict[str, Any] = here.recv()
    except EOFError:
        found = {"failure": "the process died"}
    child.join()
    return found


def measure(name: str, options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """A row for one network, and all samples: the least peak of each contestant counts."""
    model = prepared(name, options.seed)
    samples = {run: [apart(run, model) for _ in range(options.repeats)] for run in (OURS, *THEIRS)}
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values()) / MIB
    row: dict[str, Any] = {"model": name, "size": size}
    for contestant, found in samples.items():
        best = min(found, key=lambda sample: sample.get("peak", float("inf")))
        row |= {f"{contestant} {key}": value for key, value in best.items()}
    able = [row[f"{n} peak"] for n in THEIRS if f"{n} peak" in row]
    if able:
        row |= {"theirs": min(able), "ratio": row[f"{OURS} peak"] / min(able)}
    return row, {name: samples}


def table(rows: list[dict[str, Any]]) -> Table:
    """What the page shows."""
    columns = (
        Column("model", "network"),
        Column("size", "the model", ".0f"),
        Column(f"{OURS} peak", LABELS[OURS], ".0f"),
        *(Column(f"{n} peak", LABELS[n], ".0f") for n in THEIRS),
        Column("ratio", "ours / TP, cheaper way", ".2f"),
        *(Column(f"{n} failure", f"failure of {LABELS[n]}") for n in THEIRS),
    )
    text = (
        "MiB of resident memory at the peak, above what the process holds with the model. Torch-Pruning changes the "
        "model in place, and frees what it cuts as it goes. `fxcompress.prune` leaves the model as it is: the result, "
        "a network of its own, is part of what is counted."
    )
    return Table("Peak memory", columns, rows, text)


def claims(rows: list[dict[str, Any]]) -> list[Claim]:
    """One for each network on which Torch-Pruning works."""
    return [Claim(f"{r['model']}: ours / Torch-Pruning", r["ratio"], 1.0) for r in rows if "ratio" in r]


def main(arguments: list[str] | None = None) -> None:
    options = parser("memory", __doc__, repeats=1)
    options.set_defaults(threads=[1])
    options.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS, help="of torchvision (all)")
    chosen = options.parse_args(arguments)
    if not sys.platform.startswith("linux"):
        sys.exit("this benchmark reads /proc: it needs Linux")
    try:
        import torch_pruning  # noqa: F401
    except ImportError:
        sys.exit("this benchmark compares with Torch-Pruning: pip install 'fxcompress[bench]'")
    rows, samples = [], []
    with threads(chosen.threads[0]):
        for name in chosen.models:
            row, found = measure(name, chosen)
            rows.append(row)
            samples.append(found)
            print(
                {key: round(value, 2) if isinstance(value, float) else value for key, value in row.items()}, flush=True
            )
    record = Record(
        "memory", "Peak memory of pruning", command("memory", chosen), settings(chosen), [table(rows)],
        claims(rows), samples,
    )  # fmt: skip
    print(write(record, chosen.out).read_text("utf-8"))


if __name__ == "__main__":
    main()
