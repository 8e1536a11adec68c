"""Ctrl-C during training: the step that runs is finished first, so that what is left behind is whole."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType
from typing import Any

from torch import nn

from fxcompress.training.history import EpochRecord

_NOTICE = b"\nstopping after this step; press Ctrl-C again to stop at once\n"


class StepDone(Exception):  # noqa: N818 - no error
    """Raised between two steps, once Ctrl-C has been pressed."""


class TrainingInterrupted(KeyboardInterrupt):
    """Training was stopped by Ctrl-C, after a whole step. A KeyboardInterrupt: scripts end, unless they catch it.

    Attributes:
        net: the network as it stands.
        history: the epochs that were finished.
        checkpoint: the file to go on from; None where none was asked for.
    """

    def __init__(self, where: str, net: nn.Module, history: Sequence[EpochRecord], checkpoint: str | None) -> None:
        self.net = net
        self.history = list(history)
        self.checkpoint = checkpoint
        remedy = (
            f"go on with fit(..., checkpoint={checkpoint!r}, resume=True)"
            if checkpoint is not None
            else "nothing was saved (pass checkpoint= to be able to go on); this exception holds the network as .net"
        )
        super().__init__(f"stopped {where}; {remedy}")


class Interrupt:
    """Takes note of Ctrl-C instead of raising KeyboardInterrupt, while it is entered; the second one raises at once.

    Only the main thread of a program can do so. In others, and where Ctrl-C is ignored, nothing is changed.

    >>> with Interrupt() as interrupt:
    ...     signal.raise_signal(signal.SIGINT)
    >>> interrupt.requested, signal.getsignal(signal.SIGINT) is signal.default_int_handler
    (True, True)
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: Callable[[int, FrameType | None], Any] | None = None

    def __enter__(self) -> "Interrupt":  # noqa: PYI034 - typing.Self needs Python 3.11
        before = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is threading.main_thread() and callable(before):
            self._before = before
            signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        before = self._before
        if self.requested and before is not None:
            self._restore()
            before(number, frame)
            return
        self.requested = True
        with contextlib.suppress(OSError):
            os.write(2, _NOTICE)  # not print: the handler may run in the middle of one

    def _restore(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None
