"""The live display of a training run."""

from collections.abc import Iterable
from types import TracebackType

from rich import get_console
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fxcompress.training.history import EpochRecord


class Display:
    """A progress bar above the figures of the last epoch; nothing at all where ``enabled`` is False.

    Where there is no terminal, as in the log of a job, each epoch is a line.
    """

    def __init__(self, title: str, epochs: int, *, enabled: bool = True, console: Console | None = None) -> None:
        self._console = console or get_console()
        live = self._console.is_terminal or self._console.is_jupyter
        self._lines = enabled and not live
        self._progress = _Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            console=self._console,
            disable=not (enabled and live),
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
        if self._lines:
            self._console.print(str(record), soft_wrap=True, highlight=False)
        self._progress.update(self._task, completed=record.epoch, figures=str(record))


class _Progress(Progress):
    """A bar, and below it the figures: beside it they would not fit into 80 columns."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield from (task.fields["figures"] for task in self.tasks if task.fields["figures"])


def tell(line: str, *, enabled: bool) -> None:
    """Print a line that stays, on the console that displays are drawn on."""
    if enabled:
        get_console().print(line, soft_wrap=True, highlight=False)
