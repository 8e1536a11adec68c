"""The table of op classes: which rule an ATen op follows.

A rule has two halves. ``labels`` says where labels go, what they couple and what they pin; ``constants`` says what is
known of the outputs when something is known of the inputs. An op without a rule is decomposed; where that fails, every
label that touches it is pinned.
"""

import functools
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxcompress.channels.layers import Layers
from fxcompress.channels.rules.patterns import Pattern, is_array
from fxcompress.channels.space import Space
from fxcompress.channels.values import Call, Step, Value

LabelRule = Callable[[Call, Space], tuple[Layers, ...]]
Shared = dict[Hashable, tuple[object, Any]]
Patterns = dict[tuple[int, int, int], Pattern]
"""Patterns of weights, by the key of the value and the dims of rows and columns."""
ConstantRule = Callable[[Step, "Known"], list[Tensor]]


class Known:
    """What is known of each value: a map of the tensor's rank, size 1 where it does not vary, NaN = varies.

    Attributes:
        training: batch norm normalises by the batch, as in training; None where some of them may and others not.
        maps: the map of each value, by its key; float64 on the CPU, except that parameters stand as they are. Rules ask
            for one with :meth:`of` or :meth:`held`.
        patterns: for each weight, which entries may be other than zero.
        shared: what :meth:`once` has found, shared between modes and graphs.
    """

    def __init__(
        self,
        maps: dict[int, Tensor],
        patterns: Patterns | None = None,
        shared: Shared | None = None,
        *,
        training: bool | None,
    ) -> None:
        self._training = training
        self._maps = maps
        self.patterns: Patterns = {} if patterns is None else patterns
        self.shared: Shared = {} if shared is None else shared

    @property
    def training(self) -> bool | None:
        """See above."""
        return self._training

    @property
    def maps(self) -> dict[int, Tensor]:
        """See above."""
        return self._maps

    def once(self, of: object, what: Hashable, make: Callable[[], Any]) -> Any:  # noqa: ANN401 - what it makes
        """What ``make`` returns, once for each object and key of one's own."""
        key = (id(of), what)
        found = self.shared.get(key)
        if found is None:
            found = self.shared[key] = of, make()  # the object as well: so that no other one gets its place
        return found[1]

    def once_in_memory(self, tensor: Tensor, what: Hashable, make: Callable[[], Any]) -> Any:  # noqa: ANN401
        """The same for all tensors that see the same memory in the same way, as a transposed weight does each time."""
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, what)
        found = self.shared.get(key)
        if found is None:
            found = self.shared[key] = tensor, make()
        return found[1]

    def of(self, value: Value) -> Tensor:
        """The map of a value, on the CPU."""
        found = self.held(value)
        return found if found.is_cpu else self.once(found, "on the CPU", found.cpu)

    def held(self, value: Value) -> Tensor:
        """The map of a value; that of a parameter where it lies, for what makes less of it before it is copied."""
        found = self._maps.get(value.key)
        return unknown(value) if found is None else found

    def small(self, value: Value) -> np.ndarray:
        """The map of a vector, float64 (K,) or (1,): in numpy, which takes a third of the time of torch for so few."""
        found = self.of(value)
        result: np.ndarray = self.once(found, "small", lambda: _array(found).reshape(-1))
        return result

    def bits(self, value: Value) -> Tensor:
        """The map with each float64 seen as an integer, so that NaN equals itself."""
        return self.of(value).double().view(torch.int64)


def _array(tensor: Tensor) -> np.ndarray:
    if is_array(tensor):
        return tensor.detach().numpy().astype(np.float64, copy=False)
    return tensor.double().numpy()


def unknown(value: Value) -> Tensor:
    """The map of a value of which nothing is known."""
    return _unknown(value.rank)


@functools.cache
def _unknown(rank: int) -> Tensor:
    return torch.full((1,) * rank, torch.nan, dtype=torch.float64, device="cpu")


def zero_where(zero: Tensor) -> Tensor:
    """A map that knows of zeros and of nothing else."""
    return torch.where(zero, 0.0, torch.nan).double()


def equal_along(channels: Tensor, dims: Iterable[int]) -> Tensor:
    """What every entry along ``dims`` is; NaN where they differ. float64 on the CPU, size 1 along ``dims``."""
    channels = channels.double()
    for dim in dims:
        if channels.shape[dim] != 1:
            first = channels.narrow(dim, 0, 1)
            channels = torch.where((channels == first).all(dim, keepdim=True), first, torch.nan)
    return channels


def nothing_known(step: Step, known: Known) -> list[Tensor]:
    """The constant rule of ops through which nothing is known."""
    return [unknown(value) for value in step.outputs]


@dataclass(frozen=True, slots=True, eq=False)
class OpClass:
    """A class of ops that share a rule; each is one of its own.

    Attributes:
        name: for tables and reports.
        labels: the label rule.
        constants: the constant rule.
    """

    name: str
    labels: LabelRule
    constants: ConstantRule = nothing_known


_RULES: dict[Any, OpClass] = {}


def register(op_class: OpClass, ops: Iterable[str | Any]) -> OpClass:
    """Give ops a rule.

    Args:
        op_class: the rule.
        ops: names of ATen ops such as ``"relu"`` (those that this torch lacks are left out); names with a library,
            such as ``"torchvision::roi_align"``, whether the library is there or not; overload packets such as
            ``torch.ops.mylib.my_op``; or single overloads such as ``torch.ops.aten.max.dim``, which come first.

    Raises:
        ValueError: an op has a rule already.
    """
    for op in ops:
        key = getattr(torch.ops.aten, op, None) if isinstance(op, str) and "::" not in op else op
        if key is None:
            continue
        if key in _RULES:
            raise ValueError(f"{key} has the rule {_RULES[key].name!r} already")
        _RULES[key] = op_class
    return op_class


def rule_of(func: Any) -> OpClass | None:  # noqa: ANN401 - an OpOverload
    """The rule of an op overload, or None."""
    for key in _keys(func):
        found = _RULES.get(key)
        if found is not None:
            return found
    return None


@functools.cache
def _keys(func: Any) -> tuple[Any, ...]:  # noqa: ANN401
    return func, func.overloadpacket, func.name().partition(".")[0]


def registered() -> dict[Any, OpClass]:
    """A copy of the whole table."""
    return dict(_RULES)
