"""Modes that code sets while it runs: ``self.bn.eval()`` in ``forward``, for a batch norm that is to stay frozen.

A graph calls a layer in the mode that the layer is in. So the layers that code calls in another mode than that of the
model are noted, in evaluation and in training, and stay in that one whatever mode the graph's module is put into.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from torch import nn

from fxcompress.errors import TraceError
from fxcompress.trace.model.own_modes import Modes


class Switches:
    """What the traces of one model have seen.

    Attributes:
        found: whether code has set a mode.
    """

    def __init__(self) -> None:
        self.found = False
        self._running: bool | None = None
        self._called: dict[bool, dict[str, set[bool]]] = {False: {}, True: {}}

    @contextmanager
    def run(self, *, training: bool) -> Iterator[None]:
        """Within it, the model's code runs, in a mode."""
        before, self._running = self._running, training
        try:
            yield
        finally:
            self._running = before

    def wrote(self) -> None:
        """A module is put into a mode."""
        self.found |= self._running is not None

    def called(self, path: str, module: nn.Module) -> None:
        """A layer that becomes one node is called; those that do the same in both modes do not count."""
        if self._running is not None and _asks_for_mode(type(module)):  # type: ignore[arg-type] # mypy takes the hash of its objects
            self._called[self._running].setdefault(path, set()).add(module.__dict__["training"])

    def modes(self, own: Modes) -> Modes:
        """Which modules are in the other mode, in evaluation and in training.

        Args:
            own: those that ``train`` and ``eval`` of the model leave there.

        Raises:
            TraceError: a layer is called in both modes in one run.
        """
        result = []
        for mode, others in zip((False, True), own, strict=True):
            called = self._called[mode]
            both = min((path for path, found in called.items() if len(found) > 1), default=None)
            if both is not None:
                raise TraceError(f"it calls {both} in training and in evaluation in the same run, which a graph cannot")
            found = {path for path, flags in called.items() if flags == {not mode}}
            result.append(tuple(sorted(found | {path for path in others if path not in called})))
        return result[0], result[1]


@cache
def _asks_for_mode(kind: type[nn.Module]) -> bool:
    """Whether ``forward`` of a class of modules reads the mode."""
    codes = [getattr(one.__dict__.get("forward"), "__code__", None) for one in kind.__mro__]
    return any(code is not None and "training" in code.co_names for code in codes)


_CURRENT: list[Switches] = [Switches()]


def switches() -> Switches:
    """Those of the model that is being traced."""
    return _CURRENT[-1]


@contextmanager
def watched_switches() -> Iterator[Switches]:
    """Within it, one model is traced."""
    _CURRENT.append(Switches())
    try:
        yield _CURRENT[-1]
    finally:
        _CURRENT.pop()
