"""Models with functions that torch.compile has compiled, and with functions that torch runs by itself (torch.cond)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.channels.prepare import prepare
from fxcompress.errors import TraceError
from tests.exactness import difference

X = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def refused(*_: object) -> Callable[..., Any]:
    """A backend of torch.compile that fails: nothing is compiled while a model is looked at."""
    raise AssertionError


def gated(x: Tensor, scale: Tensor) -> Tensor:
    return F.gelu(x) * torch.sigmoid(x * scale) * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1)


COMPILED: dict[str, Callable[..., Tensor]] = {
    "function": torch.compile(gated, backend=refused),
    "whole graph": torch.compile(gated, backend=refused, fullgraph=True, dynamic=True),
    "not compiled": torch.compiler.disable(gated),
}
GELU = torch.compile(F.gelu, backend=refused)


class Net(nn.Module):
    """Calls a compiled function on channels and a parameter; ``looks`` at sizes, or not."""

    def __init__(self, name: str, *, looks: bool) -> None:
        super().__init__()
        self.name, self.looks, self.act = name, looks, GELU
        self.first, self.scale, self.last = nn.Linear(6, 8), nn.Parameter(torch.ones(8)), nn.Linear(8, 3)

    @torch.compile(backend=refused)
    def head(self, h: Tensor) -> Tensor:
        return self.last(self.act(h))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        if self.looks and x.shape[0] > 100:
            return x
        return self.head(COMPILED[self.name](self.first(x), self.scale))


@pytest.mark.parametrize("looks", [False, True])
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_functions_are_traced_in_their_code(name: str, *, looks: bool) -> None:
    torch.manual_seed(0)
    model = Net(name, looks=looks).double().eval()
    with torch.no_grad():
        model.first.weight[:3], model.first.bias[:3] = 0, 0
    result = fxc.prune(model, X).module
    assert result.get_parameter("first.weight").shape == (5, 6)
    with torch.compiler.set_stance("force_eager"):
        assert difference(result(X[:3]), model(X[:3])) < 1e-12


class Backbone(nn.Sequential):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))


class Conditional(nn.Module):
    """Goes one of two ways by the value of what its first part makes."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.last = Backbone(), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        return self.last(torch.cond(h.sum() > 0, torch.relu, torch.sigmoid, (h,)))  # type: ignore[no-any-return]


def test_a_choice_by_values_is_refused_and_its_parts_are_pruned() -> None:
    model = Conditional().double().eval()
    with pytest.raises(TraceError, match=r"it calls torch\.cond at .*, which runs functions as"):
        prepare(model, X)
    with torch.no_grad():
        for parameter in model.body[0].parameters():
            parameter[:3] = 0
    result = fxc.prune(model, X).module
    assert sum(p.numel() for p in result.parameters()) < sum(p.numel() for p in model.parameters())
    with torch.compiler.set_stance("force_eager"):  # or torch compiles for it
        assert difference(result(X), model(X)) < 1e-12
