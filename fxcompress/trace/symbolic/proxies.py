"""What stands for a value while torch.fx traces; it refuses to be asked which number, key or text it is."""

import operator
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from fxcompress.errors import TraceError
from fxcompress.trace.code.frames import asks_for_user
from fxcompress.trace.code.locations import place
from fxcompress.trace.code.messages import is_message
from fxcompress.trace.graph.calls import IN_PLACE_OPERATORS
from fxcompress.trace.symbolic.plain_arguments import NULLABLE
from fxcompress.trace.symbolic.questions import dispatches, has


class _StandIn:
    """Refuses what torch.fx would answer of the stand-in itself: which number, key or text it is."""

    def __int__(self) -> int:
        return self.tracer.refuse("be made numbers of Python")  # type: ignore[attr-defined,no-any-return]

    __float__ = __complex__ = __len__ = __int__

    def __reduce_ex__(self, protocol: object) -> Any:  # noqa: ANN401 - as of object
        return self.tracer.refuse("be copied by copy.copy, or pickled")  # type: ignore[attr-defined]

    def __hash__(self) -> int:
        if asks_for_user(sys._getframe(1)):  # noqa: SLF001
            return self.tracer.refuse("be keys of a set or dict")  # type: ignore[attr-defined,no-any-return]
        return super().__hash__()

    def __repr__(self) -> str:
        frame = sys._getframe(1)  # noqa: SLF001
        if asks_for_user(frame) and not is_message(frame):
            return self.tracer.refuse("be made text")  # type: ignore[attr-defined,no-any-return]
        return super().__repr__()


class _Attribute(_StandIn, fx.proxy.Attribute):
    """What stands for an attribute, and for what that has."""

    def __getattr__(self, k: str) -> fx.proxy.Attribute:
        return _Attribute(self, k)


class Proxy(_StandIn, fx.Proxy):
    """fx.Proxy that keeps ``x += y`` in place; torch.fx makes ``x = x + y`` of it, which other names of x miss.

    It has the attributes of what it stands for, where that is known, and its class for ``functools.singledispatch``.
    """

    @property  # type: ignore[misc] # read-only
    def __class__(self) -> type:
        if not dispatches(sys._getframe(1)):  # noqa: SLF001
            return type(self)
        return self.tracer.kinds.asked(self.node)  # type: ignore[attr-defined,no-any-return]

    def __getattr__(self, k: str) -> fx.proxy.Attribute:
        kind = self.tracer.kinds.of(self.node)  # type: ignore[attr-defined]
        of_tensor = hasattr(Tensor, k)
        if kind is not None and not of_tensor and not has(kind, k):
            raise AttributeError(f"{kind.__name__!r} object has no attribute {k!r}")
        attribute = _Attribute(self, k)
        if k in NULLABLE or not (of_tensor and (kind is None or issubclass(kind, Tensor))):
            _ = attribute.node  # in the graph even where the code does no more than ask whether it is None
        return attribute

    def __setattr__(self, name: str, value: object) -> None:
        """Set an attribute of what it stands for.

        Raises:
            TraceError: a graph cannot do that.
        """
        if name == "requires_grad":
            self.tracer.create_proxy("call_method", "requires_grad_", (self, value), {})
        elif hasattr(Tensor, name):
            raise TraceError(f"it sets {name} of a tensor{place()}, which a graph cannot do")
        else:
            super().__setattr__(name, value)


def _in_place(function: Callable[..., object]) -> Callable[[fx.Proxy, object], fx.Proxy]:
    def record(self: fx.Proxy, other: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


for _operator in IN_PLACE_OPERATORS - {operator.imatmul}:  # which tensors do not have: x becomes another one
    for _class in (Proxy, _Attribute):
        setattr(_class, f"__{_operator.__name__}__", _in_place(_operator))
