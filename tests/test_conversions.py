"""Code that converts sizes by ``int``, ``float`` and ``math``: the graph computes them anew for each input."""

import math
from collections.abc import Callable
from math import sqrt

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.errors import PathError
from tests.exactness import TOLERANCE, difference, outputs


def apart_and_together(h: Tensor) -> Tensor:
    """Pairs of tokens, and back: how many samples there were is computed from how many pairs there are."""
    length, width = h.shape[1], h.shape[2]
    pairs = h.reshape(h.shape[0], length // 2, 2, width).reshape(-1, 2, width)
    samples = int(pairs.shape[0] / (length / 2))
    return pairs.reshape(samples, length, -1)


def padded(h: Tensor) -> Tensor:
    length = int(math.ceil(h.shape[1] / 4) * 4)
    return nn.functional.pad(h, (0, 0, 0, length - h.shape[1]))


def square(h: Tensor) -> Tensor:
    side = int(math.sqrt(h.shape[1]))
    return h[:, : side * side].reshape(h.shape[0], side, side, -1).transpose(1, 2).flatten(1, 2)


def by_kind(h: Tensor) -> Tensor:
    rows, columns = map(int, h.shape[:2])
    assert isinstance(rows, int)
    assert not isinstance(columns, (str, float))
    return h.reshape(rows * columns, -1).reshape(rows, columns, -1)


SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "samples": apart_and_together,
    "ceil": padded,
    "root": square,
    "map": by_kind,
    "half of the tokens": lambda h: h[:, int(h.shape[1] * 0.5) :],
    "mean": lambda h: h.sum(1, keepdim=True) / float(h.shape[1]),
    "logarithm": lambda h: h * (math.log(h.shape[1], 3) + math.exp(-h.shape[0])),
    "whole": lambda h: h if (h.shape[1] / 2).is_integer() else nn.functional.pad(h, (0, 0, 0, 1)),
    "power of two": lambda h: nn.functional.pad(h, (0, 0, 0, (1 << (h.shape[1] - 1).bit_length()) - h.shape[1])),
    "text": lambda h: h * int("3") * float("0.5") * math.sqrt(2.0),
    "scale": lambda h: h / math.sqrt(h.shape[-1]),
    "imported": lambda h: h * sqrt(h.shape[-1]) / int(h.shape[-1]),
    "half of the channels": lambda h: torch.cat([h[..., int(h.shape[-1] / 2) :], h[..., : int(h.shape[-1] / 2)]], -1),
}


class Net(nn.Module):
    """Traced by running; what converts sizes stands between two layers."""

    def __init__(self, code: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.code = nn.Linear(4, 8), nn.Linear(8, 2), code

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > 100:
            return x
        return self.last(self.code(self.first(x).relu()))  # type: ignore[no-any-return]


def dead(code: Callable[[Tensor], Tensor]) -> nn.Module:
    torch.manual_seed(0)
    net = Net(code).double().eval()
    with torch.no_grad():
        for channel in (1, 2, 6, 5):
            net.first.weight[channel], net.first.bias[channel] = 0.0, 0.0
    return net


@pytest.mark.parametrize("name", SHAPES)
def test_conversions_follow_the_input(name: str) -> None:
    net = dead(SHAPES[name])
    pruned = fxc.prune(net, torch.randn(2, 6, 4).double()).module
    assert pruned.get_parameter("first.weight").shape[0] == 4
    for size in ((2, 6), (1, 6), (3, 4), (5, 8), (2, 16)):
        x = torch.randn(*size, 4).double()
        for training in (False, True):
            expected = outputs(net, (x,), training=training)
            try:
                found = outputs(pruned, (x,), training=training)
            except PathError:
                assert name == "power of two" and size[1] != 6  # noqa: PT018
            else:
                assert difference(expected, found) <= TOLERANCE


def test_what_python_does_with_a_converted_size_is_a_decision() -> None:
    def halves(h: Tensor) -> Tensor:
        return torch.stack([h[:, i] for i in range(int(h.shape[1] / 2))], 1)

    net = dead(halves)
    pruned = fxc.prune(net, torch.randn(2, 6, 4).double()).module
    assert pruned.get_parameter("first.weight").shape[0] == 4
    for length in (6, 7):
        x = torch.randn(3, length, 4).double()
        assert difference(outputs(net, (x,)), outputs(pruned, (x,))) <= TOLERANCE
    with pytest.raises(PathError, match="came out as 4, and was 3"):
        pruned(torch.randn(3, 8, 4).double())


def test_names_are_as_they_were() -> None:
    before = math.sqrt
    fxc.prune(dead(SHAPES["root"]), torch.randn(2, 6, 4).double())
    assert math.sqrt is before is sqrt
    assert "int" not in globals()
    assert "float" not in globals()
