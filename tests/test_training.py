"""Training that removes channels as it goes."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

import fxcompress as fxc
from fxcompress.errors import OptimizerError
from fxcompress.training.restore import RECORD
from tests.nets import Block, ResidualNet, batch, quantizer, set_bits

Make = Callable[[Any], Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9),
    "sgd-nesterov": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": torch.optim.Adam,
    "adam-amsgrad": lambda groups: torch.optim.Adam(groups, amsgrad=True),
    "adam-fused": lambda groups: torch.optim.Adam(groups, fused=True),
    "adamw": torch.optim.AdamW,
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, momentum=0.5),
    "adagrad": torch.optim.Adagrad,
    "adamax": torch.optim.Adamax,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "adadelta": torch.optim.Adadelta,
    "asgd": lambda groups: torch.optim.ASGD(groups, t0=1),
}
"""Not Rprop, which goes by the sign of a gradient: where that is rounding (a bias before batch norm), two runs part."""


def compressed(bits: float = 8.0) -> fxc.CompressedModule:
    torch.manual_seed(0)
    return fxc.compress(ResidualNet().double(), torch.zeros(2, 3, 10, 10, dtype=torch.float64), bits=bits)


def run(net: fxc.CompressedModule, make: Make, steps: int, every: int, gamma: float, bits_lr: float) -> list[float]:
    """Train on random batches; prune every few steps, or not at all with ``every`` 0."""
    optimizer = make(net.param_groups(2e-3, bits_lr=bits_lr))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for step in range(steps):
        x, target = batch(seed=step)
        loss = F.cross_entropy(net(x), target) + gamma * net.size()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        net.step()
        losses.append(loss.item())
        if every and step % every == every - 1:
            net.prune(optimizer)
    return losses


def same_networks(a: fxc.CompressedModule, b: fxc.CompressedModule, tolerance: float, *, tensors: bool = True) -> None:
    """Both compute the same, with tensors of the same shapes and, up to rounding, values.

    Which channel stands for a layer that is dead as a whole, and cannot go, may differ (``tensors=False``).
    """
    first, second = a.state_dict(), b.state_dict()
    del first[RECORD], second[RECORD]  # which of several equal channels stands for a layer may differ
    assert {k: v.shape for k, v in first.items()} == {k: v.shape for k, v in second.items()}
    for name, value in first.items() if tensors else ():
        torch.testing.assert_close(value, second[name], rtol=tolerance, atol=tolerance)
    x, _ = batch(seed=999)
    for mode in (True, False):
        torch.testing.assert_close(a.train(mode)(x), b.train(mode)(x), rtol=tolerance, atol=tolerance)


def test_removal_as_they_die_equals_removal_at_the_end() -> None:
    """200 steps in float64 (method.md, 4.6): every prune is exact, so the two runs are the same run.

    Few bits to start with and a low learning rate for exponents: at the paper's rates training is chaotic, and
    amplifies the rounding of the last digit until the runs part, whatever is or is not removed.
    """
    never = compressed(bits=2.0)
    often = copy.deepcopy(never)
    losses = run(never, OPTIMIZERS["adam"], 200, 0, 0.2, 0.05)
    others = run(often, OPTIMIZERS["adam"], 200, 1, 0.2, 0.05)
    assert often.get_parameter("block1.conv1.weight").shape[0] < 8
    assert often.get_parameter("block2.conv1.weight").shape[0] < 8
    assert losses == pytest.approx(others, rel=1e-10)
    assert never.prune().modified
    same_networks(
        never, often, 1e-6
    )  # a bias in front of batch norm has rounding for a gradient, and Adam scales it up


@pytest.mark.parametrize("seed", range(4))
def test_the_same_under_great_pressure(seed: int) -> None:
    """Whole layers and branches die within 18 steps, before rounding can grow."""
    torch.manual_seed(seed)
    model = ResidualNet().double()
    never = fxc.compress(model, torch.zeros(2, 3, 10, 10, dtype=torch.float64), bits=2.0)
    often = copy.deepcopy(never)
    losses = run(never, OPTIMIZERS["sgd"], 24, 0, 0.5, 2.0)
    others = run(often, OPTIMIZERS["sgd"], 24, 1, 0.5, 2.0)
    assert losses == pytest.approx(others, rel=1e-7)
    never.prune()
    same_networks(never, often, 1e-6, tensors=False)


class Depthwise(nn.Module):
    """Two groups of the depthwise convolution stay, whichever they are, when all of its channels have died."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3)
        self.wide, self.norm = nn.Conv2d(6, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.deep = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False)
        self.narrow, self.fc = nn.Conv2d(12, 6, 1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = x + self.narrow(F.relu(self.deep(F.relu(self.norm(self.wide(x))))))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def test_the_size_does_not_depend_on_which_channels_stand_for_a_layer() -> None:
    """Those that were left by an earlier removal, or others: nothing needs them, so neither have bits."""
    torch.manual_seed(0)
    never = fxc.compress(Depthwise().double(), torch.zeros(2, 3, 10, 10, dtype=torch.float64))
    with torch.no_grad():
        quantizer(never, "deep.weight").bits.copy_(torch.arange(1.0, 13.0))
    often = copy.deepcopy(never)
    sizes: list[list[float]] = [[], []]
    first = [0, 1, 2, 3, 4, 6, 7, 8, 10, 11]
    for dying in ((first, first), ([5, 9], [0, 1])):  # by their places in each network
        for net, rows, found in zip((never, often), dying, sizes, strict=True):
            set_bits(net, "wide.weight", rows)
            with torch.no_grad():
                net.get_parameter("norm.bias")[rows] = 0.0
            net.step()
            found += [net.size(objective).item() for objective in ("eq4", "eq5", "macs", "activations")]
        assert often.prune().modified == (len(dying[0]) > 2)
    torch.testing.assert_close(*map(torch.tensor, sizes))
    x, _ = batch(size=4)
    torch.testing.assert_close(never(x), often(x))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_on_as_if_nothing_had_happened(name: str) -> None:
    never = compressed()
    for layer, channels in {"stem.0": [1], "block1.conv1": [0, 3], "block2.conv1": [5], "block1.conv2": [2]}.items():
        set_bits(never, f"{layer}.weight", channels)
    for bn in ("stem.1", "block1.bn1", "block1.bn2", "block2.bn1", "block2.bn2"):
        nn.init.zeros_(never.get_parameter(f"{bn}.bias"))
    nn.init.zeros_(never.get_parameter("block2.conv1.bias"))
    often = copy.deepcopy(never)
    losses = run(never, OPTIMIZERS[name], 12, 0, 0.0, 1e-4)
    others = run(often, OPTIMIZERS[name], 12, 3, 0.0, 1e-4)
    assert often.get_parameter("block1.conv1.weight").shape == (6, 8, 3, 3)
    assert losses == pytest.approx(others, rel=1e-9)
    never.prune()
    same_networks(never, often, 1e-8)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon yet")
def test_two_optimizers_of_one_network() -> None:
    """Muon takes matrices alone, so another one trains the rest; both lose what the network loses."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    net = fxc.compress(model, torch.zeros(2, 6))
    weights, *rest = net.param_groups(1e-3)
    muon = torch.optim.Muon(weights["params"], lr=1e-2)
    adam = torch.optim.Adam(rest)
    removals = 0
    for step in range(6):
        muon.zero_grad()
        adam.zero_grad()
        net(torch.randn(16, 6)).square().mean().backward()
        muon.step()
        adam.step()
        if step == 2:
            set_bits(net, "0.weight", [1, 5])
            with torch.no_grad():
                net.get_parameter("0.bias")[[1, 5]] = 0.0
        net.step()
        removals += net.prune([muon, adam]).modified
    assert removals == 1
    held = [p for optimizer in (muon, adam) for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in net.parameters()}
    shapes = [muon.state[p]["momentum_buffer"].shape for p in muon.param_groups[0]["params"]]
    assert shapes == [(6, 6), (3, 6)]
    with pytest.raises(OptimizerError, match="that is not the network's"):
        net.prune([muon, torch.optim.SGD([nn.Parameter(torch.zeros(1))])])


def test_gradient_accumulation_goes_on_over_a_removal() -> None:
    nets = [compressed() for _ in range(2)]
    for net, when in zip(nets, (True, False), strict=True):
        set_bits(net, "block1.conv1.weight", [0, 3])
        nn.init.zeros_(net.get_parameter("block1.bn1.bias"))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        net.step()
        for part in range(2):
            x, target = batch(seed=part)
            F.cross_entropy(net(x), target).backward()
            if when and part == 0:
                assert net.prune(optimizer).modified
        optimizer.step()
        net.step()
        net.prune(optimizer)
    same_networks(nets[0], nets[1], 1e-10)


def test_bits_never_fall_below_zero() -> None:
    net = compressed()
    set_bits(net, "fc.weight", [2], -0.7)
    net.step()
    assert quantizer(net, "fc.weight").bits.min().item() == 0.0


@pytest.mark.parametrize("forgotten", [False, True])
@pytest.mark.parametrize("call", ["prune", "finalize"])
def test_a_step_that_was_forgotten_is_told_once(
    call: str, caplog: pytest.LogCaptureFixture, *, forgotten: bool
) -> None:
    net = compressed()
    optimizer = torch.optim.Adam(net.param_groups())
    for _ in range(2):
        set_bits(net, "fc.weight", [2], -0.7)
        if not forgotten:
            net.step()
        net.prune(optimizer) if call == "prune" else net.finalize()
    assert [r.getMessage().count("net.step() after each optimizer.step()") for r in caplog.records] == [1] * forgotten


def test_a_channel_may_recover_until_its_bias_is_gone() -> None:
    net = compressed()
    set_bits(net, "block1.conv1.weight", [1, 2])
    with torch.no_grad():
        net.get_parameter("block1.bn1.bias")[1] = 0.5
    net.step()
    set_bits(net, "block1.conv1.weight", [1, 2], 3.0)
    net.step()
    bits = quantizer(net, "block1.conv1.weight").bits
    assert bits[1].item() == 3.0
    assert bits[2].item() == 0.0


def test_biases_shrink_to_exactly_zero_and_only_those_of_dead_channels() -> None:
    net = compressed()
    bias = net.get_parameter("block1.bn1.bias")
    with torch.no_grad():
        bias.copy_(torch.linspace(-0.04, 0.04, 8))
    before = bias.detach().clone()
    set_bits(net, "block1.conv1.weight", [0, 6])
    for _ in range(6):
        net.step()
    assert bias[[0, 6]].tolist() == [0.0, 0.0]
    others = [1, 2, 3, 4, 5, 7]
    assert torch.equal(bias[others], before[others])
    assert net.prune().removed["block1.conv1.weight"][1] == (6, 8, 3, 3)


def test_a_convolutions_own_bias_must_go_too() -> None:
    net = compressed()
    with torch.no_grad():
        net.get_parameter("block2.conv1.bias").fill_(0.3)
        net.get_parameter("block2.bn1.bias").zero_()
    set_bits(net, "block2.conv1.weight", [4])
    net.step()
    assert not net.prune().modified
    for _ in range(30):
        net.step()
    assert net.get_parameter("block2.conv1.bias")[4].item() == 0.0
    assert net.prune().removed["block2.conv1.weight"][1] == (7, 8, 3, 3)


def test_running_statistics_are_right_at_the_moment_of_death() -> None:
    net = compressed()
    x, _ = batch()
    for _ in range(3):
        net(x)
    set_bits(net, "block1.conv1.weight", [3])
    net.step()
    assert net.get_buffer("block1.bn1.running_mean")[3].item() == 0.0
    assert net.get_buffer("block1.bn1.running_var")[3].item() == 1.0
    net.eval()
    before = net(x)
    assert net.prune().modified
    torch.testing.assert_close(net(x), before, rtol=1e-12, atol=1e-12)


def test_a_layer_that_the_network_needs_keeps_one_channel() -> None:
    net = compressed()
    for layer in ("stem.0.weight", "fc.weight"):
        set_bits(net, layer, list(range(quantizer(net, layer).bits.numel())))
    net.step()
    for layer in ("stem.0.weight", "fc.weight"):
        assert (quantizer(net, layer).bits > 0).sum().item() == 1
    x, _ = batch()
    assert net(x).std(0).max().item() > 0


def test_all_bits_of_a_grouped_transposed_convolution_may_go_at_once() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 4, 2, groups=2, bias=False), nn.Conv2d(4, 2, 1))
    net = fxc.compress(model, torch.zeros(1, 3, 4, 4))
    set_bits(net, "1.weight", [0, 1, 2, 3])
    net.step()
    assert (quantizer(net, "1.weight").bits > 0).sum() == 1


def test_a_dead_branch_disappears_from_the_graph() -> None:
    net = compressed()
    x, _ = batch()
    set_bits(net, "block1.conv2.weight", list(range(8)))
    nn.init.zeros_(net.get_parameter("block1.bn2.bias"))
    optimizer = torch.optim.Adam(net.param_groups())
    F.cross_entropy(net(x), batch()[1]).backward()
    optimizer.step()
    set_bits(net, "block1.conv2.weight", list(range(8)))
    for _ in range(3):
        net.step()
    size, before = net.size("eq5").item(), net.eval()(x)
    report = net.prune(optimizer)
    assert report.branches
    assert not [name for name, _ in net.named_modules() if name.startswith("block1")]
    assert len([node for node in net.graph.nodes if "block1" in node.name]) == 0
    torch.testing.assert_close(net(x), before, rtol=1e-12, atol=1e-12)
    assert net.size("eq5").item() == pytest.approx(size)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in net.parameters()}
    assert set(optimizer.state) <= set(net.parameters())


def test_all_branches_but_one_may_die() -> None:
    """A sum's channel goes when all that feed it are dead, and the last path is kept."""
    net = compressed()
    for layer in ("block1.conv2", "block2.conv2", "stem.0"):
        set_bits(net, f"{layer}.weight", [4])
    for bias in ("block1.bn2", "block2.bn2", "block2.conv2", "stem.1"):
        nn.init.zeros_(net.get_parameter(f"{bias}.bias"))
    net.step()
    report = net.prune()
    assert report.removed["fc.weight"] == ((5, 8), (5, 7))
    assert report.removed["stem.0.weight"] == ((8, 3, 3, 3), (7, 3, 3, 3))


class OnlyBranch(nn.Module):
    """All of its layers are in a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.back = nn.Linear(6, 8), nn.Linear(8, 6, bias=False)
        self.gain = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x * self.gain + self.back(torch.relu(self.wide(x)))
        return result


@pytest.mark.parametrize("at_once", [True, False])
def test_all_layers_may_die(*, at_once: bool) -> None:
    net = fxc.compress(OnlyBranch(), torch.randn(2, 6)).train()
    optimizer = torch.optim.Adam(net.param_groups(1e-2))
    for step in range(80):
        x = torch.randn(4, 6)
        (0.1 * net(x).square().mean() + 3 * net.size()).backward()
        optimizer.step()
        net.step()
        if at_once or step == 79:
            before = net(x)
            net.prune(optimizer)
            assert torch.equal(net(x), before)
        optimizer.zero_grad()
    assert [name for name, _ in net.named_parameters()] == ["gain"]
    assert [net.size(name).item() for name in ("eq4", "eq5", "macs", "activations")] == [0.0] * 4
    assert (net.weights_left(), net.stored_size(), net.removable(), net.channels_left()) == (0.0, 0.0, 0.0, 0)
    x = torch.randn(3, 6)
    assert torch.equal(net.finalize()(x), net(x))


def test_prune_refuses_a_strange_optimizer_and_changes_nothing() -> None:
    net = compressed()
    set_bits(net, "block1.conv1.weight", [3])
    nn.init.zeros_(net.get_parameter("block1.bn1.bias"))
    net.step()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(OptimizerError, match="not the network's"):
        net.prune(torch.optim.SGD(ResidualNet().parameters(), lr=0.1))
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert net.prune().modified


def test_frozen_weights_get_no_quantizer_and_still_count_as_inputs() -> None:
    model = ResidualNet()
    model.stem[0].weight.requires_grad_(False)
    net = fxc.compress(model, torch.zeros(2, 3, 10, 10))
    assert not hasattr(net.get_submodule("stem.0"), "weight_quantizer")
    assert net.size("eq5").item() > net.size("eq4").item()


def test_what_was_frozen_on_the_way_stays_as_it_is() -> None:
    """Biases of channels without bits are shrunk, but not those that the user has frozen since; others go on."""
    net = compressed()
    set_bits(net, "block1.conv1.weight", [3])
    set_bits(net, "block2.conv1.weight", [2])
    for name, parameter in net.named_parameters():
        if name.endswith("1.bias"):
            nn.init.ones_(parameter)
    net.step()
    net.step()
    for parameter in net.get_submodule("block1").parameters():
        parameter.requires_grad_(False)
    before = {name: parameter.clone() for name, parameter in net.named_parameters()}
    assert 0 < before["block1.bn1.bias"][3] < 1  # it has begun to shrink
    for _ in range(3):
        net.step()
    changed = {name for name, parameter in net.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed
    assert all(name.startswith("block2.") for name in changed)
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    before = {name: parameter.clone() for name, parameter in net.named_parameters()}
    net.step()
    assert all(torch.equal(parameter, before[name]) for name, parameter in net.named_parameters())


def test_state_dict_round_trip_keeps_what_is_dead() -> None:
    net, other = compressed(), compressed()
    set_bits(net, "block1.conv1.weight", [3])
    nn.init.zeros_(net.get_parameter("block1.bn1.bias"))
    net.step()
    other.load_state_dict(net.state_dict())
    set_bits(other, "block1.conv1.weight", [3], 5.0)
    other.step()
    assert quantizer(other, "block1.conv1.weight").bits[3].item() == 0.0
    assert other.prune().modified


def test_modules_keep_their_identity() -> None:
    net = compressed()
    conv = net.get_submodule("block1.conv1")
    set_bits(net, "block1.conv1.weight", [3])
    nn.init.zeros_(net.get_parameter("block1.bn1.bias"))
    net.step()
    net.prune()
    assert net.get_submodule("block1.conv1") is conv
    assert isinstance(conv, nn.Conv2d)
    assert conv.out_channels == 7


def test_block_is_what_the_docstring_says() -> None:
    block = Block(2).eval()
    x = torch.randn(1, 2, 4, 4)
    inner: Tensor = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
    torch.testing.assert_close(block(x), x + inner)
