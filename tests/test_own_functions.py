"""Functions, weak references and objects on a model that lead to modules of it: copy.deepcopy does not follow."""

import copy
import functools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.errors import TraceError
from fxcompress.trace.model.skeleton import skeleton
from tests.exactness import Fingerprint, difference

X = torch.randn(16, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
ALL: dict[str, nn.Module] = {}


class Held:
    """An object that copy.deepcopy copies by its attributes, functions as they are."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function


class Net(nn.Module):
    """Reads its last layers in one of many ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.drop, self.last = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3)
        self.tail: Any = WAYS[way](self)
        with torch.no_grad():
            for tensor in (self.first.weight, self.first.bias, self.norm.bias):
                tensor[:3] = 0

    def rest(self, x: Tensor, *, power: int = 1) -> Tensor:
        result: Tensor = self.last(self.drop(self.norm(x)) ** power)
        return result

    def forward(self, x: Tensor) -> Tensor:
        tail = self.tail.function if isinstance(self.tail, Held) else self.tail
        result: Tensor = tail(torch.relu(self.first(x)))
        return result


def calling(net: Net) -> Callable[[Tensor], Tensor]:
    def tail(x: Tensor) -> Tensor:
        return net.rest(x)

    return tail


def calling_itself(net: Net) -> Callable[..., Tensor]:
    def tail(x: Tensor, depth: int = 1) -> Tensor:
        return tail(x, depth - 1) if depth else net.rest(x)

    return tail


def calling_layers(net: Net) -> Callable[[Tensor], Tensor]:
    layers = [net.norm, net.drop, net.last]
    return lambda x: layers[2](layers[1](layers[0](x)))


def calling_by_reference(net: Net) -> Callable[[Tensor], Tensor]:
    own: Any = weakref.ref(net)
    return lambda x: own().rest(x)


def calling_by_a_global(net: Net) -> Callable[[Tensor], Tensor]:
    ALL["net"] = net

    def tail(x: Tensor) -> Tensor:
        result: Tensor = ALL["net"].rest(x)  # type: ignore[operator]
        return result

    return tail


def refused(*_: object) -> Callable[..., Any]:
    raise AssertionError


WAYS: dict[str, Callable[[Net], Any]] = {
    "method": lambda net: net.rest,
    "partial": lambda net: functools.partial(net.rest, power=1),
    "closure": calling,
    "partial of a closure": lambda net: functools.partial(lambda x, power: net.rest(x, power=power), power=1),
    "default": lambda net: lambda x, last=net.last, norm=net.norm, drop=net.drop: last(drop(norm(x))),
    "keyword": lambda net: lambda x, *, net=net: net.rest(x),
    "list": calling_layers,
    "itself": calling_itself,
    "compiled closure": lambda net: torch.compile(calling(net), backend=refused),
    "compiled method": lambda net: torch.compile(net.rest, backend=refused),
    "weak reference": calling_by_reference,
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_what_leads_to_a_module_leads_to_its_copy(way: str, *, training: bool) -> None:
    model = Net(way).double().train(training)
    visit = Fingerprint(model)
    result = fxc.prune(model, X).module
    visit.check()
    assert result.training is training
    assert result.get_parameter("first.weight").shape == (5, 8)
    assert result.get_parameter("last.weight").shape == (3, 5)
    with torch.compiler.set_stance("force_eager"):
        assert difference(result.eval()(X), model.eval()(X)) < 1e-12
    trained = fxc.compress(model, X)
    trained(X).sum().backward()
    assert all(parameter.grad is not None for parameter in trained.parameters())
    own = fxc.prune(model, X, keep_code=True).module.eval()
    with torch.compiler.set_stance("force_eager"):
        expected = model(X)
        with torch.no_grad():
            model.last.weight.zero_()  # which the code of the result does not read
        assert difference(own(X), expected) < 1e-12


@pytest.mark.parametrize("way", ["global", "object"])
def test_what_leads_past_the_copy_is_refused(way: str) -> None:
    net = Net("method")
    net.tail = calling_by_a_global(net) if way == "global" else Held(calling(net))
    for training in (False, True):
        with pytest.raises(TraceError, match=r"calls a BatchNorm1d of the model itself at .*global, or through an obj"):
            fxc.prune(net.double().train(training), X)


def test_functions_that_hold_no_module_stay_the_same() -> None:
    count = [0]
    net = nn.Sequential(nn.Linear(2, 2))
    net.plain, net.other = lambda x: x + len(count), nn.Linear(2, 2).forward  # type: ignore[assignment]
    own = skeleton(net)
    assert own.plain is net.plain
    net.note = lambda: (net, count)  # type: ignore[assignment]
    assert skeleton(net).note()[1] is count  # type: ignore[operator]
    assert copy.deepcopy(net).note()[0] is net  # type: ignore[operator]
