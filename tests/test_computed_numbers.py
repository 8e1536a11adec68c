"""A number that comes from a size is another one for other inputs: what it happens to make is no constant."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxcompress as fxc
from tests.exactness import TOLERANCE, difference, outputs
from tests.networks import randomise

C, ROWS = 5, 4
Op = Callable[[Tensor, Any], Tensor]


@fx.wrap
def scaled(h: Tensor) -> Tensor:
    return h.exp() * (h.shape[0] - ROWS)


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:  # noqa: ANN401
        return h + (h.shape[0] - ROWS)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # noqa: ANN401
        return g


class Net(nn.Module):
    def __init__(self, op: Op) -> None:
        super().__init__()
        self.op, self.first, self.last = op, nn.Linear(3, C), nn.Linear(C, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.op(self.first(x), x.shape[0] - ROWS))
        return y


def dead(op: Op) -> Net:
    net = randomise(Net(op).double())
    with torch.no_grad():
        for parameter in net.get_submodule("first").parameters():
            parameter[1:3] = 0
    return net.eval()  # type: ignore[return-value]


def rows(n: int) -> Tensor:
    return torch.randn(n, 3, dtype=torch.float64)


MAY_BE_OTHER: dict[str, Op] = {
    "add": lambda h, n: h + n,
    "subtract": lambda h, n: n - h,
    "alpha": lambda h, n: torch.add(h, torch.ones_like(h), alpha=n),
    "ones": lambda h, n: h + torch.ones_like(h) * n,
    "full_like": lambda h, n: h + torch.full_like(h, n),
    "fill": lambda h, n: h + h.clone().fill_(n),
    "masked_fill": lambda h, n: h.masked_fill(h < 1, n),
    "where": lambda h, n: torch.where(h > 1, h, n),
    "clamp": lambda h, n: h.clamp(min=n),
    "power": lambda h, n: (h + 2) ** n - 1,
    "slope": lambda h, n: F.leaky_relu(h - 1, n),
    "pad": lambda h, n: F.pad(h, (0, 0, 1, 0), value=n)[1:] + F.pad(h, (0, 0, 1, 0), value=n)[:-1],
    "scatter": lambda h, n: h.scatter(0, torch.zeros_like(h).long()[:1], n),
    "assigned": lambda h, n: h.index_fill(0, torch.tensor([0]), n),
    "quotient": lambda h, n: (h + 1) / (n + 1) - 1,
    "wrapped": lambda h, n: scaled(h),
    "autograd": lambda h, n: Scaled.apply(h),
}
MUST_BE_ZERO: dict[str, Op] = {
    "times": lambda h, n: h * (n + 1),
    "divided": lambda h, n: h / (n + ROWS),
    "square": lambda h, n: h * (n + ROWS) ** -0.5,
    "clamp": lambda h, n: h.clamp(min=0) * n + h.reshape(n + ROWS, -1),
    "padded": lambda h, n: F.pad(h, (0, 0, n, 0))[n:],
}


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("name", MAY_BE_OTHER)
def test_other_sizes(name: str, fold: bool) -> None:  # noqa: FBT001
    net = dead(MAY_BE_OTHER[name])
    pruned = fxc.prune(net, rows(ROWS), fold=fold).module
    for x in (rows(ROWS), rows(ROWS + 1), rows(1)):
        assert difference(outputs(net, (x,)), outputs(pruned, (x,))) <= TOLERANCE


@pytest.mark.parametrize("name", MUST_BE_ZERO)
def test_zeros_that_no_number_changes_go(name: str) -> None:
    net = dead(MUST_BE_ZERO[name])
    pruned = fxc.prune(net, rows(ROWS)).module
    assert pruned.get_parameter("first.weight").shape[0] == C - 2
    for x in (rows(ROWS), rows(ROWS + 2)):
        assert difference(outputs(net, (x,)), outputs(pruned, (x,))) <= TOLERANCE
