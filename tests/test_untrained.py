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
