"""Optimizers that hold another one, and those that keep tensors where nobody knows what they belong to."""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

import fxcompress as fxc
from fxcompress.errors import OptimizerError
from fxcompress.training.held import stepping, with_held
from tests.nets import ResidualNet, batch, kill, set_bits
from tests.test_loops import parameters_near

Step = Callable[[Optimizer, Callable[[], Tensor]], object]


class Sharpness(Optimizer):
    """SAM as it is written everywhere: two steps, the second one by an optimizer that shares its groups."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 1e-3, "rho": 0.05})
        self.base_optimizer = torch.optim.Adam(self.param_groups)
        self.param_groups = self.base_optimizer.param_groups

    def _held(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"] if p.grad is not None]

    @torch.no_grad()
    def first_step(self) -> None:
        """Of weights alone: what is dead would be alive for a pass, with bits that are disturbed."""
        for parameter in self._held():
            self.state[parameter]["old"] = parameter.clone()
            if parameter.grad is not None and parameter.ndim > 1:
                parameter.add_(parameter.grad, alpha=0.05)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for parameter in self._held():
            parameter.copy_(self.state[parameter]["old"])
        self.base_optimizer.step()
        self.zero_grad()


class Lookahead(Optimizer):
    """As it is written everywhere: without the ``__init__`` of Optimizer, by way of the state of the other one."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        self.inner = torch.optim.Adam(groups)
        self.param_groups, self.defaults = self.inner.param_groups, self.inner.defaults
        self.state: defaultdict[Any, Any] = defaultdict(dict)
        self.steps = 0

    @torch.no_grad()
    def step(self, _: object = None) -> None:  # type: ignore[override]
        self.inner.step()
        self.steps += 1
        for parameter in [p for group in self.param_groups for p in group["params"]] if self.steps % 3 == 0 else ():
            slow = self.inner.state[parameter].setdefault("slow", parameter.clone())
            slow.lerp_(parameter, 0.5)
            parameter.copy_(slow)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, **self.inner.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps = state_dict["steps"]
        self.inner.load_state_dict(state_dict)
        self.param_groups = self.inner.param_groups


def twice(optimizer: Optimizer, loss: Callable[[], Tensor]) -> None:
    assert isinstance(optimizer, Sharpness)
    torch.autograd.backward(loss())
    optimizer.first_step()
    torch.autograd.backward(loss())
    optimizer.second_step()


def once(optimizer: Optimizer, loss: Callable[[], Tensor]) -> None:
    torch.autograd.backward(loss())
    optimizer.step()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


WRAPPERS: dict[str, tuple[Callable[[Any], Optimizer], Step]] = {
    "SAM": (Sharpness, twice),
    "Lookahead": (Lookahead, once),
}


def compressed() -> fxc.CompressedModule:
    torch.manual_seed(0)
    return fxc.compress(ResidualNet().double(), torch.zeros(2, 3, 10, 10, dtype=torch.float64))


def train(net: fxc.CompressedModule, optimizer: Optimizer, step: Step, steps: range, removal: int) -> None:
    for number in steps:
        x, target = batch(seed=number, size=8)
        step(optimizer, lambda: F.cross_entropy(net(x), target))  # noqa: B023
        net.step()
        if number == 1:
            kill(net)
        if number == removal:
            assert net.prune(optimizer).branches


@pytest.mark.parametrize("name", WRAPPERS)
def test_what_a_wrapper_holds_goes_on_as_if_nothing_had_happened(name: str) -> None:
    make, step = WRAPPERS[name]
    nets = [compressed(), compressed()]
    for net, removal in zip(nets, (4, 8), strict=True):
        train(net, make(net.param_groups(2e-3, bits_lr=1e-4)), step, range(9), removal)
    parameters_near(nets[0], nets[1], 1e-9)


@pytest.mark.parametrize("name", WRAPPERS)
def test_what_a_wrapper_holds_is_in_checkpoints(name: str, tmp_path: Path) -> None:
    make, step = WRAPPERS[name]
    nets = [compressed(), compressed()]
    optimizers = [make(net.param_groups(2e-3, bits_lr=1e-4)) for net in nets]
    train(nets[0], optimizers[0], step, range(6), 4)
    fxc.save_checkpoint(tmp_path / "run.pt", nets[0], optimizers[0])
    fxc.load_checkpoint(tmp_path / "run.pt", nets[1], optimizers[1])
    for net, optimizer in zip(nets, optimizers, strict=True):
        for held in with_held(optimizer):
            assert held.param_groups is optimizer.param_groups
        optimizer.param_groups[0]["lr"] = 5e-4
        train(net, optimizer, step, range(6, 9), 0)
    for one, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(one, other)


def small() -> fxc.CompressedModule:
    torch.manual_seed(0)
    return fxc.compress(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)).double())


@pytest.mark.parametrize("name", WRAPPERS)
def test_steps_of_a_wrapper_are_seen(name: str) -> None:
    make, step = WRAPPERS[name]
    net = small()
    optimizer = make(net.param_groups())
    selection = fxc.select_channels(net, optimizer, steps=20, target_macs=0.5)
    steps: list[int] = []
    stepping(optimizer).register_step_post_hook(lambda *_: steps.append(1))
    x = torch.randn(16, 6, dtype=torch.float64)
    for _ in range(20):
        step(optimizer, lambda: net(x).square().mean())
        net.step()
    assert len(steps) == 20
    assert selection.left() == pytest.approx(0.5, abs=0.07)


class Slow(Lookahead):
    """Keeps what belongs to parameters in a list of its own, in their order."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups)
        self.slow = [[p.detach().clone() for p in group["params"]] for group in self.param_groups]


class Listed(Lookahead):
    """Keeps a list of the parameters."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups)
        self.cached = {"all": [p for group in self.param_groups for p in group["params"]]}


def refuses(net: fxc.CompressedModule, optimizer: Optimizer, message: str) -> None:
    set_bits(net, "0.weight", [1, 4])
    with torch.no_grad():
        net.get_parameter("0.bias")[[1, 4]] = 0.0
    net.step()
    before = {name: tuple(p.shape) for name, p in net.named_parameters()}
    with pytest.raises(OptimizerError, match=message):
        net.prune(optimizer)
    assert {name: tuple(p.shape) for name, p in net.named_parameters()} == before
    assert {id(p) for p in net.parameters()} == {id(p) for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize(("kind", "where"), [(Slow, "slow"), (Listed, "cached")])
def test_tensors_in_attributes_are_refused(kind: type[Lookahead], where: str) -> None:
    net = small()
    refuses(net, kind(net.param_groups()), rf"keeps a tensor of shape .* in its attribute {where}, where nobody knows")


def test_what_looks_like_a_weight_and_is_none_is_refused() -> None:
    """Preconditioners, which for square weights have their shape: cut along both dims they would be nonsense."""
    torch.manual_seed(0)
    net = fxc.compress(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)))
    optimizer = torch.optim.SGD(net.param_groups(), lr=0.1)
    for name, sizes in {"0.weight": (8, 8), "2.weight": (8, 8), "4.weight": (3, 8)}.items():
        optimizer.state[net.get_parameter(name)]["preconditioners"] = [torch.eye(size) for size in sizes]
    refuses(
        net, optimizer,
        r"state of SGD: state\['preconditioners'\] has shape \(8, 8\) for a parameter of shape \(8, 8\), but \(3, 3\) "
        r"for one of shape \(3, 8\), from which it does not follow; prune before the first step",
    )  # fmt: skip
