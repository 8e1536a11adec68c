"""Parameters that ``net.prune(optimizer)`` cuts, and that another optimizer may hold."""

import pytest
import torch
from torch import nn

import fxcompress as fxc
from fxcompress.training.compressed import CompressedModule


def shrinking() -> CompressedModule:
    """Two layers, of which the first has three dead channels."""
    torch.manual_seed(0)
    net = fxc.compress(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)), torch.randn(4, 6))
    kill(net)
    return net


def kill(net: CompressedModule) -> None:
    """Let three channels die."""
    with torch.no_grad():
        net.get_parameter("0.weight_quantizer.bits")[:3] = 0
        net.get_parameter("0.bias")[:3] = 0
    net.step()


def split(net: CompressedModule) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """One optimizer for the weights, one for all else."""
    weights, *others = net.param_groups(1e-3)
    return torch.optim.SGD([weights]), torch.optim.Adam(others)


def test_parameters_that_another_optimizer_holds_are_named(caplog: pytest.LogCaptureFixture) -> None:
    net = shrinking()
    weights, others = split(net)
    assert net.prune(weights).channels == 3
    assert "in no optimizer it was given: 0.bias, 0.weight_quantizer.bits, 0.weight_quantizer.exponent" in caplog.text
    assert "net.prune([first, second])" in caplog.text
    assert all(len(group["params"]) for group in others.param_groups)  # of the old ones, nobody could know
    caplog.clear()
    kill(net)
    assert net.prune(weights).channels == 3
    assert not caplog.text  # what has been said is not said again


@pytest.mark.parametrize("how", ["both", "none", "frozen", "nothing dead"])
def test_no_warning_where_nothing_is_left_behind(how: str, caplog: pytest.LogCaptureFixture) -> None:
    net = shrinking()
    weights, others = split(net)
    if how == "nothing dead":
        net.prune([weights, others])
    if how == "frozen":
        for group in others.param_groups:
            for parameter in group["params"]:
                parameter.requires_grad_(False)
    report = net.prune({"both": [weights, others], "none": None}.get(how, weights))
    assert report.modified == (how != "nothing dead")
    assert not caplog.text


def trained(net: CompressedModule, *optimizers: torch.optim.Optimizer) -> None:
    """One step of a loop."""
    net(torch.randn(4, 6)).square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    net.step()


def test_an_optimizer_that_prune_was_not_told_of_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    net = shrinking()
    optimizer = torch.optim.Adam(net.param_groups(1e-3))
    trained(net, optimizer)
    assert net.prune().channels == 3
    net.step()
    assert not caplog.text  # no gradient has come yet
    trained(net, optimizer)
    assert "net.prune() has cut 2.weight, and nothing trains it since then" in caplog.text
    assert "pass it, net.prune(optimizer)" in caplog.text
    caplog.clear()
    trained(net, optimizer)
    assert not caplog.text


class ByData(torch.optim.Optimizer):
    """Writes to parameters behind the back of autograd, as some optimizers do."""

    def __init__(self, groups: list[dict[str, object]]) -> None:
        super().__init__(groups, {"lr": 1e-2})

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data -= 0.01 * parameter.grad


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD, ByData])
def test_an_optimizer_that_is_built_after_it_is_none_to_warn_of(
    kind: type[torch.optim.Optimizer], caplog: pytest.LogCaptureFixture
) -> None:
    net = shrinking()
    trained(net, kind(net.param_groups(1e-3)))  # type: ignore[call-arg]
    assert net.prune().channels == 3
    optimizer = kind(net.param_groups(1e-3))  # type: ignore[call-arg]
    for _ in range(2):
        trained(net, optimizer)
    assert not caplog.text


def test_a_step_that_was_skipped_for_its_gradients_decides_nothing(caplog: pytest.LogCaptureFixture) -> None:
    net = shrinking()
    net.prune()
    net.get_parameter("2.weight").grad = torch.full_like(net.get_parameter("2.weight"), torch.inf)
    net.step()
    assert not caplog.text
    net.get_parameter("2.weight").grad = None
    trained(net)
    assert "nothing trains it" in caplog.text
