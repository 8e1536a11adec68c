"""A path into a sum that is narrower than the sum: exact, smaller, and known to all that comes after."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import fxcompress as fxc
from fxcompress.channels.constants import knowns_of, values_known
from fxcompress.channels.prepare import prepare
from fxcompress.errors import UnsupportedModelError
from fxcompress.passes import narrow_branches as narrowing
from fxcompress.passes.join import Join
from fxcompress.passes.narrow_paths import find_paths, open_joins
from fxcompress.passes.prune_channels import prune_channels
from fxcompress.passes.prune_report import PruneReport
from fxcompress.provenance import provenance_of
from fxcompress.trace.inputs import ExampleInputs
from tests.exactness import TOLERANCE, Fingerprint, difference, outputs
from tests.networks import Example, examples
from tests.residuals import SUMS, Form, build, check_same, image, widths

Draw = Callable[..., Any]


@st.composite
def forms(draw: Draw) -> Form:
    dead = draw(st.lists(st.integers(0, 7), unique=True, max_size=6))
    return Form(
        draw(st.sampled_from(sorted(SUMS))),
        sorted(dead),
        draw(st.sampled_from(["norm", "activation", "depthwise", ""])),
        draw(st.booleans()),
        draw(st.booleans()),
    )


@settings(max_examples=8, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(forms(), min_size=1, max_size=3), st.integers(0, 99))
def test_dead_channels_of_one_path_go(found: list[Form], seed: int) -> None:
    net = build(*found, seed=seed)
    assert not fxc.prune(net, image()).report.modified  # the sum needs them all
    visit = Fingerprint(net)
    result = fxc.prune(net, image(), narrow=True)
    visit.check()
    check_same(net, result.module)
    assert widths(result.module) == [8 - len(form.dead) for form in found]
    assert len(result.report.narrowed) == sum(bool(form.dead) for form in found)
    assert list(result.module.state_dict()) == list(net.state_dict())
    assert not fxc.prune(result.module, image(), narrow=True).report.modified
    check_gradients(net, result.module)


def check_gradients(net: nn.Module, narrow: nn.Module) -> None:
    """In training, what is left gets the gradients of the wide network; and a step goes through."""
    net, narrow = copy.deepcopy(net).train(), copy.deepcopy(narrow).train()
    for one in (net, narrow):
        one(image()).square().sum().backward()
    assert isinstance(narrow, fx.GraphModule)
    provenance = provenance_of(narrow)
    assert provenance is not None
    for name, parameter in narrow.named_parameters():
        expected = net.get_parameter(name).grad
        assert expected is not None
        for dim, index in provenance.kept.get(name, {}).items():
            expected = expected.index_select(dim, torch.tensor(index))
        assert parameter.grad is not None
        assert difference(expected, parameter.grad) <= TOLERANCE
    before = narrow.get_parameter("stem.weight").detach().clone()
    torch.optim.SGD(narrow.parameters(), lr=0.1).step()
    assert not torch.equal(before, narrow.get_parameter("stem.weight"))


def test_a_living_channel_matters() -> None:
    """The negative control: the same rewrite of a channel that is not zero goes through, and changes the output."""
    net = build(Form("x + b", [1, 4]))
    analysis = prepare(net, image())
    options, _ = find_paths(analysis, knowns_of(analysis, values_known))
    (path,) = options["eval:add"]
    module = copy.deepcopy(analysis.module)
    open_joins(module, [replace(path, index=path.index[1:])])
    pruned = prune_channels(module, analysis.inputs).module
    assert widths(pruned) == [5]
    assert difference(outputs(net, (image(),)), outputs(pruned, (image(),))) > 1e-6


@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(examples())
def test_random_networks(example: Example) -> None:
    """Any network, with rows of zeros in some layers."""
    generator = torch.Generator().manual_seed(example.seed)
    with torch.no_grad():
        for module in example.net.modules():
            if isinstance(module, nn.Conv2d | nn.Linear) and torch.rand((), generator=generator) < 0.6:
                rows = torch.rand(module.weight.shape[0], generator=generator) < 0.5
                for tensor in module.parameters():
                    tensor[rows] = 0
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for shift in (module.bias, module.running_mean):
                    if shift is not None:
                        shift.zero_()
    try:
        expected = outputs(example.net, example.inputs)
    except RuntimeError:  # it writes to memory that it may not write to
        return
    plain = fxc.prune(example.net, example.inputs).report
    result = fxc.prune(example.net, example.inputs, narrow=True)
    event(f"{len(result.report.narrowed)} narrowed")
    assert difference(expected, outputs(result.module, example.inputs)) <= TOLERANCE
    others = example.other_inputs(3, 0)
    assert difference(outputs(example.net, others), outputs(result.module, others)) <= TOLERANCE
    assert (result.report.parameters[1] < plain.parameters[1]) == bool(result.report.narrowed)


def left_wide(report: PruneReport) -> dict[tuple[str, str], str]:
    return {(path.name, path.place): path.reason for path in report.left_wide}


def test_the_report_says_what_was_narrowed() -> None:
    result = fxc.prune(build(Form("x + b", [1, 4]), Form("x - b", [])), image(), narrow=True)
    where = "add in blocks.0 at tests/residuals.py:"
    assert f"narrowed blocks.0.last 8 -> 6, index_add in place of {where}" in str(result.report)
    assert result.report.removed["blocks.0.norm.weight"] == ((8,), (6,))
    assert result.report.left_wide == ()
    kept = fxc.ChannelGraph.of(result.module, image()).find("blocks.0.last", 1)
    assert ("stem.weight", 2) in kept.producers  # they are added to each other
    assert kept.removable


def test_what_is_measured_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, set[str]] = {}

    def speedups(wide: object, narrow: object, inputs: object, groups: dict[str, set[str]]) -> dict[str, float]:
        seen.update(groups)
        return {"eval:add": 1.31, "eval:sub": 1.01}

    monkeypatch.setattr(narrowing, "speedups", speedups)
    net = build(Form("x + b", [1, 4]), Form("x - b", [0, 3, 5]))
    result = fxc.prune(net, image(), narrow="measure")
    check_same(net, result.module)
    assert widths(result.module) == [6, 8]
    assert [(path.place, path.speedup) for path in result.report.narrowed] == [("eval:add", 1.31)]
    assert "; measured 1.31 times faster" in str(result.report)
    reason = "8 -> 5 was measured 1.01 times as fast, and 1.05 times are asked for"
    assert left_wide(result.report) == {("blocks.1.last", "eval:sub"): reason}
    assert f"  left wide: blocks.1.last into {result.report.left_wide[0].where}: 8 -> 5" in str(result.report)
    assert seen["eval:add"] == {"blocks_0_last", "blocks_0_norm", "blocks_0_depthwise", "add"}  # identities too


def test_measuring_leaves_everything_as_it_is() -> None:
    net = build(Form("x + b", [1, 4]), Form("x - b", [0, 3, 5]))
    visit, state = Fingerprint(net), torch.get_rng_state()
    result = fxc.prune(net, image(), narrow="measure")
    visit.check()
    assert torch.equal(state, torch.get_rng_state())
    check_same(net, result.module)
    assert all(path.speedup is not None and path.speedup >= 1.05 for path in result.report.narrowed)
    assert len(result.report.narrowed) + len(result.report.left_wide) == 2


def test_measuring_passes_the_rest_of_the_arguments() -> None:
    class Rest(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = build(Form("x + b", [1]))

        def forward(self, x: Tensor, *rest: Tensor, **named: Tensor) -> Tensor:
            return self.body(x) * rest[0] + named["shift"]  # type: ignore[no-any-return]

    scale = torch.ones(1, dtype=torch.float64)
    inputs = ExampleInputs((image(), scale), {"shift": scale})
    report = fxc.prune(Rest().double().eval(), inputs, narrow="measure").report
    assert len(report.narrowed) + len(report.left_wide) == 1
    assert not any("could not be measured" in reason for reason in left_wide(report).values())


def test_what_cannot_be_measured_stays_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    def speedups(*_: object) -> dict[str, float]:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(narrowing, "speedups", speedups)
    report = fxc.prune(build(Form("x + b", [1])), image(), narrow="measure").report
    assert not report.modified
    assert left_wide(report) == {("blocks.0.last", "eval:add"): "it could not be measured: out of memory"}


class Function(nn.Module):
    """``thin`` is zero in two of six channels, ``wide`` in none; ``function`` puts them together."""

    def __init__(self, function: Callable[["Function", Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.thin, self.wide, self.end = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1)
        self.table = nn.Parameter(torch.randn(1, 6, 7, 7))
        with torch.no_grad():
            for tensor in self.thin.parameters():
                tensor[[1, 4]] = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.function(self, x))  # type: ignore[no-any-return]


def late_read(net: Function, x: Tensor) -> Tensor:
    wide = net.wide(x)
    total = wide.add_(net.thin(x))
    result: Tensor = wide * total
    return result


def to_a_parameter(net: Function, x: Tensor) -> Tensor:
    result: Tensor = net.table.detach().add_(net.thin(x).mean(0, keepdim=True))
    return result


STAYS: dict[str, tuple[Callable[[Function, Tensor], Tensor], str]] = {
    "late read": (late_read, "the sum is written to memory that something else reads"),
    "other types": (lambda net, x: net.wide(x).float() + net.thin(x), "its operands have different types"),
    "of the network": (to_a_parameter, "the sum is written to memory that something else reads"),
    "repeated": (
        lambda net, x: net.wide(x).mean(1, keepdim=True) + net.thin(x),
        "the sum repeats one of its operands along the channels",
    ),
    "other rank": (
        lambda net, x: net.wide(x) + net.thin(x).mean((0,)),
        "the sum repeats one of its operands along the channels",
    ),
}


@pytest.mark.parametrize("name", STAYS)
def test_what_cannot_be_narrowed_is_said(name: str) -> None:
    function, reason = STAYS[name]
    net = Function(function).double()
    result = fxc.prune(net, image(), narrow=True)
    check_same(net, result.module, image())
    assert result.report.narrowed == ()
    assert left_wide(result.report) == {("thin", f"eval:{_sum_of(result.module)}"): reason}


def _sum_of(module: nn.Module) -> str:
    assert isinstance(module, fx.GraphModule)
    return str(next(node for node in module.graph.nodes if node.name.startswith("add")))


def test_channels_that_something_else_reads_stay() -> None:
    net = Function(lambda net, x: net.wide(x) + (t := net.thin(x)) + t.flip(1).sigmoid()).double()
    result = fxc.prune(net, image(), narrow=True)
    check_same(net, result.module, image())
    assert left_wide(result.report) == {("thin", "eval:add"): "its zero channels are in use elsewhere"}


@pytest.mark.parametrize(
    "function",
    [
        lambda net, x: net.wide(x) + net.thin(x).mean((2, 3), keepdim=True),
        lambda net, x: net.wide(x).mean((2, 3), keepdim=True) + net.thin(x),
        lambda net, x: net.wide(x).mean(2, keepdim=True) + net.thin(x).mean(3, keepdim=True),
    ],
)
def test_operands_are_broadcast_along_other_dims(function: Callable[[Function, Tensor], Tensor]) -> None:
    net = Function(function).double()
    result = fxc.prune(net, image(), narrow=True)
    assert [(p.before, p.after) for p in result.report.narrowed] == [(6, 4)]
    check_same(net, result.module)


def test_a_batch_of_one_proves_nothing_about_larger_ones() -> None:
    """With one image, nothing tells a tensor that all images share from one that each has."""
    net = Function(lambda net, x: net.wide(x) + net.table * 0 + net.thin(x.mean(0, keepdim=True))).double()
    result = fxc.prune(net, image(1), narrow=True)
    assert result.report.narrowed
    check_same(net, result.module, image(1), image(3))


def test_a_join_takes_what_the_sum_took() -> None:
    """More or fewer dims in front of the channels than in the example: a batch of sequences, a single row or image."""

    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.thin, self.end = nn.Linear(3, 6), nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.end((self.wide(x) - self.thin(x.tanh())).relu() + self.thin(x))  # type: ignore[no-any-return]

    class Images(Rows):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.thin, self.end = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 6, 3), nn.Conv2d(6, 2, 1)  # type: ignore[assignment]

    for net, shapes in ((Rows(), [(4, 3), (2, 5, 3), (3,), (2, 3, 4, 3)]), (Images(), [(2, 3, 6, 6), (3, 5, 7)])):
        net.double()
        with torch.no_grad():
            net.thin.weight[1:4], net.thin.bias[1:4] = 0, 0
        result = fxc.prune(net, torch.randn(*shapes[0], dtype=torch.float64), narrow=True)
        assert result.report.narrowed
        assert result.module.get_parameter("thin.weight").shape[0] == 3
        for shape in shapes:
            check_same(net, result.module, torch.randn(*shape, dtype=torch.float64))


def test_join_promotes_types() -> None:
    """As a sum does, under autocast."""
    join = Join(1, 2, torch.tensor([2, 0]), alpha=2)
    full, part = torch.ones(1, 3), torch.tensor([[0.5, 0.25]], dtype=torch.bfloat16)
    assert torch.equal(join(full, part), torch.tensor([[1.5, 1.0, 2.0]]))


def test_an_index_add_of_ones_own() -> None:
    """A constant index: what the op adds to hangs together with what it adds, and other entries are as they were."""
    index = torch.tensor([5, 0, 2])

    class Scatter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.thin, self.end = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 3, 1), nn.Conv2d(6, 2, 1)
            self.register_buffer("index", index)

        def forward(self, x: Tensor) -> Tensor:
            return self.end(torch.index_add(self.wide(x), 1, self.index, self.thin(x)))  # type: ignore[no-any-return, arg-type]

    net = Scatter().double()
    group = fxc.ChannelGraph.of(net, image()).find("thin", 0)
    assert set(group.producers) == {("thin.weight", 0), ("wide.weight", 5)}
    with torch.no_grad():
        for tensor in (*net.thin.parameters(), *net.wide.parameters()):
            tensor[0] = 0
        net.wide.weight[[3, 5]] = 0
        net.wide.bias[[3, 5]] = 0  # type: ignore[index]
    result = fxc.prune(net, image())
    check_same(net, result.module, image())
    assert "cannot be rewritten for fewer channels" in str(result.report)  # the index is the user's


def test_bad_arguments() -> None:
    net = build(Form("x + b", [1]))
    with pytest.raises(ValueError, match=r"narrow='yes': pass True, False, or \"measure\""):
        fxc.prune(net, image(), narrow="yes")  # type: ignore[arg-type]
    training = fxc.compress(net, image())
    with pytest.raises(UnsupportedModelError, match=r"call net.finalize\(narrow=...\)"):
        fxc.prune(training, narrow=True)
    with pytest.raises(ValueError, match=r"narrow removes channels: pass prune=True"):
        training.finalize(prune=False, narrow=True)
    with pytest.raises(ValueError, match=r"narrow=1: pass"):
        training.finalize(narrow=1)  # type: ignore[arg-type]
