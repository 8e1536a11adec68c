"""Modules may have any name that torch allows, words of Python or not."""

import copy
import pickle
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


class Ours(nn.Module):
    """Layers, tensors and a list by the names of attributes that a graph module, or a network in training, has."""

    step: Tensor
    refresh: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.meta, self.graph = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8)), nn.Linear(8, 8)
        self.code, self.weights = nn.Parameter(torch.randn(8)), nn.Parameter(torch.ones(8))
        self.register_buffer("step", torch.tensor(1.5))
        self.register_buffer("refresh", torch.ones(8))
        self.size, self.prune, self.finalize = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.PReLU(8)
        self.graphs, self.train_graph, self.recompile = nn.ModuleList([nn.Linear(8, 8)]), nn.Dropout(0.1), nn.Identity()
        self.settings, self.liveness = nn.Linear(8, 8), nn.Linear(8, 3)
        with torch.no_grad():
            for layer in (self.meta[0], self.graph, self.size, self.graphs[0], self.settings):
                for parameter in layer.parameters():
                    parameter[:3] = 0
            self.prune.bias[:3] = 0

    def forward(self, x: Tensor) -> Tensor:
        h = self.graph(torch.relu(self.meta(x))) * self.weights * self.step + self.refresh * self.code
        h = self.recompile(self.train_graph(self.finalize(self.prune(self.size(h)))))
        for layer in self.graphs:
            h = torch.relu(layer(h))
        h = h * 1.25 if self.training else h
        return self.liveness(torch.relu(self.settings(h)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("keep_code", [False, True])
def test_names_of_ours(tmp_path: Path, *, keep_code: bool) -> None:
    model, x = Ours().double().eval(), torch.randn(16, 6, dtype=torch.float64)
    for result in (fxc.prune(model, x, keep_code=keep_code), fxc.prune(model, x, fold=True, keep_code=keep_code)):
        for copied in (result.module, copy.deepcopy(result.module), pickle.loads(pickle.dumps(result.module))):
            assert copied.state_dict().keys() == model.state_dict().keys()
            assert copied.get_parameter("meta.0.weight").shape == (5, 6)
            assert copied.get_submodule("graphs.0").weight.shape == (5, 5)
            assert copied.get_buffer("step").item() == 1.5
            assert difference(copied(x[:5]), model(x[:5])) <= 1e-12
    assert fxc.prune(result.module, x).report.modified is False
    net = fxc.compress(model, x, keep_code=keep_code)
    assert net.state_dict().keys() >= model.state_dict().keys()
    optimizer = torch.optim.Adam(net.param_groups(lr=1e-3))
    for _ in range(20):
        (net(x).square().mean() + 0.05 * net.size()).backward()
        optimizer.step()
        net.step()
    assert net.prune(optimizer).modified
    net.eval().load_state_dict(copy.deepcopy(net.state_dict()))
    final = net.finalize().eval()
    assert difference(final(x), net(x)) <= 1e-9
    assert final.state_dict().keys() == model.state_dict().keys()
    fxc.save(final, tmp_path / "net.fxc")
    assert torch.equal(fxc.load(tmp_path / "net.fxc", Ours().double())(x), final(x))


def test_names_of_ours_in_a_narrow_path() -> None:
    class Joined(Ours):
        def forward(self, x: Tensor) -> Tensor:
            h = self.meta(x)
            return self.liveness(torch.relu(h + self.graph(torch.relu(h))))  # type: ignore[no-any-return]

    model, x = Joined().double().eval(), torch.randn(4, 6, dtype=torch.float64)
    result = fxc.prune(model, x, narrow="measure")
    assert difference(result.module(x), model(x)) <= 1e-12
    assert difference(fxc.prune(model, x, narrow=True).module(x), model(x)) <= 1e-12
