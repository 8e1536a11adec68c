"""Forward hooks that the code of a model registers on its own layers, and those that somebody else does."""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.errors import TraceError, UnsupportedModelError
from fxcompress.trace.forward_hooks import hooked
from fxcompress.trace.inputs import ExampleInputs
from fxcompress.trace.tracer import trace
from tests.exactness import Fingerprint

COLLECTED: ContextVar[list[Tensor] | None] = ContextVar("COLLECTED", default=None)


def collect(module: nn.Module) -> None:
    """Let a module hand its results to whoever is collecting."""

    def collecting(_: nn.Module, __: Any, output: Tensor) -> None:  # noqa: ANN401
        found = COLLECTED.get()
        if found is not None:
            found.append(output)

    module.register_forward_hook(collecting)


def collecting_results(forward: Callable[..., Tensor]) -> Callable[..., Any]:
    """A forward that returns what its blocks return as well; the hooks for that are there from the first call on."""

    def wrapper(self: Any, x: Tensor, *, states: bool = False) -> Any:  # noqa: ANN401
        if states and not getattr(self, "is_hooked", False):
            for block in self.blocks:
                collect(block)
            self.is_hooked = True
        token = COLLECTED.set([] if states else None)
        try:
            result = forward(self, x)
            found = COLLECTED.get()
        finally:
            COLLECTED.reset(token)
        return (result, *found) if found is not None else result

    return wrapper


class Block(nn.Module):
    """A hidden layer that can be narrowed."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.fc2(self.fc1(x).relu())
        return result


class Collecting(nn.Module):
    """Blocks whose results are collected by hooks, as those of Hugging Face do it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(), Block()])
        with torch.no_grad():
            for block in self.blocks.children():
                block.get_parameter("fc1.weight")[2:4] = 0
                block.get_parameter("fc1.bias")[2:4] = 0

    @collecting_results
    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Asking(nn.Module):
    """Asks another model for what it collects."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = Collecting(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        _, *states = self.encoder(x, states=True)
        result: Tensor = self.head(torch.stack(states).sum(0))
        return result


class Doubled(nn.Module):
    """Its constructor hooks into a layer, and changes what that returns."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.conv.register_forward_hook(self.doubled)
        self.head.register_forward_pre_hook(lambda _, args: (args[0] + 1,))

    def doubled(self, _: nn.Module, __: Any, output: Tensor) -> Tensor:  # noqa: ANN401
        return output * 2

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.conv(x).relu())
        return result


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


def test_hooks_that_the_first_call_leaves() -> None:
    net = Asking().eval()
    visit = Fingerprint(net)
    graph = trace(net, ExampleInputs.of(X)).eval()
    visit.check()
    assert not hooked(net)
    assert not hooked(graph)
    small = fxc.prune(net, X).module
    assert small.get_parameter("encoder.blocks.1.fc1.weight").shape == (6, 6)
    for result in (graph(X), small(X)):
        torch.testing.assert_close(result, net(X))


def test_network_that_was_asked_before() -> None:
    net = Collecting().eval()
    expected = net(X, states=True)[0]
    assert hooked(net)
    for inputs in (X, {"x": X, "states": False}):
        small = fxc.prune(net, inputs).module
        assert small.get_parameter("blocks.0.fc1.weight").shape == (6, 6)
        torch.testing.assert_close(small(X), expected)
        assert not hooked(small)
    assert hooked(net)
    fxc.compress(net, X)(X)


def test_hooks_that_compute() -> None:
    net = Doubled().eval()
    with torch.no_grad():
        net.conv.weight[3], net.conv.bias[3] = 0, 0
        net.head.weight[:, 5] = 0
    small = fxc.prune(net, X, fold=True).module.eval()
    assert small.get_parameter("conv.weight").shape == (6, 6)
    torch.testing.assert_close(small(X), net(X))
    with pytest.raises(TraceError, match="forward hooks of its own"):
        trace(net)


def test_hooks_of_the_caller_are_refused() -> None:
    net = Doubled()
    net.conv.register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedModelError, match=r"'conv' .Linear.: it has a forward hook .*<lambda>"):
        fxc.prune(net, X)


class Static(nn.Module):
    """Hooks that need no ``self``, with a decorator of torch around one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.conv.register_forward_hook(self.doubled)
        self.head.register_forward_hook(self.looked_at)

    @staticmethod
    def doubled(_: nn.Module, __: object, output: Tensor) -> Tensor:
        return output * 2

    @torch.no_grad()
    def looked_at(self, _: nn.Module, __: object, output: Tensor) -> None: ...

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.conv(x).relu())
        return result


def test_hooks_are_known_by_their_own_code_and_not_by_a_decorator_of_torch() -> None:
    model = Static().eval()
    x = torch.randn(2, 6)
    torch.testing.assert_close(trace(model, ExampleInputs.of(x)).eval()(x), model(x))

    @torch.no_grad()
    def of_the_caller(_: nn.Module, __: object, output: Tensor) -> Tensor:
        return output + 1

    model.head.register_forward_hook(of_the_caller)
    with pytest.raises(UnsupportedModelError, match="hook"):
        trace(model, ExampleInputs.of(x))


def test_state_that_goes_on_changing_is_refused() -> None:
    class Growing(Collecting):
        def forward(self, x: Tensor) -> Any:  # noqa: ANN401
            self.calls = getattr(self, "calls", 0) + 1
            return super().forward(x) * self.calls

    class Once(Collecting):
        def forward(self, x: Tensor) -> Any:  # noqa: ANN401
            if not getattr(self, "is_ready", False):
                self.is_ready = True
                return super().forward(x) * 2
            return super().forward(x)

    for net in (Growing(), Once()):
        with pytest.raises(TraceError, match="sets its attribute"):
            trace(net.eval(), ExampleInputs.of(X))


def test_a_module_that_is_hooked_into_is_no_piece() -> None:
    class Deciding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = Collecting()

        def forward(self, x: Tensor) -> Tensor:
            result, *states = self.encoder(x, states=True)
            return torch.stack(states).sum(0) if bool(result.sum() > 0) else result

    net = Deciding().eval()
    result = fxc.prune(net, X)
    assert result.module.get_parameter("encoder.blocks.0.fc1.weight").shape == (6, 6)
    for _ in range(2):
        torch.testing.assert_close(result.module(X), net(X))
        torch.testing.assert_close(result.module(-X), net(-X))
    assert result.report.pieces == ("encoder.blocks.0", "encoder.blocks.1")


class Refilled(nn.Module):
    """Hooks collect what its layers return, in a container that stays: each run empties it first."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.way, self.found, self.named = way, list[Tensor](), dict[int, Tensor]()
        for i, layer in enumerate((self.first, self.second)):
            layer.register_forward_hook(self.keep if way != "lambda" else lambda *args, i=i: self.put(i, args[-1]))
            with torch.no_grad():
                layer.weight[:3], layer.bias[:3] = 0, 0

    def keep(self, _: nn.Module, __: Any, output: Tensor) -> None:  # noqa: ANN401
        self.found.append(output)

    def put(self, i: int, output: Tensor) -> None:
        self.named[i] = output

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "never":
            self.second(self.first(x).relu())
            return self.last(self.found[0] + self.found[-1])  # type: ignore[no-any-return]
        if self.way == "late":  # the first run finds nothing there
            earlier = self.found[0] if self.found else 0.0
            self.found.clear()
            self.second(self.first(x).relu())
            return self.last(self.found[-1] + earlier)  # type: ignore[no-any-return]
        self.found.clear() if self.way == "clear" else self.found.__delitem__(slice(None))
        self.named.clear()
        self.second(self.first(x).relu())
        both = self.named if self.way == "lambda" else self.found
        return self.last(both[0] + both[1])  # type: ignore[no-any-return]


@pytest.mark.parametrize("way", ["clear", "del", "lambda"])
def test_containers_that_each_run_empties_and_fills(way: str) -> None:
    net = Refilled(way).double().eval()
    visit = Fingerprint(net)
    small = fxc.prune(net, X.double()).module
    visit.check()
    assert net.found == []
    assert small.get_parameter("second.weight").shape == (5, 5)
    for x in (X.double(), -X[:2].double(), X[1:].double()):
        torch.testing.assert_close(small(x), net(x))


@pytest.mark.parametrize("way", ["never", "late"])
def test_containers_that_hold_what_the_next_run_reads(way: str) -> None:
    with pytest.raises(TraceError, match="sets its attribute found while it runs, and the next run may read it"):
        fxc.prune(Refilled(way).double().eval(), X.double())
