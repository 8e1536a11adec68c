"""A path into a sum that is narrower than the sum: exact, smaller, and known to all that comes after."""

import copy
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.channels.prepare import prepare
from fxcompress.channels.segments import trace_segments
from fxcompress.errors import CheckpointError, UnsupportedModelError
from fxcompress.passes import narrow_branches as narrowing
from fxcompress.passes.join import Join, joins_of
from fxcompress.passes.narrow_branches import narrow_branches
from fxcompress.passes.narrow_paths import find_paths, open_joins
from fxcompress.passes.prune_channels import knowns_of, prune_channels, values_known
from fxcompress.provenance import Provenance, provenance_of
from fxcompress.trace.inputs import ExampleInputs
from fxcompress.trace.tracer import trace
from fxcompress.training.record import decode, encode
from tests.exactness import TOLERANCE, Fingerprint, difference, outputs
from tests.nets import ResidualNet, batch
from tests.networks import Example, examples, randomise

Draw = Callable[..., Any]
Sum = Callable[[Tensor, Tensor], Tensor]

SUMS: dict[str, Sum] = {
    "x + b": operator.add,
    "b + x": lambda x, b: b + x,
    "torch.add": torch.add,
    "add": lambda x, b: b.add(x),
    "alpha": lambda x, b: torch.add(x, b, alpha=0.5),
    "x - b": operator.sub,
    "sub": lambda x, b: torch.sub(x, b, alpha=2),
    "iadd": lambda x, b: operator.iadd(x * 2, b),
    "add_": lambda x, b: b.add_(x),
    "isub": lambda x, b: operator.isub(x * 2, b),
}


@dataclass
class Form:
    """What a block looks like.

    Attributes:
        join: how the paths are added.
        dead: the channels of the second path that are zero.
        last: what stands behind the last layer of that path.
        tokens: linear layers on channels that come last, behind a layer norm; otherwise convolutions.
        skip: the first path passes through a layer, too.
    """

    join: str
    dead: list[int]
    last: str = "norm"
    tokens: bool = False
    skip: bool = False


class Residual(nn.Module):
    """One block: a sum of two paths."""

    def __init__(self, channels: int, form: Form) -> None:
        super().__init__()
        self.form = form
        self.before = nn.LayerNorm(channels) if form.tokens else nn.BatchNorm2d(channels)
        layer: Any = nn.Linear if form.tokens else lambda i, o: nn.Conv2d(i, o, 3, padding=1)
        self.first, self.last = layer(channels, 5), layer(5, channels)
        self.skip = layer(channels, channels) if form.skip else nn.Identity()
        self.norm = nn.BatchNorm2d(channels) if form.last == "norm" and not form.tokens else nn.Identity()
        depthwise = form.last == "depthwise" and not form.tokens
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels) if depthwise else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W)."""
        if self.form.tokens:
            return self.sum(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return F.relu(self.sum(x))

    def sum(self, x: Tensor) -> Tensor:
        b = self.depthwise(self.norm(self.last(F.relu(self.first(self.before(x))))))
        b = F.gelu(b) if self.form.last == "activation" else b
        return SUMS[self.form.join](self.skip(x), b)

    def kill(self) -> None:
        """Zero the dead channels of the path, in both modes, and nothing else."""
        dead = self.form.dead
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            module, _, leaf = name.partition(".")
            if module in {"last", "norm", "depthwise"} and leaf in {"weight", "bias", "running_mean"}:
                tensor.data[dead] *= float(module != "last" and leaf == "weight")


class Net(nn.Module):
    """A stem, blocks, and a classifier."""

    def __init__(self, *forms: Form, channels: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3)
        self.blocks = nn.ModuleList(Residual(channels, form) for form in forms)
        self.fc = nn.Linear(channels, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def build(*forms: Form, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    net = randomise(Net(*forms).double())
    assert isinstance(net, Net)
    with torch.no_grad():
        for block in net.blocks:
            assert isinstance(block, Residual)
            block.kill()
    return net


def image(n: int = 2, size: int = 7, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def widths(net: nn.Module) -> list[int]:
    """The channels of the second path of each block."""
    return [p.shape[0] for name, p in net.named_parameters() if name.endswith(".last.weight")]


def check_same(net: nn.Module, other: nn.Module, *inputs: Tensor) -> None:
    """The same outputs in both modes, of other batches and images too."""
    for x in inputs or (image(), image(1), image(3, 9)):
        for training in (False, True):
            expected = outputs(net, (x,), training=training)
            assert difference(expected, outputs(other, (x,), training=training)) <= TOLERANCE


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
    provenance = provenance_of(narrow)  # type: ignore[arg-type]
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
                for name, tensor in (*module.named_parameters(), *module.named_buffers()):
                    tensor.mul_(name not in {"bias", "running_mean"})
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


def test_the_report_says_what_was_narrowed() -> None:
    result = fxc.prune(build(Form("x + b", [1, 4]), Form("x - b", [])), image(), narrow=True)
    assert "narrowed blocks.0.last 8 -> 6, join by index_add at eval:add" in str(result.report)
    assert result.report.removed["blocks.0.norm.weight"] == ((8,), (6,))
    assert result.report.left_wide == {}
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
    assert "narrowed blocks.0.last 8 -> 6, join by index_add at eval:add; measured 1.31 times faster" in str(
        result.report
    )
    assert result.report.left_wide == {
        "blocks.1.last at eval:sub": "8 -> 5 was measured 1.01 times as fast, and 1.05 times are asked for"
    }
    assert "  left wide: blocks.1.last at eval:sub: 8 -> 5 was measured" in str(result.report)
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


def test_what_cannot_be_measured_stays_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    def speedups(*_: object) -> dict[str, float]:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(narrowing, "speedups", speedups)
    report = fxc.prune(build(Form("x + b", [1])), image(), narrow="measure").report
    assert not report.modified
    assert report.left_wide == {"blocks.0.last at eval:add": "it could not be measured: out of memory"}


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
    result: Tensor = net.table.detach().add_(net.thin(x))
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
    assert result.report.left_wide == {f"thin at eval:{_sum_of(result.module)}": reason}


def _sum_of(module: Any) -> str:  # noqa: ANN401 - a GraphModule
    names = [n.name for n in module.graph.nodes if n.name.startswith("add")]
    return names[0]


def test_channels_that_something_else_reads_stay() -> None:
    net = Function(lambda net, x: net.wide(x) + (t := net.thin(x)) + t.flip(1).sigmoid()).double()
    result = fxc.prune(net, image(), narrow=True)
    check_same(net, result.module, image())
    assert result.report.left_wide == {"thin at eval:add": "its zero channels are in use elsewhere"}


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


def test_a_network_is_saved_and_loaded(tmp_path: Path) -> None:
    net = build(
        Form("b + x", [1, 4]), Form("x - b", [0, 2, 3, 7], "depthwise", skip=True), Form("iadd", [5], tokens=True)
    )
    with torch.no_grad():  # channel 6 goes from the first sum and all before it
        net.stem.weight[6] = 0
        net.stem.bias[6] = 0  # type: ignore[index]
    result = fxc.prune(net, image(), narrow=True)
    fxc.save(result.module, tmp_path / "net.fxc")
    loaded = fxc.load(tmp_path / "net.fxc", Net(*(block.form for block in net.blocks)).double())  # type: ignore[misc]
    assert difference(outputs(result.module, (image(),)), outputs(loaded, (image(),))) == 0
    assert [join.index.tolist() for *_, join in joins_of(loaded)] == [
        join.index.tolist() for *_, join in joins_of(result.module)  # type: ignore[arg-type]
    ]  # fmt: skip
    check_same(net, loaded)
    again = copy.deepcopy(loaded)
    again.load_state_dict(result.module.state_dict())
    check_same(net, again)


def test_more_can_go_from_a_narrow_network(tmp_path: Path) -> None:
    """From both sides of a join, from the path alone, and at last all of the path."""
    net = build(Form("x + b", [1, 4]), Form("b + x", [0, 3]))
    first = fxc.prune(net, image(), narrow=True).module
    with torch.no_grad():
        for name in ("blocks.0.last", "blocks.0.norm", "blocks.1.last", "blocks.1.norm"):
            wide = [6] if name.startswith("blocks.1") else [2, 6]  # by their numbers in a wide network
            index = provenance_of(first).kept[f"{name}.weight"][0]  # type: ignore[union-attr, arg-type]
            for leaf in {"blocks.0.last": ("weight", "bias")}.get(name, ("weight", "bias")):
                first.get_parameter(f"{name}.{leaf}")[[index.index(c) for c in wide]] = 0
            if name.endswith("norm"):
                first.get_buffer(f"{name}.running_mean")[[index.index(c) for c in wide]] = 0
        for name in ("stem.weight", "stem.bias"):
            first.get_parameter(name)[6] = 0
        for name in ("blocks.0.before.bias", "blocks.0.before.running_mean", "blocks.1.before.bias"):
            dict((*first.named_parameters(), *first.named_buffers()))[name][6] = 0
        first.get_buffer("blocks.1.before.running_mean")[6] = 0
    second = fxc.prune(first, image())
    assert second.report.removed["stem.weight"][1][0] == 7  # channel 6 was zero on all paths
    assert widths(second.module) == [5, 5]
    check_same(first, second.module)
    third = fxc.prune(second.module, image(), narrow=True)
    assert [(p.name, p.before, p.after) for p in third.report.narrowed] == [("blocks.0.last", 5, 4)]
    check_same(first, third.module)
    fxc.save(third.module, tmp_path / "net.fxc")
    check_same(first, fxc.load(tmp_path / "net.fxc", build(Form("x + b", []), Form("b + x", []))))
    with torch.no_grad():
        for name in ("weight", "bias"):
            third.module.get_parameter(f"blocks.1.norm.{name}").zero_()
    fourth = fxc.prune(third.module, image())
    assert fourth.report.branches == ("eval:add_1",)
    assert len(list(joins_of(fourth.module))) == 1  # type: ignore[arg-type]
    assert not hasattr(fourth.module, "add_1_join")
    check_same(third.module, fourth.module)
    fxc.save(fourth.module, tmp_path / "net.fxc")
    check_same(third.module, fxc.load(tmp_path / "net.fxc", build(Form("x + b", []), Form("b + x", []))))


def test_the_optimizer_goes_on() -> None:
    net = build(Form("x + b", [1, 4]))
    with torch.no_grad():  # in two steps: what is zero, then what is narrow
        net.blocks[0].first.weight[2] = 0  # type: ignore[index, union-attr]
        net.blocks[0].first.bias[2] = 0  # type: ignore[index, union-attr]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for parameter in net.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.randn_like(parameter)
    weight = net.blocks[0].last.weight  # type: ignore[union-attr]
    momentum = optimizer.state[weight]["momentum_buffer"]  # type: ignore[index]
    result = fxc.prune(net, image(), optimizer, narrow=True)
    new = result.module.get_parameter("blocks.0.last.weight")
    assert new.shape[:2] == (6, 4)
    expected = momentum[[0, 2, 3, 5, 6, 7]][:, [0, 1, 3, 4]]
    assert torch.equal(optimizer.state[new]["momentum_buffer"], expected)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in result.module.parameters()}


def test_folding_and_narrowing_together() -> None:
    net = build(Form("x + b", [1, 4]))
    with torch.no_grad():
        net.blocks[0].first.weight[2] = 0  # type: ignore[index, union-attr]
        net.blocks[0].first.bias[2] = 3  # type: ignore[index, union-attr]
    net.blocks[0].last = nn.Conv2d(5, 8, 1, bias=False).double()
    nn.init.zeros_(net.blocks[0].last.weight[[1, 4]])  # type: ignore[arg-type]
    with torch.no_grad():
        net.blocks[0].last.weight[[1, 4]] = 0  # type: ignore[index]
    result = fxc.prune(net, image(), fold=True, narrow=True)
    assert result.report.folded == {"blocks.0.last.weight": 1}
    assert result.module.get_parameter("blocks.0.last.weight").shape[:2] == (6, 4)
    for x in (image(), image(1, 9)):
        assert difference(outputs(net, (x,)), outputs(result.module, (x,))) <= TOLERANCE


def compressed(net: nn.Module, inputs: Tensor) -> fxc.CompressedModule:
    return fxc.compress(net, inputs, bits=6.0)


def test_a_network_in_training_is_narrowed_when_it_is_finalized(tmp_path: Path) -> None:
    net = compressed(ResidualNet().double(), batch()[0][:2])
    with torch.no_grad():
        net.get_submodule("block1.conv2.weight_quantizer").bits[[0, 5]] = 0  # type: ignore[union-attr, index]
        net.get_parameter("block1.bn2.bias")[[0, 5]] = 0
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
    with torch.no_grad():
        net.get_submodule("blocks.0.first.weight_quantizer").bits[[0, 3]] = 0  # type: ignore[union-attr, index]
        net.get_parameter("blocks.0.first.bias")[[0, 3]] = 0
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
    provenance = provenance_of(module)  # type: ignore[arg-type]
    assert provenance is not None
    assert [(join.place, join.operand, join.dim) for join in provenance.joins] == [("eval:add", 1, 1)]
    assert decode(encode(provenance)) == replace(provenance, inputs=())
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
    with torch.no_grad():
        for name in ("stem.weight", "stem.bias", "blocks.0.before.bias", "blocks.0.before.running_mean"):
            dict((*net.inner.named_parameters(), *net.inner.named_buffers()))[name][1] = 0
    result = fxc.prune(net, image(), narrow=True)
    assert result.module.get_parameter("inner.stem.weight").shape[0] == 7
    check_same(net, result.module)


def test_pieces_are_narrowed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = build(Form("x + b", [1, 4]))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.body(x)
            return y if y.mean() > 0 else 2 * y

    net = Reading()
    result = fxc.prune(net, image(), narrow=True)
    assert "narrowed body.blocks.0.last 8 -> 6, join by index_add at body.eval:add" in str(result.report)
    check_same(net, result.module)


def test_join_promotes_types() -> None:
    """As a sum does, under autocast."""
    join = Join(1, torch.tensor([2, 0]), alpha=2)
    full, part = torch.ones(1, 3), torch.tensor([[0.5, 0.25]], dtype=torch.bfloat16)
    assert torch.equal(join(full, part), torch.tensor([[1.5, 1.0, 2.0]]))


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
        rows = dead[: net.get_submodule(name).conv2.weight.shape[0]]  # type: ignore[union-attr, index, arg-type]
        left = int((~rows).sum())
        assert result.module.get_parameter(f"{name}.conv2.weight").shape[0] == left
        assert f"narrowed {name}.conv2 {len(rows)} -> {left}, join by index_add" in str(result.report)
    check_same(net, result.module, x)


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


def test_bad_arguments() -> None:
    net = build(Form("x + b", [1]))
    with pytest.raises(ValueError, match=r"narrow='yes': pass True, False, or \"measure\""):
        fxc.prune(net, image(), narrow="yes")  # type: ignore[arg-type]
    training = compressed(net, image())
    with pytest.raises(UnsupportedModelError, match=r"call net.finalize\(narrow=...\)"):
        fxc.prune(training, narrow=True)
    with pytest.raises(ValueError, match=r"narrow removes channels: pass prune=True"):
        training.finalize(prune=False, narrow=True)
    with pytest.raises(ValueError, match=r"narrow=1: pass"):
        training.finalize(narrow=1)  # type: ignore[arg-type]
