"""Results of benchmarks: one JSON file with all that was measured, and a Markdown page that is made from it.

Tables are never written by hand: ``python -m benchmarks.record FILE.json ...`` makes the pages again.
"""

import argparse
import datetime as dt
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ROOT / "docs" / "results"
DEFAULT_THREADS = torch.get_num_threads()


def commit() -> str:
    """The commit that the code is at, and whether the library was changed since."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = " with changes" if git("status", "--porcelain", "fxcompress") else ""
        return git("rev-parse", "--short", "HEAD") + changed
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


_COMMIT = commit()
"""Asked for before anything is measured: a measurement may take long, while work goes on."""
_PACKAGES = ("torch", "torchvision", "numpy", "fxcompress", "torch-pruning")


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table.

    Attributes:
        key: of the value in each row.
        heading: what stands above it.
        form: format specification of numbers, such as ``".3f"``.
    """

    key: str
    heading: str
    form: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """A table: the rows hold plain numbers and words; the columns say how they are shown.

    Attributes:
        title: its heading.
        columns: from left to right.
        rows: one dict for each.
        text: what stands between heading and table.
    """

    title: str
    columns: tuple[Column, ...]
    rows: list[dict[str, Any]]
    text: str = ""


@dataclass(frozen=True, slots=True)
class Claim:
    """A sentence about a number, and whether it is true.

    Attributes:
        text: the sentence.
        value: what was measured.
        limit: what it must stay below.
        at_least: it must reach the limit instead.
    """

    text: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def holds(self) -> bool:
        """Whether the number is on the right side of its limit."""
        return self.value >= self.limit if self.at_least else self.value < self.limit


@dataclass(frozen=True, slots=True)
class Record:
    """The result of one run.

    Attributes:
        name: of the files.
        title: of the page.
        command: that made it.
        settings: everything that the command line chose, seeds among them.
        tables: what the page shows.
        claims: what the numbers are measured for.
        samples: every single measurement.
    """

    name: str
    title: str
    command: str
    settings: dict[str, Any]
    tables: list[Table]
    claims: list[Claim] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)


def write(record: Record, out: Path | None = None) -> Path:
    """Write the JSON file and the page that is made from it.

    Args:
        record: the result.
        out: folder for both; by default benchmarks/results and docs/results.

    Returns:
        the path of the page.
    """
    data = asdict(record)
    for claim, plain in zip(record.claims, data["claims"], strict=True):
        plain["holds"] = claim.holds
    data["date"] = dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds")
    data["environment"] = environment()
    path = (out or RESULTS) / f"{record.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n", "utf-8")
    return write_page(path, out or PAGES)


def write_page(path: Path, folder: Path) -> Path:
    """Make the Markdown page of one JSON file."""
    page = folder / f"{path.stem}.md"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(render(json.loads(path.read_text("utf-8"))), "utf-8")
    return page


def environment() -> dict[str, Any]:
    """What the numbers depend on, beside the code that was measured."""
    load = [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else []
    found: dict[str, Any] = {name: _version(name) for name in _PACKAGES}
    return found | {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "default threads": DEFAULT_THREADS,
        "OpenMP settings": [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith(("OMP_", "GOMP_"))],
        "load average": load,
        "commit": _COMMIT,
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def render(data: dict[str, Any]) -> str:
    """The page of a result, from the content of its JSON file."""
    lines = [f"# {data['title']}", "", f"Made by `{data['command']}`; not written by hand.", ""]
    for claim in data["claims"]:
        verdict = "holds" if claim["holds"] else "**does not hold**"
        word = "at least" if claim.get("at_least") else "limit"
        lines += [f"- {claim['text']}: {claim['value']:.3f}, {word} {claim['limit']:g}: {verdict}"]
    lines += [""] if data["claims"] else []
    for table in data["tables"]:
        lines += [f"## {table['title']}", "", *([table["text"], ""] if table["text"] else []), *_table(table), ""]
    lines += ["## Measured on", ""]
    facts = {"date": data["date"]} | data["environment"] | data["settings"]
    lines += [f"- {name}: {_listed(value)}" for name, value in facts.items()]
    return "\n".join(lines) + "\n"


def _table(table: dict[str, Any]) -> Iterable[str]:
    columns = table["columns"]
    yield "| " + " | ".join(column["heading"] for column in columns) + " |"
    yield "|" + "|".join("---:" if column["form"] else "---" for column in columns) + "|"
    for row in table["rows"]:
        yield "| " + " | ".join(_cell(row.get(column["key"]), column["form"]) for column in columns) + " |"


def _cell(value: object, form: str) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "-"
    return format(value, form) if isinstance(value, int | float) else str(value)


def _listed(value: object) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def parser(name: str, description: str | None, repeats: int) -> argparse.ArgumentParser:
    """The options that all benchmarks share."""
    result = argparse.ArgumentParser(f"python -m benchmarks.{name}", description=description)
    result.add_argument("--out", type=Path, help="folder for the results (benchmarks/results and docs/results)")
    result.add_argument("--seed", type=int, default=0, help="of the random weights and inputs")
    result.add_argument("--repeats", type=int, default=repeats, help=f"rounds of measurement ({repeats})")
    result.add_argument("--threads", type=int, nargs="+", default=[1, 0], help="0 is torch's default (1 and 0)")
    return result


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """The options as they are recorded; where the results go does not matter to them."""
    return {name: value for name, value in vars(options).items() if name not in {"out", "profile"}}


def command(name: str, options: argparse.Namespace) -> str:
    """The command line that measures the same again."""
    flags = []
    for key, value in settings(options).items():
        if isinstance(value, bool):  # such an option takes no word
            flags.append(f"--{key}" if value else f"--no-{key}")
            continue
        words = value if isinstance(value, list) else [value]
        flags += [f"--{key}", *map(str, words)]
    return " ".join(["python", "-m", f"benchmarks.{name}", *flags])


def main(arguments: Sequence[str]) -> None:
    for argument in arguments:
        print(write_page(Path(argument), PAGES))


if __name__ == "__main__":
    main(sys.argv[1:])
