"""The live display of a training run."""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fxcompress.training.history import EpochRecord


class Display:
    """A progress bar with the figures of the last epoch; nothing at all where ``enabled`` is False."""

    def __init__(self, title: str, epochs: int, *, enabled: bool = True, console: Console | None = None) -> None:
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not enabled,
        )
        self._task = self._progress.add_task(title, total=epochs, figures="")

    def __enter__(self) -> "Display":  # noqa: PYI034 - typing.Self needs Python 3.11
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, record: EpochRecord) -> None:
        """Show the figures of an epoch that has ended."""
        self._progress.update(self._task, completed=record.epoch, figures=str(record))
