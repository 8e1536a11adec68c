"""Parameters that no optimizer trains: those that ``net.prune(optimizer)`` cuts, or all of a network."""

import pytest
import torch
from torch import Tensor, nn

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


def fresh() -> tuple[nn.Module, CompressedModule]:
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    return model, fxc.compress(model, torch.randn(4, 6))


def test_an_optimizer_of_the_model_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    model, net = fresh()
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(10):
        trained(net, optimizer)
    assert not caplog.text  # a gradient scaler may skip so many
    trained(net, optimizer)
    assert "nothing has changed a parameter of Sequential" in caplog.text
    assert "build the optimizer from net.param_groups()" in caplog.text
    caplog.clear()
    for _ in range(20):
        trained(net, optimizer)
    assert not caplog.text


def test_it_is_noticed_in_pieces(caplog: pytest.LogCaptureFixture) -> None:
    class Chooses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.body(x)
            return self.head(y) if y.sum().item() > 1e9 else y  # type: ignore[no-any-return]

    model = Chooses()
    net = fxc.compress(model, torch.randn(4, 6))
    caplog.clear()
    for _ in range(12):
        trained(net, torch.optim.SGD(model.parameters(), lr=0.1))
    assert caplog.text.count("nothing has changed a parameter of Chooses") == 1
    assert not any(name.startswith("_fxc_") for name in net.finalize().__dict__)


@pytest.mark.parametrize("kind", [torch.optim.Adam, ByData])
@pytest.mark.parametrize("part", [slice(None), slice(1), slice(2, 3)])
def test_an_optimizer_of_a_part_of_the_network_is_none_to_warn_of(
    kind: type[torch.optim.Optimizer], part: slice, caplog: pytest.LogCaptureFixture
) -> None:
    _, net = fresh()
    if kind is ByData and part == slice(2, 3):
        pytest.skip("nobody sees that bits change behind the back of autograd")
    optimizer = kind(net.param_groups(1e-3)[part])  # type: ignore[call-arg]
    for _ in range(20):
        trained(net, optimizer)
    assert not caplog.text


def test_steps_that_are_skipped_decide_nothing(caplog: pytest.LogCaptureFixture) -> None:
    _, net = fresh()
    for _ in range(20):
        for parameter in net.parameters():
            parameter.grad = torch.full_like(parameter, torch.inf)
        net.step()
    assert not caplog.text
    trained(net, torch.optim.SGD(net.param_groups(1e-3)))
    for _ in range(20):
        net.zero_grad()
        trained(net)
    assert not caplog.text  # it has been trained, which is all that is asked
