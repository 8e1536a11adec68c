"""The latency table: interpolation, noise, files, and the objective against multiply-adds."""

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from rich.progress import Progress
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fxcompress as fxc
from fxcompress.errors import StorageError
from fxcompress.objectives import latency, timing
from fxcompress.objectives.curves import Curve, isotonic
from fxcompress.objectives.timing import Widths, Work
from tests.nets import quantizer, set_bits
from tests.networks import Example, examples
from tests.test_costs import NETS, Dying, Twice, double
from tests.test_objectives import Residual, chain, compressed

INPUTS = torch.zeros(1, 3, 8, 8)
SPEED = 1e9


def counted(
    grids: Sequence[tuple[Work, Widths, Widths]], repeats: int, whole: object = None, *, progress: bool
) -> tuple[list[np.ndarray], float]:
    """In place of seconds: the multiply-adds that torch counts in the call that would be timed, over a speed."""

    def flops(work: Work, outputs: int, inputs: int) -> float:
        with FlopCounterMode(display=False) as counter:
            work.call(outputs, inputs)()
        return float(counter.get_total_flops()) / 2 / SPEED

    found = [
        np.array([[flops(work, o, i)] for o, i in zip(outputs, inputs, strict=True)])
        if work.groups > 1
        else np.array([[flops(work, o, i) for i in inputs] for o in outputs])
        for work, outputs, inputs in grids
    ]
    return found, 0.0


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables hold seconds that are proportional to multiply-adds."""
    monkeypatch.setattr(latency, "measure", counted)


def table_of(rows: list[list[float]], outputs: Widths = (2, 4), inputs: Widths = (2, 4)) -> fxc.LatencyTable:
    """A table of one layer, "a"."""
    return fxc.LatencyTable((Curve(outputs, inputs, 1, np.array(rows)),), {"a.weight": (0,)})


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("name", NETS)
def test_time_in_proportion_to_multiply_adds_is_the_objective_macs(name: str) -> None:
    model = NETS[name]()
    table = fxc.LatencyTable.measure(model, INPUTS)
    net = double(fxc.compress(model, INPUTS, objective=table))
    first = next(iter(net.liveness.census.weights))
    set_bits(net, first, [1])  # neither flagged nor removed as yet
    torch.testing.assert_close(net.size(), net.size("macs"), rtol=1e-9, atol=0)
    grads = []
    for objective in (table, "macs"):
        net.zero_grad()
        net.size(objective).backward()
        grads.append([p.grad for p in net.liveness.bits])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-9, atol=0)


@given(example=examples())
@settings(max_examples=8, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_the_same_on_random_networks(example: Example) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "measure", counted)
        table = fxc.LatencyTable.measure(example.net, example.inputs)
    net = double(fxc.compress(example.net, example.inputs, objective=table))
    assume(not any(plain.meets for plain in net.liveness.census.analysis.plain))  # no layers, and not timed
    torch.testing.assert_close(net.size(), net.size("macs"), rtol=1e-9, atol=0)


@pytest.mark.usefixtures("exact")
def test_the_same_after_channels_and_a_branch_are_gone() -> None:
    model = Dying()
    table = fxc.LatencyTable.measure(model, INPUTS)
    net = double(fxc.compress(model, INPUTS, objective=table))
    set_bits(net, "conv0.weight", [1])
    set_bits(net, "conv1.weight", [0, 3])
    set_bits(net, "conv2.weight", [1])
    net.step()
    before = net.size("macs")
    torch.testing.assert_close(net.size(), before, rtol=1e-9, atol=0)
    assert net.prune().modified
    torch.testing.assert_close(net.size(), before, rtol=1e-9, atol=0)
    set_bits(net, "conv2.weight", [0, 1, 2])
    net.step()
    torch.testing.assert_close(net.size(), net.size("macs"), rtol=1e-9, atol=0)
    assert "conv1.weight" not in net.liveness.census.weights


@pytest.mark.usefixtures("exact")
def test_seconds_are_those_of_all_uses() -> None:
    table = fxc.LatencyTable.measure(Twice(), INPUTS)
    assert table.seconds("conv0", inputs=3, outputs=2) == pytest.approx((64 + 16) * 9 * 3 * 2 / SPEED)
    assert table.seconds("conv1.weight", inputs=1, outputs=2) == pytest.approx(16 * 2 / SPEED)


@pytest.mark.usefixtures("exact")
def test_layers_of_equal_shape_share_a_curve() -> None:
    model = nn.Sequential(*[nn.Conv2d(3, 3, 3, padding=1) for _ in range(3)], nn.Conv2d(3, 3, 3, padding=1, bias=False))
    table = fxc.LatencyTable.measure(model, INPUTS)
    assert len(table.curves) == 2
    assert [table.layers[f"{i}.weight"] for i in range(4)] == [(0,), (0,), (0,), (1,)]


@pytest.mark.usefixtures("exact")
def test_a_compressed_network_gives_the_table_of_its_model() -> None:
    model = Residual()
    net = fxc.compress(model, INPUTS)
    for kind in (torch.float32, torch.float64):
        one, other = (fxc.LatencyTable.measure(m.to(kind), INPUTS.to(kind)) for m in (model, net))
        assert one.layers == other.layers
        assert [c.as_json() for c in one.curves] == [c.as_json() for c in other.curves]
        assert one.about["dtype"] == str(kind).removeprefix("torch.")


@pytest.mark.cpu
def test_measured_seconds() -> None:
    model = chain().train()
    state = torch.random.get_rng_state()
    table = fxc.LatencyTable.measure(model, INPUTS, widths=(0.5, 1), repeats=2)
    assert torch.equal(state, torch.random.get_rng_state())
    assert model.training
    assert [c.outputs for c in table.curves] == [(2, 4), (1, 2)]
    assert [c.inputs for c in table.curves] == [(2, 3), (2, 4)]
    assert table.about["device"] == "cpu"
    net = fxc.compress(model, INPUTS, objective=table)
    assert 0 <= net.size().item() <= 8 * 2 * 4  # at most as steep as a line through nothing, twice
    for o, i in itertools.product(range(1, 5), range(1, 4)):
        assert table.seconds("0", inputs=i, outputs=o) > 0


@pytest.mark.parametrize("patience", [-1.0, 1e9])
def test_a_bar_is_shown_where_it_takes_long(patience: float, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(timing, "_PATIENCE", patience)
    for name in ("start", "stop"):
        monkeypatch.setattr(Progress, name, lambda self, name=name: calls.append(name))
    fxc.LatencyTable.measure(chain(), INPUTS, widths=(0.5,), repeats=1)
    assert calls == (["start", "stop"] if patience < 0 else [])


def test_interpolation() -> None:
    table = table_of([[2.0, 3.0], [4.0, 9.0]])
    for inputs, outputs, seconds in ((2, 2, 2.0), (4, 2, 3.0), (2, 4, 4.0), (4, 4, 9.0), (3, 3, 4.5)):
        assert table.seconds("a", inputs=inputs, outputs=outputs) == seconds


def test_slopes_at_a_measured_width_are_those_of_becoming_narrower() -> None:
    curve = Curve((2, 4, 6), (4,), 1, np.array([[1.0], [2.0], [8.0]]))
    assert [curve.at(o, 4).by_output for o in (2, 3, 4, 5, 6)] == [0.5, 0.5, 0.5, 3.0, 3.0]


def test_groups_go_whole() -> None:
    curve = Curve((4, 8), (2, 4), 2, np.array([[1.0], [3.0]]))
    point = curve.at(8, 4)
    assert (point.seconds, point.by_output, point.by_input) == (3.0, 0.5, 1.0)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=8))
def test_isotonic(values: list[float]) -> None:
    found = isotonic(np.array(values))
    assert (np.diff(found) >= 0).all()
    assert found.mean() == pytest.approx(np.mean(values))
    assert isotonic(found) == pytest.approx(found)
    if (np.diff(values) >= 0).all():
        assert found.tolist() == values


@given(data=st.data())
@settings(max_examples=50)
def test_noise_never_makes_a_wider_layer_cheaper(data: st.DataObject) -> None:
    shape = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    outputs, inputs = (tuple(range(2, 2 * n + 1, 2)) for n in shape)
    values = data.draw(st.lists(st.floats(1e-6, 1), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
    curve = Curve(outputs, inputs, 1, np.array(values).reshape(shape))
    points = [[curve.at(o, i) for i in range(1, inputs[-1] + 1)] for o in range(1, outputs[-1] + 1)]
    seconds = np.array([[p.seconds for p in row] for row in points])
    tiny = 1e-12
    assert (np.diff(seconds, axis=0) >= -tiny).all()
    assert (np.diff(seconds, axis=1) >= -tiny).all()
    assert all(p.by_output >= -tiny and p.by_input >= -tiny and p.seconds >= 0 for row in points for p in row)
    # The slopes are those of the seconds.
    assert np.diff(seconds, axis=0) == pytest.approx(np.array([[p.by_output for p in row] for row in points])[1:])
    assert np.diff(seconds, axis=1) == pytest.approx(np.array([[p.by_input for p in row] for row in points])[:, 1:])


def test_a_layer_whose_time_does_not_depend_on_its_width_feels_no_pressure() -> None:
    net = compressed(chain())
    flat, steep = np.full((2, 2), 1e-3), np.array([[1e-3, 2e-3], [2e-3, 4e-3]])
    table = fxc.LatencyTable(
        (Curve((2, 4), (1, 3), 1, flat), Curve((1, 2), (2, 4), 1, steep)), {"0.weight": (0,), "2.weight": (1,)}
    )
    net.size(table).backward()
    first, second = (quantizer(net, f"{i}.weight").bits.grad for i in "02")
    assert first is not None
    assert second is not None
    # 5 ms at the start. Each output of the second layer adds 2 ms, each input 1 ms: that is what the first layer feels.
    torch.testing.assert_close(first, torch.full((4,), 1 / 5))
    torch.testing.assert_close(second, torch.full((2,), 2 / 5))


def test_gradient_of_finite_differences() -> None:
    net = double(fxc.compress(Residual(), INPUTS))
    table = fxc.LatencyTable.measure(Residual(), INPUTS, repeats=1)
    bits = torch.cat([p.detach() for p in net.liveness.bits]).requires_grad_()
    terms = net._size_terms(bits)
    assert torch.autograd.gradcheck(lambda b: table(terms, b), (bits,))


def test_file(tmp_path: Path) -> None:
    table = fxc.LatencyTable.measure(NETS["grouped"](), INPUTS, widths=(0.5,), repeats=1)
    table.save(tmp_path / "table.json")
    again = fxc.LatencyTable.load(tmp_path / "table.json")
    assert (again.layers, again.about) == (table.layers, table.about)
    assert [c.as_json() for c in again.curves] == [c.as_json() for c in table.curves]
    net = compressed(NETS["grouped"]())
    assert net.size(again).item() == net.size(table).item()


def _drop(content: dict[str, object]) -> None:
    del content["curves"]


def _negative(content: dict[str, object]) -> None:
    content["curves"] = [{"outputs": [1], "inputs": [1], "groups": 1, "seconds": [[-1.0]]}]


def _dangling(content: dict[str, object]) -> None:
    content["layers"] = {"a": [7]}


@pytest.mark.parametrize("damage", [_drop, _negative, _dangling])
def test_damaged_file(tmp_path: Path, damage: Callable[[dict[str, object]], None]) -> None:
    path = tmp_path / "table.json"
    table_of([[1.0, 2.0], [3.0, 4.0]]).save(path)
    content = json.loads(path.read_text("utf-8"))
    damage(content)
    path.write_text(json.dumps(content), "utf-8")
    with pytest.raises(StorageError, match=r"table\.json is no latency table: .*; measure again"):
        fxc.LatencyTable.load(path)


def test_file_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with pytest.raises(StorageError, match=r"cannot read .*; check the path"):
        fxc.LatencyTable.load(path)
    with pytest.raises(StorageError, match="cannot write"):
        table_of([[1.0, 2.0], [3.0, 4.0]]).save(tmp_path / "no" / "x.json")
    for text in ("[]", "{", "3"):
        path.write_text(text, "utf-8")
        with pytest.raises(StorageError, match=r"x\.json is no latency table"):
            fxc.LatencyTable.load(path)
    path.write_text('{"fxcompress latency table": 99}', "utf-8")
    with pytest.raises(StorageError, match="has another format"):
        fxc.LatencyTable.load(path)


def test_bad_arguments() -> None:
    for widths in ((), (1.0,), (0.0, 1.0), (0.5, 2.0)):
        with pytest.raises(ValueError, match=r"must be shares in \(0, 1\], at least one of them below 1"):
            fxc.LatencyTable.measure(chain(), INPUTS, widths=widths)
    with pytest.raises(ValueError, match="repeats=0 must be at least 1"):
        fxc.LatencyTable.measure(chain(), INPUTS, repeats=0)
    table = table_of([[1.0, 2.0], [3.0, 4.0]])
    with pytest.raises(ValueError, match=r"holds no layer 'b'; it holds a\.weight"):
        table.seconds("b", inputs=1, outputs=1)
    for inputs, outputs in ((0, 1), (1, 5)):
        with pytest.raises(ValueError, match=r"'a' was measured with 1 to 4 \w+ channels, and . are asked for"):
            table.seconds("a", inputs=inputs, outputs=outputs)
    net = compressed(chain())
    with pytest.raises(ValueError, match=r"the latency table holds no layer 0\.weight, 2\.weight; measure it"):
        net.size(table)


@pytest.mark.usefixtures("exact")
def test_a_table_of_a_narrower_network_is_refused() -> None:
    net = fxc.compress(chain(), INPUTS)
    set_bits(net, "0.weight", [1])
    net.step()
    net.prune()
    with pytest.raises(ValueError, match=r"'0\.weight' was measured with 1 to 3 output channels, and 4 are asked for"):
        net.size(fxc.LatencyTable.measure(net, INPUTS))


def test_every_measured_call_is_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """At full width the call that is timed gives what the layer gives, for a weight and input of its constant."""
    layers: list[tuple[nn.Module, Tensor]] = [
        (nn.Conv1d(4, 6, 3, stride=2, padding=1), torch.full((2, 4, 9), 0.5)),
        (nn.Conv2d(4, 6, (3, 1), padding="same", dilation=2), torch.full((2, 4, 9, 8), 0.5)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2), torch.full((1, 4, 5, 5), 0.5)),
        (nn.Conv3d(4, 4, 2, groups=4, bias=False), torch.full((1, 4, 3, 3, 3), 0.5)),
        (nn.Linear(4, 6), torch.full((2, 3, 4), 0.5)),
        (nn.Linear(4, 6, bias=False), torch.full((5, 4), 0.5)),
    ]
    for layer, x in layers:
        for parameter in layer.parameters():
            nn.init.constant_(parameter, 0.5)
        seen: list[Work] = []
        monkeypatch.setattr(latency, "measure", lambda grids, repeats, whole, progress, seen=seen: seen.extend(
            work for work, *_ in grids) or counted(grids, repeats, progress=progress))  # fmt: skip
        fxc.LatencyTable.measure(layer, x)
        (work,) = seen
        expected = layer(x).detach()
        found = work.call(work.outputs, work.inputs)().reshape(expected.shape)
        torch.testing.assert_close(found, expected)
