"""Schedulers in ``fit``: ReduceLROnPlateau, those of other optimizers, and those that count epochs or stop the bits."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR, LinearLR, OneCycleLR, ReduceLROnPlateau, StepLR

import fxcompress as fxc
from fxcompress.errors import OptimizerError
from fxcompress.training.fit import FitResult
from fxcompress.training.interrupt import TrainingInterrupted
from tests.test_checkpoint import assert_same_runs, data, fresh


def run(
    validate: Callable[[nn.Module], float | None] | None,
    stop: int = 0,
    mode: Literal["min", "max"] = "max",
    **options: Any,  # noqa: ANN401
) -> tuple[FitResult, list[dict[str, float]]]:
    """A run with a learning rate that is halved after each epoch that is no better, and the rates of each epoch."""
    net = fresh()
    optimizer = torch.optim.Adam(net.param_groups(5e-3))
    plateau = ReduceLROnPlateau(optimizer, mode, factor=0.5, patience=0)
    rates: list[dict[str, float]] = []
    calls = 0

    def loss(output: Tensor, target: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == stop:
            signal.raise_signal(signal.SIGINT)
        return F.cross_entropy(output, target)

    result = fxc.fit(
        net, data(), loss, epochs=5, target_size=0.02, optimizer=optimizer, scheduler=plateau, validate=validate,
        on_epoch=lambda _: rates.append({g["name"]: g["lr"] for g in optimizer.param_groups}), progress=False, prune=2,
        **options,
    )  # fmt: skip
    return result, rates


def test_all_learning_rates_fall_where_the_metric_stands_still() -> None:
    torch.manual_seed(0)
    metrics = iter([0.5, 0.4, 0.6, 0.6, 0.9])
    result, rates = run(lambda _: next(metrics))
    assert [found["weights"] for found in rates] == [5e-3, 2.5e-3, 2.5e-3, 1.25e-3, 1.25e-3]
    assert [found["bits"] for found in rates] == [0.5, 0.25, 0.25, 0.125, 0.125]
    assert [record.metric for record in result.history] == [0.5, 0.4, 0.6, 0.6, 0.9]


def test_without_a_metric_it_is_the_loss_that_counts() -> None:
    torch.manual_seed(0)
    result, rates = run(None, mode="min")
    losses = [record.loss for record in result.history]
    expected, best, rate = [], float("inf"), 5e-3
    for loss in losses:
        if loss < best * (1 - 1e-4):
            best = loss
        else:
            rate /= 2
        expected.append(rate)
    assert [found["weights"] for found in rates] == expected


@pytest.mark.parametrize("stops", [(12, 20)], ids=["at the end of an epoch and inside of one"])
def test_a_run_that_was_stopped_comes_out_the_same(stops: tuple[int, ...], tmp_path: Path) -> None:
    def falls(net: nn.Module) -> float:
        return float(net(torch.ones(1, 1, 6, 6)).sum() + torch.rand(1))

    torch.manual_seed(0)
    whole, rates = run(falls)
    assert len({found["weights"] for found in rates}) > 1
    torch.manual_seed(0)
    resume, done = False, 0
    for stop in stops:
        with pytest.raises(TrainingInterrupted):
            run(falls, stop - done, checkpoint=tmp_path / "run.pt", resume=resume)
        torch.manual_seed(99)
        resume, done = True, stop
    resumed, later = run(falls, checkpoint=tmp_path / "run.pt", resume=True)
    assert_same_runs(whole, resumed)
    assert later == rates[-len(later) :]


def test_what_rises_must_be_measured() -> None:
    with pytest.raises(ValueError, match=r'mode="max"\) waits for a number that rises.*pass validate='):
        run(None, mode="max")
    with pytest.raises(TypeError, match="validate returned None, and the scheduler needs the accuracy"):
        run(lambda _: None)


@pytest.mark.parametrize("own", [True, False], ids=["an optimizer", "none"])
@pytest.mark.parametrize("make", [ReduceLROnPlateau, lambda optimizer: StepLR(optimizer, 1)], ids=["plateau", "steps"])
def test_a_scheduler_of_another_optimizer_is_refused(make: Any, own: bool) -> None:  # noqa: ANN401, FBT001
    """It would set learning rates that nobody reads."""
    net = fresh()
    options: dict[str, Any] = {"optimizer": torch.optim.Adam(net.param_groups())} if own else {}
    other = torch.optim.Adam(net.param_groups())
    with pytest.raises(OptimizerError, match=r"of another Adam than the one that trains the network.*optimizer="):
        fxc.fit(net, data(), F.cross_entropy, epochs=1, gamma=0.1, scheduler=make(other), progress=False, **options)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda optimizer: StepLR(optimizer, 3, 0.1), True),
        (lambda optimizer: ExponentialLR(optimizer, 0.5), True),
        (lambda optimizer: StepLR(optimizer, 20, 0.1), False),
        (lambda optimizer: LinearLR(optimizer, 1e-3, 1.0, 30), False),
        (lambda optimizer: fxc.cosine(optimizer, 30, 3), False),
        (None, False),
    ],
    ids=["steps for epochs", "falls for epochs", "steps", "a long warm-up", "cosine", "the default"],
)
def test_a_scheduler_that_counts_epochs_is_told(make: Any, told: bool, caplog: pytest.LogCaptureFixture) -> None:  # noqa: ANN401, FBT001
    """It is stepped after each batch, and learning rates would be 0 before anything was learnt."""
    net = fresh()
    optimizer = torch.optim.Adam(net.param_groups())
    scheduler = make(optimizer) if make is not None else None
    fxc.fit(net, data(), F.cross_entropy, epochs=5, gamma=0.1, optimizer=optimizer, scheduler=scheduler, progress=False)
    assert ("after 6 of 30 steps, the scheduler has let the learning rate fall" in caplog.text) == told
    assert caplog.text.count("it is stepped after each batch") == told


Make = Callable[[fxc.CompressedModule], torch.optim.Optimizer]


@pytest.mark.parametrize(
    ("make", "one_rate", "gamma", "told"),
    [
        (lambda net: torch.optim.Adam(net.param_groups()), False, 0.1, False),
        (lambda net: torch.optim.Adam(net.param_groups()), True, 0.1, True),
        (lambda net: torch.optim.Adam(net.param_groups()), True, 0.0, False),
        (lambda net: torch.optim.SGD(net.param_groups(1e-2, bits_lr=0.05)), False, 0.1, True),
        (lambda net: torch.optim.SGD(net.param_groups(1e-2, bits_lr=500, exponents_lr=0.05)), False, 0.1, False),
    ],
    ids=["adam", "one rate for all", "without pressure", "sgd", "sgd with its own rates"],
)
def test_bits_that_pressure_has_not_moved_are_told(
    make: Make,
    one_rate: bool,  # noqa: FBT001
    gamma: float,
    told: bool,  # noqa: FBT001
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.manual_seed(0)
    net = fresh()
    optimizer = make(net)
    loader = list(data()) * 4
    scheduler = OneCycleLR(optimizer, 1e-3, total_steps=120) if one_rate else StepLR(optimizer, 1000)
    fxc.fit(
        net, loader, F.cross_entropy, epochs=5, gamma=gamma, optimizer=optimizer, scheduler=scheduler, progress=False
    )
    assert ("120 steps with a gamma of 0.1 have left the bits as they were" in caplog.text) == told
