"""Code that changes how other code runs: seeds, parameters without gradients, hooks, errors, ``__call__``."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

import fxcompress as fxc
from fxcompress.errors import PathError, TraceError, UnsupportedModelError
from tests.exactness import TOLERANCE, difference
from tests.nets import made_dead

D = 6
X = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two layers with something between them."""

    def __init__(self, between: Callable[[Any, Tensor], Tensor], *, looks: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.between, self.looks = nn.Linear(4, D), nn.Linear(D, 3), between, looks

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.looks and h.shape[0] > 100:
            return h  # type: ignore[no-any-return]
        return self.last(self.between(self, h))  # type: ignore[no-any-return]


def seeded(_: Any, h: Tensor) -> Tensor:  # noqa: ANN401
    torch.manual_seed(3)
    return h + torch.randn_like(h[:, :1])


def forked(_: Any, h: Tensor) -> Tensor:  # noqa: ANN401
    with torch.random.fork_rng():
        return h + torch.randn_like(h[:, :1])


def set_back(_: Any, h: Tensor) -> Tensor:  # noqa: ANN401
    state = torch.get_rng_state()
    noise = torch.randn_like(h[:, :1])
    torch.set_rng_state(state)
    return h + noise + torch.randn_like(h[:, :1])


def packed(_: Any, h: Tensor) -> Tensor:  # noqa: ANN401
    with saved_tensors_hooks(lambda tensor: tensor * 2, lambda tensor: tensor):
        return h.tanh()


@pytest.mark.parametrize("looks", [False, True])
@pytest.mark.parametrize("between", [seeded, forked, set_back, packed])
def test_what_no_graph_does_is_refused(between: Callable[[Any, Tensor], Tensor], *, looks: bool) -> None:
    with pytest.raises(TraceError, match=r"sets the state of torch's random numbers|hooks on what autograd saves"):
        fxc.prune(made_dead(Net(between, looks=looks)), X)


def frozen(net: Any, h: Tensor) -> Tensor:  # noqa: ANN401
    """As the generator of a GAN is trained through a discriminator that must not learn from it."""
    net.last.requires_grad_(False)
    result: Tensor = net.last(h)
    for parameter in net.last.parameters():
        parameter.requires_grad = True
    return torch.cat([result, h[:, 3:]], 1)


def moved(_: Any, h: Tensor) -> Tensor:  # noqa: ANN401
    with save_on_cpu():
        return h.tanh()


@pytest.mark.parametrize("looks", [False, True])
@pytest.mark.parametrize("between", [frozen, moved])
def test_gradients_are_those_of_the_model(between: Callable[[Any, Tensor], Tensor], *, looks: bool) -> None:
    net = Net(between, looks=looks).double()
    module = fxc.prune(net, X).module
    found = []
    for each in (net, module):
        y = each(X)
        found.append([y, *torch.autograd.grad(y.square().sum(), list(each.parameters()))])
        assert all(parameter.requires_grad for parameter in each.parameters())
    assert difference(*found) <= TOLERANCE


def fifth(_: Any, h: Tensor) -> Tensor:  # noqa: ANN401
    """Goes one way for batches of five and more, and the other way for smaller ones."""
    try:
        return h * h[4, 0]
    except IndexError:
        return h * 2


def halves(_: Any, h: Tensor) -> Tensor:  # noqa: ANN401
    try:
        return h.view(2, -1, D).sum(0)
    except RuntimeError:
        return h * 3


@pytest.mark.parametrize("between", [fifth, halves])
@pytest.mark.parametrize("rows", [3, 4, 5, 6])
def test_an_error_that_is_caught_on_some_sizes(between: Callable[[Any, Tensor], Tensor], rows: int) -> None:
    net = made_dead(Net(between, looks=True))
    module = fxc.prune(net, X[:1].expand(rows, -1).clone()).module
    for others in (rows, 3, 4, 5, 6):
        x = torch.randn(others, 4, dtype=torch.float64)
        try:
            found = module(x)
        except (PathError, IndexError, RuntimeError):
            assert others != rows
            continue
        assert difference(net(x), found) <= TOLERANCE


class Typed(Net):
    """Says what it takes; nothing else."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        result: Tensor = super().__call__(*args, **kwargs)
        return result


class Says(Net):
    """Says what it takes, in one line."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        return super().__call__(*args, **kwargs)  # type: ignore[no-any-return]


class Doubles(Net):
    """Does something in ``__call__``."""

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) * 2  # type: ignore[no-any-return]


def test_call_of_its_own() -> None:
    for kind in (Typed, Says):
        net = made_dead(kind(lambda _, h: h))
        assert difference(net(X), fxc.prune(net, X).module(X)) <= TOLERANCE
    doubles = made_dead(Doubles(lambda _, h: h))
    with pytest.raises(UnsupportedModelError, match="__call__ of its own"):
        fxc.prune(doubles, X)
    outer = nn.Sequential(doubles, nn.Linear(3, 3)).double()
    assert difference(outer(X), fxc.prune(outer, X).module(X)) <= TOLERANCE
