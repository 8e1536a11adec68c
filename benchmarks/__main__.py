"""Runs benchmarks one after another, each in a process of its own: ``python -m benchmarks [--out DIR] [names...]``."""

import argparse
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ALL = (
    "speed",
    "growth",
    "memory",
    "latency",
    "step",
    "digits",
    "targets",
    "pretrained",
    "accuracy",
    "macs",
    "deployment",
    "cifar",
    "own_code",
    "zoo",
)


def main(arguments: list[str] | None = None) -> None:
    present = [name for name in ALL if find_spec(f"benchmarks.{name}") is not None]
    options = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    options.add_argument("--out", type=Path, help="folder for the results (benchmarks/results and docs/results)")
    options.add_argument("names", nargs="*", help=f"which: {', '.join(present)} (all)")
    chosen = options.parse_args(arguments)
    names = chosen.names or present
    if not set(names) <= set(present):
        options.error(f"there is no {', '.join(sorted(set(names) - set(present)))}; choose from {', '.join(present)}")
    out = [] if chosen.out is None else ["--out", str(chosen.out)]
    failed = []
    for name in names:
        print(f"--- {name}", flush=True)
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *out], check=False).returncode:
            failed.append(name)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
