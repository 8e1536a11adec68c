"""A number that knows of which module it is an attribute."""

from collections.abc import Callable
from typing import Any

Origin = tuple[str, str]
"""The path of a module, and the name of one of its attributes."""

_COMPUTES = (
    "add", "radd", "sub", "rsub", "mul", "rmul", "floordiv", "rfloordiv", "truediv", "rtruediv", "mod", "rmod", "pow",
    "rpow", "neg", "lt", "le", "gt", "ge", "eq", "ne", "bool", "index", "float", "divmod", "rdivmod", "lshift", "and",
)  # fmt: skip


class OwnNumber(int):
    """A number that knows of which module it is an attribute, and tells when something else is made of it."""

    origin: Origin
    computed: set[Origin]

    def __new__(cls, value: int, origin: Origin, computed: set[Origin]) -> "OwnNumber":  # noqa: PYI034 - 3.10 has no Self
        """A number.

        Args:
            value: of it.
            origin: of it.
            computed: where it tells of that.
        """
        result = super().__new__(cls, value)
        result.origin, result.computed = origin, computed
        return result

    def __copy__(self) -> "OwnNumber":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "OwnNumber":
        return self

    def __hash__(self) -> int:
        return int.__hash__(self)


def _telling(name: str) -> Callable[..., Any]:
    compute = getattr(int, name)

    def method(self: OwnNumber, *others: Any) -> Any:  # noqa: ANN401 - as int has it
        self.computed.add(self.origin)
        return compute(self, *others)

    return method


for _name in _COMPUTES:
    setattr(OwnNumber, f"__{_name}__", _telling(f"__{_name}__"))
