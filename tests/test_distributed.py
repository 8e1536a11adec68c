"""Many processes: the same removals everywhere, the same training as in one, and an error instead of a hang."""

import gc
import hashlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._distributed_c10d import BuiltinCommHookType, GradBucket
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import fxcompress as fxc
from fxcompress.errors import DistributedError, OptimizerError, UnsupportedModelError
from fxcompress.training.distributed import wrappers_of
from tests.nets import ResidualNet, batch, set_bits
from tests.ranks import DIED, launch, single_process
from tests.test_target_latency import Counted

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs" / "distributed.md"
SAMPLES = 16
Options = dict[str, Any]


class Plain(nn.Module):
    """Without batch norm, whose statistics would be of a part of the batch on each rank."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels, 3, stride=2)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv3 = nn.Conv2d(channels, channels, 3, padding=1)
        self.fc = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        x = x + F.relu(self.conv3(F.relu(self.conv2(x))))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


class Holder(nn.Module):
    """Holds a network deeper down, as a LightningModule does, beside a parameter without a gradient."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.idle = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]


def compressed(model: Callable[[], nn.Module] = Plain, seed: int = 0) -> fxc.CompressedModule:
    torch.manual_seed(seed)
    return fxc.compress(model().double(), torch.zeros(2, 3, 10, 10, dtype=torch.float64), bits=2.0)


def adam(net: fxc.CompressedModule, bits_lr: float = 0.06) -> Adam:
    return Adam(net.param_groups(2e-3, bits_lr=bits_lr, exponents_lr=bits_lr))


def share(step: int) -> tuple[Tensor, Tensor]:
    """This process's part of the batch."""
    x, target = batch(size=SAMPLES, seed=step)
    if not dist.is_initialized():
        return x, target
    rank, world = dist.get_rank(), dist.get_world_size()
    return x.chunk(world)[rank], target.chunk(world)[rank]


def run(net: fxc.CompressedModule, called: nn.Module, optimizer: Optimizer, steps: int = 64) -> int:
    """Train, and remove every twelfth step; how often something went."""
    removals = 0
    for step in range(steps):
        x, target = share(step)
        optimizer.zero_grad()
        (F.cross_entropy(called(x), target) + 0.35 * net.size()).backward()
        optimizer.step()
        net.step()
        if step % 12 == 11:
            removals += net.prune(optimizer).modified
    return removals


def tensors(net: nn.Module, optimizer: Optimizer | None = None) -> dict[str, Tensor]:
    """All tensors of a network and its optimizer, by name."""
    found = {f"net.{name}": value.detach().clone() for name, value in net.state_dict().items()}
    state = {} if optimizer is None else optimizer.state_dict()["state"]
    found |= {f"optimizer.{n}.{key}": v.clone() for n, entry in state.items() for key, v in entry.items()}
    return found


def digest(found: dict[str, Tensor]) -> str:
    parts = [(name, tuple(value.shape), value.numpy().tobytes()) for name, value in found.items()]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def assert_near(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert {name: value.shape for name, value in first.items()} == {n: v.shape for n, v in second.items()}
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=0, atol=1e-9)


def bucketed(wrapper: DistributedDataParallel) -> int:
    """Bytes of the gradients that the wrapper averages."""
    return sum(int(size) for size in wrapper._get_ddp_logging_data()["bucket_sizes"].split(", "))


# ---- the same training ----------------------------------------------------------------------------------------------


def train(rank: int, options: Options, deeper: bool) -> tuple[dict[str, Tensor], int]:  # noqa: FBT001
    net = compressed(seed=rank)  # the wrapper takes over what rank 0 has
    wrapper = DistributedDataParallel(Holder(net) if deeper else net, **options)
    optimizer = adam(net, 0.1)
    removals = run(net, wrapper, optimizer)
    assert bucketed(wrapper) == 8 * sum(p.numel() for p in wrapper.parameters())
    return tensors(net, optimizer), removals


@pytest.fixture(scope="module")
def alone() -> tuple[dict[str, Tensor], int]:
    """The same training in a single process."""
    net = compressed()
    optimizer = adam(net, 0.1)
    removals = run(net, net, optimizer)
    return tensors(net, optimizer), removals


@pytest.mark.parametrize(
    ("world", "options", "deeper"),
    [
        (4, {}, False),
        (2, {"find_unused_parameters": True, "gradient_as_bucket_view": True, "bucket_cap_mb": 1e-3}, True),
    ],
    ids=["4", "2, deeper"],
)
def test_training_equals_that_of_a_single_process(
    world: int,
    options: Options,
    deeper: bool,  # noqa: FBT001
    alone: tuple[dict[str, Tensor], int],
) -> None:
    """64 steps in float64 on the same batches; channels go in the middle, with their part of Adam's state."""
    expected, removals = alone
    assert removals >= 3
    outcomes = launch(world, train, options, deeper)
    assert [(o.error, o.message) for o in outcomes] == [("", "")] * world
    assert [o.value[1] for o in outcomes] == [removals] * world
    assert len({digest(o.value[0]) for o in outcomes}) == 1
    assert_near(outcomes[0].value[0], expected)


def accumulate(rank: int) -> dict[str, Tensor]:
    net = compressed()
    wrapper = DistributedDataParallel(net, gradient_as_bucket_view=True) if dist.is_initialized() else None
    optimizer = adam(net)
    for step in range(3):
        optimizer.zero_grad()
        for part in range(2):
            x, target = share(2 * step + part)
            with wrapper.no_sync() if wrapper is not None and part == 0 else nullcontext():
                called = net if wrapper is None else wrapper
                (F.cross_entropy(called(x), target) + 0.1 * net.size()).backward()
                if step == 1 and part == 0:
                    kill(net, [1, 5])
                    assert net.prune(optimizer).modified
        optimizer.step()
        net.step()
    return tensors(net, optimizer)


def kill(net: fxc.CompressedModule, channels: list[int]) -> None:
    """Make channels of the first convolution removable."""
    for name in ("conv2", "conv3"):
        set_bits(net, f"{name}.weight", channels)
        with torch.no_grad():
            net.get_parameter(f"{name}.bias")[channels] = 0.0
    net.step()


def test_a_removal_while_gradients_accumulate() -> None:
    """Inside ``no_sync``: the gradients so far are cut, and averaged with the rest."""
    expected = accumulate(0)
    outcomes = launch(2, accumulate)
    assert [(o.error, o.message) for o in outcomes] == [("", "")] * 2
    for outcome in outcomes:
        assert_near(outcome.value, expected)


def test_the_example_of_the_docs_runs_under_torchrun(tmp_path: Path) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```$", DOCS.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    script = tmp_path / "train.py"
    script.write_text(code, "utf-8")
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False, env=environment, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("parameters") == 2  # of rank 0 alone
    assert (tmp_path / "net.fxc").stat().st_size > 0


# ---- ranks that differ ----------------------------------------------------------------------------------------------


def disagree(rank: int) -> tuple[str, bool, bool]:
    net = compressed()
    wrapper = DistributedDataParallel(net)
    optimizer = adam(net)
    run(net, wrapper, optimizer, 2)
    kill(net, [1] if rank == 2 else [1, 5])
    before = digest(tensors(net, optimizer))
    with pytest.raises(DistributedError) as caught:
        net.prune(optimizer)
    unchanged = digest(tensors(net, optimizer)) == before
    kill(net, [1, 5])
    removed = net.prune(optimizer).modified
    run(net, wrapper, optimizer, 1)
    return str(caught.value), unchanged, removed


def test_ranks_that_disagree_are_named_and_nothing_changes_on_any() -> None:
    outcomes = launch(3, disagree)
    assert [o.error for o in outcomes] == [""] * 3
    for outcome in outcomes:
        message, unchanged, removed = outcome.value
        assert "ranks 0, 1: " in message
        assert "rank 2: " in message
        assert unchanged
        assert removed


def strange_optimizer(rank: int) -> str:
    net = compressed()
    wrapper = DistributedDataParallel(net)
    kill(net, [3])
    before = digest(tensors(net))
    strange = Adam(nn.Linear(2, 2).parameters())
    with pytest.raises((DistributedError, OptimizerError)) as caught:
        net.prune(strange if rank == 1 else adam(net))
    assert digest(tensors(net)) == before
    run(net, wrapper, adam(net), 1)
    return f"{type(caught.value).__name__}: {caught.value}"


def test_a_rank_that_cannot_remove_stops_the_others() -> None:
    first, second = launch(2, strange_optimizer)
    assert second.value.startswith("OptimizerError: the optimizer holds 2 parameters")
    assert first.value.startswith("DistributedError: nothing was removed on any rank")
    assert "rank 1: OptimizerError: the optimizer holds 2 parameters" in first.value


# ---- ranks that die -------------------------------------------------------------------------------------------------


def die_in_training(rank: int) -> None:
    net = compressed()
    wrapper = DistributedDataParallel(net)
    optimizer = adam(net)
    run(net, wrapper, optimizer, 10)
    if rank == 1:
        os._exit(1)
    run(net, wrapper, optimizer, 10)


def die_before_removal(rank: int) -> None:
    net = compressed()
    wrapper = DistributedDataParallel(net)
    run(net, wrapper, adam(net), 2)
    if rank == 1:
        os._exit(1)
    net.prune()


def never_come(rank: int) -> None:
    net = compressed()
    wrapper = DistributedDataParallel(net)
    run(net, wrapper, adam(net), 2)
    if rank == 1:
        time.sleep(200)
    net.prune()


def test_a_rank_that_dies_in_training_ends_the_others() -> None:
    alive, dead = launch(2, die_in_training)
    assert dead == DIED
    assert alive.error in {"RuntimeError", "DistributedError"}


def test_a_rank_that_dies_before_a_removal_is_an_error() -> None:
    alive, dead = launch(2, die_before_removal)
    assert dead == DIED
    assert alive.error == "DistributedError"
    assert alive.message.startswith("rank 0 of 2 got no answer from the others")
    assert "prune() must be called on every rank" in alive.message


def test_a_rank_that_never_comes_is_an_error_after_the_timeout() -> None:
    (waiting,) = launch(2, never_come, patience=8.0, wait_for=[0])
    assert waiting.error == "DistributedError"
    assert "Timed out" in waiting.message


# ---- fit ------------------------------------------------------------------------------------------------------------


def fitted(rank: int) -> tuple[dict[str, Tensor], list[tuple[float, float, float]], bool]:
    net = compressed(seed=rank)
    loader = [share(step) for step in range(8)]
    result = fxc.fit(
        net, loader, F.cross_entropy, epochs=5, target_size=0.01, optimizer=adam(net, 0.3), validate=shape_sum,
        progress=False,
    )  # fmt: skip
    figures = [(r.loss, r.size, r.weights) for r in result.history]
    return tensors(result.module), figures, bool(result.reports)


def shape_sum(net: nn.Module) -> float:
    return float(sum(p.numel() for p in net.parameters()))


def test_fit_in_two_processes_equals_fit_in_one() -> None:
    expected, figures, removed = fitted(0)
    assert removed
    outcomes = launch(2, fitted)
    assert [(o.error, o.message) for o in outcomes] == [("", "")] * 2
    assert digest(outcomes[0].value[0]) == digest(outcomes[1].value[0])
    assert_near(outcomes[0].value[0], expected)
    for outcome in outcomes:
        assert outcome.value[1] == [pytest.approx(f, abs=1e-9) for f in figures]


class Weighted(nn.Module):
    """A loss with parameters, one of which a single rank needs and one that nobody does, and a buffer that moves."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed + 5)
        self.scale = nn.Parameter(1 + torch.rand(5, dtype=torch.float64))
        self.rare = nn.Parameter(torch.rand(5, dtype=torch.float64))
        self.idle = nn.Parameter(torch.rand(3, dtype=torch.float64))
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(5, dtype=torch.float64))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        self.mean.lerp_(output.detach().mean(0), 0.1)
        loss = F.cross_entropy(output * self.scale, target)
        if (target == 0).sum() > 2:
            loss = loss + 0.1 * F.cross_entropy(output * self.rare, target)
        return loss


def fitted_with_a_loss(rank: int, as_function: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:  # noqa: FBT001
    net, loss = compressed(seed=rank), Weighted(rank)
    groups = [*net.param_groups(2e-3), {"params": loss.parameters(), "lr": 0.01}]
    called = loss.forward if as_function else loss
    fxc.fit(
        net, [share(step) for step in range(8)], called, epochs=3, gamma=0.3, optimizer=Adam(groups, weight_decay=0.1),
        progress=False,
    )  # fmt: skip
    return tensors(net), tensors(loss)


@pytest.mark.parametrize("as_function", [False, True])
def test_a_loss_with_parameters_is_trained_as_one(as_function: bool) -> None:  # noqa: FBT001
    """Its gradients are means over the processes as well, and all begin with what the first has."""
    before = tensors(Weighted(0))
    outcomes = launch(2, fitted_with_a_loss, as_function)
    assert [(o.error, o.message) for o in outcomes] == [("", "")] * 2
    (net, loss), (other_net, other_loss) = outcomes[0].value, outcomes[1].value
    assert digest(net) == digest(other_net)
    if as_function:  # nobody knows its buffers
        del loss["net.mean"], other_loss["net.mean"]
    assert digest(loss) == digest(other_loss)
    moved = {name for name, value in loss.items() if not torch.equal(value, before[name])}
    assert moved >= {"net.scale", "net.rare"}
    assert "net.idle" not in moved


def loss_in_parts(rank: int) -> dict[str, Tensor]:
    """Parameters of a loss that is the mean over its samples."""
    net = compressed(seed=rank)
    scale = nn.Parameter(torch.ones(5, dtype=torch.float64))
    groups = [*net.param_groups(2e-3, bits_lr=0.06, exponents_lr=0.06), {"params": [scale], "lr": 0.01}]
    fxc.fit(
        net, [share(step) for step in range(8)], lambda output, target: F.cross_entropy(output * scale, target),
        epochs=3, gamma=0.3, optimizer=Adam(groups), progress=False,
    )  # fmt: skip
    return tensors(net) | {"scale": scale.detach()}


def test_a_loss_with_parameters_in_two_processes_equals_that_in_one() -> None:
    expected = loss_in_parts(0)
    outcomes = launch(2, loss_in_parts)
    assert [(o.error, o.message) for o in outcomes] == [("", "")] * 2
    assert not torch.equal(expected["scale"], torch.ones(5, dtype=torch.float64))
    assert_near(outcomes[0].value, expected)


def waited(rank: int) -> tuple[list[float], dict[str, Tensor]]:
    """A learning rate that waits for a metric which is better in one process than in the other."""
    net = compressed(seed=rank)
    optimizer = adam(net)
    metrics = iter([(0.1, 0.9), (0.9, 0.0), (0.2, 0.95)])  # means of 0.5, 0.45, 0.575
    rates: list[float] = []
    fxc.fit(
        net, [share(step) for step in range(4)], F.cross_entropy, epochs=3, gamma=0.3, optimizer=optimizer,
        scheduler=ReduceLROnPlateau(optimizer, "max", factor=0.5, patience=0), validate=lambda _: next(metrics)[rank],
        on_epoch=lambda _: rates.append(optimizer.param_groups[0]["lr"]), progress=False,
    )  # fmt: skip
    return rates, tensors(net, optimizer)


def test_all_processes_lower_their_learning_rates_together() -> None:
    outcomes = launch(2, waited)
    assert [(o.error, o.message) for o in outcomes] == [("", "")] * 2
    assert [o.value[0] for o in outcomes] == [[2e-3, 1e-3, 1e-3]] * 2
    assert digest(outcomes[0].value[1]) == digest(outcomes[1].value[1])


def led(rank: int) -> tuple[dict[str, Tensor], float, bool]:
    net = compressed(seed=rank)
    loader = [share(step) for step in range(8)]
    result = fxc.fit(
        net, loader, F.cross_entropy, epochs=5, target_macs=0.5, optimizer=adam(net, 0.3), progress=False, prune=4
    )
    return tensors(result.module), net.macs_left(), bool(result.reports)


def test_a_share_of_the_multiply_adds_leads_to_the_same_channels_in_two_processes_as_in_one() -> None:
    expected, left, removed = led(0)
    assert removed
    assert left <= 0.5
    outcomes = launch(2, led)
    assert [(o.error, o.message) for o in outcomes] == [("", "")] * 2
    assert digest(outcomes[0].value[0]) == digest(outcomes[1].value[0])
    assert_near(outcomes[0].value[0], expected)


def led_by_seconds(rank: int) -> tuple[dict[str, Tensor], float | None, int]:
    net, timer = compressed(seed=rank), Counted(factor=1.0 + rank)
    loader = [share(step) for step in range(8)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fxcompress.objectives.latency.measure", timer)
        result = fxc.fit(
            net,
            loader,
            F.cross_entropy,
            epochs=5,
            target_latency=0.7,
            optimizer=adam(net, 0.3),
            progress=False,
            prune=4,
        )
    return tensors(result.module), result.latency, timer.calls


def test_seconds_are_measured_in_the_first_process_and_count_in_all() -> None:
    outcomes = launch(2, led_by_seconds)
    assert [(o.error, o.message) for o in outcomes] == [("", "")] * 2
    (first, left, calls), (second, other_left, other_calls) = (outcome.value for outcome in outcomes)
    assert digest(first) == digest(second)
    assert left == other_left
    assert left <= 0.75
    assert (calls, other_calls) == (1, 0)


def failing(rank: int) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no clock")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fxcompress.objectives.latency.measure", fail)
        fxc.fit(
            compressed(seed=rank), [share(0)], F.cross_entropy, epochs=1, target_latency=0.7, progress=False
        )  # fmt: skip


def test_all_processes_hear_that_the_first_could_not_measure() -> None:
    outcomes = launch(2, failing)
    assert [o.error for o in outcomes] == ["RuntimeError", "DistributedError"]
    assert outcomes[1].message == "the first process failed: RuntimeError: no clock"


def searched(rank: int) -> tuple[list[tuple[float | None, float, float, bool]], str]:
    loader = [share(step) for step in range(8)]
    found = fxc.fit_to_accuracy(
        compressed(seed=rank), loader, F.cross_entropy, min_accuracy=0.5, validate=lambda net: 0.4 + 0.3 * rank,
        epochs=5, rounds=2, progress=False,
    )  # fmt: skip
    return [(r.target, r.size, r.metric, r.kept) for r in found.rounds], digest(tensors(found.module))


def test_a_search_takes_the_same_rounds_in_all_processes_by_the_mean_of_their_metrics() -> None:
    first, second = launch(2, searched)
    assert (first.error, first.message) == ("", "")
    assert first.value == second.value
    rounds, _ = first.value
    assert [(metric, kept) for *_, metric, kept in rounds] == [(pytest.approx(0.55), True)] * 3
    start = rounds[0][1]
    assert [target for target, *_ in rounds] == [None, start / 2, pytest.approx(start / 4, rel=0.2)]


def uneven(rank: int) -> None:
    net = compressed()
    fxc.fit(net, [share(step) for step in range(2 + rank)], F.cross_entropy, epochs=2, gamma=0.1, progress=False)


def test_fit_refuses_ranks_with_different_numbers_of_batches() -> None:
    for outcome in launch(2, uneven):
        assert outcome.error == "DistributedError"
        assert "rank 0: 4" in outcome.message
        assert "rank 1: 6" in outcome.message


def with_batch_norm(rank: int) -> tuple[str, int]:
    data = TensorDataset(*batch(size=64, seed=1))
    sampler: DistributedSampler[Any] = DistributedSampler(data)
    loader = DataLoader(data, batch_size=8, sampler=sampler)
    net = compressed(ResidualNet)
    wrapper = DistributedDataParallel(net)
    optimizer = adam(net, 0.3)
    result = fxc.fit(net, loader, F.cross_entropy, epochs=5, gamma=0.5, optimizer=optimizer, progress=False)
    assert sampler.epoch == 5
    assert wrappers_of(net) == [wrapper]
    return digest(tensors(net, optimizer) | tensors(result.module)), len(result.reports)


def test_batch_norm_leaves_the_same_network_on_each_rank_although_their_statistics_differ() -> None:
    first, second = launch(2, with_batch_norm)
    assert (first.error, first.message) == ("", "")
    assert first.value == second.value
    assert first.value[1] >= 2


# ---- a group of one process -----------------------------------------------------------------------------------------


@pytest.fixture
def _group() -> Iterator[None]:
    single_process()
    yield
    dist.destroy_process_group()


group = pytest.mark.usefixtures("_group")


def static(net: nn.Module) -> nn.Module:
    return DistributedDataParallel(net, static_graph=True)


def test_refresh_finds_what_was_set_from_outside() -> None:
    """The flags of dead channels arrive by a broadcast; the size no longer counts what they let go."""
    net, other = compressed(), compressed()
    kill(net, [1, 5])
    other.size()
    with torch.no_grad():
        for tensor, source in zip(other.state_dict().values(), net.state_dict().values(), strict=True):
            tensor.copy_(source)
    other.refresh()
    assert other.size("eq4").item() == net.size("eq4").item()
    set_bits(other, "conv2.weight", [1, 5], 3.0)
    other.step()
    assert other.prune().modified


@group
@pytest.mark.parametrize("wrap", [lambda net: net, DistributedDataParallel, static], ids=["bare", "wrapped", "static"])
def test_a_group_of_one_is_like_none(wrap: Callable[[nn.Module], nn.Module]) -> None:
    net, other = compressed(), compressed()
    called = wrap(net)
    for module, call in ((net, called), (other, other)):
        optimizer = adam(module)
        run(module, call, optimizer, 2)
        kill(module, [1, 5])
        assert module.prune(optimizer).modified
        run(module, call, optimizer, 2)
    assert_near(tensors(net), tensors(other))


@group
def test_a_wrapper_keeps_its_options_hooks_mode_and_identity() -> None:
    net = compressed()
    calls: list[str] = []
    options: Options = {"find_unused_parameters": True, "gradient_as_bucket_view": True, "bucket_cap_mb": 3}
    wrapper = DistributedDataParallel(Holder(net), **options)
    wrapper.register_forward_hook(lambda *_: calls.append("forward"))
    wrapper.register_comm_hook(None, halved)
    wrapper.eval()
    kill(net, [1, 5])
    net.prune()
    assert not wrapper.training
    assert wrapper.find_unused_parameters
    assert wrapper.gradient_as_bucket_view
    assert wrapper.bucket_bytes_cap == 3 * 2**20
    wrapper(share(0)[0]).sum().backward()
    assert calls == ["forward"]
    halves = net.get_parameter("fc.bias").grad
    assert halves is not None
    assert halves.tolist() == [SAMPLES / 2] * 5


def halved(state: object, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """A communication hook that shows in the gradients."""
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer() / 2)
    return future


@group
def test_a_module_that_does_not_hold_the_network_is_left_alone() -> None:
    net, other = compressed(), compressed()
    wrapper = DistributedDataParallel(other)
    assert wrappers_of(net) == []
    assert wrappers_of(other) == [wrapper]


@group
@pytest.mark.parametrize("which", ["join", "stateful hook", "built-in hook", "delayed"])
def test_a_wrapper_that_cannot_follow_is_an_error_and_nothing_changes(which: str) -> None:
    net = compressed()
    delayed: Options = {}
    if which == "delayed":
        weight = net.get_parameter("fc.weight")
        delayed = {"delay_all_reduce_named_params": [("fc.weight", weight)]}
        delayed["param_to_hook_all_reduce"] = net.get_parameter("fc.bias")
    wrapper = DistributedDataParallel(net, **delayed)
    if which == "stateful hook":
        wrapper.register_comm_hook(object(), halved)
    if which == "built-in hook":
        wrapper._register_builtin_comm_hook(BuiltinCommHookType.ALLREDUCE)
    kill(net, [1, 5])
    before = digest(tensors(net))
    with wrapper.join() if which == "join" else nullcontext(), pytest.raises(DistributedError, match="cannot follow"):
        net.prune()
    assert digest(tensors(net)) == before


class Reshaped(nn.Module):
    """Its graph holds a number of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.fc = nn.Linear(8 * 64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.conv(x)).reshape(-1, 8 * 64))  # type: ignore[no-any-return]


@pytest.mark.parametrize("model", [Plain, Reshaped])
def test_a_forward_on_the_instance_is_refused_where_it_would_run_the_old_graph(model: Callable[[], nn.Module]) -> None:
    """As Accelerate sets one for mixed precision, from the function that the class had."""
    net = compressed(model)
    net.forward = MethodType(type(net).forward, net)
    weight = "conv2" if model is Plain else "conv"
    set_bits(net, f"{weight}.weight", [1, 5])
    with torch.no_grad():
        net.get_parameter(f"{weight}.bias")[[1, 5]] = 0.0
    net.step()
    before = digest(tensors(net))
    if model is Plain:
        assert net.prune().modified
        net(share(0)[0])
        return
    with pytest.raises(UnsupportedModelError, match="hold the network in another module"):
        net.prune()
    assert digest(tensors(net)) == before


@group
def test_objects_hidden_by_gc_freeze_are_not_taken_for_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    net = compressed()
    wrapper = DistributedDataParallel(net)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    gc.freeze()
    try:
        with pytest.raises(DistributedError, match=r"gc\.unfreeze"):
            net.prune()
    finally:
        gc.unfreeze()
    assert wrappers_of(net) == [wrapper]


@group
def test_an_optimizer_in_shards_is_refused() -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    net = compressed()
    wrapper = DistributedDataParallel(net)
    optimizer = ZeroRedundancyOptimizer(wrapper.parameters(), Adam, lr=1e-3)
    with pytest.raises(OptimizerError, match="ZeroRedundancyOptimizer keeps parameters and state in an optimizer"):
        net.prune(optimizer)


@group
def test_sharded_parameters_are_refused() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net = compressed()
    fully_shard(net, mesh=init_device_mesh("cpu", (1,)))
    for act in (net.size, net.step, net.prune, net.finalize):
        with pytest.raises(DistributedError, match="sharded over processes"):
            act()


@group
def test_synchronized_batch_norm_is_batch_norm_to_the_analysis() -> None:
    """Its training needs a GPU; what can be removed does not."""
    net = compressed(ResidualNet)
    nn.SyncBatchNorm.convert_sync_batchnorm(net)
    other = fxc.compress(nn.SyncBatchNorm.convert_sync_batchnorm(ResidualNet()).double(), batch(size=2)[0])
    for module in (net, other):
        assert isinstance(module.get_submodule("block1.bn1"), nn.SyncBatchNorm)
        set_bits(module, "block1.conv1.weight", [0, 3])
        nn.init.zeros_(module.get_parameter("block1.bn1.bias"))
        module.step()
        module.eval()
        before = module(batch()[0])
        assert module.prune().removed["block1.conv1.weight"][1] == (6, 8, 3, 3)
        torch.testing.assert_close(module(batch()[0]), before, rtol=1e-12, atol=1e-12)
