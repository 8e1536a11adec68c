"""Modules that choose which of their methods is ``forward``, as those do that merge branches or slice in evaluation."""

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.errors import UnsupportedModelError
from tests.exactness import TOLERANCE, difference, outputs


class Chooses(nn.Module):
    """One convolution on half of the channels; ``forward`` is what the class never calls."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 3, padding=1)
        self.forward = getattr(self, way)  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        """Something else, which must not be traced."""
        return x * 100

    def by_parts(self, x: Tensor) -> Tensor:
        """On parts that are joined again."""
        first, rest = torch.split(x, [6, x.shape[1] - 6], 1)
        return torch.cat([self.conv(first), rest], 1)

    def in_place(self, x: Tensor) -> Tensor:
        """On a slice that is written to."""
        x = x.clone()
        x[:, :6] = self.conv(x[:, :6])
        return x

    def by_mode(self, x: Tensor) -> Tensor:
        """One of both, by the mode."""
        return self.by_parts(x) if self.training else self.in_place(x) * 2


class Inner(nn.Module):
    """The module within a network."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3)
        self.chooses = Chooses(way)
        self.last = nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.chooses(self.first(x).relu()))
        return y


class Outer(Inner):
    """The network itself chooses."""

    def __init__(self, way: str) -> None:
        super().__init__(way)
        self.forward = self.twice  # type: ignore[method-assign]

    def twice(self, x: Tensor) -> Tensor:
        """Another result than that of the class."""
        return super().forward(x) * 2


class Decides(nn.Module):
    """No graph as a whole: it reads a value."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.body = Outer(way)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return y if float(y.sum()) > 0 else -y


WAYS = ["by_parts", "in_place", "by_mode"]
KINDS = [Inner, Outer, Decides]


def made(kind: Callable[[str], nn.Module], way: str) -> nn.Module:
    """A network with two channels that are zero, and not in the half that is convolved."""
    net = kind(way).double().eval()
    first = net.get_submodule("body.first" if kind is Decides else "first")
    with torch.no_grad():
        for parameter in first.parameters():
            parameter[8:10] = 0
    return net


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_what_was_chosen_runs(kind: Callable[[str], nn.Module], way: str) -> None:
    net, x = made(kind, way), torch.randn(2, 3, 8, 8).double()
    result = fxc.prune(net, (x,))
    assert result.report.parameters[1] < result.report.parameters[0]
    for training in (False, True):
        assert (
            difference(outputs(net, (x,), training=training), outputs(result.module, (x,), training=training))
            <= TOLERANCE
        )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [Inner, Outer])
def test_own_code_goes_on_choosing_and_runs_on_its_own_tensors(kind: Callable[[str], nn.Module], way: str) -> None:
    net, x = made(kind, way), torch.randn(2, 3, 8, 8).double()
    small = fxc.prune(net, (x,), keep_code=True).module
    again = copy.deepcopy(small)
    with torch.no_grad():
        for module in (net, small, again):
            for parameter in module.parameters():
                parameter.mul_(1.5)
    for training in (False, True):
        expected = outputs(net, (x,), training=training)
        assert difference(expected, outputs(small, (x,), training=training)) <= TOLERANCE
        assert difference(expected, outputs(again, (x,), training=training)) <= TOLERANCE


@pytest.mark.parametrize("kind", [Inner, Outer])
@pytest.mark.parametrize("keep_code", [False, True])
def test_compressed_finalized_and_loaded(kind: Callable[[str], nn.Module], keep_code: bool) -> None:  # noqa: FBT001
    net, x = made(kind, "by_parts"), torch.randn(2, 3, 8, 8).double()
    compressed = fxc.compress(net, (x,), keep_code=keep_code)
    final = compressed.finalize().eval()
    assert difference(outputs(net, (x,)), outputs(final, (x,))) < 0.1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.fxc"
        fxc.save(final, path)
        loaded = fxc.load(path, made(kind, "by_parts"))
    assert difference(outputs(final, (x,)), outputs(loaded, (x,))) <= TOLERANCE


def test_what_is_no_method_of_the_module_is_refused() -> None:
    net, x = made(Inner, "by_parts"), torch.randn(2, 3, 8, 8).double()
    other = copy.deepcopy(net)
    net.__dict__["forward"] = other.forward
    with pytest.raises(UnsupportedModelError, match="replaced on the instance by what is no method of it"):
        fxc.prune(net, (x,))


def test_a_layer_of_torch_that_runs_another_method_is_refused() -> None:
    net, x = made(Inner, "by_parts"), torch.randn(2, 3, 8, 8).double()
    layer = net.get_submodule("last")
    layer.__dict__["forward"] = layer.extra_repr
    with pytest.raises(UnsupportedModelError, match="replaced on the instance"):
        fxc.prune(net, (x,))
