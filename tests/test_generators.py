"""The random numbers of the caller, on the CPU and on GPUs, go on as if nothing of ours had run."""

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.trace.basics.generators import generators_kept

pytestmark = pytest.mark.cpu
X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Gpus:
    """What torch has for a kind of GPUs, two of them, of which nothing but the generators is there."""

    def __init__(self) -> None:
        self.states = [torch.tensor([5]), torch.tensor([7])]
        self.used = True
        self.seeds: list[int] = []

    def is_initialized(self) -> bool:
        return self.used

    def device_count(self) -> int:
        return len(self.states)

    def get_rng_state_all(self) -> list[Tensor]:
        assert self.used, "this would start a GPU that nobody has asked for"
        return [state.clone() for state in self.states]

    def set_rng_state_all(self, states: list[Tensor]) -> None:
        self.states = states

    def set_rng_state(self, state: Tensor, index: int) -> None:
        self.states[index] = state

    def manual_seed_all(self, seed: int) -> None:
        self.seeds.append(seed)
        self.states = [torch.tensor([seed]) for _ in self.states]


@pytest.fixture(name="gpus")
def _gpus(monkeypatch: pytest.MonkeyPatch) -> Gpus:
    gpus = Gpus()
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch, "get_device_module", lambda _: gpus)
    # torch.manual_seed would come by here, and seed GPUs that are used later: nothing may call it.
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda _: pytest.fail("GPUs are seeded for good"))
    return gpus


class Noisy(nn.Module):
    """Draws in training and in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout()
        self.second = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(self.norm(self.first(x)).relu())
        made = self.second(h)
        return made + 0.1 * torch.randn_like(made)  # type: ignore[no-any-return]


def removal(model: nn.Module) -> None:
    net = fxc.compress(model, X)
    optimizer = torch.optim.SGD(net.param_groups(1e-3), lr=1e-3)
    with torch.no_grad():
        net.get_parameter("first.weight_quantizer.bits")[:3] = 0
        net.get_parameter("first.bias")[:3] = 0
        net.get_parameter("norm.bias")[:3] = 0
    net.step()
    assert net.prune(optimizer).modified
    net.finalize()


USES: dict[str, Callable[[nn.Module], object]] = {
    "prune": lambda model: fxc.prune(model, X, fold=True, narrow="measure"),
    "own code": lambda model: fxc.prune(model, X, keep_code=True),
    "graph": lambda model: fxc.ChannelGraph.of(model, X),
    "removal": removal,
    "latency": lambda model: fxc.LatencyTable.measure(fxc.compress(model, X), repeats=1),
}


@pytest.mark.parametrize("gpus_are", ["used", "not used"])
@pytest.mark.parametrize("use", USES)
def test_all_generators_stand_where_they_stood(use: str, gpus_are: str, gpus: Gpus) -> None:
    gpus.used = gpus_are == "used"
    model = Noisy()
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # type: ignore[index] # noqa: NPY002
    USES[use](model)
    assert torch.equal(before[0], torch.get_rng_state())
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])  # type: ignore[index] # noqa: NPY002
    assert [int(state) for state in gpus.states] == [5, 7]
    assert gpus.used or not gpus.seeds


def test_within_they_start_from_the_seed(gpus: Gpus) -> None:
    with generators_kept(seed=3):
        drawn = torch.rand(2)
        assert [int(state) for state in gpus.states] == [3, 3]
    with generators_kept(seed=3):
        assert torch.equal(drawn, torch.rand(2))
    assert [int(state) for state in gpus.states] == [5, 7]


def test_an_error_within_leaves_them_as_well(gpus: Gpus) -> None:
    def fail() -> None:
        with generators_kept(seed=3):
            raise KeyError

    before = torch.get_rng_state()
    with pytest.raises(KeyError):
        fail()
    assert torch.equal(before, torch.get_rng_state())
    assert [int(state) for state in gpus.states] == [5, 7]
