"""What limits the pressure, and when what is dead is removed."""

import json
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import fxcompress as fxc
from fxcompress.training.controller import TargetSize
from fxcompress.training.guard import Guard
from fxcompress.training.policy import PrunePolicy, prune_policy
from tests.nets import ResidualNet, batch, quantizer, set_bits


def limited(share: float) -> fxc.CompressedModule:
    torch.manual_seed(0)
    inputs = torch.zeros(2, 3, 10, 10, dtype=torch.float64)
    return fxc.compress(ResidualNet().double(), inputs, death_limit=share)


def zero_rows(net: fxc.CompressedModule) -> int:
    return sum(int((p == 0).sum()) for name, p in net.named_parameters() if name.endswith(".bits"))


def test_no_more_channels_than_allowed_die_in_a_step() -> None:
    net = limited(0.05)
    most = int(0.05 * sum(p.numel() for name, p in net.named_parameters() if name.endswith(".bits")))
    assert most > 1
    net.step()
    counts = []
    for _ in range(8):
        with torch.no_grad():  # great pressure: all that is left of these loses its last bit
            for name in ("block1.conv1.weight", "block2.conv1.weight"):
                quantizer(net, name).bits[:6] -= 9
        net.step()
        counts.append(zero_rows(net))
    steps = [after - before for before, after in zip([0, *counts], counts, strict=False)]
    assert max(steps) == most
    assert counts[-1] == 12


def test_channels_of_the_smallest_scale_die_first() -> None:
    net = limited(0.05)
    net.step()
    with torch.no_grad():
        quantizer(net, "block1.conv1.weight").exponent.copy_(torch.arange(8).flip(0))
    set_bits(net, "block1.conv1.weight", [1, 2, 3, 6, 7])
    net.step()
    assert (quantizer(net, "block1.conv1.weight").bits == 0).nonzero().flatten().tolist() == [6, 7]


@pytest.mark.parametrize("share", [0.0, -0.1, 1.5])
def test_a_limit_must_be_a_share(share: float) -> None:
    with pytest.raises(ValueError, match="death_limit"):
        fxc.compress(ResidualNet(), torch.zeros(2, 3, 10, 10), death_limit=share)


def test_removal_as_they_die_is_removal_at_the_end_under_a_limit() -> None:
    """The limit counts the channels at the start, so what was removed meanwhile does not matter."""

    def trained(*, removing: bool) -> fxc.CompressedModule:
        net = limited(0.04)
        optimizer = torch.optim.SGD(net.param_groups(2e-3, bits_lr=3.0, bits_eps=0.0)[:2], lr=1e-2)
        optimizer.add_param_group({"params": [p for g in net.param_groups()[2:] for p in g["params"]], "lr": 7.0})
        for step in range(60):
            x, target = batch(seed=step)
            optimizer.zero_grad()
            (F.cross_entropy(net(x), target) + 0.5 * net.size()).backward()
            optimizer.step()
            net.step()
            if removing and step % 5 == 4:
                net.prune(optimizer)
        net.prune(optimizer)
        return net

    first, second = trained(removing=True), trained(removing=False)
    shapes = {name: p.shape for name, p in first.named_parameters()}
    assert shapes == {name: p.shape for name, p in second.named_parameters()}
    assert first.channels_left() < 35
    x, _ = batch(seed=99)
    torch.testing.assert_close(first(x), second(x), rtol=1e-9, atol=1e-9)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60), st.floats(0.1, 5))
def test_waiting_wastes_what_a_removal_costs_and_no_more(shares: list[float], cost: float) -> None:
    policy = PrunePolicy(cost=cost)
    wasted = 0.0
    for share in shares:
        wasted += share
        due = policy.due(share)
        assert due == (wasted >= cost)
        wasted = 0.0 if due else wasted


def test_a_network_that_loses_nothing_is_never_rewritten() -> None:
    assert not any(PrunePolicy().due(0.0) for _ in range(1000))


def test_every_so_many_steps() -> None:
    policy = prune_policy(3)
    assert policy is not None
    assert [policy.due(0.0) for _ in range(7)] == [False, False, True, False, False, True, False]
    assert prune_policy(prune=False) is None
    assert isinstance(prune_policy(prune=True), PrunePolicy)
    for wrong in (0, -2):
        with pytest.raises(ValueError, match="at least one step"):
            prune_policy(wrong)
    with pytest.raises(ValueError, match="positive"):
        PrunePolicy(cost=0)


def test_what_could_go_is_a_share_of_what_is_there() -> None:
    net = limited(1.0)
    assert net.removable() == 0
    set_bits(net, "block1.conv1.weight", [0, 1])
    with torch.no_grad():
        net.get_parameter("block1.bn1.bias")[:2] = 0
    net.step()
    before = sum(p.numel() for name, p in net.named_parameters() if name.endswith(("conv1.weight", "conv2.weight")))
    before += net.get_parameter("stem.0.weight").numel() + net.get_parameter("fc.weight").numel()
    gone = 2 * (8 * 9) * 2  # rows of conv1, columns of conv2
    assert net.removable() == pytest.approx(gone / before)
    net.prune()
    assert net.removable() == 0


def test_a_guard_holds_while_the_metric_is_low() -> None:
    guard = Guard(min_metric=0.9)
    found = []
    for metric in (0.95, 0.85, 0.9, 0.5):
        guard.see_metric(metric)
        found.append(guard.holds)
    assert found == [False, True, False, True]


def test_a_guard_holds_while_the_loss_is_high() -> None:
    guard = Guard(max_loss_increase=0.2)
    for _ in range(300):
        guard.see_loss(1.0)
    found = [guard.holds]
    for loss in (1.3, 1.1):
        for _ in range(300):
            guard.see_loss(loss)
        found.append(guard.holds)
    assert found == [False, True, False]
    with pytest.raises(ValueError, match="positive"):
        Guard(max_loss_increase=0.0)


def test_the_controller_gives_bits_back_below_the_wanted_size() -> None:
    """The task seldom makes a network larger."""
    found = []
    for factor in (1.05, 1.0, 0.95):
        control = TargetSize(0.05)
        found.append([control(0.8, 0.05 * factor) for _ in range(10)][-1])
    assert found[0] > 1.5 * found[1] > 0 > found[2]


def test_the_controller_presses_again_after_a_jump() -> None:
    """Half of the network gone at once is not the speed at which it goes on."""
    control = TargetSize(0.05)
    for step in range(200):
        control(0.6 + step / 1000, 0.2 if step < 100 else 0.052)
    assert control(0.8, 0.052) > 0.01


class Coasting:
    """A network as the controller sees it: log sizes with inertia, and learning rates that fall to 0."""

    def __init__(self, size: float, strength: float, memory: float) -> None:
        self.log_size, self.strength, self.memory, self.speed = math.log(size), strength, memory, 0.0

    def step(self, gamma: float, progress: float) -> float:
        """Press for a step; the size after it."""
        rate = self.strength * max(0.0, math.cos(math.pi / 2 * min(1.0, progress / 0.9)) ** 2)
        self.speed = self.memory * self.speed - (1 - self.memory) * rate * gamma
        self.log_size += min(0.2, max(-0.2, self.speed))  # as b moves by its learning rate at most
        return math.exp(self.log_size)


@given(
    st.floats(0.01, 0.2), st.integers(200, 2000), st.floats(-1, 1), st.sampled_from([0.0, 0.5, 0.9]),
    st.sampled_from([1.0, 1.5]),
)  # fmt: skip
def test_the_controller_lands_on_the_target(
    target: float, steps: int, log_strength: float, memory: float, start: float
) -> None:
    """In short runs and long ones, of networks that are easy to press and that are not, with momentum and without."""
    control = TargetSize(target)
    size = 0.25 * start
    network = Coasting(size, 10.0**log_strength, memory)
    for step in range(steps):
        size = network.step(control(step / steps, size), step / steps)
    assert abs(size / target - 1) < 0.03


def test_a_controller_goes_on_as_if_nothing_had_happened() -> None:
    whole, network = TargetSize(0.05), Coasting(0.25, 1.0, 0.9)
    size = 0.25
    for step in range(40):
        size = network.step(whole(step / 100, size), step / 100)
    resumed = TargetSize(0.05)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    assert [resumed(p, size) for p in (0.41, 0.42)] == [whole(p, size) for p in (0.41, 0.42)]


class Growing(Coasting):
    """One that the task makes larger while nothing presses."""

    def step(self, gamma: float, progress: float) -> float:
        self.log_size = min(math.log(0.25), self.log_size + (0.01 if gamma <= 0 else 0.0))
        return super().step(gamma, progress)


@given(
    st.floats(0.01, 0.1), st.integers(200, 1000), st.floats(-0.5, 1), st.sampled_from([0.5, 0.9]),
    st.lists(st.tuples(st.floats(0.05, 0.8), st.floats(0.02, 0.3)), min_size=1, max_size=3),
)  # fmt: skip
def test_after_a_hold_a_network_falls_no_faster_than_before_and_not_below_its_path(
    target: float, steps: int, log_strength: float, memory: float, holds: list[tuple[float, float]]
) -> None:
    control, size = TargetSize(target), 0.25
    network = Growing(size, 10.0**log_strength, memory)
    steepest = math.log(0.25 / target) / (control.arrival - control.warmup) / steps
    over = min(begin + length for begin, length in holds)
    wanted: list[float] = []
    for step in range(steps):
        progress = step / steps
        held = any(begin <= progress < begin + length for begin, length in holds)
        gamma = (control.held if held else control)(progress, size)
        if held:
            assert gamma <= 0
        wanted.append(control.wanted(progress))
        size = network.step(gamma, progress)
        assert size >= 0.6 * wanted[-1] or progress < over
    falls = [math.log(a / b) for a, b in pairwise(wanted)]
    assert max(falls) <= max(steepest, 2.0 / steps) * (1 + 1e-6)


def test_a_path_without_a_hold_is_as_it_was() -> None:
    control = TargetSize(0.05, warmup=0.1, arrival=0.6)
    control(0.0, 0.25)
    found = [control.wanted(p) for p in (0.0, 0.1, 0.35, 0.6, 1.0)]
    assert found == pytest.approx([0.25, 0.25, math.sqrt(0.25 * 0.05), 0.05, 0.05])


def test_a_path_stops_during_a_hold_and_goes_on_from_the_present_size() -> None:
    control = TargetSize(0.05)
    control(0.0, 0.25)
    control(0.2, 0.2)
    before = control.wanted(0.2)
    control.held(0.2, 0.2)
    control.held(0.4, 0.2)
    assert control.wanted(0.4) == pytest.approx(before)
    control(0.4, 0.2)
    assert control.wanted(0.4) == pytest.approx(0.2)
    assert 0.05 < control.wanted(0.6) < 0.2
    assert control.wanted(0.9) == pytest.approx(0.05)


@pytest.mark.parametrize("stop", [35, 45, 60])
def test_a_controller_that_was_held_goes_on_as_if_nothing_had_happened(stop: int) -> None:
    """Before the hold is over, and after it."""
    whole, network = TargetSize(0.05), Growing(0.25, 1.0, 0.9)
    size, resumed = 0.25, TargetSize(0.05)
    for step in range(100):
        now = [(c.held if 30 <= step < 50 else c)(step / 100, size) for c in (whole, resumed)]
        if step > stop:
            assert now[0] == now[1]
        size = network.step(now[0], step / 100)
        if step == stop:
            resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
