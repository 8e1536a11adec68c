"""What a long call is doing, on the terminal: a line that appears after some seconds and goes when the call ends.

It is drawn on the terminal that stderr is, and nothing at all is written where stderr is none: in files, pipes, logs.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

PATIENCE = 3.0
"""Seconds after which a call is long."""


class _Line:
    """The line of one call."""

    def __init__(self, title: str, console: Console, patience: float) -> None:
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            TextColumn("{task.fields[stage]}"),
            BarColumn(bar_width=20),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._bar.add_task(title, total=None, stage="")
        self._timer = threading.Timer(patience, self._bar.start)
        self._timer.daemon = True
        self._timer.start()

    def show(self, name: str, done: int, total: int | None) -> None:
        self._bar.update(self._task, stage=name, completed=done, total=total)

    def stop(self) -> None:
        self._timer.cancel()
        self._timer.join()
        self._bar.stop()


_lines: list[_Line] = []


@contextmanager
def progress(title: str, *, console: Console | None = None, patience: float = PATIENCE) -> Iterator[None]:
    """Show what goes on inside, once it takes long; a call within a call shows nothing of its own.

    Args:
        title: of the line.
        console: to draw on; stderr by default.
        patience: seconds before the line appears.

    >>> with progress("pruning Net"):
    ...     stage("analysis", 3, 120)
    """
    console = Console(stderr=True) if console is None else console
    if _lines or not console.is_terminal or threading.current_thread() is not threading.main_thread():
        yield
        return
    line = _Line(title, console, patience)
    _lines.append(line)
    try:
        yield
    finally:
        _lines.clear()
        line.stop()


def stage(name: str, done: int = 0, total: int | None = None) -> None:
    """Say what is being done now, and how much of it is; costs nothing where nobody watches.

    Args:
        name: of the stage.
        done: how many steps.
        total: of how many; None where that is not known.
    """
    for line in _lines:
        line.show(name, done, total)
