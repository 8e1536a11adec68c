"""Tables that a model makes when it first needs them: of sizes they may be made anew each time, of values not."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.errors import TraceError
from fxcompress.trace.inputs import ExampleInputs
from fxcompress.trace.tracer import trace
from tests.exactness import Fingerprint


class Keeping(nn.Module):
    """Adds a table (1, T, 12) to features (N, T, 8), which it makes and keeps until T is another one."""

    table: Tensor
    rates: Tensor

    def __init__(self, make: Callable[["Keeping", Tensor], Tensor], length: object = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 12), nn.Linear(12, 4)
        self.register_buffer("table", torch.zeros(1, 1, 12), persistent=False)
        self.register_buffer("rates", torch.arange(12.0))
        self.make, self.length = make, length

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.length != x.shape[1] or self.table.device != x.device:
            self.length = x.shape[1]
            self.table = self.make(self, x)
        result: Tensor = self.last((x + self.table).relu())
        return result


def angles(net: Keeping, x: Tensor) -> Tensor:
    """As of rotary embeddings: of sizes, and of a buffer."""
    return torch.outer(torch.arange(x.shape[1], device=x.device), net.rates).cos()[None]


def written(_: Keeping, x: Tensor) -> Tensor:
    """Made empty, and filled in place."""
    table = torch.zeros(1, x.shape[1], 12)
    table[:, :, 1] = torch.arange(x.shape[1])
    return table


def anchors(net: Keeping, x: Tensor) -> Tensor:
    """As of detection heads: of the type of what they are for, and filled with the value of a tensor."""
    places = torch.arange(x.shape[1]).type_as(x) + 0.5
    scales: list[Any] = list(net.rates[1:3])  # a number, says torch, and takes a tensor
    made = x.new_full((x.shape[1], 1), scales[0], dtype=x.dtype) * torch.full_like(x[0, :, :1], scales[1])
    return places[None, :, None].to(x) * made * torch.zeros_like(x[:1, :, :1]).add(2)


def filled_with_input(_: Keeping, x: Tensor) -> Tensor:
    total: Any = x.sum()
    return total.new_full((1, x.shape[1], 12), total)  # type: ignore[no-any-return]


def like_of_input(_: Keeping, x: Tensor) -> Tensor:
    return torch.zeros_like(x[:1]).copy_(x[:1].detach())


def of_input(_: Keeping, x: Tensor) -> Tensor:
    return x.mean(0, keepdim=True)


def of_input_in_place(_: Keeping, x: Tensor) -> Tensor:
    table = torch.zeros(1, x.shape[1], 12)
    table.view(x.shape[1], 12)[:, 1] = x[0, :, 0]
    return table


def of_parameter(net: Keeping, x: Tensor) -> Tensor:
    return net.first.bias.detach().expand(1, x.shape[1], -1)


def of_before(net: Keeping, x: Tensor) -> Tensor:
    return net.table[:, :1].expand(-1, x.shape[1], -1) + 1


def of_chance(_: Keeping, x: Tensor) -> Tensor:
    return torch.rand(1, x.shape[1], 12)


MADE_OF_VALUES = [
    of_input, of_input_in_place, of_parameter, of_before, of_chance, filled_with_input, like_of_input
]  # fmt: skip


def features(length: int = 5) -> Tensor:
    return torch.randn(2, length, 8, generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("length", [0, None])
@pytest.mark.parametrize("make", [angles, written, anchors])
def test_table_of_sizes(make: Callable[[Keeping, Tensor], Tensor], length: object) -> None:
    net = Keeping(make, length).eval()
    with torch.no_grad():
        net.first.weight[0], net.last.weight[:, 3] = 0, 0
    visit = Fingerprint(net)
    small = fxc.prune(net, features()).module
    visit.check()
    assert small.get_parameter("last.weight").shape == (4, 11)
    for x in (features(), features(9), features(5), features(3)):
        torch.testing.assert_close(small(x), net(x))


@pytest.mark.parametrize("make", MADE_OF_VALUES)
def test_table_of_values(make: Callable[[Keeping, Tensor], Tensor]) -> None:
    with pytest.raises(TraceError):
        trace(Keeping(make).eval(), ExampleInputs.of(features()))


def test_table_for_a_shape() -> None:
    class Shaped(Keeping):
        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            if self.length != x.shape:
                self.table, self.length = self.make(self, x), x.shape
            result: Tensor = self.last((x + self.table).relu())
            return result

    net = Shaped(anchors).eval()
    small = trace(net, ExampleInputs.of(features()))
    for x in (features(), features(9), features()[:1], features(3)):
        torch.testing.assert_close(small(x), net(x))


def test_count_beside_a_table() -> None:
    class Counting(Keeping):
        def forward(self, x: Tensor) -> Tensor:
            self.calls = getattr(self, "calls", 0) + 1
            result = super().forward(x)
            return result * 2 if self.calls > 1000 else result

    with pytest.raises(TraceError, match="sets its attribute"):
        trace(Counting(angles).eval(), ExampleInputs.of(features()))


class Biased(nn.Module):
    """Reads biases by an index, and keeps what it has read in a dict while it is in evaluation, as LeViT does."""

    index: Tensor

    def __init__(self, key: Callable[["Biased"], object]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 12), nn.Linear(12, 4)
        self.biases = nn.Parameter(torch.randn(12))
        self.register_buffer("index", torch.arange(12).flip(0))
        self.kept: dict[object, Tensor] = {}
        self.key = key

    def train(self, mode: bool = True) -> "Biased":  # noqa: FBT001, FBT002
        self.kept.clear()
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != 8:  # symbolic tracing gives up here
            raise ValueError("eight features")
        x = self.first(x)
        key = self.key(self)
        if self.training or key not in self.kept:
            self.kept[key] = self.biases[self.index]
        result: Tensor = self.last((x + self.kept[key]).relu())
        return result


def test_dict_that_is_filled_once() -> None:
    net = Biased(lambda _: "cpu").eval()
    small = trace(net, ExampleInputs.of(features()))
    for training in (False, True):
        for x in (features(), features(9)):
            torch.testing.assert_close(small.train(training)(x), net.train(training)(x))


def test_dict_that_grows() -> None:
    with pytest.raises(TraceError, match="sets its attribute kept"):
        trace(Biased(lambda net: len(net.kept)).eval(), ExampleInputs.of(features()))


class Rotary(nn.Module):
    """Cosines and sines that are kept together: by cached_property, in a list or in a dict."""

    rates: Tensor

    def __init__(self, way: str, *, of_input: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.way, self.of_input = nn.Linear(8, 12), nn.Linear(12, 4), way, of_input
        self.register_buffer("rates", torch.arange(6.0))
        self.kept: Any = None

    @functools.cached_property
    def tables(self) -> tuple[Tensor, Tensor]:
        angles = torch.outer(torch.arange(16), self.rates)
        return angles.cos(), angles.sin()

    def made(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.way == "property":
            return self.tables
        if self.kept is None or self.kept["length"] != x.shape[1]:
            angles = torch.outer(torch.arange(x.shape[1]), self.rates) + (x.mean() if self.of_input else 0)
            self.kept = {"tables": [angles.cos(), angles.sin()], "length": x.shape[1]}
        return tuple(self.kept["tables"])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        cos, sin = (table[: x.shape[1]] for table in self.made(x))
        a, b = x.chunk(2, -1)
        result: Tensor = self.last(torch.cat([a * cos - b * sin, a * sin + b * cos], -1).relu())
        return result


@pytest.mark.parametrize("way", ["property", "dict"])
def test_tables_in_containers(way: str) -> None:
    net = Rotary(way).eval()
    with torch.no_grad():
        net.first.weight[[0, 6]], net.first.bias[[0, 6]] = 0, 0
    visit = Fingerprint(net)
    small = fxc.prune(net, features()).module
    visit.check()
    assert small.get_parameter("last.weight").shape == (4, 10)
    for x in (features(), features(9), features(5), features(3)):
        torch.testing.assert_close(small(x), net(x))
    with pytest.raises(TraceError, match="sets its attribute kept while it runs"):
        trace(Rotary("dict", of_input=True).eval(), ExampleInputs.of(features()))
