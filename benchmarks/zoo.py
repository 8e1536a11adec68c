"""The scoreboard: all networks of torchvision with 30 % of their removable groups dead, each in its own process.

Each network is pruned and compared in float64, and what is left is trained, exported, compiled and run on other
inputs. Results are kept line by line, so that a run that was interrupted goes on where it stopped. Whatever fails,
takes too long or needs too much memory stays in the table, with the reason.
"""

import argparse
import hashlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import ROOT, Record, commit, write
from benchmarks.zoo_checks import all_cases
from benchmarks.zoo_groups import SHARE
from benchmarks.zoo_models import Case
from benchmarks.zoo_page import claims, tables
from benchmarks.zoo_subject import TOLERANCE
from benchmarks.zoo_uses import BACKEND

LINES = ROOT / "out" / "zoo.jsonl"
FAMILIES = ("classification", "segmentation", "video", "optical flow", "detection", "timm", "transformers")
Row = dict[str, Any]


def code() -> str:
    """A digest of all code that a result depends on, and of the versions of torch and torchvision."""
    digest = hashlib.sha256(f"{torch.__version__} {version('torchvision')}".encode())
    own = ROOT / "benchmarks"
    checks = [path for path in sorted(own.glob("zoo_*.py")) if path.stem != "zoo_page"]
    library = sorted((ROOT / "fxcompress").rglob("*.py"))
    for path in [*library, ROOT / "tests" / "exactness.py", *checks, own / "timing.py"]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def measure(case: Case, options: argparse.Namespace) -> Row:
    """Run the checks of one network in a process of its own, within its limits."""
    row: Row = {"model": case.name, "family": case.family, "failures": {}}
    words = [case.name, str(options.memory_limit), ",".join(options.extra), *map(str, options.seeds)]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as log:
        start = time.perf_counter()
        child = subprocess.Popen([sys.executable, "-m", "benchmarks.zoo_checks", *words], stdout=out, stderr=log)
        late = _wait(child, options.timeout)
        elapsed = time.perf_counter() - start
        out.seek(0)
        log.seek(0)
        for line in out:
            row |= _finding(line)
        last = log.read().strip().rpartition("\n")[2]
    if late:
        row["failures"][str(row.get("step", "start"))] = f"not done after {options.timeout:g} seconds"
    elif row.get("step") != "done" or child.returncode:
        row["failures"][str(row.get("step", "start"))] = f"the process ended with {child.returncode}: {last[:300]}"
    return row | {"exact": row.get("exact", False), "seconds": elapsed}


def _wait(child: "subprocess.Popen[bytes]", seconds: float) -> bool:
    """Whether the process had to be ended."""
    try:
        child.wait(seconds)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
        return True
    except BaseException:
        child.kill()
        raise
    return False


def _finding(line: str) -> Row:
    """What a line says; nothing where a library printed it, or where the process was ended within it."""
    try:
        found = json.loads(line)
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def stored(lines: Path, key: Row) -> dict[str, Row]:
    """The rows that were measured by the same code under the same settings, by model.

    Limits count for the rows of networks that failed.
    """
    if not lines.exists():
        return {}
    rows = (_finding(line) for line in lines.read_text("utf-8").splitlines())
    return {row["model"]: row for row in rows if "key" in row and _counts(row, key)}


def _counts(row: Row, key: Row) -> bool:
    limits = ("timeout", "memory") if row.get("exact") else ()
    return {k: v for k, v in row["key"].items() if k not in limits} == {k: v for k, v in key.items() if k not in limits}


def collect(cases: Iterable[Case], options: argparse.Namespace) -> dict[str, Row]:
    """Measure what is not stored yet; all rows of these settings, by model."""
    key = {"code": code(), "seeds": options.seeds, "timeout": options.timeout, "memory": options.memory_limit}
    rows = stored(options.lines, key)
    options.lines.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    for case in cases:
        if time.perf_counter() - start > options.stop_after:
            break
        if options.fresh or case.name not in rows:
            rows[case.name] = measure(case, options) | {"key": key, "commit": commit()}
            with options.lines.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rows[case.name]) + "\n")
            print(_line(rows[case.name]), flush=True)
    return rows


def earlier(path: Path | None) -> dict[str, Row]:
    """The rows of an earlier page that were measured, by model, each with the commit that it was measured at."""
    if path is None:
        return {}
    record = json.loads(path.read_text("utf-8"))
    return {
        row["model"]: {"commit": record["environment"]["commit"]} | row for row in record["samples"] if "seconds" in row
    }


def _line(row: Row) -> str:
    word = "exact" if row["exact"] else "FAILS"
    reasons = "; ".join(f"{step}: {reason[:140]}" for step, reason in row["failures"].items())
    return f"{row['model']:<40} {word}  share {row.get('share', 0):.3f}  {row['seconds']:.0f} s  {reasons}"


def command(options: argparse.Namespace) -> str:
    """The command line that measures all of it again."""
    words = ["python -m benchmarks.zoo --seeds", *map(str, options.seeds)]
    words += [f"--timeout {options.timeout:g} --memory-limit {options.memory_limit:g}"]
    return " ".join([*words, *(["--extra", *options.extra] if options.extra else [])])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.zoo", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for the results (benchmarks/results and docs/results)")
    parser.add_argument("--lines", type=Path, default=LINES, help="file of single results (out/zoo.jsonl)")
    parser.add_argument("--models", nargs="+", default=[], help="measure these only")
    parser.add_argument("--family", nargs="+", default=[], choices=FAMILIES, help="measure these only")
    parser.add_argument("--extra", nargs="+", default=[], choices=["timm", "transformers"], help="other libraries")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of what is dead (0 1 2)")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one network (600)")
    parser.add_argument("--memory-limit", type=float, default=12.0, help="GB of data for one network (12)")
    parser.add_argument("--stop-after", type=float, default=1e9, help="start no network after so many seconds")
    parser.add_argument("--resume", action="store_true", help="keep stored results of the same code; the default")
    parser.add_argument("--fresh", action="store_true", help="measure again what is stored")
    parser.add_argument("--earlier", type=Path, help="results whose rows are shown for what is not measured now")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))  # and the child with it, in _wait
    cases = all_cases(options.extra)
    unknown = set(options.models) - {case.name for case in cases}
    if unknown:
        sys.exit(f"there is no {', '.join(sorted(unknown))}; --extra adds other libraries")
    chosen = [c for c in cases if not options.models or c.name in options.models]
    rows = collect((c for c in chosen if not options.family or c.family in options.family), options)
    missing = {"failures": {"start": "not measured yet"}, "exact": False}
    known = earlier(options.earlier) | rows
    listed = [{"model": c.name, "family": c.family} | known.get(c.name, missing) for c in cases]
    settings = {
        "seeds": options.seeds,
        "dead": f"{SHARE:.0%} of the removable groups",
        "exact": f"relative difference of at most {TOLERANCE:g} in float64",
        "limits": f"{options.timeout:g} seconds and {options.memory_limit:g} GB of data for each network",
        "torch.compile": f"backend {BACKEND}, fullgraph",
    }
    record = Record("zoo", "Scoreboard", command(options), settings, tables(listed), claims(listed), listed)
    print(write(record, options.out))


if __name__ == "__main__":
    main()
