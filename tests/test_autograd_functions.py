"""Functions with a backward of their own stay whole, however the model got hold of their ``apply``."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from tests.exactness import TOLERANCE, difference


class Round(torch.autograd.Function):
    """Straight through; without its backward, nothing in front of it learns."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ANN401
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # noqa: ANN401
        return grad * 3


class Again(Round):
    """Has the forward of another one."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # noqa: ANN401
        return grad * 5


class Saves(torch.autograd.Function):
    """Keeps what it returns, looks at sizes, and computes in several steps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int = -1) -> Tensor:  # noqa: ANN401
        rank = torch.arange(1, x.shape[dim] + 1, device=x.device, dtype=x.dtype)
        result = torch.softmax(x, dim) * rank.sum()
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        return grad * ctx.saved_tensors[0], None


class Apart(torch.autograd.Function):
    """Sets its context up after the forward."""

    @staticmethod
    def forward(x: Tensor, factor: float = 2.0) -> Tensor:
        return torch.floor(x) * factor

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        return grad * ctx.factor, None


apart: Callable[..., Tensor] = Apart.apply
FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "kept": Round.apply,
    "inherited": Again.apply,
    "saves": Saves.apply,
    "apart": Apart.apply,
    "apart, told": lambda h: apart(h, 4.0),
    "forward itself": lambda h: Apart.forward(h, 4.0),
    "forward itself, of one with a context": lambda h: Round.forward(None, h.sin()) + h.cos(),
    "by name": lambda h: Round.apply(h),  # noqa: PLW0108 - looked up when it runs
}


class Net(nn.Module):
    """A function between two layers; ``looks`` makes it a network that is traced by running it."""

    def __init__(self, function: Callable[..., Tensor], *, looks: bool, detached: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
        self.function, self.looks, self.detached = function, looks, detached

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.looks and h.shape[0] > 100:
            return h  # type: ignore[no-any-return]
        if not self.detached:
            return self.last(h.sigmoid() + self.function(h))  # type: ignore[no-any-return]
        with torch.no_grad():
            fixed = self.function(h)
        return self.last(h.sigmoid() + fixed)  # type: ignore[no-any-return]


@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.parametrize("looks", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_are_those_of_the_model(name: str, *, looks: bool, detached: bool) -> None:
    net, x = Net(FUNCTIONS[name], looks=looks, detached=detached).double(), torch.randn(5, 4, dtype=torch.float64)
    module = fxc.prune(net, x).module
    found = []
    for each in (net, module):
        y = each(x)
        y.square().sum().backward()
        grads = [p.grad for p in each.parameters()]
        found.append([y, *(torch.zeros(1) if grad is None else grad for grad in grads)])
    assert difference(*found) <= TOLERANCE


def test_a_compressed_network_learns_in_front_of_it() -> None:
    net = fxc.compress(Net(Round.apply, looks=False), torch.randn(5, 4))
    net(torch.randn(5, 4))[:, 0].sum().backward()
    grad = net.get_parameter("first.weight").grad
    assert grad is not None
    assert bool(grad[3:].any())
