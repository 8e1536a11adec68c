"""Modules may have any name that torch allows, words of Python or not."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxcompress as fxc
from tests.exactness import difference


class Named(nn.Module):
    """A layer under a name, and one under the name in a ModuleDict; another graph in training."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, nn.Linear(4, 8))
        self.table = nn.ModuleDict({name: nn.Linear(8, 3)})

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(getattr(self, self.name)(x))
        return self.table[self.name](2 * y if self.training else y)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["a b", 'say "a"', "it's", "a\\b", "for", "1", "a-b"])
def test_a_name_that_is_no_word_of_python(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Named(name).double().eval(), torch.randn(3, 4, dtype=torch.float64)
    with torch.no_grad():
        model.get_submodule(name).weight[2] = 0  # type: ignore[operator]
        model.get_submodule(name).bias[2] = 0  # type: ignore[operator]
    pruned = fxc.prune(model, x).module
    assert pruned.get_parameter(f"table.{name}.weight").shape == (3, 7)
    assert difference(model(x), pruned(x)) <= 1e-12
    assert difference(model.train()(x), pruned.train()(x)) <= 1e-12
    net = fxc.compress(model, x)
    (net(x).sum() + net.size()).backward()
    net.step()
    final = net.finalize().eval()
    fxc.save(final, tmp_path / "net.fxc")
    assert difference(final(x), fxc.load(tmp_path / "net.fxc", Named(name).double())(x)) == 0
