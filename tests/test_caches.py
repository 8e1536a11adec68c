"""Models whose code keeps tensors outside of the model: a trace leaves nothing there."""

import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache, lru_cache
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc

TABLE: dict[int, Tensor] = {}
ROWS: list[Tensor] = []
LAST: tuple[int, Tensor] | None = None


@cache
def cached(size: int) -> Tensor:
    return torch.ones(size, size).tril()


def tabled(size: int) -> Tensor:
    if size not in TABLE:
        TABLE[size] = torch.ones(size, size).tril()
    return TABLE[size]


def listed(size: int) -> Tensor:
    for known in ROWS:
        if known.shape[0] == size:
            return known
    ROWS.append(torch.ones(size, size).tril())
    return ROWS[-1]


def last(size: int) -> Tensor:
    global LAST  # noqa: PLW0603 - what is tested
    if LAST is None or LAST[0] != size:
        LAST = size, torch.ones(size, size).tril()
    return LAST[1]


class OfClass:
    known: dict[int, Tensor] = {}  # noqa: RUF012 - what is tested

    @classmethod
    def get(cls, size: int) -> Tensor:
        if size not in cls.known:
            cls.known[size] = torch.ones(size, size).tril()
        return cls.known[size]


class Mixes(nn.Module, OfClass):
    """Can only be traced by running it, and mixes its tokens by a table."""

    def __init__(self, table: Callable[[int], Tensor]) -> None:
        super().__init__()
        self.table, self.first, self.last = table, nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > 100:
            return x
        return self.last(self.table(x.shape[1]) @ self.first(x).relu())  # type: ignore[no-any-return]


@pytest.mark.parametrize("table", [cached, tabled, listed, last, Mixes.get])
@pytest.mark.parametrize("warm", [True, False])
def test_a_trace_leaves_nothing_in_a_cache(table: Callable[[int], Tensor], *, warm: bool) -> None:
    global LAST  # noqa: PLW0603
    LAST = None
    cached.cache_clear()
    for known in (TABLE, ROWS, Mixes.known):
        known.clear()
    model, x = Mixes(table).eval(), torch.randn(2, 5, 4)
    if warm:
        model(x)
    with torch.no_grad():
        model.first.weight[1], model.first.bias[1] = 0.0, 0.0
    for _ in range(2):
        pruned = fxc.prune(model, x).module
        assert pruned.get_parameter("first.weight").shape == (5, 4)
        expected = model(x)
        assert type(expected) is Tensor
        assert torch.allclose(pruned(x), expected, atol=1e-6)


class Feels(nn.Module):
    """A hook that was made with the model writes to the model, also where a copy runs it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)
        self.found: dict[str, Tensor] = {}
        self.first.register_forward_hook(lambda _module, _inputs, output: self.found.update(first=output))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu())  # type: ignore[no-any-return]


def test_a_hook_leaves_nothing_of_a_trace_in_the_model() -> None:
    model, x = Feels().eval(), torch.randn(2, 4)
    for _ in range(2):
        with suppress(fxc.FxCompressError):
            pruned = fxc.prune(model, x).module
            assert torch.equal(pruned(x), model(x))
        assert not model.found or type(model.found["first"]) is Tensor
        model(x)
        model.found.clear()


LIBRARY = """
from functools import lru_cache

@lru_cache
def halves(shape, **more):
    return tuple(size // 2 for size in shape) + tuple(more.values())

class Closed(type):
    def __setattr__(cls, name, value):
        raise AttributeError(name)

class Kept(metaclass=Closed):
    @staticmethod
    @lru_cache
    def half(size):
        return size // 2

class Shapes:
    @staticmethod
    @lru_cache
    def swapped(shape):
        return shape[:-2] + (shape[-1], shape[-2])

    @lru_cache
    def joined(self, shape):
        return shape[0] * shape[1], *shape[2:]
"""


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A package that models use, with functions that remember what they have made of a shape."""
    found = ModuleType("of_shapes")
    exec(LIBRARY, vars(found))
    monkeypatch.setitem(sys.modules, "of_shapes", found)
    return found


class Turns(nn.Module):
    """Traced by running, in both modes; the sizes that it reads come out of functions with a cache."""

    def __init__(self, library: ModuleType) -> None:
        super().__init__()
        self.shapes = library.Shapes()
        self.first, self.norm, self.last = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        library = sys.modules["of_shapes"]
        h = self.first(x.reshape(self.shapes.joined(x.shape)))
        h = self.norm(h).relu().reshape(x.shape[0], x.shape[1], -1)
        h = h.transpose(1, 2).reshape(library.Shapes.swapped(h.transpose(1, 2).shape))
        h = h.reshape((*x.shape[:2], -1)).flip(1)
        rows, *_ = library.halves(x.shape, more=x.shape[1])
        return self.last(h[rows:])  # type: ignore[no-any-return]


@pytest.mark.parametrize("warm", [True, False])
def test_a_size_goes_through_a_function_with_a_cache(library: ModuleType, *, warm: bool) -> None:
    model, x = Turns(library).eval().double(), torch.randn(6, 6, 4).double()
    if warm:
        model(x)
    for _ in range(2):
        pruned = fxc.prune(model, x).module
        for size in ((6, 6, 4), (4, 6, 4), (3, 5, 4), (7, 3, 4)):
            other = torch.randn(size).double()
            for training in (False, True):
                expected = model.train(training)(other)
                assert torch.allclose(pruned.train(training)(other), expected, rtol=0, atol=1e-12)
        model.eval()
        assert library.halves((6, 4)) == (3, 2)
        assert all(type(n) is int for n in library.halves((6, 6, 4)))


@lru_cache
def drawn(size: int) -> Tensor:
    return torch.randn(size, size)


@pytest.mark.parametrize("of_input", [True, False])
def test_random_numbers_in_a_cache_are_drawn_once(*, of_input: bool) -> None:
    """A graph that draws them would draw others each time; those that are drawn already are constants."""
    drawn.cache_clear()
    model, x = Mixes(lambda n: drawn(n if of_input else 5)).eval(), torch.randn(2, 5, 4)
    with pytest.raises(fxc.FxCompressError, match="drawn, which has a cache, draws random numbers"):
        fxc.ChannelGraph.of(model, x)
    model(x)
    assert torch.equal(fxc.prune(model, x).module(x), model(x))
    drawn.cache_clear()


SEEN: dict[tuple[int, ...], torch.Size] = {}


def test_a_size_that_an_earlier_run_has_kept_is_refused_or_plain() -> None:
    """It would be looked up in the graph of a run that is over."""

    def kept(size: int) -> Tensor:
        key = (int(size),)
        if key not in SEEN:
            SEEN[key] = torch.Size([size])
        return torch.ones(SEEN[key][0], SEEN[key][0]).tril()

    SEEN.clear()
    model, x = nn.Sequential(Mixes(kept), nn.BatchNorm1d(5)).eval(), torch.randn(2, 5, 4)
    pruned = fxc.prune(model, x).module
    assert torch.allclose(pruned(x), model(x))
