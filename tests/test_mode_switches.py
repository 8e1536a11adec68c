"""Code that sets modes while it runs: a layer stays in the mode in which the code calls it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.errors import FxCompressError
from tests.exactness import TOLERANCE, difference

X = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """``switch`` is called before the norm, ``after`` after it."""

    def __init__(self, switch: Callable[[Any], object], after: Callable[[Any], object] = lambda net: None) -> None:
        super().__init__()
        self.lin, self.drop, self.out = nn.Linear(4, 12), nn.Dropout(0.5), nn.Linear(12, 3)
        self.bn: Any = nn.BatchNorm1d(12)
        self.steps = [switch, after]

    def forward(self, x: Tensor) -> Tensor:
        h = self.lin(x)
        self.steps[0](self)
        h = self.bn(h)
        self.steps[1](self)
        result: Tensor = self.out(self.drop(h))
        return result


class Sized(Net):
    """Traced by running it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 1 if x.shape[0] > 1 else x)


def set_all(net: Any) -> None:  # noqa: ANN401
    for module in net.modules():
        module.eval()


def only_in_training(net: Any) -> None:  # noqa: ANN401
    if net.training:
        net.bn.eval()


def attribute(net: Any) -> None:  # noqa: ANN401
    net.bn.training = False


FROZEN: dict[str, tuple[Callable[[Any], object], Callable[[Any], object]]] = {
    "eval": (lambda net: net.bn.eval(), lambda net: None),
    "train": (lambda net: net.bn.train(False), lambda net: None),
    "attribute": (attribute, lambda net: None),
    "back again": (lambda net: net.bn.eval(), lambda net: net.bn.train(net.training)),
    "all modules": (set_all, lambda net: None),
    "in training alone": (only_in_training, lambda net: None),
}


@pytest.mark.parametrize("kind", [Net, Sized])
@pytest.mark.parametrize("name", FROZEN)
@pytest.mark.parametrize("training", [False, True])
def test_a_norm_that_forward_freezes_stays_frozen(kind: type[Net], name: str, training: bool) -> None:  # noqa: FBT001
    torch.manual_seed(0)
    net = kind(*FROZEN[name]).double().train(training)
    net.drop.p = 0.0
    net.bn.running_mean.uniform_(-1, 1)
    net.bn.running_var.uniform_(1, 4)
    with torch.no_grad():
        for parameter in (net.lin.weight, net.lin.bias, net.bn.weight, net.bn.bias, net.bn.running_mean):
            assert parameter is not None
            parameter[::3] = 0
    small = fxc.prune(net, X).module
    assert small.get_parameter("lin.weight").shape[0] == 8
    statistics = small.get_buffer("bn.running_mean").clone()
    for mode in (True, False, True):
        assert difference(small.train(mode)(X), net.train(mode)(X)) < TOLERANCE
    assert torch.equal(small.get_buffer("bn.running_mean"), statistics)
    compressed = fxc.compress(net.train(), X).train()
    before = compressed(X)
    assert difference(compressed(X), before) < TOLERANCE
    assert torch.equal(compressed.get_buffer("bn.running_mean"), net.bn.running_mean)


@pytest.mark.parametrize("kind", [Net, Sized])
def test_dropout_that_forward_turns_on_is_on_in_evaluation(kind: type[Net]) -> None:
    torch.manual_seed(0)
    net = kind(lambda net: net.drop.train()).double().eval()
    small = fxc.prune(net, X).module.eval()
    torch.manual_seed(1)
    expected = net(X)
    torch.manual_seed(1)
    assert difference(small(X), expected) < TOLERANCE
    assert difference(small(X), expected) > 1e-3
    assert not small.get_submodule("bn").training


def test_a_layer_that_is_called_in_both_modes_is_refused() -> None:
    class Both(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = self.lin(x)
            self.bn.eval()
            a = self.bn(h)
            self.bn.train()
            return self.out(a + self.bn(h))  # type: ignore[no-any-return]

    with pytest.raises(FxCompressError, match="it calls bn in training and in evaluation in the same run"):
        fxc.prune(Both(lambda net: None), X.float())
