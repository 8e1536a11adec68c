"""Pruning does not change what a network computes: hundreds of random networks, with and without dead channels."""

import copy
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import fxcompress as fxc
from fxcompress.channels.prepare import prepare
from fxcompress.passes.rewrite import carry_out
from fxcompress.pruning import PruneResult
from fxcompress.trace.inputs import ExampleInputs
from fxcompress.trace.tracer import trace
from tests.attention import Attention
from tests.exactness import (
    TOLERANCE,
    Fingerprint,
    atoms_of,
    difference,
    forced,
    kill,
    outputs,
    removable_units,
    runs_on,
    tensors,
)
from tests.networks import Example, examples, randomise

FUZZ = os.environ.get("FXCOMPRESS_FUZZ") == "1"
AGAIN = os.environ.get("FXCOMPRESS_AGAIN") == "1"
"""On another device, after hundreds of cases on the CPU."""

CASES = settings(
    max_examples=20_000 if FUZZ else 30 if AGAIN else 120,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
pytestmark = pytest.mark.filterwarnings("ignore:Using a non-full backward hook")


class ScoresByNorm(nn.Module):
    """The right operand of a product is an activation: which of its entries are zero is a matter of the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.norm = nn.Linear(4, 6), nn.Linear(4, 6), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.mm(self.left(x), torch.relu(self.norm(self.right(x))).t())


def test_a_product_with_what_is_zero_in_evaluation_alone_stays() -> None:
    net = ScoresByNorm().double()
    with torch.no_grad():  # a constant, which evaluation makes negative, and training one
        net.right.weight[2], net.right.bias[2], net.norm.bias[2] = 0, 1, 1
        net.norm.get_buffer("running_mean")[2] = 5
    x = torch.randn(8, 4, dtype=torch.float64)
    result = fxc.prune(net, x).module
    for training in (False, True):
        assert difference(outputs(net, (x,), training=training), outputs(result, (x,), training=training)) < TOLERANCE


def without_dropout(net: nn.Module) -> nn.Module:
    """A copy in which dropout drops nothing: removing channels moves the random numbers that hit the others."""
    net = copy.deepcopy(net)
    for module in net.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    return net


def check_same(example: Example, pruned: nn.Module) -> None:
    """The same outputs: in both modes, on other batch sizes and on larger images."""
    net = example.net
    runs = [example.inputs, example.other_inputs(3, 0)]
    runs += [] if example.fixed or not runs_on(net, example.other_inputs(1, 4)) else [example.other_inputs(1, 4)]
    for inputs in runs:
        assert difference(outputs(net, inputs), outputs(pruned, inputs)) <= TOLERANCE
    if example.remembers:
        first, last = (outputs(each, example.inputs, calls=3) for each in (net, pruned))
        assert difference(first, last) <= TOLERANCE
    if not example.noisy:
        a, b = without_dropout(net), without_dropout(pruned)
        for inputs in runs[:2]:
            assert difference(outputs(a, inputs, training=True), outputs(b, inputs, training=True)) <= TOLERANCE


def check_trains(example: Example, pruned: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A step of the optimizer reaches the parameters of the pruned network."""
    pruned = pruned.train()

    def loss(net: nn.Module) -> Tensor:
        found = [x.square().mean() for x in tensors(net(*(x.clone() for x in example.inputs)))]
        return torch.stack(found).sum()

    try:
        loss(copy.deepcopy(example.net).train()).backward()
    except RuntimeError:  # an in-place op on what the backward pass needs: the original does not train either
        event("does not train")
        return
    optimizer.zero_grad()
    loss(pruned).backward()
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in pruned.named_parameters():
        assert id(parameter) in held, name
        assert parameter.grad is None or parameter.grad.shape == parameter.shape
    optimizer.step()


def check_names(example: Example, result: PruneResult) -> None:
    """The names in the state_dict stay, but for what went with a branch."""
    before, after = list(example.net.state_dict()), list(result.module.state_dict())
    assert after == [name for name in before if name in after]
    assert set(before) - set(after) == set(result.report.gone)
    if not result.report.branches:
        assert before == after


def check_second_run(result: PruneResult, example: Example) -> None:
    """A second run changes nothing, with three exceptions.

    The last channel of what nobody reads is kept, and may now be seen to be zero. And what one rewrite could not do,
    because torch takes another path at that size, may be possible from a size that is smaller already. And attention
    among the dims of a head keeps all dims of several heads, but not those of the one that may be left.
    """
    graph = trace(example.net, ExampleInputs.of(example.inputs)).graph
    if any(not node.users for node in graph.nodes if node.op in {"call_function", "call_method", "call_module"}):
        event("something is computed and not used")
    elif any("cannot be rewritten" in kept.reason for kept in result.report.kept):
        event("something could not be rewritten")
    elif any(isinstance(module, Attention) and module.form.among_dims for module in example.net.modules()):
        event("attention among dims")
    else:
        again = fxc.prune(result.module, example.inputs).report
        assert not again.modified, again


def check(example: Example, share: float) -> tuple[PruneResult, np.ndarray]:
    """Make a share of the removable units dead, prune, and check all that is promised."""
    assume(runs_on(example.net, example.inputs))
    analysis = prepare(example.net, example.inputs)
    units = removable_units(analysis)
    chosen = units[np.random.default_rng(example.seed).random(len(units)) < share]
    dead = atoms_of(analysis, chosen)
    kill(analysis, dead)
    first = next(example.net.parameters())
    first.grad = torch.randn_like(first)
    optimizer = torch.optim.SGD(example.net.parameters(), lr=1e-3, momentum=0.9)
    visit = Fingerprint(example.net)
    result = fxc.prune(example.net, example.inputs, optimizer)
    visit.check()
    check_same(example, result.module)
    check_names(example, result)
    check_second_run(result, example)
    assert isinstance(result.module, fx.GraphModule)
    for graph in (result.module.graph, getattr(result.module, "train_graph", None)):
        if graph is not None:
            graph.lint()
    check_trains(example, result.module, optimizer)
    return result, dead


@CASES
@given(examples(), st.sampled_from([0.1, 0.3, 0.6, 1.0]))
def test_dead_channels(example: Example, share: float) -> None:
    result, dead = check(example, share)
    event("something removed" if result.report.modified else "nothing removed")
    if example.keeps_zero and dead.any():
        read = [str(kept) for kept in result.report.kept if "reads it" in kept.reason and _is_dead(example, kept, dead)]
        assert read == []


def _is_dead(example: Example, kept: object, dead: np.ndarray) -> bool:
    analysis = prepare(example.net, example.inputs)
    sites = next(s for s in analysis.sites if s.weight_name == getattr(kept, "tensor", ""))
    return bool(dead[sites.rows[getattr(kept, "channel", 0)]])


@settings(CASES, max_examples=CASES.max_examples // 4)
@given(examples())
def test_nothing_dead(example: Example) -> None:
    check(example, 0.0)


@settings(CASES, max_examples=CASES.max_examples // 10)
@given(examples(), st.sampled_from([0.3, 1.0]))
def test_pruned_networks_are_saved_and_loaded(example: Example, share: float) -> None:
    """What is loaded is the original, freshly built and cut in one step."""
    fresh = copy.deepcopy(example.net)
    module = check(example, share)[0].module
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.fxc"
        fxc.save(module, path)
        loaded = fxc.load(path, model=fresh)
    assert difference(outputs(module, example.inputs), outputs(loaded, example.inputs)) <= TOLERANCE


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.fc = nn.Conv2d(8, 6, 3), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.bn1(self.conv1(x)))
        return self.fc(F.silu(self.conv2(x)).mean((2, 3)))  # type: ignore[no-any-return]


class Residual(Chain):
    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x))
        x = F.silu(x + F.pad(self.conv1(F.silu(x[:, :3])), (1, 1, 1, 1)))
        return self.fc(F.silu(self.conv2(x)).mean((2, 3)))  # type: ignore[no-any-return]


class Concat(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.conv2 = nn.Conv2d(16, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.bn1(self.conv1(x)))
        return self.fc(F.silu(self.conv2(torch.cat([x, x.flip(1)], 1))).mean((2, 3)))  # type: ignore[no-any-return]


class Grouped(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.conv2 = nn.Conv2d(8, 8, 3, groups=4)
        self.fc = nn.Linear(8, 5)


@pytest.mark.parametrize("model", [Chain, Residual, Concat, Grouped])
def test_live_channels_are_missed(model: type[nn.Module]) -> None:
    """The negative control: the same rewrite on channels that are alive goes through, and changes the output."""
    net = randomise(model().double()).eval()
    x = torch.randn(2, 3, 10, 10, dtype=torch.float64)
    analysis = prepare(net, x)
    units = removable_units(analysis)
    assert len(units) >= 4
    for unit in units:
        rewritten = carry_out(analysis, forced(analysis, np.array([unit])))
        assert sum(p.numel() for p in rewritten.module.parameters()) < sum(p.numel() for p in net.parameters())
        assert difference(net(x), rewritten.module.eval()(x)) > 1e-3


@pytest.mark.parametrize("model", [Chain, Residual, Concat, Grouped])
def test_exactly_the_dead_channels_go(model: type[nn.Module]) -> None:
    net = randomise(model().double()).eval()
    x = torch.randn(2, 3, 10, 10, dtype=torch.float64)
    analysis = prepare(net, x)
    units = removable_units(analysis)[::3]
    dead = atoms_of(analysis, units)
    kill(analysis, dead)
    for name, parameter in fxc.prune(net, x).module.named_parameters():
        left = [int((~dead[atoms.numpy()]).sum()) for atoms in analysis.atoms[name].values()]
        assert [n for n in parameter.shape if n > 1] == [n for n in left if n > 1], name
