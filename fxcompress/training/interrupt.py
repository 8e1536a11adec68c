"""Ctrl-C or SIGTERM during training: the step that runs is finished first, so that what is left behind is whole."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType
from typing import Any

from torch import nn

from fxcompress.training.history import EpochRecord

_NOTICES = {
    signal.SIGINT: b"\nstopping after this step; press Ctrl-C again to stop at once\n",
    signal.SIGTERM: b"\nSIGTERM: stopping after this step; a second one stops at once\n",
}
"""What is said of each signal that asks to stop: from a keyboard, or from the scheduler of a cluster."""

_Handler = Callable[[int, FrameType | None], Any] | int | None


def _nothing(number: int, frame: FrameType | None) -> None:
    """A handler, where a signal that has come already must find one."""


class StepDone(Exception):  # noqa: N818 - no error
    """Raised between two steps, once the program has been asked to stop."""


class TrainingInterrupted(KeyboardInterrupt):
    """Training was stopped by Ctrl-C or SIGTERM, after a whole step. A KeyboardInterrupt: scripts end, unless caught.

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
    """Takes note of Ctrl-C and SIGTERM instead of ending the program, while it is entered; the second one ends it.

    Only the main thread of a program can do so. In others nothing is changed, and a signal that is ignored, or handled
    by something that is not Python's, is left alone.

    A terminal sends Ctrl-C to the workers of a DataLoader as well, and many schedulers send SIGTERM to them. torch
    raises an error for a worker that has died, wherever the program is just then, from a handler of SIGCHLD: there is
    none from the first signal on, so that the step is finished all the same.

    >>> with Interrupt() as interrupt:
    ...     signal.raise_signal(signal.SIGINT)
    >>> interrupt.requested, signal.getsignal(signal.SIGINT) is signal.default_int_handler
    (True, True)
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, _Handler] = {}
        self._process = os.getpid()

    def __enter__(self) -> "Interrupt":  # noqa: PYI034 - typing.Self needs Python 3.11
        if threading.current_thread() is threading.main_thread():
            for number in _NOTICES:
                before = signal.getsignal(number)
                if callable(before) or before is signal.SIG_DFL:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            self._restore()
            signal.raise_signal(number)
            return
        self.requested = True
        if os.getpid() != self._process:
            return  # a worker that was forked: its parent will end it
        self._let_children_die()
        with contextlib.suppress(OSError):
            os.write(2, _NOTICES[signal.Signals(number)])  # not print: the handler may run in the middle of one

    def _let_children_die(self) -> None:
        number = getattr(signal, "SIGCHLD", None)  # none on Windows
        if number is not None and callable(before := signal.getsignal(number)):
            self._before[number] = before
            signal.signal(number, _nothing)

    def _restore(self) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {}
