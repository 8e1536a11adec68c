"""Code that hooks into the gradients of what it computes: to look at them (Grad-CAM), or to change them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.errors import TraceError
from tests.exactness import Fingerprint, difference

X = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Does something to the gradient of its hidden features."""

    def __init__(self, touch: Callable[[Any, Tensor], object]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.touch = touch
        with torch.no_grad():
            for parameter in (*self.first.parameters(), *self.second.parameters()):
                parameter[:3] = 0

    def keep(self, gradient: Tensor) -> None:
        self.kept = gradient

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        self.touch(self, h)
        result: Tensor = self.last(self.second(h))
        return result


def retain(_: Any, h: Tensor) -> None:  # noqa: ANN401
    h.retain_grad()


def retain_if_asked(_: Any, h: Tensor) -> None:  # noqa: ANN401
    if h.requires_grad:
        h.retain_grad()


def retain_and_keep(net: Any, h: Tensor) -> None:  # noqa: ANN401
    net.features = h
    retain_if_asked(net, h)


@pytest.mark.parametrize("touch", [retain, retain_if_asked, retain_and_keep])
def test_gradients_that_are_only_kept(touch: Callable[[Any, Tensor], object]) -> None:
    model = Net(touch).double().eval()
    visit = Fingerprint(model)
    result = fxc.prune(model, X).module
    visit.check()
    assert result.get_parameter("first.weight").shape == (5, 6)
    assert difference(result(X[:3]), model(X[:3])) < 1e-12
    with torch.no_grad():
        result(X)
    own = fxc.prune(model, X, keep_code=True).module
    if touch is retain_and_keep:
        own(X).sum().backward()
        assert own.features.grad.shape == (4, 5)  # type: ignore[union-attr]


HOOKS: dict[str, Callable[[Any, Tensor], object]] = {
    "clips": lambda _, h: h.register_hook(lambda gradient: gradient.clamp(-1, 1)),
    "keeps": lambda net, h: h.register_hook(net.keep) if h.requires_grad else None,
    "in training": lambda net, h: h.register_hook(net.keep) if net.training else None,
    "of a weight": lambda net, _: net.first.weight.register_hook(net.keep),
    "after": lambda net, _: net.first.weight.register_post_accumulate_grad_hook(net.keep),
}


@pytest.mark.parametrize("way", HOOKS)
def test_hooks_on_gradients_are_refused_with_what_to_do(way: str) -> None:
    with pytest.raises(
        TraceError, match=r"(?s)a hook on the gradient of a tensor at .*test_gradient_hooks.py.*Function"
    ):
        fxc.prune(Net(HOOKS[way]).double().eval(), X)


def test_pieces_of_a_model_with_such_a_hook() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.last = Net(lambda *_: None), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.body(x)
            h.register_hook(lambda gradient: gradient.clamp(-0.1, 0.1))
            return self.last(h)  # type: ignore[no-any-return]

    model = Outer().double().eval()
    result = fxc.prune(model, X)
    assert result.report.pieces == ("body",)
    assert result.module.get_parameter("body.first.weight").shape == (5, 6)
    small, whole = (
        torch.autograd.grad(net(x).sum(), x)[0] for net in (result.module, model) for x in [X.clone().requires_grad_()]
    )
    assert difference(small, whole) < 1e-12


class Clipped(torch.autograd.Function):
    """What the message says to do instead."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:  # noqa: ANN401
        return x.view_as(x)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:  # noqa: ANN401
        return gradient.clamp(-0.1, 0.1)


def test_the_way_that_the_message_names() -> None:
    class Other(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.last(Clipped.apply(self.second(torch.relu(self.first(x)))))  # type: ignore[no-any-return]

    model = Other(retain).double().eval()
    result = fxc.prune(model, X).module
    gradients = [torch.autograd.grad(net(X).sum(), net.get_parameter("second.bias"))[0] for net in (result, model)]
    assert float(gradients[1].abs().max()) == pytest.approx(0.4)
    assert difference(gradients[0], gradients[1][3:]) < 1e-12
