"""A share of the multiply-adds as a target: what is counted, which channels go, and that a run is as exact as any."""

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fxcompress as fxc
from fxcompress.errors import CheckpointError
from fxcompress.fitting import DEATH_LIMIT
from fxcompress.training.costs import Macs
from fxcompress.training.fit import FitResult
from fxcompress.training.importance import Importance
from fxcompress.training.interrupt import TrainingInterrupted
from tests.test_fit import Digits, digits
from tests.test_pieces import image, reading

X = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def macs(net: nn.Module, x: Tensor = X) -> int:
    """What torch counts of one call."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.eval()(x)
    total: int = counter.get_total_flops()
    return total // 2


def batches(count: int = 10, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    x, y = zip(*digits()[0], strict=True)
    return [(a.to(dtype), b) for a, b in zip(torch.cat(x).split(32), torch.cat(y).split(32), strict=True)][:count]


def fitted(net: nn.Module, target: float | None = 0.4, epochs: int = 10, **options: Any) -> FitResult:  # noqa: ANN401
    loader, loss = options.pop("loader", batches()), options.pop("loss_fn", F.cross_entropy)
    return fxc.fit(net, loader, loss, epochs=epochs, target_macs=target, progress=False, **options)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.0, 0.9))
def test_macs_that_would_be_left_are_those_that_are_left(seed: int, share: float) -> None:
    """Counted from the terms, as torch counts them in the network that was really cut."""
    torch.manual_seed(seed)
    net = fxc.compress(Digits(), X)
    importance = Importance(net)
    bits = torch.cat([b.detach().cpu() for b in net.fxc_bits])
    units = np.unique(importance.unit[importance.unit >= 0])
    gone = units[torch.rand(len(units), device="cpu").numpy() < share]
    alive = (bits > 0).numpy() & ~np.isin(importance.unit, gone)
    names = [name for part in net.fxc_parts().values() for name, _ in part.liveness.named_bits()]
    assert all(span.any() for span in np.split(alive, np.cumsum([len(b) for b in net.fxc_bits])[:-1])) or share > 0.5
    counted = Macs(net.fxc_all_terms(), importance.unit)
    one = counted.left(np.ones(len(alive), dtype=bool)) - counted.saved(np.ones(len(alive), dtype=bool))
    for unit in gone[:3]:
        assert one[unit] == pytest.approx(counted.left(importance.unit != unit))
    before = macs(net.finalize())
    with torch.no_grad():
        for name, own in zip(names, np.split(alive, np.cumsum([len(b) for b in net.fxc_bits])[:-1]), strict=True):
            parameter = net.get_parameter(name)
            parameter[torch.from_numpy(~own).to(parameter.device)] = 0
        for name, parameter in net.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    net.step()
    kept = torch.cat([b.detach().cpu() for b in net.fxc_bits]).numpy() > 0  # one of a layer is revived
    if len(kept) == len(alive):
        assert counted.left(kept) == pytest.approx(net.macs_left())
    net.prune()
    assert macs(net.finalize()) / before == pytest.approx(net.macs_left())


@pytest.mark.parametrize("target", [0.7, 0.3])
def test_a_run_ends_at_the_share_it_was_given(target: float) -> None:
    torch.manual_seed(0)
    model = Digits()
    before = macs(model)
    result = fitted(model, target)
    assert 0.8 * target <= macs(result.module) / before <= 1.02 * target
    assert result.net.macs_left() == pytest.approx(macs(result.module) / before)
    assert result.net.fractional_size() > 0.9 * result.net.weights_left() * 6 / 32, "what stays keeps its bits"
    assert f"{result.net.macs_left():.1%}" in str(result)


def test_bits_fall_as_well_where_a_size_is_wanted_too() -> None:
    torch.manual_seed(0)
    result = fitted(Digits(), 0.5, epochs=12, target_size=0.06)
    assert result.net.macs_left() <= 0.51
    assert result.net.fractional_size() == pytest.approx(0.06, rel=0.25)


def test_what_the_task_does_not_need_goes_first() -> None:
    """Half of the hidden channels reach the output through weights of a thousandth."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    with torch.no_grad():
        model[2].weight[:, 1::2] *= 1e-3  # type: ignore[index, operator]
        model[0].weight[1::2] *= 1e-3  # type: ignore[index, operator]
    x = torch.randn(64, 8)
    data = [(x, model(x).argmax(1).detach())] * 8
    net = fxc.compress(model, x)
    optimizer = torch.optim.Adam(net.param_groups(1e-5))
    result = fitted(net, 0.5, epochs=10, loader=data, optimizer=optimizer)
    left = result.module.get_parameter("0.weight").norm(dim=1)
    assert len(left) == 16
    assert left.min() > 1e-2


def test_each_layer_keeps_a_tenth_and_a_target_below_is_refused() -> None:
    torch.manual_seed(0)
    model = Digits()
    with pytest.raises(ValueError, match=r"target_macs=0\.001 cannot be reached: 0\.0\d+ of the multiply-adds") as told:
        fitted(model, 0.001)
    floor = float(re.findall(r"reached: (\S+) of", str(told.value))[0])
    result = fitted(model, floor * 0.999)
    widths = [p.shape[0] for n, p in result.module.named_parameters() if n.endswith("weight") and p.ndim == 4]
    assert widths == [2, 2, 2]
    assert result.net.macs_left() == pytest.approx(floor, rel=0.01)


def test_a_target_that_was_missed_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """Three steps are too few for biases to go."""
    torch.manual_seed(0)
    net = fxc.compress(Digits(), X)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("bias"):
                parameter.fill_(100.0)
    with caplog.at_level(logging.WARNING, "fxcompress"):
        fitted(net, 0.4, epochs=1, loader=batches(3))
    assert "target of 0.4 of the multiply-adds was not reached: 1 are left" in caplog.text


def smooth() -> nn.Module:
    """A network without maxima, between which ties would be decided by the last bit."""
    layers = [nn.Conv2d(1, 12, 3), nn.BatchNorm2d(12), nn.GELU(), nn.Conv2d(12, 16, 3), nn.BatchNorm2d(16), nn.GELU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)).double()


def test_it_makes_no_difference_when_dead_channels_are_removed() -> None:
    found = []
    for prune in (3, False):
        torch.manual_seed(0)
        net = fxc.compress(smooth(), X.double(), death_limit=DEATH_LIMIT)
        result = fitted(net, 0.3, loader=batches(dtype=torch.float64), prune=prune)
        assert (len(result.reports) > 3) == bool(prune)
        net.prune()
        # Not the weights on their grid: the last bit of a sum may put one on the next point.
        found.append({name: p.detach() for name, p in net.named_parameters() if name.endswith(("weight", "bias"))})
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-3, atol=1e-4)  # Adam makes more of rounding


@pytest.mark.parametrize("stop", [13, 30, 47])
def test_a_run_that_was_stopped_comes_out_the_same(stop: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Before the first removal, after it, and after the last choice."""

    def run(until: int = 0, **options: Any) -> FitResult:  # noqa: ANN401
        torch.manual_seed(0)
        steps = 0

        def loss(output: Tensor, target: Tensor) -> Tensor:
            nonlocal steps
            steps += 1
            if steps == until:
                raise KeyboardInterrupt
            return F.cross_entropy(output, target)

        return fitted(Digits(), 0.3, loss_fn=loss, prune=5, **options)

    whole, path = run(), tmp_path / "run.pt"
    with pytest.raises((KeyboardInterrupt, TrainingInterrupted)):
        run(stop, checkpoint=path)
    with pytest.raises(CheckpointError, match=r"the run was one with target_macs=0\.3, and this one has neither"):
        fxc.fit(
            Digits(), batches(), F.cross_entropy, epochs=10, gamma=0.0, checkpoint=path, resume=True, progress=False
        )
    again = run(checkpoint=path, resume=True)
    assert "this one is from compress" not in caplog.text
    assert len(whole.reports) > 1
    first, second = whole.net.state_dict(), again.net.state_dict()
    assert [name for name, value in first.items() if not torch.equal(value, second[name])] == []


def test_a_network_in_pieces_is_led_as_a_whole() -> None:
    torch.manual_seed(0)
    model, x = reading().float(), image().float()
    net = fxc.compress(model, x, bias_shrink=0.1)
    assert len(net.fxc_parts()) > 1

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output.mean() - target).square().mean()

    result = fitted(net, 0.65, epochs=10, loader=[(x, torch.ones(3))] * 20, loss_fn=loss)
    assert 0.5 < net.macs_left() <= 0.65
    assert type(result.module).__name__ == type(model).__name__


def test_a_network_in_bfloat16_is_led_as_well() -> None:
    """Steps are counted in float32: in halves they would be rounded."""
    torch.manual_seed(0)
    result = fitted(Digits().bfloat16(), 0.4, epochs=30, loader=batches(dtype=torch.bfloat16))
    assert result.net.macs_left() <= 0.42
    assert all(p.dtype == torch.bfloat16 for p in result.module.parameters())


def test_no_channel_is_chosen_while_the_guard_holds() -> None:
    torch.manual_seed(0)
    result = fitted(Digits(), 0.3, min_accuracy=2.0, validate=lambda net: 0.5)
    whole = fitted(Digits(), 0.3)
    assert result.net.macs_left() > whole.net.macs_left() + 0.2


@pytest.mark.parametrize(
    ("target", "error", "words"),
    [
        (0.0, ValueError, r"target_macs=0\.0 must be a share of the multiply-adds"),
        (1.0, ValueError, r"target_macs=1\.0 must be a share"),
        (float("nan"), ValueError, r"target_macs=nan"),
        ("half", TypeError, r"target_macs"),
        (True, ValueError, r"target_macs=True"),
    ],
)
def test_a_target_that_is_none_is_refused(target: Any, error: type[Exception], words: str) -> None:  # noqa: ANN401
    with pytest.raises(error, match=words):
        fitted(Digits(), target)


def test_a_network_that_is_smaller_already_is_refused() -> None:
    net = fitted(Digits(), 0.3).net
    with pytest.raises(ValueError, match=r"target_macs=0\.5 is more than the 0\.\d+ of the multiply-adds"):
        fitted(net, 0.5)
