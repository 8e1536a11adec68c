"""What the checks of one network find, line by line."""

import json
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@dataclass(slots=True)
class Report:
    """Where findings go.

    Attributes:
        failures: the reason for each step that failed.
    """

    failures: dict[str, str] = field(default_factory=dict)

    def add(self, **findings: Any) -> None:  # noqa: ANN401 - whatever JSON can hold
        """Print findings."""
        print(json.dumps(findings), flush=True)

    def fail(self, step: str, reason: str) -> None:
        """Print why a step failed."""
        self.failures[step] = reason
        self.add(failures=self.failures)

    def passed(self, step: str) -> None:
        """Take back that a step failed: there is another way."""
        del self.failures[step]
        self.add(failures=self.failures)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """A step of which an error is a finding."""
        self.add(step=name)
        try:
            yield
        except Exception as error:  # noqa: BLE001 - the reason is what the scoreboard is for
            self.fail(name, reason_of(error))


def reason_of(error: Exception) -> str:
    """An error on one line, without the folders of this machine."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return "the memory limit is reached"
    text = re.sub(r"(/[^\s:]*)?/site-packages/|(/[^\s:]*)?/lib/python[\d.]+/", "", text).replace(f"{ROOT}/", "")
    return f"{type(error).__name__}: {text}"[:600]


def peak() -> float:
    """The most memory that this process has held, in MB."""
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held / (1e6 if sys.platform == "darwin" else 1e3)
