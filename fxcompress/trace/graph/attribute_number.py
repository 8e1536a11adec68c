"""A number that knows of which module it is an attribute."""

import builtins
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

Origin = tuple[str, str]
"""The path of a module, and the name of one of its attributes."""

_NOT_OF_VALUES = frozenset(
    {
        "__class__", "__delattr__", "__dir__", "__doc__", "__getattribute__", "__getnewargs__", "__getstate__",
        "__hash__", "__init__", "__init_subclass__", "__new__", "__reduce__", "__reduce_ex__", "__setattr__",
        "__sizeof__", "__subclasshook__", "from_bytes",
    }
)  # fmt: skip
_OF_TRACERS = frozenset({"__format__", "__int__", "__repr__", "__str__"})
"""What tracers do with any number, to write it down: it counts where other code does it."""


class OwnNumber(int):
    """A number that knows of which module it is an attribute, and tells when something else is made of it."""

    origin: Origin
    computed: set[Origin]
    of_layer: bool

    def __new__(cls, value: int, origin: Origin, computed: set[Origin], *, of_layer: bool = False) -> "OwnNumber":  # noqa: PYI034 - 3.10 has no Self
        """A number.

        Args:
            value: of it.
            origin: of it.
            computed: where it tells of that.
            of_layer: of torch, whose own code may do with it what it likes.
        """
        result = super().__new__(cls, value)
        result.origin, result.computed, result.of_layer = origin, computed, of_layer
        return result

    def tell(self, what: str, depth: int) -> None:
        """Tell that something was made of it, by the code ``depth`` frames above the caller."""
        frame: Any = sys._getframe(depth + 1)  # noqa: SLF001
        while self.of_layer and _home(frame).startswith("torch.nn.functional"):
            frame = frame.f_back
        ours = _home(frame).startswith(("fxcompress.", "torch.fx."))
        own = self.of_layer and (ours or _home(frame).startswith("torch.nn.modules."))
        if not own and not (ours and what in _OF_TRACERS):
            self.computed.add(self.origin)

    def __copy__(self) -> "OwnNumber":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "OwnNumber":
        return self

    def __hash__(self) -> int:
        return int.__hash__(self)


def _home(frame: Any) -> str:  # noqa: ANN401 - a frame, or None above the last one
    return "" if frame is None else str(frame.f_globals.get("__name__", ""))


def _telling(name: str) -> Callable[..., Any]:
    compute = getattr(int, name)

    def method(self: OwnNumber, *others: Any, **named: Any) -> Any:  # noqa: ANN401 - as int has it
        self.tell(name, 1)
        return compute(self, *others, **named)

    return method


for _name in dir(int):
    if _name not in _NOT_OF_VALUES and callable(getattr(int, _name)):
        setattr(OwnNumber, _name, _telling(_name))


class _RangeKind(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, _RANGE)


class _Range(metaclass=_RangeKind):
    """``range``, which takes numbers without asking them for anything."""

    def __new__(cls, *args: Any) -> Any:  # noqa: ANN401 - a range
        for number in args:
            if isinstance(number, OwnNumber):
                number.tell("range", 1)
        return _RANGE(*args)


_RANGE = range


@contextmanager
def ranges_tell() -> Iterator[None]:
    """Within it, numbers tell of ranges that are made of them."""
    with patch.object(builtins, "range", _Range):
        yield
