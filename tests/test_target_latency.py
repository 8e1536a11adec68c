"""A share of the latency as a target, and both targets in loops of one's own."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.objectives.curves import Curve
from fxcompress.training.costs import Cost, Macs, Seconds
from fxcompress.training.importance import Importance
from tests.test_fit import Digits
from tests.test_selection import X, batches, fitted, macs


class Mixed(nn.Module):
    """A sum, a depthwise convolution, and one in four groups."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.depthwise = nn.Conv2d(width, width, 3, groups=width)
        self.grouped = nn.Conv2d(width, 8, 3, groups=4)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        x = x + self.second(x).relu()
        result: Tensor = self.out(self.grouped(self.depthwise(x).relu()).relu().mean((2, 3)))
        return result


def like_macs(net: Any, factors: dict[str, float] | None = None) -> fxc.LatencyTable:  # noqa: ANN401
    """A table whose seconds are multiply-adds, times a factor for some layers."""
    curves: list[Curve] = []
    layers: dict[str, tuple[int, ...]] = {}
    terms = net.fxc_all_terms()
    for number, use in enumerate(terms.uses):
        weight = net.get_parameter(use.weight)
        groups = use.inputs // weight.shape[1]
        each = (factors or {}).get(use.weight, 1.0) * float(terms.macs[use.blocks[0]])
        outputs, inputs = np.arange(1, use.outputs + 1), np.arange(1, use.inputs + 1)
        if groups > 1:
            outputs = np.arange(1, groups + 1) * (use.outputs // groups)
            inputs = np.arange(1, groups + 1) * (use.inputs // groups)
            seconds = (each * outputs * (use.inputs // groups))[:, None]
        else:
            seconds = each * outputs[:, None] * inputs[None, :]
        curves.append(Curve(tuple(outputs.tolist()), tuple(inputs.tolist()), groups, seconds.astype(float)))
        layers[use.weight] = (number,)
    return fxc.LatencyTable(tuple(curves), layers)


def costs(net: fxc.CompressedModule) -> tuple[list[Cost], np.ndarray]:
    importance = Importance(net)
    terms = net.fxc_all_terms()
    return [Macs(terms, importance.unit), Seconds(terms, importance.unit, like_macs(net))], importance.unit


@pytest.mark.parametrize("model", [Digits, Mixed])
def test_what_a_set_saves_is_what_is_missing_without_it(model: type[nn.Module]) -> None:
    found, unit = costs(fxc.compress(model(), X))
    alive = np.ones(len(unit), dtype=bool)
    counted, timed = found
    assert counted.left(alive) == pytest.approx(1.0)
    assert timed.left(alive) == pytest.approx(1.0)
    for one in np.unique(unit[unit >= 0]):
        missing = 1 - counted.left(unit != one)
        assert counted.saved(alive)[one] == pytest.approx(missing)
        assert timed.saved(alive)[one] == pytest.approx(missing, rel=0.3)  # to first order


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.0, 0.9), st.booleans())
def test_seconds_in_proportion_to_multiply_adds_are_counted_as_these(seed: int, share: float, mixed: bool) -> None:  # noqa: FBT001
    torch.manual_seed(seed)
    found, unit = costs(fxc.compress((Mixed if mixed else Digits)(), X))
    gone = np.unique(unit[unit >= 0])
    gone = gone[torch.rand(len(gone), device="cpu").numpy() < share]
    lefts = [cost.left(~np.isin(unit, gone)) for cost in found]
    assert lefts[0] == pytest.approx(lefts[1])


def test_a_run_ends_at_the_share_of_the_seconds_and_spares_what_is_fast(capsys: pytest.CaptureFixture[str]) -> None:
    """A layer that takes nearly all of the time, though hardly any multiply-adds, is the one that shrinks."""
    torch.manual_seed(0)
    net = fxc.compress(Mixed(16), X, death_limit=0.1)
    table = like_macs(net, {"depthwise.weight": 100.0, "first.weight": 1e-3})
    result = fxc.fit(
        net, batches(10), lambda out, y: F.cross_entropy(out, y % 3), epochs=12, progress=False,
        target_latency=0.5, latency_table=table,
    )  # fmt: skip
    assert result.latency is not None
    assert 0.35 < result.latency <= 0.51
    assert f"seconds of its layers, by the table: {result.latency:.1%}" in str(result)
    assert result.module.get_parameter("depthwise.weight").shape[0] == 8


class Counted:
    """Seconds that do not depend on the machine, and are others each time."""

    def __init__(self, factor: float = 1.0) -> None:
        self.calls, self.factor = 0, factor

    def __call__(self, grids: Any, repeats: int, whole: Any, *, progress: bool) -> tuple[list[np.ndarray], float]:  # noqa: ANN401
        self.calls += 1
        whole()
        found = [
            np.array(outputs, float)[:, None] + 0.01 * self.calls * self.factor
            if work.groups > 1
            else np.outer(np.array(outputs, float), np.array(inputs, float)) + 0.01 * self.calls * self.factor
            for work, outputs, inputs in grids
        ]
        return found, 1.5 * sum(float(times.max()) for times in found)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    found = Counted()
    monkeypatch.setattr("fxcompress.objectives.latency.measure", found)
    return found


def test_layers_are_measured_where_no_table_is_given(tmp_path: Path, counted: Counted) -> None:
    """And a run that is taken up goes on with what was measured when it began."""
    torch.manual_seed(0)
    path, stop = tmp_path / "run.pt", 30
    steps = 0

    def loss(output: Tensor, target: Tensor) -> Tensor:
        nonlocal steps
        steps += 1
        if steps == stop:
            raise KeyboardInterrupt
        return F.cross_entropy(output, target)

    def run(**options: Any) -> Any:  # noqa: ANN401
        torch.manual_seed(0)
        return fxc.fit(
            Digits(), batches(), loss, epochs=10, progress=False, target_latency=0.6, checkpoint=path, **options
        )

    with pytest.raises(KeyboardInterrupt):
        run()
    kept = torch.load(path, weights_only=True)["extra"]["fit"]["selection"]["table"]
    result = run(resume=True)
    assert result.latency <= 0.61
    assert counted.calls == 1
    again = torch.load(path, weights_only=True)["extra"]["fit"]["selection"]["table"]
    assert kept == again
    assert fxc.LatencyTable.from_json(json.loads(json.dumps(kept))).layers.keys() == {
        use.weight for use in result.net.fxc_all_terms().start.uses
    }


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"target_macs": 0.5, "target_latency": 0.5}, ValueError, r"either target_macs= or target_latency="),
        ({"target_macs": 0.5, "latency_table": 3}, ValueError, r"latency_table= is for target_latency="),
        (
            {"target_latency": 0.5, "latency_table": 3},
            TypeError,
            r"latency_table= is a int; pass LatencyTable\.measure",
        ),
        ({"target_latency": 1.5}, ValueError, r"target_latency=1\.5 must be a share of the latency"),
        ({"target_latency": "x"}, TypeError, r"target_latency='x' is a str"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_done(
    options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        fxc.fit(Digits(), batches(), F.cross_entropy, epochs=1, progress=False, **options)


def test_what_hardly_depends_on_widths_is_refused_before_anything_is_lost() -> None:
    """Or a network would lose nine tenths of its channels for nothing."""
    net = fxc.compress(Digits(), X)
    table = like_macs(net)
    slow = [replace(c, measured=c.measured.max() + c.measured * 0.01) for c in table.curves]
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"target_latency=0\.5 cannot be reached: 0\.99\d* of the latency.*a larger batch"
    ):
        fitted(net, None, target_latency=0.5, latency_table=fxc.LatencyTable(tuple(slow), table.layers))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_table_of_another_network_is_refused() -> None:
    table = like_macs(fxc.compress(Mixed(), X))
    with pytest.raises(ValueError, match=r"the latency table holds no layer"):
        fitted(Digits(), None, target_latency=0.5, latency_table=table)


def own_loop(net: fxc.CompressedModule, count: int, **options: Any) -> Iterator[tuple[Any, Any]]:  # noqa: ANN401
    """Ten epochs of a user's own; after each step what selects, and the optimizer."""
    optimizer = torch.optim.Adam(net.param_groups(1e-3))
    selection = fxc.select_channels(net, optimizer, steps=count, **options)
    data = batches()
    for step in range(count):
        x, y = data[step % len(data)]
        loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        net.step()
        if step % 7 == 6:
            net.prune(optimizer)
        yield selection, optimizer


@pytest.mark.parametrize("kind", ["macs", "latency"])
def test_a_loop_of_ones_own_gets_there_too(kind: str) -> None:
    torch.manual_seed(0)
    model = Digits()
    net = fxc.compress(model, X)
    more = {} if kind == "macs" else {"latency_table": like_macs(net)}
    *_, (selection, optimizer) = own_loop(net, 100, **{f"target_{kind}": 0.4}, **more)
    net.prune(optimizer)
    assert 0.3 < selection.left() <= 0.41
    assert macs(net.finalize()) / macs(model) == pytest.approx(selection.left())
    bits = torch.cat([b.detach() for b in net.fxc_bits])
    assert bits.min() > 5, "what stays keeps its bits"
    selection.stop()
    before = [b.detach().clone() for b in net.fxc_bits]
    optimizer.zero_grad()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, net.fxc_bits, strict=True))


def test_a_loop_of_ones_own_is_taken_up_with_its_state() -> None:
    """By way of JSON, in the middle of the path."""

    def start() -> fxc.CompressedModule:
        torch.manual_seed(0)
        return fxc.compress(Digits(), X)

    whole = start()
    for step, (selection, optimizer) in enumerate(own_loop(whole, 60, target_macs=0.4)):
        if step == 20:
            state = json.loads(json.dumps(selection.state_dict()))
            kept = {k: v.clone() for k, v in whole.state_dict().items()}
            moments = optimizer.state_dict()
            break
    again = start()
    again.load_state_dict(kept)
    optimizer = torch.optim.Adam(again.param_groups(1e-3))
    optimizer.load_state_dict(moments)
    taken_up = fxc.select_channels(again, optimizer, steps=60, target_macs=0.4, state=state)
    assert taken_up.left() == selection.left() < 1
    assert taken_up.state_dict() == state


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"steps": 0, "target_macs": 0.5}, ValueError, r"steps=0 must be a whole number"),
        ({"steps": 1.5, "target_macs": 0.5}, ValueError, r"steps=1\.5 must be a whole number"),
        ({"steps": 10}, ValueError, r"pass target_macs= or target_latency="),
    ],
)
def test_a_loop_without_end_or_aim_is_refused(options: dict[str, Any], error: type[Exception], words: str) -> None:
    net = fxc.compress(Digits(), X)
    optimizer = torch.optim.Adam(net.param_groups(1e-3))
    with pytest.raises(error, match=words):
        fxc.select_channels(net, optimizer, **options)


def test_a_plain_network_is_refused() -> None:
    model: Any = Digits()
    with pytest.raises(TypeError, match=r"net is a Digits; pass the network that compress\(\) has returned"):
        fxc.select_channels(model, torch.optim.Adam(model.parameters()), steps=3, target_macs=0.5)


@pytest.mark.parametrize("other", [False, True], ids=["the same optimizer", "another optimizer"])
@pytest.mark.parametrize("after", [0, 9])
def test_a_second_selection_takes_the_place_of_the_first(
    after: int, other: bool, caplog: pytest.LogCaptureFixture  # noqa: FBT001
) -> None:  # fmt: skip
    """As if the first had been stopped, in a loop or by ``fit``, with a word of it; before channels fall or then."""
    found = []
    for stop in (True, False):
        torch.manual_seed(0)
        net = fxc.compress(Digits(), X)
        steps = zip(range(after + 1), own_loop(net, 60, target_macs=0.2), strict=False)
        *_, (_, (first, optimizer)) = steps
        if stop:
            first.stop()
        if other:
            optimizer = torch.optim.Adam(net.param_groups(1e-3))
            fxc.fit(
                net, batches(), F.cross_entropy, epochs=2, target_macs=0.4, optimizer=optimizer, progress=False, prune=5
            )
        else:
            second = fxc.select_channels(net, optimizer, steps=20, target_macs=0.4)
            for x, y in batches() * 2:
                optimizer.zero_grad()
                F.cross_entropy(net(x), y).backward()
                optimizer.step()
                net.step()
            assert 0.3 < second.left() <= 0.42
        assert ("was on its way to 0.2 of the multiply-adds" in caplog.text) == (not stop)
        found.append(net.state_dict())
    assert found[0].keys() == found[1].keys()
    assert [name for name, value in found[0].items() if not torch.equal(value, found[1][name])] == []


def test_a_search_leaves_a_network_on_its_way(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    net = fxc.compress(Digits(), X)
    *_, (_, (selection, _)) = zip(range(20), own_loop(net, 60, target_macs=0.4), strict=False)
    before = selection.state_dict()
    assert any(step is not None for step in before["chosen"])
    fxc.fit_to_accuracy(
        net, batches(2), F.cross_entropy, min_accuracy=0.5, validate=lambda _: 1.0, by="macs", rounds=1, epochs=1,
        progress=False,
    )  # fmt: skip
    assert "on its way" not in caplog.text
    assert selection.state_dict() == before
