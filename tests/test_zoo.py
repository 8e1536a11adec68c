"""Twelve networks of torchvision: 30 % of their groups made dead, and pruned without any rule for a network."""

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.channels.analysis import Analysis
from fxcompress.passes.rewrite import carry_out
from tests.exactness import Fingerprint, atoms_of, difference, forced, kill, removable_units, tensors
from tests.networks import randomise

NAMES = (
    "resnet18", "resnet50", "vgg11_bn", "mobilenet_v2", "mobilenet_v3_small", "densenet121", "googlenet",
    "squeezenet1_1", "mnasnet1_0", "efficientnet_b0", "regnet_y_400mf", "shufflenet_v2_x1_0",
)  # fmt: skip


def build(name: str) -> nn.Module:
    """A network with random weights and statistics, in float64, in evaluation mode."""
    torch.manual_seed(0)
    options = {"init_weights": False, "aux_logits": True} if name == "googlenet" else {}
    net: nn.Module = torchvision.models.get_model(name, weights=None, **options)
    if name == "vgg11_bn":  # its 120 million parameters between 25,088 and 4,096 features show nothing new
        slim = [nn.Linear(25088, 64), nn.ReLU(True), nn.Dropout(), nn.Linear(64, 64), nn.ReLU(True), nn.Dropout()]
        net.classifier = nn.Sequential(*slim, nn.Linear(64, 9))
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # removing channels moves the random numbers that hit the others
    return randomise(net.double()).eval()


@dataclass
class Subject:
    """One network, restored before each test.

    Attributes:
        net: the network.
        state: its weights, all alive.
        analysis: of it.
        share: of its parameters that may go.
    """

    net: nn.Module
    state: dict[str, Tensor]
    analysis: Analysis
    share: float


@pytest.fixture(scope="module", params=NAMES)
def subject(request: pytest.FixtureRequest) -> Subject:
    net = build(request.param)
    graph = fxc.ChannelGraph.of(net, image(0, 64))
    return Subject(net, copy.deepcopy(net.state_dict()), graph.analysis, graph.share)


def image(seed: int, size: int, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, size, size, generator=generator, dtype=torch.float64)


def test_almost_all_parameters_may_go(subject: Subject) -> None:
    assert subject.share >= 0.99


@pytest.mark.sampled(2)
@pytest.mark.parametrize("seed", range(3))
def test_dead_groups_go_and_the_output_stays(subject: Subject, seed: int) -> None:
    net, analysis = subject.net, subject.analysis
    net.load_state_dict(subject.state)
    units = removable_units(analysis)
    chosen = np.random.default_rng(seed).choice(units, int(0.3 * len(units)), replace=False)
    dead = atoms_of(analysis, chosen)
    kill(analysis, dead)
    visit = Fingerprint(net)
    result = fxc.prune(net, image(seed, 64))
    visit.check()
    pruned = result.module.eval()
    assert list(pruned.state_dict()) == list(net.state_dict())
    for name, parameter in pruned.named_parameters():
        left = [int((~dead[atoms.numpy()]).sum()) for atoms in analysis.atoms[name].values()]
        assert [n for n in parameter.shape if n > 1] == [n for n in left if n > 1], name
    x = image(seed + 10, 64) if seed else image(seed + 10, 96, batch=1)
    with torch.no_grad():
        assert difference(net(x), pruned(x)) <= 1e-9
    if seed == 1:
        check_trains(net, pruned)


def check_trains(net: nn.Module, pruned: nn.Module) -> None:
    """The same loss in training mode, and a step that changes the weights."""
    x = image(5, 64)
    torch.manual_seed(0)  # for stochastic depth, which drops whole images
    with torch.no_grad():
        expected = list(tensors(copy.deepcopy(net).train()(x)))
    torch.manual_seed(0)
    found = list(tensors(pruned.train()(x)))
    assert difference(expected, found) <= 1e-9
    optimizer = torch.optim.SGD(pruned.parameters(), lr=1e-3)
    before = {name: p.detach().clone() for name, p in pruned.named_parameters()}
    torch.stack([y.square().mean() for y in found]).sum().backward()
    optimizer.step()
    assert sum(not torch.equal(p, before[name]) for name, p in pruned.named_parameters()) > 0.5 * len(before)


def test_live_groups_are_missed(subject: Subject) -> None:
    """The negative control: the same rewrite on groups that are alive goes through, and changes the output."""
    net, analysis = subject.net, subject.analysis
    net.load_state_dict(subject.state)
    units = removable_units(analysis)
    chosen = np.random.default_rng(0).choice(units, int(0.3 * len(units)), replace=False)
    rewritten = carry_out(analysis, forced(analysis, chosen)).module.eval()
    x = image(0, 64)
    with torch.no_grad():
        assert difference(net(x), rewritten(x)) > 1e-2
