"""What the adapters add to somebody else's loop is what the documented loop does by hand."""

import copy
import importlib
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.adapters.core import Pressure, Removals, compressed, metrics, optimizer_of, step_after
from fxcompress.errors import MissingPackageError, OptimizerError, UnsupportedModelError
from fxcompress.training.controller import ConstantGamma, TargetSize
from tests.nets import set_bits

GAMMA = 0.3


def network() -> fxc.CompressedModule:
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    return fxc.compress(model, torch.zeros(2, 5, dtype=torch.float64))


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(16, 5, dtype=torch.float64), torch.randint(0, 3, (16,))


def task(net: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(net(data[0]), data[1])


def adam(net: fxc.CompressedModule) -> torch.optim.Optimizer:
    return torch.optim.Adam(net.param_groups(lr=1e-2))


@pytest.mark.parametrize("scale", [1.0, 64.0])
def test_gradient_is_that_of_the_whole_loss(scale: float) -> None:
    net, data = network(), batch()
    twin = copy.deepcopy(net)
    (scale * task(net, data)).backward()
    Pressure(ConstantGamma(GAMMA)).press(net, 0.0, scale)
    (scale * (task(twin, data) + GAMMA * twin.size())).backward()
    for (name, ours), theirs in zip(net.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)


def test_without_gamma_nothing_is_added() -> None:
    net = network()
    Pressure(ConstantGamma(0.0)).press(net, 0.0)
    assert all(p.grad is None for p in net.parameters())


def test_training_goes_as_by_hand_while_channels_go() -> None:
    nets = [network()]
    nets.append(copy.deepcopy(nets[0]))
    optimizers = [adam(net) for net in nets]
    pressure, hook = Pressure(ConstantGamma(GAMMA)), step_after(optimizers[0], nets[0])
    for step in range(60):
        data = batch()
        task(nets[0], data).backward()
        pressure.press(nets[0], 0.0)
        (task(nets[1], data) + GAMMA * nets[1].size()).backward()
        for net, optimizer in zip(nets, optimizers, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            if net is nets[1]:
                net.step()
            if step % 10 == 9:
                net.prune(optimizer)
    assert nets[0].channels_left() < 17
    for (name, ours), theirs in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)
    hook.remove()


def test_no_step_where_the_scaler_skips_one(monkeypatch: pytest.MonkeyPatch) -> None:
    net = fxc.compress(nn.Linear(3, 2))
    optimizer, scaler, calls = adam(net), torch.amp.GradScaler("cpu"), []
    monkeypatch.setattr(type(net), "step", lambda _: calls.append(1))
    step_after(optimizer, net)
    for factor, expected in ((torch.inf, 0), (1.0, 1)):
        optimizer.zero_grad()
        scaler.scale(factor * net(torch.ones(1, 3)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert len(calls) == expected


def test_metrics_of_a_fresh_network() -> None:
    assert metrics(network(), 0.5) == {
        "size/fractional": 0.25, "size/weights": 1.0, "size/channels": 17.0, "size/gamma": 0.5
    }  # fmt: skip


def test_what_gamma_has_adapted_survives() -> None:
    first, second = Pressure(TargetSize(0.1)), Pressure(TargetSize(0.1))
    for step in range(5):
        first.gamma(step / 10, 0.25)
    second.load_state_dict(first.state_dict())
    assert second.gamma(0.5, 0.2) == first.gamma(0.5, 0.2) != TargetSize(0.1)(0.5, 0.2)


def wrong_optimizers(net: fxc.CompressedModule) -> dict[str, list[torch.optim.Optimizer]]:
    groups = net.param_groups()
    bits = next(group for group in groups if group["name"] == "bits")["params"]
    return {
        "no optimizer holds": [torch.optim.Adam(nn.Linear(1, 1).parameters())],
        "2 optimizers share": [torch.optim.Adam(groups[:1]), torch.optim.Adam(groups[1:])],
        "1 parameter that is not the network's": [
            torch.optim.Adam([*groups[1:], {"params": [nn.Parameter(torch.zeros(1))]}])
        ],
        "lacks the bits of 3 of 3 weights": [torch.optim.Adam(groups[:2])],
        r"param_groups\[0\] of the optimizer holds bits together with weights": [torch.optim.Adam(net.parameters())],
        "lacks the bits of 2 of 3 weights": [torch.optim.Adam([*groups[:2], {"params": bits[:1]}])],
    }


def test_wrong_optimizers_are_refused() -> None:
    net = network()
    for message, optimizers in wrong_optimizers(net).items():
        with pytest.raises(OptimizerError, match=message):
            optimizer_of(net, optimizers)


def test_the_right_optimizer_is_found_among_others() -> None:
    net = network()
    right, other = adam(net), torch.optim.Adam(nn.Linear(1, 1).parameters())
    assert optimizer_of(net, [other, right]) is right


def test_the_optimizer_may_train_a_head_or_a_loss_as_well() -> None:
    net, head = network(), nn.Linear(3, 3)
    joint = torch.optim.Adam([*net.param_groups(), {"params": head.parameters()}])
    assert optimizer_of(net, [joint]) is joint


def test_plain_network_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"Model\.net is a Linear, not a network from fxcompress\.compress"):
        compressed(nn.Linear(1, 1), "Model.net")


@pytest.mark.parametrize("policy", [None, fxc.PrunePolicy(cost=1.0), fxc.PrunePolicy(every=3)])
def test_removals_are_made_when_the_policy_says_so(policy: fxc.PrunePolicy | None) -> None:
    """As by hand: the policy counts steps, and what a checkpoint holds of it goes on."""
    net = network()
    optimizer = adam(net)
    set_bits(net, "0.weight", [1, 2])
    with torch.no_grad():
        net.get_parameter("0.bias")[[1, 2]] = 0.0
    net.step()
    by_hand = copy.deepcopy(policy)
    expected = next((n for n in range(20) if by_hand and by_hand.due(net.removable())), None)
    removals = Removals(policy)
    found = None
    for number in range(20):
        again = Removals(fxc.PrunePolicy())
        again.load_state_dict(removals.state_dict())
        removals = again
        removals.count(net)
        removals.make(net, optimizer)
        if removals.reports:
            found = number
            break
    assert found == expected
    assert (len(net.get_parameter("0.weight")) == 8) == (policy is None)
    removals.make(net, optimizer, last=True)
    assert removals.policy == policy or (policy is not None and removals.policy is not None)


@pytest.mark.parametrize(("module", "package"), [("lightning", "lightning.pytorch"), ("huggingface", "transformers")])
def test_missing_package_is_named(module: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"fxcompress.adapters.{module}", raising=False)
    with pytest.raises(MissingPackageError, match=rf"fxcompress\[{module}\]"):
        importlib.import_module(f"fxcompress.adapters.{module}")


@pytest.mark.parametrize("name", ["lightning.SelfCompression", "huggingface.SelfCompressionCallback"])
def test_a_fine_tuning_arrives_early(name: str) -> None:
    module, _, kind = name.partition(".")
    callback = getattr(importlib.import_module(f"fxcompress.adapters.{module}"), kind)
    wanted = [callback(0.1, fine_tune=fine_tune).pressure.gamma for fine_tune in (True, False)]
    for control in wanted:
        control(0.0, 0.25)
    assert [control.wanted(0.25) for control in wanted] == [pytest.approx(0.1), pytest.approx(0.16, abs=0.01)]
