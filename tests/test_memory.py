"""Models that leave something on their modules for the next run, in plain attributes: never wrong without a word."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.errors import TraceError
from fxcompress.trace.inputs import ExampleInputs
from fxcompress.trace.tracer import trace
from fxcompress.trace.verify import computes_the_same
from tests.exactness import TOLERANCE, Fingerprint, difference
from tests.nets import made_dead

D = 6
X = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
OTHER = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Two layers; ``between`` may read and set attributes."""

    def __init__(self, between: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.first, self.last, self.between = nn.Linear(4, D), nn.Linear(D, 3), between
        self.count, self.rate, self.kept, self.list, self.dict = 0, 0.5, None, [1.0], {"a": 1}

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self, self.first(x)))  # type: ignore[no-any-return]


def also(change: Callable[[Any, Tensor], object], result: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], Any]:
    def between(net: Any, h: Tensor) -> Any:  # noqa: ANN401
        change(net, h)
        return result(net, h)

    return between


def put(name: str, value: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], None]:
    return lambda net, h: setattr(net, name, value(net, h))


def table(net: Any, h: Tensor) -> Any:  # noqa: ANN401
    """Made once, and again for another size."""
    if net.kept is None or net.kept.shape[0] != h.shape[0]:
        net.kept = torch.arange(h.shape[0], dtype=torch.float64)[:, None]
    return h * net.kept


def fixed_table(net: Any, h: Tensor) -> Any:  # noqa: ANN401
    if net.kept is None:
        net.kept = torch.arange(D, dtype=torch.float64)
    return h * net.kept


def scratch(net: Any, h: Tensor) -> Any:  # noqa: ANN401
    net.list = []
    for i in range(3):
        net.list.append(h * i)
    return sum(net.list)


def first_time(net: Any, h: Tensor) -> Tensor:  # noqa: ANN401
    h = h if net.kept is None else h + 1
    net.kept = 1
    return h


def first_value(net: Any, h: Tensor) -> Any:  # noqa: ANN401
    if net.kept is None:
        net.kept = h.detach().sum()
    return h * net.kept


HARMLESS: dict[str, Callable[[Any, Tensor], Any]] = {
    "result kept": also(put("kept", lambda net, h: h), lambda net, h: h * 2),
    "result in a list": also(lambda net, h: net.list.append(h), lambda net, h: h * 2),
    "result in a dict": also(lambda net, h: net.dict.update(h=h), lambda net, h: net.dict["h"] * 2),
    "count": also(put("count", lambda net, h: net.count + 1), lambda net, h: h * 2),
    "the same number": also(put("rate", lambda net, h: 0.5), lambda net, h: h * net.rate),
    "scratch": scratch,
    "table": table,
    "fixed table": fixed_table,
}
HARMFUL: dict[str, Callable[[Any, Tensor], Any]] = {
    "count read": also(put("count", lambda net, h: net.count + 1), lambda net, h: h * net.count),
    "count compared": also(
        put("count", lambda net, h: net.count + 1), lambda net, h: h if net.count < 1000 else h.flip(1)
    ),
    "rate": also(put("rate", lambda net, h: net.rate * 0.9), lambda net, h: h * net.rate),
    "length of a list": also(lambda net, h: net.list.append(h), lambda net, h: h * len(net.list)),
    "number in a dict": also(lambda net, h: net.dict.update(a=net.dict["a"] + 1), lambda net, h: h * net.dict["a"]),
    "first time": first_time,
    "first value": first_value,
}


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_only_kept_does_no_harm(name: str, *, given: bool) -> None:
    net = made_dead(Net(HARMLESS[name]))
    visit = Fingerprint(net)
    module = fxc.prune(net, X if given else None).module
    visit.check()
    for x in (X, OTHER, X):
        assert difference(net(x), module(x)) <= TOLERANCE
    assert module.get_parameter("first.weight").shape[0] == D - (name != "fixed table")


@pytest.mark.parametrize("name", HARMFUL)
def test_what_reaches_the_next_run_is_refused(name: str) -> None:
    net = made_dead(Net(HARMFUL[name]))
    visit = Fingerprint(net)
    with pytest.raises(TraceError, match=r"it sets its attribute (count|rate|list|dict|kept) while it runs"):
        fxc.prune(net, X)
    visit.check()
    assert (net.count, net.kept, net.list, net.dict) == (0, None, [1.0], {"a": 1})


class Picky(nn.Module):
    """Takes no values but those of the example, and counts its calls."""

    count = 0

    def forward(self, x: Tensor) -> Tensor:
        if float(x[0, 0]) != float(X[0, 0]):
            raise ValueError("other values")
        self.count += 1
        return x * self.count


def test_a_model_that_takes_no_other_values_is_compared_on_those_of_the_example() -> None:
    inputs = ExampleInputs.of(X)
    assert not computes_the_same(Picky(), trace(nn.Sequential(nn.Identity())), inputs)
