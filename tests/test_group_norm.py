"""Group norm with several groups: channels that are zero go one by one, from each group as many as there are."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import fxcompress as fxc
from fxcompress.channels.rules.group_sums import in_runs
from fxcompress.passes.means import group_norm_over
from tests.exactness import Fingerprint, difference

C, GROUPS = 12, 3
LOSSES = {
    "uneven": [1, 4, 5],
    "one group is gone": [0, 1, 2, 3],
    "one group is gone, and more": [4, 5, 6, 7, 10],
    "as many of each": [0, 3, 5, 6, 8, 9],
    "one group is left": [*range(8)],
    "one group is left, and not whole": [*range(8), 9],
    "one of each is left": [1, 2, 3, 4, 6, 7, 8, 9, 11],
    "one is left": [0, *range(2, 12)],
}


class Function(nn.GroupNorm):
    """As libraries write it."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps, cudnn_enabled=False)


class Residual(nn.Module):
    """Blocks of a diffusion network: group norm, an activation, a convolution, a time embedding, and a sum."""

    def __init__(self, norm: type[nn.GroupNorm] = nn.GroupNorm, *, affine: bool = True) -> None:
        super().__init__()
        self.stem, self.time = nn.Conv2d(3, C, 3, padding=1), nn.Linear(3, C)
        self.norms = nn.ModuleList(norm(GROUPS, C, affine=affine, eps=0.1) for _ in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(C, C, 3, padding=1) for _ in range(2))
        self.last = nn.Linear(C, 4)

    def forward(self, x: Tensor) -> Tensor:
        time, x = self.time(x.mean((2, 3))), self.stem(x)
        x = x + self.convs[0](F.silu(self.norms[0](x)))
        x = x + self.convs[1](F.silu(self.norms[1](x + time[:, :, None, None])))
        result: Tensor = self.last(self.norms[2](x.mean((2, 3))))
        return result


X = torch.randn(2, 3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
OTHER = torch.randn(3, 3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def build(dead: list[int], norm: type[nn.GroupNorm] = nn.GroupNorm, seed: int = 0, *, affine: bool = True) -> Residual:
    torch.manual_seed(seed)
    net = Residual(norm, affine=affine).double()
    with torch.no_grad():
        for parameter in net.norms.parameters():
            parameter.copy_(torch.randn_like(parameter))
    kill(net, dead)
    return net


def kill(net: nn.Module, dead: list[int]) -> None:
    """Make channels of the stream zero wherever they are made."""
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if not name.startswith("last"):
                parameter[dead] = 0


def width(net: nn.Module) -> int:
    return net.get_parameter("stem.weight").shape[0]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("norm", [nn.GroupNorm, Function])
@pytest.mark.parametrize("name", LOSSES)
def test_zero_channels_go_and_go_again(name: str, norm: type[nn.GroupNorm], *, training: bool) -> None:
    net = build(LOSSES[name], norm).train(training)
    visit = Fingerprint(net)
    module = fxc.prune(net, X).module
    visit.check()
    assert width(module) == C - len(LOSSES[name])
    assert list(module.state_dict()) == list(net.state_dict())
    for images in (X, OTHER):
        assert difference(net(images), module(images)) <= 1e-12
    assert not fxc.prune(module, X).report.modified
    if width(module) > 1:
        kill(module, [0])
        expected = module(OTHER)
        again = fxc.prune(module, X).module
        assert width(again) == width(module) - 1
        assert difference(expected, copy.deepcopy(again)(OTHER)) <= 1e-12


@settings(max_examples=40, deadline=None)
@given(st.sets(st.integers(0, C - 1), max_size=C - 1), st.integers(0, 9))
def test_any_set_of_channels(dead: set[int], seed: int) -> None:
    net = build(sorted(dead), seed=seed)
    module = fxc.prune(net, X).module
    assert width(module) == C - len(dead)
    assert difference(net(OTHER), module(OTHER)) <= 1e-12


def test_whole_groups_leave_the_norm_that_it_was() -> None:
    module = fxc.prune(build(LOSSES["one group is gone"]), X).module
    assert isinstance(module, fx.GraphModule)
    norms = [node for node in module.graph.nodes if "group_norm" in str(node.target)]
    assert len(norms) == 3
    assert all(node.target is F.group_norm and node.args[1] == 2 for node in norms)


def test_a_group_of_zeros_is_its_bias() -> None:
    """Without weights nothing but the mean of the group moves a zero: a group of zeros stays, and goes."""
    net = build([0, 1, 2, 3, 5], affine=False)
    module = fxc.prune(net, X).module
    assert width(module) == C - 4
    assert difference(net(OTHER), module(OTHER)) <= 1e-12


def test_a_group_that_nobody_reads_goes_whatever_it_holds() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, C, 1), nn.GroupNorm(GROUPS, C), nn.Conv2d(C, 2, 1)).double()
    with torch.no_grad():
        net.get_parameter("2.weight")[:, 4:9] = 0
    module = fxc.prune(net, X).module
    assert module.get_parameter("0.weight").shape[0] == C - 4
    assert difference(net(OTHER), module(OTHER)) <= 1e-12


def test_what_is_not_zero_before_the_norm_stays() -> None:
    net = build([1, 4, 5])
    with torch.no_grad():
        net.get_parameter("time.bias")[4] = 1
    module = fxc.prune(net, X).module
    assert width(module) == C - 2
    assert difference(net(OTHER), module(OTHER)) <= 1e-12


@pytest.mark.parametrize("name", ["uneven", "as many of each"])
def test_the_result_is_stored_compiled_and_exported(name: str, tmp_path: Path) -> None:
    module = fxc.prune(build(LOSSES[name]).eval(), X).module
    assert isinstance(module, fx.GraphModule)
    fxc.save(module, tmp_path / "net.fxc")
    loaded = fxc.load(tmp_path / "net.fxc", Residual().double(), X)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    exported = torch.export.export(module, (X,)).module()
    for other in (loaded, compiled, exported, module):
        assert difference(module(X), other(X)) <= 1e-12


@pytest.mark.parametrize("name", ["uneven", "as many of each", "one group is gone, and more"])
def test_training_goes_on_as_in_the_whole_network(name: str) -> None:
    whole, other = (build(LOSSES[name]).train() for _ in range(2))
    optimizers = [torch.optim.Adam(net.parameters()) for net in (whole, other)]
    for net, optimizer in zip((whole, other), optimizers, strict=True):
        train(net, optimizer, LOSSES[name])
    small = fxc.prune(other, X, optimizers[1]).module
    assert width(small) == C - len(LOSSES[name])
    train(whole, optimizers[0], LOSSES[name])
    train(small, optimizers[1], [])
    assert difference(whole(OTHER), small(OTHER)) <= 1e-10


def train(net: nn.Module, optimizer: torch.optim.Optimizer, dead: list[int]) -> None:
    """Two steps; what is dead is held at zero."""
    for _ in range(2):
        optimizer.zero_grad()
        net(X).square().mean().backward()
        optimizer.step()
        kill(net, dead)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(1, 3), st.integers(0, 99))
@settings(deadline=None)
def test_the_function_is_that_of_the_whole_tensor(left: list[int], places: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    kept = torch.cat([torch.arange(n) + 4 * i for i, n in enumerate(left)])
    full = torch.zeros(2, 4 * len(left), places, dtype=torch.float64)
    full[:, kept] = torch.randn(2, len(kept), places, generator=generator, dtype=torch.float64) + 3
    weight, bias = torch.randn(2, len(full[0]), generator=generator, dtype=torch.float64)
    narrow, wide = full[:, kept].clone().requires_grad_(), full.clone().requires_grad_()
    found = group_norm_over(narrow, ((1, 4),), weight[kept], bias[kept], 0.01, tuple(left))
    expected = F.group_norm(wide, len(left), weight, bias, 0.01)[:, kept]
    assert difference(expected, found) <= 1e-11
    weights = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    assert wide.grad is not None
    assert difference(wide.grad[:, kept], narrow.grad) <= 1e-9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_function_is_that_of_torch_where_nothing_is_gone(dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(3, 8, 5, 5).to(dtype), torch.rand(8).to(dtype), torch.rand(8).to(dtype)
    found = group_norm_over(x, ((1, 4),), weight, bias, 1e-5, (4, 4))
    assert found.dtype == dtype
    expected = F.group_norm(x.double(), 2, weight.double(), bias.double(), 1e-5)
    assert difference(expected, found.double()) <= torch.finfo(dtype).eps * 8


@pytest.mark.parametrize("value", [0.0, 1.0, -3e4])
def test_equal_entries_are_finite(value: float) -> None:
    assert group_norm_over(torch.full((2, 5, 3), value), ((1, 4),), groups=(2, 3)).isfinite().all()


@given(st.lists(st.integers(1, 4), min_size=1, max_size=8))
def test_the_groups_of_channels_by_runs(groups: list[int]) -> None:
    expected = [i for i, size in enumerate(groups) for _ in range(size)]
    assert in_runs(tuple(groups), torch.device("cpu")).tolist() == expected
