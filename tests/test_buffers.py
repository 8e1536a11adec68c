"""Networks that remember: what they write to their buffers is another number in the next call."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress as fxc
from tests.exactness import TOLERANCE, Fingerprint, difference, outputs

WIDTH, DEAD = 8, [1, 4]
Step = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """Two layers; what happens between them may read and write the buffers."""

    mean: Tensor
    twin: Tensor
    calls: Tensor
    seen: Tensor
    ring: Tensor

    def __init__(self, between: Step) -> None:
        super().__init__()
        self.first, self.last, self.between = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 3), between
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("twin", torch.zeros(WIDTH))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("seen", torch.zeros(WIDTH, dtype=torch.bool))
        self.register_buffer("ring", torch.zeros(3, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self, self.first(x)))  # type: ignore[no-any-return]


def averaged(net: Net, h: Tensor) -> Tensor:
    net.mean.mul_(0.9).add_(0.1 * h.detach().mean(0))
    return h * net.mean


def read_first(net: Net, h: Tensor) -> Tensor:
    y = h * net.mean
    net.mean.copy_(h.detach().mean(0))
    return y


def copied_on(net: Net, h: Tensor) -> Tensor:
    """What is written to one buffer reaches the next one a call later."""
    y = h * net.twin
    net.twin.copy_(net.mean)
    net.mean.add_(h.detach().amax(0))
    return y


def through_a_view(net: Net, h: Tensor) -> Tensor:
    y = h * net.mean
    net.mean.view(2, -1)[0].add_(h.detach()[0, : WIDTH // 2])
    return y


def through_an_alias(net: Net, h: Tensor) -> Tensor:
    y = h * net.mean
    net.mean.detach().add_(h.detach().mean(0))
    return y


def through_data(net: Net, h: Tensor) -> Tensor:
    y = h * net.mean
    net.mean.data.add_(h.detach().mean(0))
    return y


def counted(net: Net, h: Tensor) -> Tensor:
    y = h * net.calls
    net.calls.add_(1)
    return y


def by_operators(net: Net, h: Tensor) -> Tensor:
    """Each writes to the tensor, and puts it where it is already."""
    y = h * net.mean
    net.mean += h.detach().mean(0)
    net.twin *= 0.5
    net.calls += 1
    return y


def flagged(net: Net, h: Tensor) -> Tensor:
    y = h * net.seen
    net.seen.logical_or_(h.detach().mean(0) != 0)
    return y


def queued(net: Net, h: Tensor) -> Tensor:
    y = h * net.ring[2]
    net.ring.copy_(torch.cat([h.detach()[:1], net.ring[:2]]))
    return y


def in_training(net: Net, h: Tensor) -> Tensor:
    if net.training:
        net.mean.lerp_(h.detach().mean(0), 0.1)
    return h * net.mean


FOLLOWED = [averaged, read_first, copied_on, through_an_alias, through_data, counted, by_operators, in_training]
REMEMBERING = [*FOLLOWED, through_a_view, flagged, queued]


def run(net: nn.Module, modes: tuple[bool, ...] = (False, False, True, True, False, False)) -> list[Any]:
    """The outputs of a copy, call by call, in training where ``modes`` say so, and its buffers at the end."""
    net, generator = copy.deepcopy(net), torch.Generator().manual_seed(1)
    inputs = [torch.randn(5, 4, dtype=torch.float64, generator=generator) for _ in modes]
    with torch.no_grad():
        return [net.train(mode)(x) for mode, x in zip(modes, inputs, strict=True)]


def built(between: Step) -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    return Net(between).double().eval(), torch.randn(5, 4, dtype=torch.float64)


@pytest.mark.parametrize("between", REMEMBERING)
def test_what_a_buffer_holds_at_first_is_not_taken_for_a_constant(between: Step) -> None:
    """All of them hold zeros, so that nothing reaches the output in the first call; it does later."""
    net, x = built(between)
    visit = Fingerprint(net)
    module = fxc.prune(net, x, fold=True).module
    visit.check()
    expected = run(net)
    assert any(difference(a, expected[0]) > 1e-3 for a in expected[1:])
    assert difference(expected, run(module)) <= TOLERANCE
    left = WIDTH // 2 if between is through_a_view else WIDTH  # nobody writes to the other half, which stays zero
    assert module.get_parameter("first.weight").shape == (left, 4)


@pytest.mark.parametrize("between", FOLLOWED)
def test_entries_that_no_run_changes_go(between: Step) -> None:
    """A channel that is zero keeps its average at zero."""
    net, x = built(between)
    with torch.no_grad():
        for parameter in net.first.parameters():
            parameter[DEAD] = 0
    module = fxc.prune(net, x).module
    assert module.get_parameter("first.weight").shape == (WIDTH - len(DEAD), 4)
    assert difference(run(net), run(module)) <= TOLERANCE


@pytest.mark.parametrize("between", [averaged, copied_on, counted, by_operators, in_training])
def test_networks_that_remember_compress_themselves(between: Step) -> None:
    net, x = built(between)
    compressed = fxc.compress(net, x, death_limit=1.0)
    with torch.no_grad():
        for parameter in compressed.first.parameters():
            parameter[DEAD] = 0
    compressed.step()
    before = run(compressed.eval())
    compressed.prune()
    assert difference(before, run(compressed)) <= TOLERANCE
    assert difference(before, run(compressed.eval().finalize())) <= TOLERANCE


WRAPPED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(WIDTH, WIDTH, 3, padding=1, padding_mode="circular"), (2, 3, 7)),
    "conv2d": (lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=(2, 1), padding_mode="circular"), (2, 3, 7, 6)),
    "conv3d": (lambda: nn.Conv3d(WIDTH, WIDTH, 3, padding=1, padding_mode="circular"), (2, 3, 5, 4, 6)),
    "module": (lambda: nn.CircularPad2d((1, 2, 0, 3)), (2, 3, 7, 6)),
}


class Wrapped(nn.Module):
    """A border from the other side between two layers."""

    def __init__(self, pad: Callable[[Tensor], Tensor], ndim: int) -> None:
        super().__init__()
        conv: Any = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[ndim]
        self.first, self.pad, self.last = conv(3, WIDTH, 1), pad, conv(WIDTH, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.pad(self.first(x)).relu())  # type: ignore[no-any-return]


def check_wrapped(net: Wrapped, x: Tensor) -> None:
    with torch.no_grad():
        for parameter in net.first.parameters():
            parameter[DEAD] = 0
    module = fxc.prune(net, x).module
    assert module.get_parameter("first.weight").shape[0] == WIDTH - len(DEAD)
    assert difference(net(x), module(x)) <= TOLERANCE
    larger = torch.randn(3, *(n + 2 * (d > 0) for d, n in enumerate(x.shape[1:])), dtype=x.dtype)
    assert difference(net(larger), module(larger)) <= TOLERANCE


@pytest.mark.parametrize("name", WRAPPED)
def test_channels_go_through_circular_padding(name: str) -> None:
    torch.manual_seed(0)
    make, shape = WRAPPED[name]
    check_wrapped(Wrapped(make(), len(shape)).double().eval(), torch.randn(shape, dtype=torch.float64))


@pytest.mark.parametrize("pad", [(1, 2), (3, 0), (-1, 2), (2, -2), (-1, -1), (1, 1, 2, 0), (-2, 1, 3, -1)])
def test_circular_padding_by_hand(pad: tuple[int, ...]) -> None:
    """Negative widths crop."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, *[7] * (len(pad) // 2), dtype=torch.float64)
    check_wrapped(Wrapped(lambda h: F.pad(h, pad, "circular"), x.ndim).double().eval(), x)


class Halves(nn.Module):
    """It keeps the means of two halves that change places; each of them may be left with one channel."""

    means: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1)
        self.register_buffer("means", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.first(x).chunk(2, 1)
        h = torch.cat([right, left], 1)
        out: Tensor = self.second(h - self.means[:, None, None])
        self.means.copy_(h.detach().mean((0, 2, 3)))
        return out


@pytest.mark.parametrize("alive", [[0, 3], [2, 4, 5], [0, 1, 5]])
def test_halves_with_one_channel_left(alive: list[int]) -> None:
    torch.manual_seed(0)
    net, x = Halves().double().eval(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    dead = [c for c in range(6) if c not in alive]
    with torch.no_grad():
        net.first.weight[dead] = 0
        assert net.first.bias is not None
        net.first.bias[dead] = 0
    result = fxc.prune(net, x).module
    assert result.get_parameter("first.weight").shape[0] == len(alive)
    for _ in range(3):
        assert difference(outputs(net, (x,), calls=2), outputs(result, (x,), calls=2)) <= TOLERANCE
