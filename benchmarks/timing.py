"""Measuring several contestants in turn, within one process."""

import ctypes
import gc
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from benchmarks.record import DEFAULT_THREADS

CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}


@dataclass(slots=True)
class Stopwatch:
    """Seconds by phase, on each clock.

    Attributes:
        laps: for each clock, the seconds of each phase, in the order in which they were run.
    """

    laps: dict[str, dict[str, float]] = field(default_factory=lambda: {clock: {} for clock in CLOCKS})

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what runs inside."""
        start = {clock: read() for clock, read in CLOCKS.items()}
        yield
        for clock, read in CLOCKS.items():
            self.laps[clock][name] = self.laps[clock].get(name, 0.0) + read() - start[clock]

    def total(self, clock: str) -> float:
        """The sum of all phases."""
        return sum(self.laps[clock].values())


def medians(watches: Sequence[Stopwatch], clock: str) -> dict[str, float]:
    """The median of each phase."""
    return {name: statistics.median(w.laps[clock][name] for w in watches) for name in watches[0].laps[clock]}


def median_total(watches: Sequence[Stopwatch], clock: str) -> float:
    """The median of the totals."""
    return statistics.median(w.total(clock) for w in watches)


def paired_ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """The median over rounds of a / b: what slows a round down as a whole cancels."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def rotated(names: Sequence[str], turn: int) -> list[str]:
    """The contestants, each round another one first."""
    start = turn % len(names)
    return [*names[start:], *names[:start]]


def settle() -> None:
    """Collect the garbage of what ran before, so that it is not collected at the expense of what runs next."""
    gc.collect()


@contextmanager
def threads(count: int) -> Iterator[int]:
    """Run with so many threads; 0 is torch's default."""
    used = count or DEFAULT_THREADS
    torch.set_num_threads(used)
    try:
        yield used
    finally:
        torch.set_num_threads(DEFAULT_THREADS)


def keep_memory() -> bool:
    """Have glibc keep for the next step what one step freed, for the rest of the process; whether that is possible.

    It is what ``MALLOC_TRIM_THRESHOLD_`` and ``MALLOC_MMAP_THRESHOLD_`` ask for when a program starts, and what torch
    does itself on a GPU. Otherwise large tensors are made of fresh pages, which the system fills with zeros first.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return False
    trim, mmap = -1, -3
    return bool(mallopt(trim, 2**31 - 1)) and bool(mallopt(mmap, 2**31 - 1))
