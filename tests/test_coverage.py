"""Ops without a rule are named: where they are called, what they cost, and what to do."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.channels.coverage import REMEDY, Uncovered
from fxcompress.channels.rules import registered, registry
from fxcompress.channels.rules.pointwise import POINTWISE
from fxcompress.channels.rules.registry import register
from fxcompress.trace.graph.described import Place
from tests.exactness import difference, outputs


@torch.library.custom_op("fxcompress_tests::damp", mutates_args=())
def damp(x: Tensor) -> Tensor:
    return x / 2


@damp.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def damped(x: Tensor) -> Tensor:
    y: Tensor = damp(x)
    return y


class Odd(nn.Module):
    """A module that calls an op."""

    def __init__(self, op: Callable[[Tensor], Tensor], *, branches: bool = False) -> None:
        super().__init__()
        self.op, self.branches = op, branches

    def forward(self, x: Tensor) -> Tensor:
        if self.branches and x.shape[1] < 2:  # which torch.fx cannot trace: the model is run
            return x
        return self.op(x)


def build(op: Callable[[Tensor], Tensor], *, branches: bool = False) -> nn.Sequential:
    """Three convolutions, 4 -> 6 -> 8, with the op after the second: it meets 6 rows, and 6 columns after them."""
    torch.manual_seed(0)
    odd = nn.Sequential(nn.ReLU(), Odd(op, branches=branches))
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1), odd, nn.Conv2d(6, 8, 1)).double()


X = torch.ones(1, 3, 4, 4, dtype=torch.float64)
KEPT = 6 * 4 + 6 + 8 * 6  # weight and bias before the op, weight after it


def here(text: str) -> int:
    """The line of this file that holds a text."""
    return next(i for i, line in enumerate(Path(__file__).read_text("utf-8").splitlines(), 1) if line.endswith(text))


@pytest.mark.parametrize("branches", [False, True])
def test_a_custom_op_in_the_middle_of_a_network(*, branches: bool) -> None:
    net = build(damped, branches=branches)
    report = fxc.prune(net, X).report
    (found,) = report.uncovered
    assert found.op == "fxcompress_tests.damp.default"
    (place,) = found.places
    assert (place.module, place.file, place.line) == ("2.1", __file__, here("= damp(x)"))
    assert (found.parameters, found.alone) == (KEPT, KEPT)
    line = f"no rule for {found.op}: it keeps {KEPT} parameters, {KEPT} of them nothing else keeps"
    for text in (str(report), str(fxc.ChannelGraph.of(net, X))):
        assert line in text
        assert f"  damp in 2.1 at tests/test_coverage.py:{place.line}\n" in text
        assert REMEDY in text


def test_a_rule_sets_free_what_the_op_alone_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_RULES", registered())
    net = build(damped)
    with torch.no_grad():
        for parameter in net[1].parameters():
            parameter[2] = 0
    (before,) = fxc.ChannelGraph.of(net, X).uncovered
    assert not fxc.prune(net, X).report.modified
    register(POINTWISE, [torch.ops.fxcompress_tests.damp])
    graph = fxc.ChannelGraph.of(net, X)
    assert graph.uncovered == ()
    (bundle,) = [b for b in graph.bundles if "1.weight" in b.producers]
    assert bundle.removable
    assert bundle.parameters == before.alone
    result = fxc.prune(net, X)
    assert result.report.uncovered == ()
    assert result.module.get_parameter("1.weight").shape[0] == 5
    assert difference(outputs(net, (X,)), outputs(result.module, (X,))) <= 1e-9


def test_an_op_of_torch_without_a_rule() -> None:
    (found,) = fxc.prune(build(lambda x: x.masked_scatter(x > 0, x)), X).report.uncovered
    assert (found.op, found.places[0].node, found.parameters) == ("aten.masked_scatter.default", "masked_scatter", KEPT)


def test_what_something_else_keeps_as_well_is_told_apart() -> None:
    softmax = fxc.prune(build(lambda x: damped(x) + x.softmax(1)), X).report.uncovered
    assert [(op.parameters, op.alone) for op in softmax] == [(6 * 4 + 6, 0)]
    both = fxc.prune(build(lambda x: damped(x.masked_scatter(x > 0, x))), X).report.uncovered
    assert {op.op: (op.parameters, op.alone) for op in both} == dict.fromkeys(
        ("aten.masked_scatter.default", "fxcompress_tests.damp.default"), (KEPT, 0)
    )
    shared = fxc.prune(build(lambda x: damped(x) + x.masked_scatter(x > 0, x)), X).report.uncovered
    assert [(op.parameters, op.alone) for op in shared] == [(KEPT, 0)] * 2


def test_an_op_that_meets_no_channel_costs_nothing() -> None:
    net = nn.Sequential(Odd(damped), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)).double()
    (found,) = fxc.prune(net, X).report.uncovered
    assert (found.parameters, found.alone) == (0, 0)
    assert "it keeps no parameter" in str(found)
    assert REMEDY not in str(found)


def test_the_report_can_be_written_as_json() -> None:
    found = fxc.prune(build(damped), X).report.uncovered
    read = json.loads(json.dumps([dataclasses.asdict(op) for op in found]))
    assert [Uncovered(**{**op, "places": tuple(Place(**p) for p in op["places"])}) for op in read] == list(found)


def test_many_places_are_shortened() -> None:
    op = Uncovered("mylib.op", tuple(Place(f"op_{i}") for i in range(9)), 10, 5)
    assert "  and 5 more places" in str(op).splitlines()
    assert len(str(op).splitlines()) == 7


def test_the_remedy_names_a_section_that_exists() -> None:
    page, _, title = REMEDY.removeprefix("give it a rule: ").partition(", ")
    text = (Path(__file__).parents[1] / page).read_text("utf-8")
    assert f"\n## {title.strip(chr(34))}\n" in text
