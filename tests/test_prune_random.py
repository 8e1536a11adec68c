"""Removal while training does not change what a network computes, in evaluation or in training: random networks."""

import copy
import os
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from torch import Tensor, nn

import fxcompress as fxc
from tests.exactness import difference, outputs
from tests.nets import lose, set_bits
from tests.networks import Example, compressed, examples

FUZZ = os.environ.get("FXCOMPRESS_FUZZ") == "1"
CASES = settings(
    max_examples=20_000 if FUZZ else 15 if os.environ.get("FXCOMPRESS_AGAIN") == "1" else 45,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def with_dead_channels(example: Example) -> fxc.CompressedModule:
    """Half of the channels have lost their bits, and most biases are zero."""
    net = compressed(example)
    lose(net, example.seed, 0.5)
    return net


@CASES
@given(examples())
def test_removal_while_training_changes_nothing(example: Example) -> None:
    net = with_dead_channels(example)
    pruned = copy.deepcopy(net)
    event("smaller" if pruned.prune().modified else "nothing removed")
    for training in (False, True) if not example.noisy else (False,):
        for inputs in (example.inputs, example.other_inputs(3, 0)):
            before, after = (_outputs(each, inputs, training=training) for each in (net, pruned))
            assert difference(before, after) <= 1e-9


def _outputs(net: nn.Module, inputs: tuple[Tensor, ...], *, training: bool) -> object:
    for module in net.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    return outputs(net, inputs, training=training)


def sizes(net: fxc.CompressedModule) -> list[float]:
    """What counts nothing that could be removed at once, and so is the same after a removal."""
    found = [net.size(objective).item() for objective in ("eq4", "eq5", "macs", "activations")]
    return [*found, net.stored_size(), net.weights_left(), float(net.channels_left())]


class FunctionalNorm(nn.Module):
    """Batch norm with running statistics and a scale, without a shift."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mean: Tensor
        self.var: Tensor
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))
        self.scale = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(x, self.mean, self.var, self.scale, None, self.training)


class MovedNorm(FunctionalNorm):
    """Its statistics are computed before they are used."""

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.mean * 1.0, self.var + 0.1
        return nn.functional.batch_norm(x, mean, var, self.scale, None, self.training)


def frozen(channels: int) -> nn.Module:
    """Batch norm with parameters that are not trained."""
    return nn.BatchNorm2d(channels).requires_grad_(False)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "affine": nn.BatchNorm2d,
    "no-affine": lambda n: nn.BatchNorm2d(n, affine=False),
    "cumulative": lambda n: nn.BatchNorm2d(n, affine=False, momentum=None),
    "no-statistics": lambda n: nn.BatchNorm2d(n, affine=False, track_running_stats=False),
    "scale": FunctionalNorm,
    "moved": MovedNorm,
    "frozen": frozen,
    "instance": lambda n: nn.InstanceNorm2d(n, track_running_stats=True),
    "instance-affine": lambda n: nn.InstanceNorm2d(n, affine=True, track_running_stats=True),
}
GO = {"affine", "no-affine", "cumulative", "no-statistics", "scale"}
"""Norms whose statistics can be set when what they read has died. Before the others, channels stay."""


class Twice(nn.Module):
    """One norm behind two layers."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(3, 6, 3, padding=1, bias=False) for _ in range(2))
        self.norm, self.last = norm, nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)) + self.norm(self.second(x)))
        return self.last(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("name", NORMS)
def test_norms_of_dead_channels(name: str, *, twice: bool) -> None:
    """Evaluation subtracts a running mean that is left from when the channel was alive."""
    torch.manual_seed(0)
    norm = NORMS[name](6)
    model = Twice(norm) if twice else nn.Sequential(nn.Conv2d(3, 6, 3), norm, nn.ReLU(), nn.Conv2d(6, 2, 1))
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    net = fxc.compress(model.double(), x).train()
    optimizer = torch.optim.SGD(net.param_groups(1e-2))
    layer = "first" if twice else "0"
    for dead in ([], [1, 4], [1, 4] if not twice else list(range(6))):
        set_bits(net, f"{layer}.weight", dead)
        for bias in (n for n, p in net.named_parameters() if n.endswith("bias") and p.shape == (6,)):
            net.get_parameter(bias).data[dead] = 0.0
        net.step()
        for _ in range(2):
            optimizer.zero_grad()
            (net(x) - 1).square().mean().backward()
            optimizer.step()
            net.step()
    pruned = copy.deepcopy(net)
    assert pruned.prune().modified or twice or name not in GO
    for training in (False, True):
        assert difference(outputs(net, (x,), training=training), outputs(pruned, (x,), training=training)) <= 1e-9


class Gated(nn.Module):
    """Where a gate has died, nothing reads what it lets through, which still has bits."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.last = nn.Linear(4, 12), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.both(x).chunk(2, -1)
        return self.last(value * gate)  # type: ignore[no-any-return]


@pytest.mark.parametrize("dead", [[6], [7, 9, 11], [0, 7, 8, 9, 10]])
def test_what_nobody_reads_counts_for_nothing(dead: list[int]) -> None:
    net = fxc.compress(Gated().double(), torch.randn(2, 4, dtype=torch.float64))
    set_bits(net, "both.weight", dead)
    nn.init.zeros_(net.get_parameter("both.bias"))
    net.step()
    before = sizes(net)
    assert net.prune().modified
    assert sizes(net) == pytest.approx(before, rel=1e-9)


class Attends(nn.Module):
    """Two heads of four dims; scores by a product or by the fused function."""

    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.last = (nn.Linear(8, 8, bias=False) for _ in range(4))
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        attend = nn.functional.scaled_dot_product_attention
        y = attend(q, k, v) if self.fused else (q @ k.mT / 2).softmax(-1) @ v
        return self.last(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("left", [1, 2])
@pytest.mark.parametrize("fused", [False, True])
def test_a_removal_does_not_change_the_size_of_an_attention(*, fused: bool, left: int, tokens: int) -> None:
    """Its values feed what comes behind it; queries and keys do not, be it one dim of them that is left or many."""
    net = fxc.compress(Attends(fused=fused).double(), torch.randn(2, tokens, 8, dtype=torch.float64))
    set_bits(net, "q.weight", [*range(left, 4), *range(4 + left, 8)], 0.0)
    set_bits(net, "k.weight", list(range(8)), 3.0)
    set_bits(net, "v.weight", [1, 3, 5, 6], 0.0)
    net.step()
    before = sizes(net)
    assert net.prune().modified
    assert net.get_parameter("q.weight").shape[0] == 2 * left
    assert sizes(net) == pytest.approx(before, rel=1e-9)


def test_training_goes_on_when_all_that_is_trained_has_gone() -> None:
    """A frozen network with an adapter, which has died as a whole: the loss can still be differentiated."""

    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 5).requires_grad_(False), nn.Linear(5, 3).requires_grad_(False)
            self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 5, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.body(x) + self.up(self.down(x))))  # type: ignore[no-any-return]

    x = torch.randn(3, 4)
    net = fxc.compress(Adapted(), x)
    optimizer = torch.optim.Adam(net.param_groups(1e-3))
    set_bits(net, "up.weight", [0, 1, 2, 3, 4])
    for _ in range(2):
        net.step()
        net.prune(optimizer)
        (net(x).square().mean() + net.size()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert net.size() == 0
    assert {name.partition(".")[0] for name, _ in net.named_parameters()} == {"body", "head"}
