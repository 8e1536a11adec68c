"""The contract of passes, checked on each of them by one helper."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_manager import PassManager

from fxcompress.passes import Finalize, FoldConstants, InjectQuantizers, NarrowBranches, Pass, PruneChannels
from fxcompress.trace.inputs import ExampleInputs
from fxcompress.trace.traced import TracedModule
from fxcompress.trace.tracer import trace
from tests.nets import ResidualNet


class Noisy(nn.Module):
    """Two graphs: functional dropout in training."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.conv2(F.dropout(F.relu(self.conv1(x)), 0.5, self.training))
        return result


def example() -> Tensor:
    return torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def dead(model: nn.Module) -> nn.Module:
    """Zero the first two channels of each convolution, and all biases."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight[:2] = 0
            if isinstance(module, nn.Conv2d | nn.BatchNorm2d) and module.bias is not None:
                module.bias.zero_()
    return model


def check_pass(run: Pass, module: TracedModule, *, changes: bool, tolerance: float, **counts: int) -> TracedModule:
    """Assert the contract; ``counts`` are the output channels that a layer must have afterwards, to the letter."""
    x = example()
    state = {name: value.clone() for name, value in module.state_dict().items()}
    modes = [m.training for m in module.modules()]
    code = module.code
    expected = copy.deepcopy(module).eval()(x)
    result = run(module)
    assert result.modified is changes
    after = result.graph_module
    assert isinstance(after, TracedModule)
    assert after is not module
    for graph in after.graphs.values():
        graph.lint()
    torch.testing.assert_close(after.eval()(x), expected, rtol=tolerance, atol=tolerance)
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert [m.training for m in module.modules()] == modes
    assert module.code == code
    assert set(module.state_dict()) <= set(after.state_dict()) or not isinstance(run, InjectQuantizers)
    again = run(after)
    assert not again.modified
    for layer, channels in counts.items():
        weight = after.get_parameter(f"{layer.replace('__', '.')}.weight")
        assert weight.shape[0] == channels
    return after


@pytest.mark.parametrize("model", [ResidualNet, Noisy])
def test_inject_and_finalize(model: type[nn.Module]) -> None:
    net = trace(model().double())
    quantized = check_pass(InjectQuantizers(), net, changes=True, tolerance=0.05)
    check_pass(Finalize(), quantized, changes=True, tolerance=1e-12)


def test_prune_channels() -> None:
    run = PruneChannels(ExampleInputs.of(example()))
    counts = {"stem__0": 6, "block1__conv1": 6, "block1__conv2": 6, "block2__conv1": 6, "fc": 5}
    check_pass(run, trace(dead(ResidualNet().double())), changes=True, tolerance=1e-12, **counts)
    check_pass(run, trace(dead(Noisy().double())), changes=True, tolerance=1e-12, conv1=4, conv2=4)


def test_fold_constants() -> None:
    """Batch norm with shifts other than zero makes constants of the two dead channels of a layer."""
    net = trace(dead(ResidualNet().double()))
    for name, parameter in net.named_parameters():
        if "bn" in name and name.endswith("bias"):
            nn.init.ones_(parameter)
    inputs = ExampleInputs.of(example())
    counts = {"stem__0": 8, "block1__conv1": 8, "block1__conv2": 8, "fc": 5}
    folded = check_pass(FoldConstants(inputs), net, changes=True, tolerance=1e-12, **counts)
    counts = {"stem__0": 7, "block1__conv1": 7, "block2__conv1": 7, "fc": 5}
    check_pass(PruneChannels(inputs), folded, changes=True, tolerance=1e-12, **counts)


def test_fold_constants_leaves_a_network_alone_that_has_none() -> None:
    check_pass(FoldConstants(ExampleInputs.of(example())), trace(ResidualNet().double()), changes=False, tolerance=0)


def test_narrow_branches() -> None:
    """Two channels of block1's path are zero, and alive in the sum."""
    net = ResidualNet().double()
    nn.init.zeros_(net.block1.bn2.bias)
    with torch.no_grad():
        net.block1.conv2.weight[:2] = 0
    run = NarrowBranches(ExampleInputs.of(example()))
    counts = {"stem__0": 8, "block1__conv2": 6, "block1__bn2": 6, "block2__conv2": 8, "fc": 5}
    check_pass(run, trace(net), changes=True, tolerance=1e-12, **counts)


def test_narrow_branches_leaves_a_network_alone_whose_paths_are_alive() -> None:
    run = NarrowBranches(ExampleInputs.of(example()))
    check_pass(run, trace(ResidualNet().double()), changes=False, tolerance=0)


def test_prune_channels_leaves_a_network_alone_that_has_nothing_to_lose() -> None:
    check_pass(PruneChannels(ExampleInputs.of(example())), trace(ResidualNet().double()), changes=False, tolerance=0)


def test_in_torchs_pass_manager() -> None:
    inputs = ExampleInputs.of(example())
    manager = PassManager([InjectQuantizers(), Finalize(), PruneChannels(inputs)])
    result = manager(trace(dead(Noisy().double())))
    assert result.modified
    assert isinstance(result.graph_module, fx.GraphModule)
    assert result.graph_module.get_parameter("conv1.weight").shape[0] == 4


def test_passes_are_values() -> None:
    assert InjectQuantizers(4.0) == InjectQuantizers(4.0) != InjectQuantizers()
    assert Finalize() == Finalize()
