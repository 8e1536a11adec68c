"""``fit_to_accuracy``: the smallest network that keeps an accuracy, on real data, and its errors."""

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.errors import CheckpointError
from fxcompress.training.bracket import CLOSE, Bracket
from fxcompress.training.history import EpochRecord
from tests.test_fit import Digits, digits
from tests.test_target_latency import Counted, counted

__all__ = ["counted"]


@given(st.floats(1e-4, 0.2499), st.floats(0.25, 0.8))
def test_the_bracket_closes_on_the_smallest_size_that_keeps(limit: float, start: float) -> None:
    bracket, tried = Bracket(start), []
    for _ in range(30):
        size = bracket.next()
        if size is None:
            break
        assert size < (bracket.kept or start)
        tried.append(size)
        bracket.see(size, kept=size >= limit)
    assert len(set(tried)) == len(tried) < 30
    assert bracket.kept is None or limit <= bracket.kept
    assert (bracket.kept or start) <= CLOSE * CLOSE * limit


@given(st.lists(st.tuples(st.floats(0.001, 0.5), st.booleans()), max_size=12))
def test_the_bracket_takes_outcomes_that_contradict_each_other(outcomes: list[tuple[float, bool]]) -> None:
    bracket = Bracket(0.5)
    for size, kept in outcomes:
        bracket.see(size, kept=kept)
        assert bracket.kept is None or bracket.failed is None or bracket.failed < bracket.kept
        following = bracket.next()
        assert following is None or following < (bracket.kept or 0.5)


def accuracy_on(x: Tensor, y: Tensor) -> Any:  # noqa: ANN401
    def accuracy(net: nn.Module) -> float:
        return float((net(x).argmax(1) == y).float().mean())

    return accuracy


def trained() -> Digits:
    """A network for digits in floats."""
    torch.manual_seed(0)
    model, (loader, *_) = Digits(), digits()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    schedule = fxc.cosine(optimizer, 8 * len(loader))
    for x, y in loader * 8:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        schedule.step()
    return model


@pytest.mark.parametrize("by", ["macs", "latency"])
def test_the_network_of_least_cost_for_digits_keeps_its_accuracy(by: Any, counted: Counted) -> None:  # noqa: ANN401
    model, (loader, x, y) = trained(), digits()
    accuracy = accuracy_on(x, y)
    with torch.no_grad():
        least = accuracy(model.eval()) - 0.03
    model.train()
    found = fxc.fit_to_accuracy(
        model, loader, F.cross_entropy, min_accuracy=least, validate=accuracy, epochs=4, rounds=2, lr=2e-3, by=by,
        progress=False,
    )  # fmt: skip
    assert counted.calls == (by == "latency")
    assert [round_.target is None for round_ in found.rounds] == [True] + [False] * (len(found.rounds) - 1)
    assert found.kept
    assert found.metric >= least
    assert found.size < 0.8
    assert found.net.fractional_size() / found.net.weights_left() > 6 / 32, "what stays keeps its bits"
    assert found.size == (
        pytest.approx(found.net.macs_left()) if by == "macs" else min(r.size for r in found.rounds if r.kept)
    )
    word = {"macs": "multiply-adds", "latency": "latency"}[by]
    assert f"the smallest that is good enough: {word} {found.size:.2%}" in str(found)


def test_a_search_ends_at_what_the_graph_lets_go() -> None:
    """Where every accuracy is good enough, all that may go has gone, and no round asks for less."""
    torch.manual_seed(0)
    loader = digits()[0]
    found = fxc.fit_to_accuracy(
        Digits(), loader, F.cross_entropy, min_accuracy=0.0, validate=lambda net: 1.0, epochs=2, rounds=9, by="macs",
        progress=False,
    )  # fmt: skip
    assert 4 <= len(found.rounds) < 9
    assert min(r.size for r in found.rounds) == found.size < 0.05
    assert [r.kept for r in found.rounds] == [True] * len(found.rounds)


def test_the_smallest_network_for_digits_keeps_its_accuracy(tmp_path: Path) -> None:
    model, (loader, x, y) = trained(), digits()
    accuracy = accuracy_on(x, y)
    with torch.no_grad():
        least = accuracy(model.eval()) - 0.03
    assert least > 0.85
    model.train()
    state, path = copy.deepcopy(model.state_dict()), tmp_path / "best.fxc"
    found = fxc.fit_to_accuracy(
        model, loader, F.cross_entropy, min_accuracy=least, validate=accuracy, epochs=3, rounds=2, lr=2e-3,
        path=path, progress=False,
    )  # fmt: skip
    assert found.kept
    assert found.rounds[0].size == pytest.approx(0.25)  # 8 bits
    assert found.size < 0.13  # at least one round kept it
    assert found.metric == accuracy(found.module) >= least
    assert [r.kept for r in found.rounds] == [r.metric >= least for r in found.rounds]
    assert found.size == min(r.size for r in found.rounds if r.kept) == found.net.fractional_size()
    assert not found.module.training
    assert "the smallest that is good enough: bits" in str(found)
    assert str(found).count("accuracy") == 1 + len(found.rounds)
    assert ".module: Digits with" in str(found)
    assert torch.equal(fxc.load(path, Digits())(x), found.module(x))
    assert model.training
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


def test_a_compressed_network_is_left_as_it_is_and_keeps_its_objective(tmp_path: Path) -> None:
    model, (loader, x, y) = trained(), digits()
    net = fxc.compress(model, x[:2], objective="macs")
    state = copy.deepcopy(net.state_dict())
    records: list[EpochRecord] = []
    found = fxc.fit_to_accuracy(
        net, loader * 3, F.cross_entropy, min_accuracy=0.2, validate=accuracy_on(x, y), epochs=1, rounds=2,
        progress=False, on_epoch=records.append,
    )  # fmt: skip
    assert [round_.target for round_ in found.rounds] == [None, pytest.approx(0.125), pytest.approx(0.0625, rel=0.2)]
    assert len(records) == 2
    assert found.net is not net
    assert found.net.settings.objective == net.settings.objective
    assert all(torch.equal(state[k], v) for k, v in net.state_dict().items())


def test_from_random_weights_the_first_round_trains_them() -> None:
    torch.manual_seed(0)
    loader, x, y = digits()
    found = fxc.fit_to_accuracy(
        Digits(), loader, F.cross_entropy, min_accuracy=0.85, validate=accuracy_on(x, y), epochs=6, rounds=1,
        fine_tune=False, lr=5e-3, progress=False,
    )  # fmt: skip
    first, second = found.rounds
    assert not first.kept
    assert second.kept
    assert found.size == second.size < 0.14


def test_where_no_network_is_good_enough_the_best_is_returned_and_told(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    loader, *_ = digits()
    answers = itertools.chain([0.1, 0.0, 0.3, 0.0], itertools.repeat(0.2))  # at the start, an epoch, its result ...
    found = fxc.fit_to_accuracy(
        Digits(), loader * 3, F.cross_entropy, min_accuracy=0.9, validate=lambda net: next(answers), epochs=1,
        rounds=2, path=tmp_path / "best.fxc", progress=False,
    )  # fmt: skip
    assert not found.kept
    assert found.metric == 0.3
    assert "none is good enough" in str(found)
    assert "no network reached min_accuracy=0.9" in caplog.text
    assert [r.target for r in found.rounds[1:]] == [pytest.approx(0.125), pytest.approx((0.25 * 0.125) ** 0.5, rel=0.1)]
    assert not (tmp_path / "best.fxc").exists()


def test_the_best_network_is_in_its_file_when_a_run_is_stopped(tmp_path: Path) -> None:
    loader, x, y = digits()
    path, seen = tmp_path / "best.fxc", []

    def stop(record: EpochRecord) -> None:
        seen.append(record)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fxc.fit_to_accuracy(
            Digits(), loader * 3, F.cross_entropy, min_accuracy=0.0, validate=accuracy_on(x, y), epochs=1, rounds=3,
            path=path, progress=False, on_epoch=stop,
        )  # fmt: skip
    assert fxc.load(path, Digits())(x[:3]).shape == (3, 10)
    eight_bits = fxc.save(fxc.compress(Digits(), x[:2]).finalize(), tmp_path / "start.fxc")
    assert path.stat().st_size < eight_bits


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"target_size": 0.1}, ValueError, "target_size= is no argument of fit_to_accuracy: each round has its own"),
        ({"optimizer": None}, ValueError, "optimizer= is no argument"),
        ({"epoch": 3}, TypeError, "epoch= is no argument of fit_to_accuracy, nor of fit"),
        ({"min_accuracy": "90"}, TypeError, "min_accuracy='90' is a str"),
        ({"rounds": 0}, ValueError, "rounds=0 must be at least 1"),
        ({"epochs": 0}, ValueError, "epochs=0 must be at least 1"),
        ({"validate": 0.9}, TypeError, "validate"),
        ({"validate": lambda net: None}, TypeError, "min_accuracy= needs the accuracy"),
        ({"path": "no/such/folder/best.fxc"}, CheckpointError, "there is no folder"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    loader, x, y = digits()
    given: dict[str, Any] = {"min_accuracy": 0.5, "validate": accuracy_on(x, y), "epochs": 1, "progress": False}
    with pytest.raises(kind, match=message):
        fxc.fit_to_accuracy(Digits(), loader[:1], F.cross_entropy, **(given | options))


def test_rounds_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    loader, x, y = digits()
    fxc.fit_to_accuracy(
        Digits(), loader[:1], F.cross_entropy, min_accuracy=0.0, validate=accuracy_on(x, y), epochs=1, rounds=1
    )
    shown = capsys.readouterr().out
    assert "at the start: bits 25.00% accuracy" in shown
    assert "round 1: bits" in shown


def test_an_accuracy_in_another_unit_is_refused_before_anything_is_shown_or_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "best.fxc"
    for least, found in ((91.5, 0.9), (0.9, 91.5)):  # no network would be good enough, or the first one at once

        def measured(net: nn.Module, found: float = found) -> float:
            return found

        with pytest.raises(ValueError, match="in percent"):
            fxc.fit_to_accuracy(
                Digits(), digits()[0][:2], F.cross_entropy, min_accuracy=least, validate=measured, epochs=1,
                by="latency", path=path,
            )  # fmt: skip
    assert capsys.readouterr() == ("", "")
    assert not path.exists()
