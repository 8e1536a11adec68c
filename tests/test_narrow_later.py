"""What comes after a path was narrowed: files, training, folding, and further removals."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.channels.prepare import prepare
from fxcompress.channels.segments import trace_segments
from fxcompress.errors import CheckpointError
from fxcompress.passes.join import joins_of
from fxcompress.passes.narrow_branches import narrow_branches
from fxcompress.provenance import Provenance, provenance_of
from fxcompress.trace.inputs import ExampleInputs
from fxcompress.trace.traced import TracedModule
from fxcompress.trace.tracer import trace
from fxcompress.training.record import decode, encode
from tests.exactness import TOLERANCE, difference, outputs
from tests.nets import ResidualNet, batch, set_bits
from tests.networks import randomise
from tests.residuals import Form, Residual, Residuals, build, check_same, image, widths, zero

Draw = Callable[..., Any]


def test_a_network_is_saved_and_loaded(tmp_path: Path) -> None:
    forms = [Form("b + x", [1, 4]), Form("x - b", [0, 2, 3, 7], "depthwise", skip=True), Form("iadd", [5], tokens=True)]
    net = build(*forms)
    zero(net, [3], "blocks.0.first.weight", "blocks.0.first.bias")
    result = fxc.prune(net, image(), narrow=True)
    fxc.save(result.module, tmp_path / "net.fxc")
    loaded = fxc.load(tmp_path / "net.fxc", Residuals(*forms).double())
    assert difference(outputs(result.module, (image(),)), outputs(loaded, (image(),))) == 0
    assert indices(loaded) == indices(result.module)
    assert provenance_of(loaded) == provenance_of(traced(result.module))
    check_same(net, loaded)
    again = copy.deepcopy(loaded)
    again.load_state_dict(result.module.state_dict())
    check_same(net, again)


def traced(module: nn.Module) -> TracedModule:
    assert isinstance(module, TracedModule)
    return module


def indices(module: nn.Module) -> list[list[int]]:
    """The channels that each join adds to."""
    return [join.index.tolist() for *_, join in joins_of(traced(module))]


def reload(module: nn.Module, folder: Path, *forms: Form) -> nn.Module:
    """A network by way of a file."""
    fxc.save(module, folder / "net.fxc")
    return fxc.load(folder / "net.fxc", build(*forms))


def test_more_can_go_from_a_narrow_network(tmp_path: Path) -> None:
    """From both sides of a join, from the path alone, and at last all of the path."""
    forms = Form("x + b", [1, 4]), Form("b + x", [0, 3])
    first = fxc.prune(build(*forms), image(), narrow=True).module
    assert indices(first) == [[0, 2, 3, 5, 6, 7], [1, 2, 4, 5, 6, 7]]
    for i, dead in enumerate([[1, 4], [4]]):  # channels 2 and 6 of the sum, and channel 6
        names = ("last.weight", "last.bias", "norm.weight", "norm.bias", "norm.running_mean")
        zero(first, dead, *(f"blocks.{i}.{name}" for name in names))
        zero(first, [6], *(f"blocks.{i}.before.{name}" for name in ("bias", "running_mean")))
    zero(first, [6], "stem.weight", "stem.bias")
    second = fxc.prune(first, image())
    assert second.report.removed["stem.weight"][1][0] == 7  # channel 6 was zero on all paths
    assert widths(second.module) == [5, 5]
    check_same(first, second.module)
    third = fxc.prune(second.module, image(), narrow=True)
    assert [(p.name, p.before, p.after) for p in third.report.narrowed] == [("blocks.0.last", 5, 4)]
    assert indices(third.module) == [[0, 3, 5, 6], [1, 2, 4, 5, 6]]
    check_same(first, third.module)
    check_same(first, reload(third.module, tmp_path, *forms))
    zero(third.module, list(range(5)), "blocks.1.norm.weight", "blocks.1.norm.bias")
    fourth = fxc.prune(third.module, image())
    assert fourth.report.branches == ("eval:add_1",)
    assert len(indices(fourth.module)) == 1
    assert not hasattr(fourth.module, "add_1_join")
    check_same(third.module, fourth.module)
    check_same(third.module, reload(fourth.module, tmp_path, *forms))


def test_the_optimizer_goes_on() -> None:
    """Over two steps: what is zero goes first, then what is narrow."""
    net = build(Form("x + b", [1, 4]))
    zero(net, [2], "blocks.0.first.weight", "blocks.0.first.bias")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for parameter in net.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.randn_like(parameter)
    momentum = optimizer.state[net.get_parameter("blocks.0.last.weight")]["momentum_buffer"]
    result = fxc.prune(net, image(), optimizer, narrow=True)
    new = result.module.get_parameter("blocks.0.last.weight")
    assert new.shape[:2] == (6, 4)
    expected = momentum[[0, 2, 3, 5, 6, 7]][:, [0, 1, 3, 4]]
    assert torch.equal(optimizer.state[new]["momentum_buffer"], expected)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in result.module.parameters()}


def test_folding_and_narrowing_together() -> None:
    """Channel 2 between the layers is 3 in evaluation and in training, where the last layer has no padding."""
    net = build(Form("x + b", [1, 4], ""))
    block = net.blocks[0]
    assert isinstance(block, Residual)
    block.last = nn.Conv2d(5, 8, 1).double()
    zero(net, [1, 4], "blocks.0.last.weight", "blocks.0.last.bias")
    zero(net, [2], "blocks.0.first.weight")
    nn.init.constant_(block.first.bias, 3.0)
    result = fxc.prune(net, image(), fold=True, narrow=True)
    assert result.report.folded == {"blocks.0.last.weight": 1}
    assert result.module.get_parameter("blocks.0.last.weight").shape[:2] == (6, 4)
    check_same(net, result.module)


def compressed(net: nn.Module, inputs: Tensor) -> fxc.CompressedModule:
    return fxc.compress(net, inputs, bits=6.0)


def test_a_network_in_training_is_narrowed_when_it_is_finalized(tmp_path: Path) -> None:
    net = compressed(ResidualNet().double(), batch()[0][:2])
    set_bits(net, "block1.conv2.weight", [0, 5])
    zero(net, [0, 5], "block1.bn2.bias")
    net.step()
    wide, narrow = net.finalize().eval(), net.finalize(narrow=True).eval()
    x = batch(seed=3)[0]
    assert wide.get_parameter("block1.conv2.weight").shape[0] == 8
    assert narrow.get_parameter("block1.conv2.weight").shape[0] == 6
    assert difference(wide(x), narrow(x)) <= TOLERANCE
    fxc.save(narrow, tmp_path / "net.fxc")
    assert torch.equal(fxc.load(tmp_path / "net.fxc", ResidualNet().double())(x), narrow(x))


def test_a_narrow_network_trains_and_compresses_itself() -> None:
    model = fxc.prune(build(Form("x + b", [1, 4]), Form("x - b", [0])), image(), narrow=True).module
    net = compressed(model, image())
    optimizer = torch.optim.Adam(net.param_groups())
    (net(image()).square().mean() + net.size()).backward()
    optimizer.step()
    set_bits(net, "blocks.0.first.weight", [0, 3])
    zero(net, [0, 3], "blocks.0.first.bias")
    net.step()
    before = outputs(net, (image(),))
    assert net.prune(optimizer).modified
    assert difference(before, outputs(net, (image(),))) <= TOLERANCE
    fresh = compressed(model, image())
    fresh.load_state_dict(net.state_dict())
    assert difference(before, outputs(fresh, (image(),))) <= TOLERANCE
    other = compressed(build(Form("x + b", []), Form("x - b", [])), image())
    with pytest.raises(CheckpointError, match="the state_dict is of another network"):
        other.load_state_dict(net.state_dict())
    assert net.finalize().eval()(image()).shape == (2, 4)


def test_a_record_holds_the_joins() -> None:
    module = fxc.prune(build(Form("x + b", [1, 4])), image(), narrow=True).module
    provenance = provenance_of(traced(module))
    assert provenance is not None
    assert [(join.place, join.operand, join.dim) for join in provenance.joins] == [("eval:add", 1, 1)]
    assert decode(encode(provenance)) == replace(provenance, inputs=(), graph="")
    assert decode(encode(Provenance({}))).joins == ()


def test_a_narrow_network_inside_another_one() -> None:
    """It is called twice, each call by the same join."""
    inner = fxc.prune(build(Form("x + b", [1, 4])), image(), narrow=True).module

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.inner(x) + self.inner(x.flip(2))
            return result

    net = copy.deepcopy(Twice())
    zero(net.inner, [1], "stem.weight", "stem.bias", "blocks.0.before.bias", "blocks.0.before.running_mean")
    result = fxc.prune(net, image(), narrow=True)
    assert result.module.get_parameter("inner.stem.weight").shape[0] == 7
    check_same(net, result.module)


def test_pieces_are_narrowed() -> None:
    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = build(Form("x + b", [1, 4]))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.body(x)
            return y if y.mean() > 0 else 2 * y

    net = Reading()
    result = fxc.prune(net, image(), narrow=True)
    assert [path.place for path in result.report.narrowed] == ["body.eval:add"]
    where = "add in body.blocks.0 at tests/residuals.py:"
    assert f"narrowed body.blocks.0.last 8 -> 6, index_add in place of {where}" in str(result.report)
    check_same(net, result.module)


def test_both_graphs_of_a_network_are_narrowed() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = build(Form("x + b", [1, 4]))

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.net(x), 0.5, self.training)

    net = Noisy()
    module = trace(net)
    narrowed = narrow_branches(module, ExampleInputs.of(image()))
    assert {path.place for path in narrowed.paths} == {"eval:add", "train:add"}
    assert narrowed.removal is not None
    assert widths(narrowed.removal.module) == [6]
    assert difference(outputs(net, (image(),)), outputs(narrowed.removal.module, (image(),))) <= TOLERANCE
    torch.manual_seed(0)
    expected = outputs(net, (image(),), training=True)
    torch.manual_seed(0)
    assert difference(expected, outputs(narrowed.removal.module, (image(),), training=True)) <= TOLERANCE


def test_resnet18() -> None:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    net = randomise(torchvision.models.resnet18(num_classes=10).double())
    dead = torch.rand(512) < 0.7
    with torch.no_grad():
        for name in ("layer1.1", "layer3.1", "layer4.0"):
            block: Any = net.get_submodule(name)
            rows = dead[: block.conv2.weight.shape[0]]
            for tensor in (block.conv2.weight, block.bn2.bias, block.bn2.running_mean):
                tensor[rows] = 0
    x = image(2, 33)
    result = fxc.prune(net, x, narrow=True)
    for name in ("layer1.1", "layer3.1", "layer4.0"):
        rows = dead[: net.get_submodule(name).conv2.weight.shape[0]]  # type: ignore[union-attr, index]
        left = int((~rows).sum())
        assert result.module.get_parameter(f"{name}.conv2.weight").shape[0] == left
        where = f"add_ in {name} at torchvision/models/resnet.py:"
        assert f"narrowed {name}.conv2 {len(rows)} -> {left}, index_add in place of {where}" in str(result.report)
    check_same(net, result.module, x)


def test_the_objectives_see_who_feeds_a_join() -> None:
    """Behind it, a channel is fed by both paths where both have it, and by the wide one elsewhere."""
    net = fxc.prune(build(Form("x + b", [1, 4])), image(), narrow=True).module
    analysis = prepare(net, image())
    segments = trace_segments(analysis.trails["eval"], analysis.sites)
    sum_ = analysis.trails["eval"].values["add"]
    names = [
        [analysis.sites[site].weight_name for site, _ in segments.sources[segment]]
        for segment in segments.along(sum_, 1).tolist()
    ]
    assert [sorted(found) for found in names] == [
        ["stem.weight"] if channel in {1, 4} else ["blocks.0.last.weight", "stem.weight"] for channel in range(8)
    ]
