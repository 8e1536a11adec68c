"""What code does with autocast while it is traced: the regions that it enters, and whether it asks for the mode."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final
from unittest.mock import patch

import torch

from fxcompress.errors import TraceError
from fxcompress.trace.code.frames import asks_for_user
from fxcompress.trace.code.locations import place
from fxcompress.trace.graph.autocast import autocast_is_on, enter_autocast, exit_autocast, inference_mode

_ENTER: Final[Callable[..., Any]] = torch.autocast.__enter__
_EXIT: Final[Callable[..., Any]] = torch.autocast.__exit__
_INIT: Final[Callable[..., None]] = torch.autocast.__init__
_IS_ENABLED: Final = torch.is_autocast_enabled
_IS_INFERRING: Final = torch.is_inference_mode_enabled


def _mode() -> tuple[bool, bool]:
    """Whether autocast is on, on a CPU and on a GPU."""
    return _IS_ENABLED("cpu"), _IS_ENABLED("cuda")


class AutocastRegions:
    """The regions that code enters while it is traced.

    Args:
        record: writes a call of a function into the graph, and returns what stands for its result there.
        device: what stands in the graph for a type of devices.
        ask: told of a question whether autocast or inference mode is on, a function and its arguments, with the answer.
    """

    def __init__(
        self,
        record: Callable[[Callable[..., Any], tuple[Any, ...]], Any],
        device: Callable[[str], object],
        ask: Callable[[Callable[..., object], tuple[object, ...], object], None],
    ) -> None:
        self._record, self._device, self._ask = record, device, ask
        self._mode = _mode()
        self._inside: list[tuple[torch.autocast, Any]] = []

    def refuse_unseen(self) -> None:
        """Raise where autocast has been switched by other means than ``torch.autocast``.

        Raises:
            TraceError: it has.
        """
        if _mode() != self._mode:
            raise TraceError(f"it switches autocast{place()} in a way that a graph does not know; use torch.autocast")

    @contextmanager
    def watched(self, paused: Callable[[], bool]) -> Iterator[None]:
        """Within it, what code does with ``torch.autocast`` is recorded, but while tracing is ``paused``."""

        def entered(region: Any) -> Any:  # noqa: ANN401
            result = _ENTER(region)
            if not paused():
                self._enter(region)
            return result

        def left(region: Any, *error: Any) -> Any:  # noqa: ANN401
            result = _EXIT(region, *error)
            if not paused():
                self._leave(region)
            return result

        def is_on(device_type: str = "cuda") -> bool:
            known = _IS_ENABLED(device_type)
            inside = any(region.device == device_type for region, _ in self._inside)
            if not (paused() or inside) and asks_for_user(sys._getframe(1)):  # noqa: SLF001
                self._ask(autocast_is_on, (self._device(device_type),), known)
            return known

        def is_inferring() -> bool:
            known = _IS_INFERRING()
            if not paused() and asks_for_user(sys._getframe(1)):  # noqa: SLF001
                self._ask(inference_mode, (), inference_mode())
            return known

        with ExitStack() as stack:
            for name, member in {"__init__": _begun, "__enter__": entered, "__exit__": left}.items():
                stack.enter_context(patch.object(torch.autocast, name, member))
            stack.enter_context(patch.object(torch, "is_autocast_enabled", is_on))
            stack.enter_context(patch.object(torch, "is_inference_mode_enabled", is_inferring))
            yield

    def _enter(self, region: Any) -> None:  # noqa: ANN401
        """Write down a region as its code has asked for it, which is not always what this machine can do."""
        made = {
            "device_type": region.device, "dtype": region.fast_dtype, "enabled": region._enabled,  # noqa: SLF001
            "cache_enabled": region._cache_enabled,  # noqa: SLF001
        }  # fmt: skip
        given = {"dtype": None, "enabled": True, "cache_enabled": None} | getattr(region, "fxc_given", made)
        self._mode = _mode()
        args = self._device(str(given["device_type"])), given["dtype"], bool(given["enabled"]), given["cache_enabled"]
        self._inside.append((region, self._record(enter_autocast, args)))

    def _leave(self, region: Any) -> None:  # noqa: ANN401
        if self._inside and self._inside[-1][0] is region:
            self._mode = _mode()
            self._record(exit_autocast, (self._inside.pop()[1],))


def _begun(region: Any, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
    """As ``torch.autocast(...)`` begins; what it is given is kept."""
    given = dict(zip(("device_type", "dtype", "enabled", "cache_enabled"), args, strict=False)) | kwargs
    _INIT(region, **given)
    region.fxc_given = given
