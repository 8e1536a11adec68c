"""Modules may have any name that torch allows, words of Python or not."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxcompress as fxc
from fxcompress.quantizer import Quantizer
from fxcompress.training.liveness import Liveness
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


class Taken(nn.Module):
    """Tensors at the top of a network, by names that what watches over them has for itself."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.layer1, self.layer2 = nn.Linear(3, 4), nn.Linear(4, 2)
        self.tensor = name
        self.register_parameter(name, nn.Parameter(torch.randn(4)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer2(self.layer1(x) + getattr(self, self.tensor))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", sorted(set(dir(Liveness)) - set(dir(nn.Module)) - {"__annotations__"}))
def test_a_tensor_called_like_something_of_ours(name: str) -> None:
    torch.manual_seed(0)
    net, x = fxc.compress(Taken(name), torch.randn(5, 3)), torch.randn(5, 3)
    optimizer = torch.optim.Adam(net.param_groups())
    for _ in range(2):
        (net(x).square().sum() + net.size()).backward()
        optimizer.step()
        net.step()
    net.prune(optimizer)
    other = fxc.compress(Taken(name), x)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x), net(x))


def test_a_layer_may_have_the_name_of_something_that_only_we_call() -> None:
    net = fxc.compress(Named("start"), torch.zeros(2, 4))
    assert isinstance(net.get_submodule("start.weight_quantizer"), Quantizer)
