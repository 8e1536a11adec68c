"""Decisions on sizes that do nothing but stop a model refuse no input that it takes.

PYTEST_DONT_REWRITE: the assertions of a model must be as they are.
"""

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.errors import PathError
from tests.exactness import TOLERANCE, difference, outputs


def by_assert(rows: int, heads: int) -> int:
    assert rows % heads == 0, f"{rows} rows are no {heads} heads"
    return rows // heads


def by_error(rows: int, heads: int) -> int:
    if rows % heads != 0:
        raise ValueError(f"{rows} rows are no {heads} heads")
    return rows // heads


def by_caught_error(rows: int, heads: int) -> int:
    try:
        return by_error(rows, heads)
    except ValueError:
        return rows


class Heads(nn.Module):
    """Attention, the heads of which lie beside the samples."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.inputs, self.out = kind, nn.Linear(5, 3 * 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        samples, words, _ = x.shape
        if words > 100:
            return x
        split = self.inputs(x).reshape(samples, words, 3, 4, 3).permute(2, 0, 3, 1, 4).reshape(3, -1, words, 3)
        q, k, v = split.unbind(0)
        mixed = (q @ k.transpose(1, 2)).softmax(-1) @ v
        heads = {"assert": by_assert, "error": by_error, "caught": by_caught_error}[self.kind](mixed.shape[0], samples)
        result: Tensor = self.out(mixed.reshape(samples, heads, words, -1).transpose(1, 2).flatten(2))
        return result


@pytest.mark.parametrize("kind", ["assert", "error", "caught"])
def test_a_check_that_only_stops_goes_where_a_cut_changes_its_sizes(kind: str) -> None:
    torch.manual_seed(0)
    net = Heads(kind).double()
    with torch.no_grad():
        net.inputs.weight[24 + 3 : 24 + 6] = 0  # the values of a head
        net.inputs.bias[24 + 3 : 24 + 6] = 0
    pruned = fxc.prune(net, torch.randn(2, 6, 5, dtype=torch.float64)).module
    assert pruned.get_parameter("inputs.weight").shape[0] == 27
    for samples, words in ((2, 6), (1, 6), (3, 4)):
        x = torch.randn(samples, words, 5, dtype=torch.float64)
        if kind == "caught" and samples != 2:  # where it comes out otherwise, the model goes another way
            with pytest.raises(PathError):
                pruned(x)
        else:
            assert difference(outputs(net, (x,)), outputs(pruned, (x,))) <= TOLERANCE


class Windows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] % 2 == 0
        h = self.first(x)
        assert h.shape[-1] == 8 or h.shape[-1] == 6
        result: Tensor = self.last(h.reshape(x.shape[0], -1, 2, h.shape[-1]).mean(2))
        return result


def test_a_check_of_sizes_that_stay_goes_on_refusing() -> None:
    net = Windows()
    with torch.no_grad():
        net.first.weight[:2], net.first.bias[:2] = 0.0, 0.0
    pruned = fxc.prune(net, torch.randn(2, 6, 5)).module
    assert pruned.get_parameter("first.weight").shape[0] == 6
    assert torch.allclose(pruned(torch.ones(3, 4, 5)), net(torch.ones(3, 4, 5)), atol=1e-6)
    with pytest.raises((PathError, AssertionError)):
        pruned(torch.ones(3, 5, 5))
