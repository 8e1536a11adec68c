"""Models that change something around them, past their plain attributes: never wrong without a word."""

import functools
import itertools
import os
import threading
from array import array
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from enum import Enum
from functools import partial
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.errors import TraceError
from fxcompress.trace.basics.patching import patched
from tests.exactness import TOLERANCE, difference
from tests.nets import made_dead

D = 6
X = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
COUNT = 0
TABLES: dict[str, Tensor] = {}


class Nested:
    """Counts a level deeper."""

    def __init__(self) -> None:
        self.inner = Slots()


class Slots:
    """Has no ``__dict__``."""

    __slots__ = ("count", "once")

    def __init__(self) -> None:
        self.count = 0

    def step(self) -> int:
        self.once = True
        self.count += 1
        return self.count


@dataclass(slots=True)
class SlottedData:
    """A dataclass with slots."""

    count: int = 0


class Named(NamedTuple):
    """Holds something for good, which may be another thing in itself."""

    items: list[int]


NESTED = Nested()


class Counts:
    """Counts on the class."""

    count = 0

    @classmethod
    def step(cls) -> int:
        cls.count += 1
        return cls.count


class Net(nn.Module):
    """Two layers; ``between`` may change anything."""

    seen: list[int] = []  # noqa: RUF012

    def __init__(self, between: Callable[[Any, Tensor], Any], *, looks: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.act = nn.Linear(4, D), nn.Linear(D, 3), ACT
        self.between, self.looks, self.partial = between, looks, partial(appended, [])
        self.slots, self.data, self.steps = Slots(), SlottedData(), itertools.count(1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.looks and h.shape[0] > 100:
            return h  # type: ignore[no-any-return]
        return self.last(self.between(self, h))  # type: ignore[no-any-return]


ACT = nn.ReLU()


def appended(items: list[int], h: Tensor) -> Tensor:
    items.append(1)
    return h * len(items)


def by_global(_: Any, h: Tensor) -> Tensor:  # noqa: ANN401
    global COUNT  # noqa: PLW0603
    COUNT += 1
    return h * COUNT


def by_default(_: Any, h: Tensor, items: list[int] = []) -> Tensor:  # noqa: ANN401, B006
    items.append(1)
    return h * len(items)


def by_own_attribute(_: Any, h: Tensor) -> Tensor:  # noqa: ANN401
    by_own_attribute.count = getattr(by_own_attribute, "count", 0) + 1  # type: ignore[attr-defined]
    return h * by_own_attribute.count  # type: ignore[attr-defined,no-any-return]


def enclosed() -> Callable[[Any, Tensor], Tensor]:
    count = 0

    def between(_: Any, h: Tensor) -> Tensor:  # noqa: ANN401
        nonlocal count
        count += 1
        return h * count

    return between


def of_class(net: Any, h: Tensor) -> Tensor:  # noqa: ANN401
    net.seen.append(1)
    return h * len(net.seen)


def by_slots(net: Any, h: Tensor) -> Any:  # noqa: ANN401
    return h * net.slots.step()


def by_data(net: Any, h: Tensor) -> Any:  # noqa: ANN401
    net.data.count += 1
    return h * net.data.count


def by_object(_: Any, h: Tensor) -> Tensor:  # noqa: ANN401
    return h * NESTED.inner.step()


def other_layer(net: Any, h: Tensor) -> Any:  # noqa: ANN401
    h = net.act(h)
    net.act = nn.Tanh()
    return h


def no_layer(net: Any, h: Tensor) -> Any:  # noqa: ANN401
    if hasattr(net, "act"):
        h = net.act(h)
        del net.act
    return h


class Table(dict[str, int]):
    """Keeps a count in itself, and one in an attribute."""

    def __missing__(self, key: str) -> int:
        return 0


class Row(list[int]):
    """As Table."""


class Helper(nn.Module):
    """A module that is none of the model's."""

    count = 0

    def forward(self) -> int:
        self.count += 1
        return self.count


class Colour(Enum):
    """Has a member that anyone can hang something on."""

    RED = 1

    @property
    def step(self) -> int:
        self.count: int = getattr(self, "count", 0) + 1
        return self.count


THREAD, VARIABLE, ARRAY, BYTES = threading.local(), ContextVar("count", default=0), array("i", [0]), bytearray(1)
TABLE, ROW, WEAK, HELPER = Table(), Row(), WeakKeyDictionary[Any, int](), Helper()
NAMED, PROXY, METHOD = Named([0]), MappingProxyType({"count": [0]}), Slots().step
AROUND = ModuleType("around")
AROUND.table, AROUND.slots, AROUND.kind = {"count": 0}, Slots(), type("Kind", (), {"count": 0})  # type: ignore[attr-defined]


@functools.cache
def only_one() -> Slots:
    return Slots()


@functools.lru_cache
def only_list() -> list[int]:
    return []


only_one()
only_list()


def by_thread() -> int:
    THREAD.count = getattr(THREAD, "count", 0) + 1
    return THREAD.count  # type: ignore[no-any-return]


def by_variable() -> int:
    VARIABLE.set(VARIABLE.get() + 1)
    return VARIABLE.get()


def by_environment() -> int:
    os.environ["FXC_COUNT"] = str(int(os.environ.get("FXC_COUNT", "0")) + 1)
    return int(os.environ["FXC_COUNT"])


def by_item(table: Any, key: object = "count") -> int:  # noqa: ANN401
    table[key] = table[key] + 1
    return int(table[key])


def by_weak() -> int:
    WEAK[Slots] = WEAK.get(Slots, 0) + 1
    return WEAK[Slots]


def by_length(items: list[int]) -> int:
    items.append(1)
    return len(items)


def by_kind_in_module() -> int:
    AROUND.kind.count += 1
    return AROUND.kind.count  # type: ignore[no-any-return]


def by_name() -> int:
    globals()["COUNTED"] = globals()["COUNTED"] + 1
    return COUNTED


COUNTED = 0
STEPS: dict[str, Callable[[], int]] = {
    "thread": by_thread,
    "variable of a context": by_variable,
    "environment": by_environment,
    "array": lambda: by_item(ARRAY, 0),
    "bytes": lambda: by_item(BYTES, 0),
    "kind of dict": lambda: by_item(TABLE),
    "kind of list": lambda: by_length(ROW),
    "weak dict": by_weak,
    "module of nobody": lambda: HELPER(),  # noqa: PLW0108 - seen by its name
    "member of an enum": lambda: Colour.RED.step,
    "named tuple": lambda: by_item(NAMED.items, 0),
    "read-only dict": lambda: by_item(PROXY["count"], 0),
    "bound method": lambda: METHOD(),  # noqa: PLW0108
    "table in a module": lambda: by_item(AROUND.table),
    "object in a module": lambda: int(AROUND.slots.step()),
    "class in a module": by_kind_in_module,
    "what a cache returns": lambda: only_one().step(),
    "what a bounded cache returns": lambda: by_length(only_list()),
    "global by its name": by_name,
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("looks", [False, True])
@pytest.mark.parametrize("name", STEPS)
def test_a_count_is_refused_and_put_back_wherever_it_is(name: str, *, looks: bool) -> None:
    step = STEPS[name]
    before = step()
    net = made_dead(Net(lambda _, h: h * step(), looks=looks))
    with pytest.raises(TraceError, match=r"while it runs, and the next run may read it"):
        fxc.prune(net, X)
    assert step() == before + 1


HARMFUL: dict[str, Callable[[], Callable[[Any, Tensor], Any]]] = {
    "global": lambda: by_global,
    "default": lambda: by_default,
    "attribute of a function": lambda: by_own_attribute,
    "variable around it": enclosed,
    "class": lambda: of_class,
    "another class": lambda: lambda net, h: h * Counts.step(),
    "slots": lambda: by_slots,
    "dataclass with slots": lambda: by_data,
    "object in an object": lambda: by_object,
    "partial": lambda: lambda net, h: net.partial(h),
    "iterator": lambda: lambda net, h: h * next(net.steps),
    "layer": lambda: other_layer,
    "layer gone": lambda: no_layer,
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("looks", [False, True])
@pytest.mark.parametrize("name", HARMFUL)
def test_what_reaches_the_next_run_is_refused(name: str, *, looks: bool) -> None:
    net = made_dead(Net(HARMFUL[name](), looks=looks))
    with pytest.raises(TraceError, match=r"while it runs, and the next run may read it"):
        fxc.prune(net, X)
    assert (net.slots.count, net.data.count, net.act, net.partial.args) == (0, 0, ACT, ([],))


def tabled(_: Any, h: Tensor) -> Tensor:  # noqa: ANN401
    if "ramp" not in TABLES:
        TABLES["ramp"] = torch.arange(D, dtype=torch.float64)
    return h * TABLES["ramp"]


def quiet_count(_: Any, h: Tensor) -> Tensor:  # noqa: ANN401
    global COUNT  # noqa: PLW0603
    COUNT += 1
    return h * 2


@pytest.mark.parametrize("looks", [False, True])
@pytest.mark.parametrize("between", [tabled, quiet_count])
def test_what_changes_no_result_does_no_harm(between: Callable[[Any, Tensor], Tensor], *, looks: bool) -> None:
    with patched(globals(), {"COUNT": 0, "TABLES": {}}):
        net = made_dead(Net(between, looks=looks))
        module = fxc.prune(net, X).module
        assert all(type(table) is Tensor for table in TABLES.values())
        assert difference([net(X), net(X)], [module(X), module(X)]) <= TOLERANCE


def test_names_are_swapped_back_alone() -> None:
    space = {"a": 1}
    with suppress(KeyError), patched(space, {"a": 2, "b": 3}):
        space["c"] = space["a"] + space["b"]
        raise KeyError
    assert space == {"a": 1, "c": 5}
