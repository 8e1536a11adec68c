"""Numbers that stand for sizes while a network is traced by running it.

They are kinds of torch's SymInt, SymFloat and SymBool: torch takes them wherever it takes a number, and Python cannot
read them (as an index, a loop count, a condition) without calling a method of theirs. Arithmetic makes another such
number and is remembered as a :class:`Recipe`; reading one is a decision, which the recorder turns into a check.
"""

import math
import operator
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol, TypeGuard

import torch

from fxcompress.errors import TraceError
from fxcompress.trace.code.locations import place
from fxcompress.trace.code.messages import is_message

__all__ = ["FUNCTIONS", "OF_MATH", "Number", "Recipe", "Size", "converted", "kept_number", "number", "plain"]


@dataclass(frozen=True, slots=True, eq=False)
class Recipe:
    """How a number is computed: a function, and what it is called with.

    Attributes:
        function: that goes into the graph.
        args: nodes, recipes and plain values.
        sizes: the recipes that read a size off a tensor and that this one is computed from; itself, if it is one.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    sizes: "tuple[Recipe, ...]" = ()


class Decider(Protocol):
    """Whoever keeps the recipes and is told of decisions."""

    def recipe(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Recipe:
        """The one recipe of this kind."""
        ...

    def decide(self, recipe: Recipe, outcome: object) -> None:
        """Code has read the outcome of ``recipe``; what it does next may depend on it."""


class Number:
    """What the three kinds have in common."""

    fxc_value: Any
    fxc_recipe: Recipe
    fxc_decider: Decider

    def __init__(self, value: bool | float, recipe: Recipe, decider: Decider) -> None:  # noqa: FBT001
        self.fxc_value = value
        self.fxc_recipe = recipe
        self.fxc_decider = decider

    @property  # type: ignore[misc] # read-only
    def __class__(self) -> type:
        """``isinstance(n, int)`` must hold as it does for the size itself, or code would go another way."""
        return type(self.fxc_value)

    def fxc_read(self, kind: Callable[..., Any]) -> Any:  # noqa: ANN401 - what the kind makes
        """A plain number for Python."""
        outcome, recipe = kind(self.fxc_value), self.fxc_recipe
        if kind is not type(self.fxc_value):
            recipe = self.fxc_decider.recipe(kind, (recipe,))
        self.fxc_decider.decide(recipe, outcome)
        return outcome

    def __divmod__(self, other: Any) -> tuple[Any, Any]:  # noqa: ANN401
        return self // other, self % other

    def __rdivmod__(self, other: Any) -> tuple[Any, Any]:  # noqa: ANN401
        return other // self, other % self

    def is_integer(self) -> Any:  # noqa: ANN401
        """Whether the number is a whole one, as of float; a decision once it is read."""
        return self % 1 == 0  # type: ignore[operator]

    def bit_length(self) -> int:
        """As of int."""
        return operator.index(self).bit_length()

    def __repr__(self) -> str:
        return f"size({self.fxc_value})"  # no number, so that code which looks it up in a table does not find it

    def __str__(self) -> str:
        return self._text("", sys._getframe(1))  # noqa: SLF001 - there is no other way to ask

    def __format__(self, spec: str) -> str:
        return self._text(spec, sys._getframe(1))  # noqa: SLF001

    def _text(self, spec: str, frame: FrameType) -> str:
        return repr(self) if is_message(frame) else format(self.fxc_read(type(self.fxc_value)), spec)

    def __hash__(self) -> int:
        return hash(self.fxc_read(type(self.fxc_value)))

    def __bool__(self) -> bool:
        return bool(self.fxc_read(bool))

    def __int__(self) -> int:
        return int(self.fxc_read(int))

    def __index__(self) -> int:
        return operator.index(self.fxc_read(type(self.fxc_value)))

    def __float__(self) -> float:
        return float(self.fxc_read(float))


def kept_number() -> TraceError:
    """The error for a size that code has kept from one run to the next, where a trace does not look."""
    return TraceError(
        f"a size that an earlier run of the model has kept comes up again{place()}: out of a cache or a global\n"
        "  keep what is computed from sizes in the model, or compute it anew"
    )


def _apply(function: Callable[..., Any], *operands: Any) -> Any:  # noqa: ANN401
    """The result of ``function`` as a number of the kind that it is."""
    deciders = {id(o.fxc_decider): o.fxc_decider for o in operands if isinstance(o, Number)}
    if len(deciders) > 1:
        raise kept_number()
    decider = next(iter(deciders.values()))
    value = function(*(plain(o) for o in operands))
    recipe = decider.recipe(function, tuple(o.fxc_recipe if isinstance(o, Number) else o for o in operands))
    return number(value, recipe, decider)


def converted(function: Callable[..., Any], *operands: Any) -> Any:  # noqa: ANN401
    """What a function makes of numbers one of which is a size: another such number, and no decision."""
    return _apply(function, *operands)


def _is_operand(value: object) -> TypeGuard[float]:
    return isinstance(value, bool | int | float)  # also of a Number, by its __class__


def _binary(function: Callable[..., Any], *, swapped: bool = False) -> Callable[[Any, Any], Any]:
    def method(self: Any, other: Any) -> Any:  # noqa: ANN401
        if not _is_operand(other):
            return NotImplemented
        return _apply(function, other, self) if swapped else _apply(function, self, other)

    return method


def _unary(function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Any, *rest: Any) -> Any:  # noqa: ANN401
        return _apply(function, self, *rest)

    return method


_ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "lshift", "rshift", "and_", "or_", "xor")
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
_UNARY: dict[str, Callable[..., Any]] = {
    "neg": operator.neg, "pos": operator.pos, "abs": operator.abs, "invert": operator.invert,
    "floor": math.floor, "ceil": math.ceil, "trunc": math.trunc, "round": round,
}  # fmt: skip
_BY_NUMPY: dict[str, Callable[..., Any]] = {
    name: getattr(math, name) for name in ("sqrt", "exp", "log", "log2", "log10", "log1p", "sin", "cos", "tanh")
}
"""What numpy calls by these names on numbers that it does not know: ``np.sqrt(h.shape[-1])``."""

OF_MATH = tuple(_BY_NUMPY.values())
"""The functions of ``math`` that a graph may have on sizes."""

FUNCTIONS: frozenset[Callable[..., Any]] = frozenset(
    {
        bool,
        float,
        int,
        *_UNARY.values(),
        *_BY_NUMPY.values(),
        *(getattr(operator, name) for name in (*_ARITHMETIC, *_COMPARISONS)),
    }
)
"""All that recipes compute numbers by; what reads them off tensors is not among it."""


def _methods() -> dict[str, Callable[..., Any]]:
    methods = {f"__{name}__": _unary(function) for name, function in _UNARY.items()}
    methods |= {name: _unary(function) for name, function in _BY_NUMPY.items()}
    for name in _ARITHMETIC:
        function, bare = getattr(operator, name), name.rstrip("_")
        methods[f"__{bare}__"], methods[f"__r{bare}__"] = _binary(function), _binary(function, swapped=True)
    methods |= {f"__{name}__": _binary(getattr(operator, name)) for name in _COMPARISONS}
    # In the classes below torch's own methods come after these in the order of resolution, so each must be named here.
    methods |= {f"__sym_{name}__": _unary(function) for name, function in (("float", float), ("int", int))}
    return methods


for _name, _method in _methods().items():
    setattr(Number, _name, _method)


class Size(Number, torch.SymInt):
    """A whole number."""

    __hash__ = Number.__hash__


class Ratio(Number, torch.SymFloat):
    """A number with a fraction."""

    __hash__ = Number.__hash__


class Truth(Number, torch.SymBool):
    """Whether something holds; a decision only once ``bool`` reads it."""

    __hash__ = Number.__hash__


_KINDS: dict[type, type[Number]] = {bool: Truth, int: Size, float: Ratio}


def number(value: Any, recipe: Recipe, decider: Decider) -> Any:  # noqa: ANN401
    """``value`` as a number of the kind that it is; where there is no such kind, it is read at once."""
    kind = _KINDS.get(type(value))
    if kind is not None:
        return kind(value, recipe, decider)
    decider.decide(recipe, value)
    return value


def plain(value: Any) -> Any:  # noqa: ANN401
    """The value of a number; anything else as it is. No decision: for handing it to torch."""
    return value.fxc_value if isinstance(value, Number) else value
