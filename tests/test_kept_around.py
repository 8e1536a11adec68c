"""Models that change something around them, past their plain attributes: never wrong without a word."""

import itertools
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.errors import TraceError
from fxcompress.trace.swapped import swapped
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
    with swapped(globals(), {"COUNT": 0, "TABLES": {}}):
        net = made_dead(Net(between, looks=looks))
        module = fxc.prune(net, X).module
        assert all(type(table) is Tensor for table in TABLES.values())
        assert difference([net(X), net(X)], [module(X), module(X)]) <= TOLERANCE


def test_names_are_swapped_back_alone() -> None:
    space = {"a": 1}
    with suppress(KeyError), swapped(space, {"a": 2, "b": 3}):
        space["c"] = space["a"] + space["b"]
        raise KeyError
    assert space == {"a": 1, "c": 5}
