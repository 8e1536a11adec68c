"""``fit``: the whole loop on real data, its controllers, and its errors."""

import copy
import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.adapters.core import Pressure
from fxcompress.errors import OptimizerError
from fxcompress.objectives import SizeTerms
from fxcompress.training.controller import ConstantGamma, TargetSize
from fxcompress.training.guard import Guard
from fxcompress.training.history import EpochRecord
from fxcompress.training.target import held_epochs, tell_of_selection, tell_of_target
from tests.nets import Block


class Digits(nn.Module):
    """A small residual net for 8x8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.block = Block(16)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.block(F.max_pool2d(self.stem(x), 2))).amax((2, 3)))  # type: ignore[no-any-return]


def digits() -> tuple[list[tuple[Tensor, Tensor]], Tensor, Tensor]:
    """Batches to train on, and a test set."""
    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    y = torch.tensor(data.target)
    batches = list(zip(x[:1400].split(100), y[:1400].split(100), strict=True))
    return batches, x[1400:], y[1400:]


def test_fit_shrinks_a_network_on_digits_and_keeps_it_working() -> None:
    torch.manual_seed(0)
    loader, x, y = digits()

    def accuracy(net: nn.Module) -> float:
        return float((net(x).argmax(1) == y).float().mean())

    records: list[EpochRecord] = []
    model = Digits()
    result = fxc.fit(
        model, loader, F.cross_entropy, epochs=8, target_size=0.06, lr=5e-3, validate=accuracy, progress=False,
        on_epoch=records.append,
    )  # fmt: skip
    last = result.history[-1]
    assert records == result.history
    assert 0.04 < last.size < 0.08
    assert last.weights < 1
    assert last.metric is not None
    assert last.metric > 0.6
    assert accuracy(result.module) == pytest.approx(last.metric, abs=0.01)
    assert sum(p.numel() for p in result.module.parameters()) < sum(p.numel() for p in model.parameters())
    assert not result.module.training


def test_fit_trains_a_compressed_network_with_the_users_own_optimizer() -> None:
    torch.manual_seed(0)
    loader, _, _ = digits()
    net = fxc.compress(Digits(), loader[0][0])
    optimizer = torch.optim.AdamW(net.param_groups(1e-3, weight_decay=0.01))
    result = fxc.fit(net, loader, F.cross_entropy, epochs=1, gamma=0.02, optimizer=optimizer, progress=False)
    assert result.net is net
    assert result.history[0].gamma == 0.02
    assert result.history[0].size < 0.25


def test_bits_of_a_trained_network_move_by_a_tenth_in_a_step_at_most() -> None:
    """However loud the task: a step in proportion to the gradient would be far longer, and take channels with it."""

    def loud(output: Tensor, target: Tensor) -> Tensor:
        return 1e4 * F.cross_entropy(output, target)

    loader = digits()[0][:2]
    moved = {}
    for fine_tune in (False, True):
        torch.manual_seed(0)
        net = fxc.compress(Digits(), loader[0][0], bits=3.0)
        before = [p.detach().clone() for n, p in net.named_parameters() if n.endswith(".bits")]
        adam = torch.optim.Adam(net.param_groups(fine_tune=fine_tune))
        fxc.fit(net, loader, loud, epochs=1, gamma=0.0, optimizer=adam, prune=False, progress=False)
        after = [p.detach() for n, p in net.named_parameters() if n.endswith(".bits")]
        moved[fine_tune] = max(float((a - b).abs().max()) for a, b in zip(after, before, strict=True))
    assert 0 < moved[True] <= 0.1 * len(loader) + 1e-4
    assert moved[False] > 0.1 * len(loader) + 1e-4
    rates = {g["name"]: (g["lr"], round(g["lr"] / g["eps"])) for g in net.param_groups(eps=1e-8, fine_tune=0.25)}
    assert rates["bits"] == (0.25, 500)
    assert rates["exponents"] == (0.05, 100)


def test_gamma_and_target_size_exclude_each_other() -> None:
    loader, _, _ = digits()
    for options, more in (({}, "; for speed alone, target_macs="), ({"gamma": 0.1, "target_size": 0.1}, "$")):
        with pytest.raises(ValueError, match=rf"either gamma= .* or target_size= \(share of the bits\){more}"):
            fxc.fit(Digits(), loader, F.cross_entropy, epochs=1, progress=False, **options)  # type: ignore[arg-type]


def test_an_optimizer_of_the_plain_model_is_refused() -> None:
    loader, _, _ = digits()
    model = Digits()
    with pytest.raises(ValueError, match=r"net\.param_groups\(\)"):
        fxc.fit(model, loader, F.cross_entropy, epochs=1, gamma=0.1, optimizer=torch.optim.SGD(model.parameters(), 0.1))


OPTIMIZERS: dict[str, tuple[Callable[[fxc.CompressedModule], object], type[Exception], str]] = {
    "none": (lambda net: 3, TypeError, "expected a torch.optim.Optimizer, got int"),
    "of the network as it was": (
        lambda net: torch.optim.Adam(Digits().parameters()), OptimizerError, "parameters that are not the network's"
    ),
    "without bits": (
        lambda net: torch.optim.Adam(net.param_groups()[:2]), OptimizerError,
        "lacks the bits of 4 of 4 weights, so they would never shrink",
    ),
    "with a closure": (
        lambda net: torch.optim.LBFGS(net.parameters()), TypeError, r"optimizer.step is called as optimizer.step\(\)"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_optimizer_that_cannot_train_the_network_is_refused_before_the_first_step(kind: str) -> None:
    make, error, message = OPTIMIZERS[kind]
    loader, x, _ = digits()
    net = fxc.compress(Digits(), x[:2])
    before = {name: parameter.clone() for name, parameter in net.named_parameters()}
    with pytest.raises(error, match=message):
        fxc.fit(net, loader, F.cross_entropy, epochs=1, gamma=0.1, optimizer=make(net), progress=False)  # type: ignore[arg-type]
    assert all(torch.equal(parameter, before[name]) for name, parameter in net.named_parameters())


def test_bits_that_are_trained_as_weights_are_told(caplog: pytest.LogCaptureFixture) -> None:
    loader, x, _ = digits()
    for mixed in (True, False):
        net = fxc.compress(Digits(), x[:2])
        caplog.clear()
        optimizer = torch.optim.Adam(net.parameters() if mixed else net.param_groups())
        fxc.fit(net, loader[:1], F.cross_entropy, epochs=1, gamma=0.1, optimizer=optimizer, progress=False)
        assert ("param_groups[0] of the optimizer holds bits together with weights" in caplog.text) is mixed


def test_a_loop_whose_optimizer_treats_bits_as_weights_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    net = fxc.compress(Digits(), torch.zeros(2, 1, 8, 8))
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(3):
        net.prune(optimizer)
    assert caplog.text.count("holds bits together with weights, but they need a learning rate") == 1
    with pytest.raises(TypeError, match=r"what fit\(\) returns holds the network as its \.module"):
        fxc.save(fxc.fit(net, digits()[0][:2], F.cross_entropy, epochs=1, gamma=0.1, progress=False), "net.fxc")  # type: ignore[arg-type]


def alive(terms: SizeTerms, bits: Tensor) -> Tensor:
    """A number of channels: it has no gradient."""
    return (bits > 0).float().mean()


def test_an_objective_without_a_gradient_is_refused() -> None:
    loader, x, _ = digits()
    net = fxc.compress(Digits(), x[:2], objective=alive)
    with pytest.raises(ValueError, match=r"objective .* returned a number without a gradient"):
        fxc.fit(net, loader, F.cross_entropy, epochs=1, gamma=0.1, progress=False)
    for parameter in net.fxc_bits:
        parameter.requires_grad_(False)  # the weights alone are trained then
    assert fxc.fit(net, loader[:1], F.cross_entropy, epochs=1, gamma=0.1, progress=False).history


@pytest.mark.parametrize("target", [0.0, 1.0, 5.0])
def test_a_target_is_a_share(target: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        TargetSize(target)


def test_constant_gamma_warms_up() -> None:
    gamma = ConstantGamma(0.2, warmup=0.5)
    assert [gamma(p, 0.1) for p in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([0.0, 0.1, 0.2, 0.2])


def test_the_controller_presses_harder_on_a_network_that_is_too_large() -> None:
    controls = [TargetSize(0.02) for _ in range(2)]
    for control in controls:
        control(0.0, 0.25)
    for _ in range(30):  # the first of them see a fall that they take to go on
        small, large = (control(0.8, size) for control, size in zip(controls, (0.02, 0.1), strict=True))
    assert large > 10 * small
    assert controls[0].wanted(0.0) == pytest.approx(0.25)
    assert controls[0].wanted(1.0) == pytest.approx(0.02)


def test_no_pressure_while_the_accuracy_is_too_low() -> None:
    """An accuracy that nothing reaches stops the pressure after the first epoch."""
    torch.manual_seed(0)
    loader, _, _ = digits()
    result = fxc.fit(
        Digits(), loader, F.cross_entropy, epochs=3, gamma=0.5, validate=lambda net: 0.5, min_accuracy=0.9,
        progress=False,
    )  # fmt: skip
    assert [record.gamma for record in result.history] == [0.5, 0.0, 0.0]
    with pytest.raises(ValueError, match="validate"):
        fxc.fit(Digits(), loader, F.cross_entropy, epochs=1, gamma=0.5, min_accuracy=0.9)


def test_a_network_that_fell_below_its_path_gets_bits_back_while_the_pressure_is_held() -> None:
    """It would stay there, too bad for any pressure and too small to get better."""
    torch.manual_seed(0)
    loader, _, _ = digits()

    def collapsing(net: nn.Module) -> float:
        if not seen:
            seen.append(net)
            with torch.no_grad():
                for name, parameter in net.named_parameters():
                    parameter.copy_(torch.full_like(parameter, 2.0) if name.endswith(".bits") else parameter)
        return 0.5

    seen: list[nn.Module] = []
    result = fxc.fit(
        Digits(), loader, F.cross_entropy, epochs=3, target_size=0.2, validate=collapsing, min_accuracy=0.9,
        progress=False,
    )  # fmt: skip
    sizes = [record.size for record in result.history]
    assert sizes[0] == pytest.approx(2 / 32)
    assert sizes[0] < sizes[1] < sizes[2] < 0.2
    assert result.history[1].gamma < 0


def test_there_is_no_pressure_while_a_controller_is_held() -> None:
    control = TargetSize(0.1)
    for step in range(40):
        control(step / 100, 0.25)
    before = control.state_dict()["sum"]
    assert [control.held((40 + step) / 100, 0.25) for step in range(20)] == [0.0] * 20
    assert control.state_dict()["sum"] <= before


@pytest.mark.parametrize("least", [0.9, 90.0])
def test_an_accuracy_that_no_epoch_reached_is_told(least: float, caplog: pytest.LogCaptureFixture) -> None:
    loader = [(torch.randn(8, 1, 8, 8), torch.zeros(8, dtype=torch.long))]
    fxc.fit(
        Digits(), loader, F.cross_entropy, epochs=2, gamma=0.5, validate=lambda net: 0.95, min_accuracy=least,
        progress=False,
    )  # fmt: skip
    assert ("no epoch reached min_accuracy=90" in caplog.text) is (least > 1)


def test_one_controller_may_be_given_to_several_runs() -> None:
    """What it adapts belongs to the run; the caller's object stays as it is."""
    loader, _, _ = digits()
    control = TargetSize(0.1, arrival=0.6)
    histories = []
    for _ in range(2):
        torch.manual_seed(0)
        result = fxc.fit(Digits(), loader[:3], F.cross_entropy, epochs=4, gamma=control, progress=False)
        histories.append([(record.loss, record.size, record.gamma) for record in result.history])
    assert histories[0] == histories[1]
    assert control == TargetSize(0.1, arrival=0.6)


def test_fine_tuning_reaches_its_target_early_and_lets_formats_rest() -> None:
    loader, _, _ = digits()
    sizes = {}
    for fine_tune in (False, True):
        torch.manual_seed(0)
        result = fxc.fit(
            Digits(), loader, F.cross_entropy, epochs=10, target_size=0.1, fine_tune=fine_tune, progress=False
        )
        sizes[fine_tune] = [record.size for record in result.history]
    assert sizes[True][3] < 0.105 < sizes[False][3]
    assert len(set(sizes[True][6:])) == 1 < len(set(sizes[False][6:]))
    assert all(found[-1] == pytest.approx(0.1, rel=0.05) for found in sizes.values())


def taught(output: Tensor, target: Tensor, answer: Tensor) -> Tensor:
    soft = F.kl_div(output.log_softmax(1), answer.log_softmax(1), log_target=True, reduction="batchmean")
    return F.cross_entropy(output, target) + soft


def test_a_model_teaches_itself_as_it_was_and_stays_as_it_is() -> None:
    """It answers in evaluation, whatever mode the caller's network is in, and its statistics do not move."""
    loader, _, _ = digits()
    model = nn.Sequential(Digits(), nn.Dropout(0.5)).train()
    model[0].stem[1].eval()  # type: ignore[index, union-attr]
    original = copy.deepcopy(model).eval()
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    with torch.no_grad():
        answered = [(x, (y, original(x))) for x, y in loader]
    histories = []
    for batches, loss, teacher in (
        (loader, taught, model),
        (answered, lambda output, target: taught(output, *target), None),
    ):
        torch.manual_seed(0)
        result = fxc.fit(model, batches, loss, epochs=2, gamma=0.1, progress=False, teacher=teacher)
        histories.append([(record.loss, record.size) for record in result.history])
    assert histories[0] == histories[1]
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(entry, before[name]) for name, entry in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_teacher_is_a_network_and_the_loss_takes_its_answer() -> None:
    model, (loader, x, _) = Digits(), digits()
    with pytest.raises(TypeError, match=r"loss_fn is called as loss_fn\(output, target, answer\)"):
        fxc.fit(model, loader, lambda output, target: output.sum(), epochs=1, gamma=0.1, teacher=model)
    with pytest.raises(TypeError, match=r"teacher= is a function; pass a network"):
        fxc.fit(model, loader, taught, epochs=1, gamma=0.1, teacher=taught)  # type: ignore[arg-type]
    net = fxc.compress(model, x[:2])
    with pytest.raises(ValueError, match=r"pass the model that it was compressed from"):
        fxc.fit(net, loader, taught, epochs=1, gamma=0.1, teacher=net)


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (None, TypeError, "gamma returned a NoneType for progress=0, size=0.25; it must return one number"),
        ("0.1x", TypeError, "gamma returned a str"),
        (torch.ones(2), TypeError, "gamma returned a Tensor"),
        (math.nan, ValueError, "gamma returned nan for progress=0, size=0.25; it must be finite"),
        (torch.tensor(math.inf), ValueError, "gamma returned inf"),
    ],
)
def test_a_gamma_that_returns_no_finite_number(value: object, kind: type[Exception], message: str) -> None:
    net, loader = fxc.compress(Digits(), digits()[1][:2]), digits()[0]
    before = {name: entry.clone() for name, entry in net.state_dict().items()}
    with pytest.raises(kind, match=message):
        fxc.fit(net, loader, F.cross_entropy, epochs=1, gamma=lambda progress, size: value, progress=False)  # type: ignore[arg-type, return-value]
    with pytest.raises(kind, match=message):
        Pressure(lambda progress, size: value).press(net, 0.0)  # type: ignore[arg-type, return-value]
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, before[name])


def test_a_gamma_may_be_a_tensor_and_records_hold_a_number() -> None:
    loader, _, _ = digits()
    result = fxc.fit(
        Digits(), loader[:1], F.cross_entropy, epochs=1, gamma=lambda progress, size: torch.tensor(0.5),  # type: ignore[arg-type, return-value]
        progress=False,
    )  # fmt: skip
    assert json.loads(json.dumps(result.history[0].as_dict()))["gamma"] == 0.5


@pytest.mark.parametrize("lowest", [4.0, 0.5, -0.5, -4.0])
def test_a_loss_may_rise_by_a_share_of_its_lowest_on_either_side_of_zero(lowest: float) -> None:
    """A logarithm of a likelihood may be of either sign."""
    guard = Guard(max_loss_increase=0.2)
    for rise, held in ((0.0, False), (0.15, False), (0.25, True), (0.15, False)):
        for _ in range(500):  # until the smoothed loss is there
            guard.see_loss(lowest + rise * abs(lowest))
        assert guard.holds is held


def test_a_metric_that_is_not_a_number_is_too_low() -> None:
    guard = Guard(min_metric=-1.0)
    for metric, held in ((-2.0, True), (0.0, False), (math.nan, True), (-1.0, False)):
        guard.see_metric(metric)
        assert guard.holds is held


@pytest.mark.parametrize("held", [False, True])
def test_a_target_that_was_missed_is_told(caplog: pytest.LogCaptureFixture, *, held: bool) -> None:
    loader, _, _ = digits()
    result = fxc.fit(
        Digits(), loader, F.cross_entropy, epochs=2, target_size=0.001, validate=lambda net: 0.5,
        min_accuracy=0.9 if held else None, progress=False,
    )  # fmt: skip
    text, *others = [record.getMessage() for record in caplog.records]
    assert f"the target of 0.001 of the bits was not reached: {result.history[-1].size:.3g} are left" in text
    assert ("no pressure at the end of 1 of 2 epochs" in text) is held
    assert ["no epoch reached min_accuracy=0.9" in other for other in others] == [True] * held


def test_a_brake_is_told_where_it_held_and_only_there(caplog: pytest.LogCaptureFixture) -> None:
    """A target of the multiply-adds alone has a gamma of 0 throughout, which says nothing of a brake."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    loader = [(torch.randn(8, 8), torch.randint(4, (8,))) for _ in range(4)]
    answers = iter([0.5, 0.5, 0.95, 0.95])
    result = fxc.fit(
        model, loader, F.cross_entropy, epochs=4, target_macs=0.3, validate=lambda net: next(answers),
        min_accuracy=0.9, progress=False,
    )  # fmt: skip
    assert [record.held for record in result.history] == [False, True, True, False]
    missed = SimpleNamespace(left=lambda: 0.5, target=0.3, what="multiply-adds")
    tell_of_selection(cast("Any", missed), held_epochs(result.history))
    assert "there was no pressure at the end of 2 of 4 epochs" in caplog.text
    assert "min_accuracy= and max_loss_increase= hold the pressure off" in caplog.text
    caplog.clear()
    tell_of_selection(cast("Any", missed), held_epochs(result.history[:1]))
    assert "0.5 are left" in caplog.text
    assert "pressure" not in caplog.text


@pytest.mark.parametrize("options", [{"gamma": 0.1}, {"target_size": 0.24}, {"gamma": 0.0, "target_macs": 0.99}])
@pytest.mark.parametrize("last", [0.85, 0.95])
def test_an_accuracy_that_is_missed_at_the_end_is_told(
    options: dict[str, Any], last: float, caplog: pytest.LogCaptureFixture
) -> None:
    loader, _, _ = digits()
    answers = iter([0.9, 0.5, last])
    fxc.fit(
        Digits(), loader, F.cross_entropy, epochs=3, validate=lambda net: next(answers), min_accuracy=0.9,
        progress=False, **options,
    )  # fmt: skip
    assert ("ended with 0.85 where min_accuracy=0.9 was asked for" in caplog.text) is (last < 0.9)


def test_a_training_that_ended_far_below_its_target_is_told(caplog: pytest.LogCaptureFixture) -> None:
    net = fxc.compress(Digits(), digits()[1][:2])
    size = net.fractional_size()
    for factor, told in ((1.1, False), (1.6, True)):
        tell_of_target(net, TargetSize(size * factor))
        assert ("was to end at" in caplog.text) is told


def test_a_brake_does_not_let_a_network_fall_off_its_path() -> None:
    """It once pressed as hard as it could when the hold was over, until next to nothing was left."""
    torch.manual_seed(0)
    loader, _, _ = digits()
    epochs, target = 10, 0.02
    answers = iter([0.9, 0.9, *[0.5] * 3, *[0.9] * 5])
    result = fxc.fit(
        Digits(), loader, F.cross_entropy, epochs=epochs, target_size=target, validate=lambda net: next(answers),
        min_accuracy=0.8, progress=False,
    )  # fmt: skip
    sizes = [record.size for record in result.history]
    fall = (0.25 / target) ** (1 / (0.47 * epochs))  # in an epoch of a run that is not held
    assert all(before / after < 1.1 * fall for before, after in pairwise(sizes))
    assert sizes[-1] < sizes[5]


def test_nothing_is_told_of_a_target_that_was_reached(caplog: pytest.LogCaptureFixture) -> None:
    loader, _, _ = digits()
    result = fxc.fit(Digits(), loader, F.cross_entropy, epochs=1, target_size=0.249, progress=False)
    assert result.history[-1].size < 0.3
    assert not caplog.records


def test_a_target_above_eight_bits_begins_with_more_and_one_above_the_present_size_is_refused() -> None:
    torch.manual_seed(0)
    loader, x, _ = digits()
    result = fxc.fit(Digits(), loader, F.cross_entropy, epochs=2, target_size=0.4, progress=False)
    assert 0.35 < result.history[0].size <= 0.5
    with pytest.raises(ValueError, match="bits="):
        fxc.fit(fxc.compress(Digits(), x[:2]), loader, F.cross_entropy, epochs=1, target_size=0.4)


def test_a_network_at_its_target_may_be_trained_on() -> None:
    loader, x, _ = digits()
    net = fxc.compress(Digits(), x[:2], bits=1.55)  # 4.8 % of the bits: where a run to 5 % may have ended
    for options in ({"target_size": 0.07}, {"gamma": TargetSize(0.07)}):
        with pytest.raises(ValueError, match=r"target_size=0.07 is more than the network's present size of 0.04"):
            fxc.fit(net, loader[:1], F.cross_entropy, epochs=1, progress=False, **options)
    for options in ({"target_size": 0.05}, {"gamma": TargetSize(0.05)}):
        assert fxc.fit(net, loader[:1], F.cross_entropy, epochs=1, progress=False, **options).history


class Long(list[Any]):
    """Says that it has another length than it has."""

    said = 0

    def __len__(self) -> int:
        return self.said


@pytest.mark.parametrize("said", [2, 3, 9])
def test_a_loader_with_another_length_than_it_says_is_told(said: int, caplog: pytest.LogCaptureFixture) -> None:
    loader = Long(digits()[0][:3])
    loader.said = said
    fxc.fit(Digits(), loader, F.cross_entropy, epochs=2, gamma=0.1, progress=False)
    texts = [record.getMessage() for record in caplog.records]
    if said == 3:
        assert texts == []
    else:
        (text,) = texts
        assert f"has a length of {said}, and gave 3 batches in an epoch" in text
        assert f"a course of {2 * said} steps, of which 6 will be made" in text


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_fit_trains_where_gradients_are_off(around: Callable[[], AbstractContextManager[None]]) -> None:
    loader, x, _ = digits()
    results = []
    for context in (around, nullcontext):
        torch.manual_seed(0)
        with context():
            results.append(fxc.fit(Digits(), loader[:3], F.cross_entropy, epochs=2, gamma=0.1, progress=False))
    assert results[0].history[-1].loss == results[1].history[-1].loss
    assert torch.equal(results[0].module(x), results[1].module(x))


@pytest.mark.parametrize("prune", [True, 5, False])
def test_when_to_remove_is_a_choice(prune: int) -> None:
    torch.manual_seed(0)
    loader, x, _ = digits()
    result = fxc.fit(Digits(), loader, F.cross_entropy, epochs=4, gamma=1.0, prune=prune, progress=False)
    removed = result.net.weights_left()
    present = sum(p.numel() for n, p in result.net.named_parameters() if p.ndim > 1) / result.net.weights
    assert removed < 0.9
    assert present == pytest.approx(removed if prune is not False else 1.0)
    assert bool(result.reports) == (prune is not False)
    assert result.module(x).isfinite().all()


def test_records_call_the_metric_by_the_name_of_its_function() -> None:
    x, y = torch.randn(8, 4), torch.randint(2, (8,))

    def accuracy(net: nn.Module) -> float:
        return float((net(x).argmax(1) == y).double().mean())

    def perplexity(net: nn.Module) -> float:
        return float(F.cross_entropy(net(x), y).exp())

    for validate, shown in (
        (accuracy, "%"),
        (perplexity, " perplexity "),
        (lambda _: 1.5, " metric 1.5000"),
        (None, ""),
    ):
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        result = fxc.fit(model, [(x, y)], F.cross_entropy, epochs=1, gamma=1e-3, validate=validate, progress=False)
        text = str(result.history[0])
        assert shown in text
        assert ("accuracy" in text) == (validate is accuracy)


def test_norms_that_were_put_into_evaluation_stay_there() -> None:
    """As those that are frozen while the rest is tuned; a network that is in evaluation as a whole is trained."""
    batches, _, _ = digits()
    for whole in (False, True):
        torch.manual_seed(0)
        model = Digits().train(not whole)
        frozen = next(name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d))
        model.get_submodule(frozen).eval()
        before = {name: value.clone() for name, value in model.named_buffers()}
        result = fxc.fit(
            model, batches[:4], F.cross_entropy, epochs=2, gamma=0.01, progress=False, validate=lambda net: 1.0
        )
        after = dict(result.net.named_buffers())
        same = {name for name, value in before.items() if torch.equal(value, after[name])}
        assert same == (set() if whole else {name for name in before if name.startswith(f"{frozen}.")})


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (F.cross_entropy, "would take the answer for its weight="),
        (F.mse_loss, "would take the answer for its size_average="),
        (F.huber_loss, "would take the answer for its reduction="),
        (nn.CrossEntropyLoss(), "its signature .* does not allow"),
        (lambda output, _: output.sum(), "its signature .* does not allow"),
    ],
)
def test_a_loss_that_knows_no_teacher_is_refused(loss: Callable[..., Tensor], words: str) -> None:
    model, seen = Digits(), list[object]()
    with pytest.raises(TypeError, match=rf"(?s){words}.*loss_fn=lambda output, target, answer: "):
        fxc.fit(model, digits()[0], loss, epochs=1, gamma=0.1, teacher=model, on_epoch=seen.append, progress=False)
    assert not seen


def test_a_loss_that_nobody_trains_is_told(caplog: pytest.LogCaptureFixture) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            return F.cross_entropy(output * self.weight, target)

    loss, loader = Scaled(), [(torch.randn(4, 3), torch.arange(4) % 2)]
    net = fxc.compress(nn.Linear(3, 2), torch.zeros(1, 3))
    fxc.fit(net, loader, loss, epochs=1, gamma=0.0, progress=False)
    assert "the loss, a Scaled, has 1 parameters that could be trained, and the optimizer lacks them" in caplog.text
    caplog.clear()
    optimizer = torch.optim.Adam([*net.param_groups(), {"params": loss.parameters()}])
    fxc.fit(net, loader, loss, epochs=1, gamma=0.0, optimizer=optimizer, progress=False)
    assert "the loss" not in caplog.text


def test_what_an_optimizer_of_ones_own_would_ignore_is_refused() -> None:
    loader, x, _ = digits()
    net = fxc.compress(Digits(), x[:2])
    optimizer = torch.optim.Adam(net.param_groups())
    for name in ("lr", "weight_decay"):
        options: dict[str, Any] = {name: 0.001 if name == "lr" else 0.0}
        with pytest.raises(ValueError, match=rf"{name}= is of the default optimizer.*net\.param_groups\({name}="):
            fxc.fit(net, loader, F.cross_entropy, epochs=1, gamma=0.1, optimizer=optimizer, **options)


def test_an_optimizer_that_mixes_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    loader, x, _ = digits()
    net = fxc.compress(Digits(), x[:2])
    fxc.fit(
        net, loader[:2], F.cross_entropy, epochs=1, gamma=0.1, optimizer=torch.optim.Adam(net.parameters()),
        progress=False, prune=1,
    )  # fmt: skip
    assert caplog.text.count("holds bits together with weights") == 1


@pytest.mark.parametrize(
    ("least", "metric", "words"),
    [
        (97.0, 0.5, "min_accuracy=97 seems to be in percent, and validate returned 0.5, a share"),
        (0.97, 50.0, "min_accuracy=0.97 seems to be a share of 1, and validate returned 50, as in percent"),
        (0.97, 0.5, ""),
        (97.0, 50.0, ""),
        (-0.5, -2.0, ""),
    ],
)
def test_an_accuracy_in_another_unit_is_told_at_once(
    least: float, metric: float, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"validate": lambda net: metric, "min_accuracy": least, "progress": False}
    loader = digits()[0][:2]
    found: list[str] = []
    fxc.fit(
        Digits(), loader, F.cross_entropy, epochs=2, gamma=0.1, on_epoch=lambda _: found.append(caplog.text), **options
    )
    assert (words in found[0]) if words else ("seems to be" not in caplog.text)
    assert caplog.text.count("seems to be") == bool(words)
    with pytest.raises(ValueError, match=words) if words else nullcontext():
        fxc.fit_to_accuracy(Digits(), loader, F.cross_entropy, epochs=1, rounds=1, **options)
