"""Models whose code keeps tensors outside of the model: a trace leaves nothing there."""

from collections.abc import Callable
from contextlib import suppress
from functools import cache

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
