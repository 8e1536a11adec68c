"""Training that is stopped and taken up again: the file, and a run that comes out the same."""

import copy
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fxcompress as fxc
from fxcompress.checkpoint import check_scheduler
from fxcompress.errors import CheckpointError, OptimizerError
from fxcompress.storage.atomic import write_atomically
from fxcompress.storage.states import read_states, write_states
from fxcompress.training.controller import ConstantGamma, TargetSize
from fxcompress.training.fit import FitResult
from fxcompress.training.interrupt import Interrupt, TrainingInterrupted
from fxcompress.training.schedule import cosine
from tests.nets import Block, set_bits

ROOT = Path(__file__).resolve().parents[1]


class Net(nn.Module):
    """With a branch, norms and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.block = Block(8, bias=True)
        self.drop = nn.Dropout(0.2)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(F.relu(self.block(self.stem(x))).mean((2, 3))))  # type: ignore[no-any-return]


@cache
def _made() -> fxc.CompressedModule:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return fxc.compress(Net(), torch.zeros(2, 1, 6, 6), bits=3.0)


def fresh() -> fxc.CompressedModule:
    """The same network each time."""
    return copy.deepcopy(_made())


def data(generator: torch.Generator | None = None, size: int = 48, workers: int = 0) -> DataLoader[Any]:
    """Shuffled batches; by the global generator where none is given."""
    fixed = torch.Generator().manual_seed(1)
    target = torch.randint(4, (size,), generator=fixed)
    x = torch.randn(4, 1, 6, 6, generator=fixed)[target] + 0.3 * torch.randn(size, 1, 6, 6, generator=fixed)
    return DataLoader(
        TensorDataset(x, target), batch_size=8, shuffle=True, generator=generator, num_workers=workers,
        multiprocessing_context="fork" if workers else None,
    )  # fmt: skip


Make = Callable[[fxc.CompressedModule], torch.optim.Optimizer]


def adam(net: fxc.CompressedModule) -> torch.optim.Optimizer:
    return torch.optim.Adam(net.param_groups(5e-3))


def sgd(net: fxc.CompressedModule) -> torch.optim.Optimizer:
    groups = [{k: v for k, v in group.items() if k != "eps"} for group in net.param_groups(1e-2, bits_lr=2.5)]
    return torch.optim.SGD(groups, momentum=0.9)


def train(make: Make, loader: DataLoader[Any] | list[Any], stop: int = 0, **options: Any) -> FitResult:  # noqa: ANN401
    """A short run in which channels are removed; Ctrl-C is pressed in step ``stop``."""
    net = fresh()
    steps = 0

    def loss(output: Tensor, target: Tensor) -> Tensor:
        nonlocal steps
        steps += 1
        if steps == stop:
            signal.raise_signal(signal.SIGINT)
        return F.cross_entropy(output, target)

    return fxc.fit(
        net, loader, loss, epochs=5, target_size=0.006, optimizer=make(net), progress=False,
        prune=2, validate=lambda n: float(n(torch.ones(1, 1, 6, 6)).sum() + torch.rand(1)),
        **options,
    )  # fmt: skip


def assert_same_runs(a: FitResult, b: FitResult) -> None:
    """Bit for bit."""
    first, second = a.net.state_dict(), b.net.state_dict()
    assert first.keys() == second.keys()
    assert [name for name, value in first.items() if not torch.equal(value, second[name])] == []
    histories = [[record.as_dict() | {"seconds": 0.0} for record in result.history] for result in (a, b)]
    assert histories[0] == histories[1]
    assert a.reports == b.reports
    final, other = a.module.state_dict(), b.module.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in final.items())


@pytest.mark.parametrize(
    ("make", "own_generator", "stops"),
    [(adam, True, (16, 24)), (sgd, False, (15,))],
    ids=["adam, stopped twice", "sgd, global generator"],
)
def test_a_run_that_was_stopped_comes_out_the_same(
    make: Make,
    own_generator: bool,  # noqa: FBT001
    stops: tuple[int, ...],
    tmp_path: Path,
) -> None:
    """Stopped inside an epoch and at the end of one (6 steps each), with removals before and after."""

    def loader(seed: int) -> DataLoader[Any]:
        return data(torch.Generator().manual_seed(seed) if own_generator else None)

    torch.manual_seed(0)
    whole = train(make, loader(3))
    removals = [len(report.removed) for report in whole.reports]
    assert len(removals) > 1
    torch.manual_seed(0)
    resume = False
    done = 0
    for stop in stops:
        with pytest.raises(KeyboardInterrupt, match=rf"after step {stop} of 30, .*resume=True\)") as caught:
            train(make, loader(3), stop - done, checkpoint=tmp_path / "run.pt", resume=resume)
        assert isinstance(caught.value, TrainingInterrupted)
        assert len(caught.value.history) == (stop - 1) // 6
        torch.manual_seed(99)  # another program, in another state
        random.seed(99)
        resume, done = True, stop
    assert_same_runs(whole, train(make, loader(77), checkpoint=tmp_path / "run.pt", resume=True))


class Dying(DataLoader[Any]):
    """Workers that get the signal that the program gets, so that a batch does not come."""

    def __init__(self, after: int, seed: int) -> None:
        like = data(torch.Generator().manual_seed(seed))
        super().__init__(like.dataset, batch_size=8, shuffle=True, generator=like.generator)
        self.left = after

    def __iter__(self) -> Any:  # noqa: ANN401
        for batch in super().__iter__():
            if not self.left:
                signal.raise_signal(signal.SIGTERM)
                raise RuntimeError("DataLoader worker (pid 1) exited unexpectedly")
            self.left -= 1
            yield batch


class Scaled(nn.Module):
    """A loss with a weight for each class, and a count of its calls; Ctrl-C is pressed in one of them."""

    def __init__(self, stop: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.stop = stop

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.stop:
            signal.raise_signal(signal.SIGINT)
        return F.cross_entropy(output * self.weight / self.calls, target)


def test_a_loss_with_parameters_goes_on_as_well(tmp_path: Path) -> None:
    def run(loss: Scaled, **options: Any) -> fxc.CompressedModule:  # noqa: ANN401
        torch.manual_seed(0)
        net = fresh()
        optimizer = torch.optim.Adam([*net.param_groups(5e-3), {"params": loss.parameters(), "lr": 0.1}])
        fxc.fit(net, data(), loss, epochs=3, gamma=0.1, optimizer=optimizer, progress=False, **options)
        return net

    straight, resumed, path = Scaled(), Scaled(), tmp_path / "run.pt"
    net = run(straight)
    with pytest.raises(TrainingInterrupted):
        run(Scaled(stop=9), checkpoint=path)
    other = run(resumed, checkpoint=path, resume=True)
    assert not torch.equal(straight.weight, torch.ones(4))
    assert torch.equal(straight.weight, resumed.weight)
    assert straight.calls == resumed.calls == 18
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def test_another_loss_than_the_run_began_with_is_told(tmp_path: Path) -> None:
    fxc.fit(fresh(), data(), Scaled(), epochs=1, gamma=0.1, progress=False, checkpoint=tmp_path / "run.pt")
    with pytest.raises(CheckpointError, match=r"the loss is another one than the run began with: .*CrossEntropyLoss"):
        fxc.fit(
            fresh(), data(), nn.CrossEntropyLoss(), epochs=1, gamma=0.1, progress=False,
            checkpoint=tmp_path / "run.pt", resume=True,
        )  # fmt: skip


@pytest.mark.parametrize("after", [0, 4, 6, 9, 12])
def test_a_loader_that_fails_after_a_signal_stops_the_run_and_no_more(after: int, tmp_path: Path) -> None:
    """Also where the first batch of an epoch does not come, whose order has been drawn by then."""
    torch.manual_seed(0)
    whole = train(adam, data(torch.Generator().manual_seed(3)))
    torch.manual_seed(0)
    with pytest.raises(TrainingInterrupted, match=rf"after step {after} of 30, with {after // 6} of 5"):
        train(adam, Dying(after, seed=3), checkpoint=tmp_path / "run.pt")
    torch.manual_seed(99)
    again = train(adam, data(torch.Generator().manual_seed(77)), checkpoint=tmp_path / "run.pt", resume=True)
    assert_same_runs(whole, again)


def test_a_loader_that_fails_without_a_signal_is_an_error() -> None:
    loader: Any = Dying(3, seed=3)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with pytest.raises(RuntimeError, match="exited unexpectedly"):
            train(adam, loader)
    finally:
        signal.signal(signal.SIGTERM, before)


def one_epoch(path: Path | None, **options: Any) -> FitResult:  # noqa: ANN401
    options = {"gamma": 0.01, "loader": data(), "epochs": 1, **options}
    return fxc.fit(fresh(), loss_fn=F.cross_entropy, progress=False, checkpoint=path, **options)


def test_a_finished_run_is_not_trained_further(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    first = one_epoch(path, resume="auto")
    again = one_epoch(path, resume="auto", on_epoch=lambda _: pytest.fail("there is nothing left to do"))
    assert_same_runs(first, again)
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]


@pytest.mark.parametrize(
    ("options", "what"),
    [({"gamma": 0.01}, "the learning rates follow"), ({"gamma": None, "target_size": 0.01}, "the learning rates")],
)
def test_a_course_over_other_epochs_is_refused(options: dict[str, Any], what: str, tmp_path: Path) -> None:
    """The learning rates and the pressure would be those of neither run."""
    path = tmp_path / "run.pt"
    one_epoch(path, **options)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=rf"one of 1 epochs, and this one is of 2: {what}.* pass epochs=1"):
        one_epoch(path, **options, epochs=2, resume=True)
    assert path.read_bytes() == before


class Short(list[Any]):
    """Says that it is longer than it is."""

    def __len__(self) -> int:
        return 6


def test_a_loader_that_gives_less_than_was_done_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    batches = list(data())
    with pytest.raises(TrainingInterrupted):
        train(adam, batches, 4, checkpoint=tmp_path / "run.pt")
    with pytest.raises(CheckpointError, match="had done 4 batches of an epoch, and the loader gives 2"):
        train(adam, Short(batches[:2]), checkpoint=tmp_path / "run.pt", resume=True)


def test_a_run_without_a_course_may_be_made_longer(tmp_path: Path) -> None:
    def run(name: str, **options: Any) -> FitResult:  # noqa: ANN401
        torch.manual_seed(0)
        net = fresh()
        optimizer = adam(net)
        constant = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
        return fxc.fit(
            net, data(), F.cross_entropy, optimizer=optimizer, scheduler=constant, progress=False, prune=False,
            checkpoint=tmp_path / name, **{"gamma": 0.1} | options,
        )  # fmt: skip

    whole = run("a.pt", epochs=3)
    run("b.pt", epochs=1)
    assert_same_runs(whole, run("b.pt", epochs=3, resume=True))
    with pytest.raises(CheckpointError, match="gamma follows a course over all epochs"):
        run("b.pt", epochs=4, resume=True, gamma=ConstantGamma(0.1, warmup=0.5))


def test_another_target_than_the_run_began_with_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def run(name: str, target: float, **options: Any) -> None:  # noqa: ANN401
        net = fresh()
        fxc.fit(
            net, data(), F.cross_entropy, epochs=2, target_size=target, optimizer=adam(net), progress=False,
            checkpoint=tmp_path / name, **options,
        )  # fmt: skip

    def stop(_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    for name, target in (("same", 0.05), ("other", 0.04)):
        with pytest.raises(TrainingInterrupted):
            run(name, 0.05, on_epoch=stop)
        run(name, target, resume=True)
        assert ("began with" in caplog.text) == (target != 0.05)
    assert "the run began with TargetSize target=0.05 and goes on with 0.04" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"run\.pt holds a run already: pass resume=True to go on with it, or delete the file to start anew"),
        ({"resume": True, "gamma": None, "target_size": 0.1}, r"with a ConstantGamma for gamma.* has a TargetSize"),
        ({"resume": True, "loader": data(size=16)}, r"had 6 batches in an epoch, and the loader has 2"),
        ({"resume": True, "loader": data(torch.Generator())}, r"had 0 random generators of its own.* has 1"),
    ],
)
def test_a_run_goes_on_as_it_began_or_not_at_all(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    one_epoch(tmp_path / "run.pt")
    before = (tmp_path / "run.pt").read_bytes()
    with pytest.raises(CheckpointError, match=message):
        one_epoch(tmp_path / "run.pt", **options)
    assert (tmp_path / "run.pt").read_bytes() == before


@pytest.mark.parametrize("resume", [False, True, "auto"])
def test_a_run_that_could_not_be_kept_does_not_begin(resume: Any, tmp_path: Path) -> None:  # noqa: ANN401
    seen: list[object] = []
    for path, why in ((tmp_path / "runs" / "run.pt", "there is no folder .*runs; pass"), (tmp_path, "it is a folder")):
        with pytest.raises(CheckpointError, match=f"cannot write .*: {why}"):
            one_epoch(path, resume=resume, on_epoch=seen.append)
    assert not seen


def test_what_to_resume_must_be_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no file .*run\.pt to go on from.*resume='auto'"):
        one_epoch(tmp_path / "run.pt", resume=True)
    with pytest.raises(ValueError, match=r"resume= needs checkpoint="):
        one_epoch(None, resume=True)
    with pytest.raises(ValueError, match=r"resume='always' is none of True, False and 'auto'"):
        one_epoch(tmp_path / "run.pt", resume="always")
    fxc.save_checkpoint(tmp_path / "own.pt", fresh())
    with pytest.raises(CheckpointError, match=r"of a loop of your own, not of fit\(\)"):
        one_epoch(tmp_path / "own.pt", resume=True)

    class Plain:
        def step(self) -> None: ...

    with pytest.raises(CheckpointError, match=r"Plain has no state_dict and load_state_dict"):
        one_epoch(tmp_path / "run.pt", scheduler=Plain())


# A loop of one's own


def shrunk(make: Make) -> tuple[fxc.CompressedModule, torch.optim.Optimizer, Any]:
    """A network without its block, one step into training."""
    net = fresh()
    optimizer = make(net)
    scheduler = cosine(optimizer, 10)
    set_bits(net, "block.conv2.weight", list(range(8)))
    set_bits(net, "stem.0.weight", [2])
    for name in ("block.bn2.bias", "block.conv2.bias", "stem.1.bias"):
        nn.init.zeros_(net.get_parameter(name))
    net.step()
    step(net, optimizer, scheduler)
    net.prune(optimizer)
    assert not hasattr(net, "block")
    return net, optimizer, scheduler


def step(net: fxc.CompressedModule, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:  # noqa: ANN401
    x, target = next(iter(data()))
    optimizer.zero_grad()
    (F.cross_entropy(net(x), target) + 0.01 * net.size()).backward()
    optimizer.step()
    scheduler.step()
    net.step()


@pytest.mark.parametrize("make", [adam, sgd])
def test_an_optimizer_that_was_built_before(make: Make, tmp_path: Path) -> None:
    first = shrunk(make)
    fxc.save_checkpoint(tmp_path / "run.pt", *first, epoch=4, more={"a": [1, (2.5, None)]})
    net = fresh()
    optimizer = make(net)
    second = (net, optimizer, cosine(optimizer, 10))
    extra = fxc.load_checkpoint(tmp_path / "run.pt", *second)
    assert extra == {"epoch": 4, "more": {"a": [1, (2.5, None)]}}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in net.parameters()}
    for _ in range(2):
        random = torch.get_rng_state()
        step(*first)
        torch.set_rng_state(random)
        step(*second)
    states = [n.state_dict() for n in (first[0], net)]
    assert [name for name, value in states[0].items() if not torch.equal(value, states[1][name])] == []
    assert str(first[1].state_dict()) == str(optimizer.state_dict())
    assert check_scheduler(first[2]).state_dict() == check_scheduler(second[2]).state_dict()


def two_of_them(net: fxc.CompressedModule, loss: nn.Module) -> list[torch.optim.Optimizer]:
    """One for matrices and their kin, and one for all else, which trains a loss as well."""
    weights, rest, *formats = net.param_groups(1e-2)
    rest["params"] = [*loss.parameters(), *rest["params"]]
    return [torch.optim.SGD([weights], momentum=0.9), torch.optim.Adam([rest, *formats])]


def step_both(net: fxc.CompressedModule, loss: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    torch.manual_seed(0)
    x, _ = next(iter(data()))
    for optimizer in optimizers:
        optimizer.zero_grad()
    (loss(net(x)).square().mean() + 0.01 * net.size()).backward()
    for optimizer in optimizers:
        optimizer.step()
    net.step()


def test_several_optimizers_one_of_which_trains_a_loss_as_well(tmp_path: Path) -> None:
    net, loss = shrunk(adam)[0], nn.Linear(4, 2)
    optimizers = two_of_them(net, loss)
    schedulers = [cosine(optimizer, 10) for optimizer in optimizers]
    step_both(net, loss, optimizers)
    fxc.save_checkpoint(tmp_path / "run.pt", net, optimizers, schedulers, loss=loss.state_dict())
    again, loss_again = fresh(), nn.Linear(4, 2)
    others = two_of_them(again, loss_again)
    more = [cosine(optimizer, 10) for optimizer in others]
    loss_again.load_state_dict(fxc.load_checkpoint(tmp_path / "run.pt", again, others, more)["loss"])
    for _ in range(2):
        step_both(net, loss, optimizers)
        step_both(again, loss_again, others)
    for one, other in ((net, again), (loss, loss_again)):
        states = [module.state_dict() for module in (one, other)]
        assert [name for name, value in states[0].items() if not torch.equal(value, states[1][name])] == []
    with pytest.raises(CheckpointError, match="the states of 2 optimizers, and 1 are given"):
        fxc.load_checkpoint(tmp_path / "run.pt", again, others[0])
    with pytest.raises(CheckpointError, match=r"held 2 parameters that are not the network's, and holds 0 now"):
        fxc.load_checkpoint(tmp_path / "run.pt", again, two_of_them(again, nn.ReLU()))


def weights_alone(terms: Any, bits: Tensor) -> Tensor:  # noqa: ANN401 - an objective
    return bits.sum()


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "objective": ({"objective": "eq4"}, "compress(objective='eq5'), and this one is from compress(objective='eq4')"),
    "own objective": ({"objective": weights_alone}, "this one is from compress(objective='weights_alone')"),
    "several": ({"keep_range": False, "bias_shrink": 0.5}, "compress(bias_shrink=0.5, keep_range=False)"),
    "none": ({}, ""),
}


@pytest.mark.parametrize("which", SETTINGS)
def test_other_settings_than_it_began_with_are_told(
    which: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fxc.save_checkpoint(tmp_path / "run.pt", fresh())
    options, message = SETTINGS[which]
    net = fxc.compress(Net(), torch.zeros(2, 1, 6, 6), bits=3.0, **options)
    fxc.load_checkpoint(tmp_path / "run.pt", net)
    assert message in caplog.text
    assert ("goes on as the latter" in caplog.text) == bool(message)


def test_random_generators_go_on(tmp_path: Path) -> None:
    def draw() -> list[float]:
        return [torch.rand(1).item(), random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()]  # noqa: NPY002

    draw()  # numbers from gauss come in pairs: one waits
    fxc.save_checkpoint(tmp_path / "run.pt", fresh())
    expected = draw()
    fxc.load_checkpoint(tmp_path / "run.pt", fresh())
    assert draw() == expected
    fxc.load_checkpoint(tmp_path / "run.pt", fresh(), random=False)
    assert draw() != expected


def test_a_controller_goes_on() -> None:
    first, second = TargetSize(0.02), TargetSize(0.02)
    for progress in (0.0, 0.2, 0.4):
        first(progress, 0.2)
    second.load_state_dict(first.state_dict())
    assert first(0.5, 0.1) == second(0.5, 0.1)


def of_half(net: fxc.CompressedModule) -> torch.optim.Optimizer:
    return torch.optim.Adam(net.param_groups()[:2])


def of_fewer(net: fxc.CompressedModule) -> torch.optim.Optimizer:
    groups = net.param_groups()
    groups[0]["params"] = groups[0]["params"][:1]
    return torch.optim.Adam(groups)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (sgd, r"run\.pt does not fit: its optimizer is Adam, not SGD"),
        (of_half, r"its optimizer has 4 parameter groups, this Adam 2"),
        (of_fewer, r"fc\.weight is in param_groups\[0\] of one optimizer and not of the other"),
    ],
)
def test_an_optimizer_that_does_not_fit_changes_nothing(make: Make, message: str, tmp_path: Path) -> None:
    fxc.save_checkpoint(tmp_path / "run.pt", *shrunk(adam)[:2])
    net = fresh()
    optimizer = make(net)
    groups = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(CheckpointError, match=message):
        fxc.load_checkpoint(tmp_path / "run.pt", net, optimizer)
    assert optimizer.state_dict() == groups
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in fresh().state_dict().items())


def test_bad_calls_are_explained(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    net = fresh()
    with pytest.raises(CheckpointError, match=r"of a network from compress\(\), not of a Net; pass what is inside"):
        fxc.save_checkpoint(path, Net())  # type: ignore[arg-type]
    with pytest.raises(OptimizerError, match="not the network's"):
        fxc.save_checkpoint(path, net, adam(fresh()))
    with pytest.raises(CheckpointError, match=r"cannot save extra\['a'\]\[0\]: a pathlib\S+ would have to be pi"):
        fxc.save_checkpoint(path, net, a=[tmp_path])
    with pytest.raises(CheckpointError, match=r"cannot write .*: there is no folder .*absent; make it first"):
        fxc.save_checkpoint(tmp_path / "absent" / "run.pt", net)
    assert not list(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=r"there is no file .*run\.pt; check the path"):
        fxc.load_checkpoint(path, net)
    fxc.save_checkpoint(path, net)
    with pytest.raises(CheckpointError, match=r"it holds no optimizer: it was saved without"):
        fxc.load_checkpoint(path, net, adam(net))
    with pytest.raises(CheckpointError, match=r"it holds no scheduler"):
        fxc.load_checkpoint(path, net, scheduler=cosine(adam(net), 1))


def test_the_loop_in_the_docs_runs_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "training.md").read_text("utf-8")
    (code,) = (
        c for c in re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL) if "load_checkpoint" in c
    )
    monkeypatch.chdir(tmp_path)
    exec(code.replace("range(start, 10)", "range(start, 4)"), {})
    whole: dict[str, Any] = {}
    exec(code, whole)
    assert whole["start"] == 4
    assert whole["schedule"].last_epoch == 10
    assert read_states("run.pt")["extra"] == {"epoch": 10}


# The file


@pytest.mark.cpu
def test_plain_values_come_back(tmp_path: Path) -> None:
    values = {"a": [1, 2.5, "x", b"y", None, True], "t": torch.arange(3), "n": np.float64(0.5), "d": {1: (torch.int8,)}}
    write_states(tmp_path / "file", values)
    found = read_states(tmp_path / "file")
    assert torch.equal(found.pop("t"), torch.arange(3))
    assert found == {"a": [1, 2.5, "x", b"y", None, True], "n": 0.5, "d": {1: (torch.int8,)}}
    assert type(found["n"]) is float


@pytest.mark.parametrize("harm", ["cut", "flip", "other", "foreign"])
def test_a_damaged_file_is_told(harm: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_states(path, {"a": torch.ones(1000)})
    content = bytearray(path.read_bytes())
    if harm == "flip":  # which torch.load does not see
        content[len(content) // 2] ^= 1
    path.write_bytes({"cut": content[:2000], "flip": content}.get(harm, b"hello"))
    if harm == "foreign":
        torch.save({"a": 1}, path)
    with pytest.raises(CheckpointError, match=r"file is damaged, or was not written by save_checkpoint: .*use another"):
        read_states(path)


def test_a_finalized_network_is_no_checkpoint(tmp_path: Path) -> None:
    net = fxc.compress(nn.Linear(8, 4), torch.zeros(1, 8))
    fxc.save(net.finalize(), tmp_path / "net.fxc")
    with pytest.raises(
        CheckpointError, match=r"net.fxc holds a finalized network, or .*, and no checkpoint: load reads"
    ):
        fxc.load_checkpoint(tmp_path / "net.fxc", net)


def test_a_newer_file_is_told(tmp_path: Path) -> None:
    torch.save({"fxcompress": 99}, tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"has format 99 and this fxcompress reads formats up to 1; upgrade it"):
        read_states(tmp_path / "file")


def test_what_killed_writers_left_is_ignored_and_cleared_away(tmp_path: Path) -> None:
    path, old, new = tmp_path / "file", tmp_path / ".file.0123.tmp", tmp_path / ".file.4567.tmp"
    for left in (old, new):
        left.write_bytes(b"half a fi")
    os.utime(old, (0, 0))
    assert write_atomically(path, lambda file: file.write(b"whole")) == 5
    assert path.read_bytes() == b"whole"
    assert not old.exists()
    assert new.exists()  # somebody may be writing it


@pytest.mark.parametrize("name", ["run.pt", "run"])
def test_what_a_killed_process_left_is_cleared_away_by_the_next_one(name: str, tmp_path: Path) -> None:
    """At the next write, and what others may still be writing is not."""
    path = tmp_path / name
    script = f"""
import os, pathlib, signal
from fxcompress.storage.atomic import write_atomically
write_atomically(pathlib.Path({str(path)!r}), lambda file: os.kill(os.getpid(), signal.SIGKILL))
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False)
    (left,) = tmp_path.iterdir()
    alive = tmp_path / re.sub(r"-\d+-", f"-{os.getpid()}-", left.name)
    elsewhere = tmp_path / re.sub(r"\.[0-9a-f]{8}-", ".0-", left.name)
    other = tmp_path / left.name.replace(name, "other", 1)
    others = (alive, elsewhere, other)
    for temporary in others:
        temporary.write_bytes(b"half a fi")

    def write() -> None:
        write_atomically(path, lambda file: file.write(b"whole"))

    write()
    assert left.exists()  # for a while
    for temporary in (left, *others):
        os.utime(temporary, (time.time() - 100, time.time() - 100))
    write()
    assert not left.exists()
    assert all(temporary.exists() for temporary in others)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_states(path, {"a": 1})

    def fail(file: BinaryIO) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, fail)
    assert read_states(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


WRITER = """
import os, signal, sys, time, torch
from fxcompress.storage.states import read_states, write_states

def write(n):
    write_states(sys.argv[1], {"n": n, "t": torch.full((200_000,), float(n))})

write(0)
for attempt in range(8):
    child = os.fork()
    if not child:
        for n in range(10**6):
            write(n)
    time.sleep(0.02 + 0.003 * attempt)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found = read_states(sys.argv[1])
    assert torch.equal(found["t"], torch.full((200_000,), float(found["n"])))
    print(found["n"])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_writer_that_is_killed_leaves_a_whole_file(tmp_path: Path) -> None:
    """Killed again and again, at whatever moment it is."""
    command = [sys.executable, "-c", WRITER, str(tmp_path / "file")]
    run = subprocess.run(command, capture_output=True, cwd=ROOT, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.split()) == 8


# Ctrl-C and SIGTERM

SCRIPT = """
import sys, torch, torch.nn.functional as F, fxcompress as fxc
from tests.test_checkpoint import data, fresh
def loss(output, target):
    print("step", flush=True)
    return F.cross_entropy(output, target)
fxc.fit(fresh(), data(), loss, epochs=10**6, gamma=0.01, progress=False, checkpoint=sys.argv[1], resume="auto")
"""


@pytest.mark.skipif(os.name != "posix", reason="needs signals that a parent can send")
@pytest.mark.parametrize(
    ("number", "notice"),
    [
        (signal.SIGINT, "stopping after this step; press Ctrl-C again to stop at once"),
        (signal.SIGTERM, "SIGTERM: stopping after this step; a second one stops at once"),
    ],
)
def test_a_signal_ends_a_script_and_leaves_a_checkpoint(number: int, notice: str, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, text=True
    ) as script:
        assert script.stdout is not None
        assert script.stderr is not None
        for _ in range(8):
            script.stdout.readline()
        script.send_signal(number)
        error = script.stderr.read()
    assert script.returncode == 1
    assert notice in error
    assert f"go on with fit(..., checkpoint='{path}', resume=True)" in error
    extra = fxc.load_checkpoint(path, fresh())
    assert extra["fit"]["done"] >= 7
    assert extra["fit"]["batch"] == extra["fit"]["done"] % 6 or extra["fit"]["batch"] == 6


WITH_WORKERS = SCRIPT.replace("data()", "data(workers=2)")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_workers_of_a_loader_as_well(number: int, tmp_path: Path) -> None:
    """As a terminal sends Ctrl-C, and a scheduler SIGTERM: to all processes of the group."""
    path = tmp_path / "run.pt"
    with subprocess.Popen(
        [sys.executable, "-c", WITH_WORKERS, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT,
        text=True, start_new_session=True,
    ) as script:  # fmt: skip
        assert script.stdout is not None
        assert script.stderr is not None
        for _ in range(8):
            script.stdout.readline()
        os.killpg(script.pid, number)
        error = script.stderr.read()
    assert error.count("stopping after this step") == 1
    assert f"go on with fit(..., checkpoint='{path}', resume=True)" in error
    assert "Exception ignored" not in error
    assert fxc.load_checkpoint(path, fresh())["fit"]["done"] >= 7


@pytest.mark.skipif(not hasattr(signal, "SIGCHLD"), reason="needs SIGCHLD")
def test_the_death_of_a_worker_is_no_error_once_a_signal_has_come() -> None:
    """PyTorch raises one from a handler, wherever the program is just then."""

    def fail(*_: object) -> None:
        raise RuntimeError("DataLoader worker is killed by signal")

    before = signal.signal(signal.SIGCHLD, fail)
    try:
        with Interrupt():
            with pytest.raises(RuntimeError, match="is killed"):
                signal.raise_signal(signal.SIGCHLD)
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGCHLD)
        assert signal.getsignal(signal.SIGCHLD) is fail
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_the_second_ctrl_c_stops_at_once() -> None:
    before = signal.getsignal(signal.SIGTERM)

    def press_twice() -> None:
        with Interrupt() as interrupt:
            signal.raise_signal(signal.SIGINT)
            assert interrupt.requested
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as caught:
        press_twice()
    assert type(caught.value) is KeyboardInterrupt
    assert signal.getsignal(signal.SIGTERM) is before
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_second_sigterm_goes_to_the_former_handler() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    try:
        with Interrupt() as interrupt:
            signal.raise_signal(signal.SIGTERM)
            assert interrupt.requested
            assert seen == []
            signal.raise_signal(signal.SIGTERM)
        assert seen == [signal.SIGTERM]
        with Interrupt():
            pass
        signal.raise_signal(signal.SIGTERM)
        assert len(seen) == 2
    finally:
        signal.signal(signal.SIGTERM, before)


def test_without_a_checkpoint_the_network_is_in_the_exception() -> None:
    with pytest.raises(
        TrainingInterrupted, match=r"after step 8 of 30, with 1 of 5 epochs .*nothing was saved"
    ) as stop:
        train(adam, data(), stop=8)
    assert isinstance(stop.value.net, fxc.CompressedModule)
    assert stop.value.checkpoint is None
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_is_left_alone_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM)
    seen: list[list[object]] = []

    def enter() -> None:
        with Interrupt():
            seen.append([signal.getsignal(number) for number in numbers])

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        enter()
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    assert seen == [before, [signal.SIG_IGN] * 2]
