"""Constants other than zero are folded into what reads them: where that is exact, and nowhere else."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxcompress as fxc
from fxcompress.channels.prepare import prepare
from fxcompress.errors import OptimizerError, UnsupportedModelError
from fxcompress.passes import fold_sites
from fxcompress.passes.fold_constants import fold_constants
from fxcompress.pruning import PruneResult
from fxcompress.storage.file import read
from tests.exactness import Fingerprint, atoms_of, difference, make_constant, outputs, removable_units
from tests.nets import set_bits
from tests.networks import randomise
from tests.test_zoo import build

DEAD = [1, 3, 4]
"""Channels of the first layer whose weights are zero; a sigmoid makes constants of them that are not."""


class Net(nn.Module):
    """A first layer with dead channels, a sigmoid, and what reads it: ``function``."""

    def __init__(self, function: Callable[["Net", Tensor], Tensor], dead: list[int] = DEAD) -> None:
        super().__init__()
        self.function = function
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.plain, self.other = nn.Conv2d(8, 4, 3), nn.Conv2d(8, 4, 3, bias=False)
        self.padded, self.wide = nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(8, 4, 5, padding=2, bias=False)
        self.depthwise, self.up = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ConvTranspose2d(8, 4, 2, 2)
        self.point, self.after = nn.ConvTranspose2d(8, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.linear = nn.Linear(8, 4, bias=False)
        randomise(self)
        with torch.no_grad():
            self.first.weight[dead] = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, torch.sigmoid(self.norm(self.first(x))))


def image(size: int = 9, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.randn(batch, 3, size, size, generator=generator, dtype=torch.float64)


def check(net: nn.Module, *, tolerance: float = 1e-12, fixed: bool = False) -> PruneResult:
    """Fold and prune: the same in evaluation on images of two sizes; a second run folds nothing."""
    net, x = net.double().eval(), image()
    visit = Fingerprint(net)
    result = fxc.prune(net, x, fold=True)
    visit.check()
    for inputs in (x,) if fixed else (x, image(13, 1)):
        assert difference(outputs(net, (inputs,)), outputs(result.module, (inputs,))) <= tolerance
    assert isinstance(result.module, fx.GraphModule)
    result.module.graph.lint()
    assert fxc.prune(result.module, x, fold=True).report.folded == {}
    return result


def left(result: PruneResult) -> int:
    """Channels of the first layer that are left."""
    return int(result.module.get_parameter("first.weight").shape[0])


def functional(net: Net, x: Tensor) -> Tensor:
    return F.conv2d(F.conv2d(x, net.plain.weight, net.plain.bias, 2), net.linear.weight[:, :4, None, None])


INTO_BIAS: dict[str, tuple[Callable[[Net, Tensor], Tensor], str, tuple[str, ...]]] = {
    "conv": (lambda net, x: net.plain(x), "plain.weight", ()),
    "conv without bias": (lambda net, x: net.other(x), "other.weight", ("other.weight",)),
    "before batch norm": (lambda net, x: net.after(net.other(x)), "other.weight", ()),
    "function": (functional, "plain.weight", ()),
    "function without bias": (lambda net, x: F.conv2d(x, net.other.weight), "other.weight", ("other.weight",)),
    "function by keyword": (lambda net, x: F.conv2d(x, weight=net.other.weight), "other.weight", ("other.weight",)),
    "1x1 transposed": (lambda net, x: net.point(x), "point.weight", ("point.weight",)),
    "linear": (lambda net, x: net.linear(x.permute(0, 2, 3, 1).contiguous()), "linear.weight", ("linear.weight",)),
    "after a mean": (lambda net, x: net.linear(x.mean((2, 3))), "linear.weight", ("linear.weight",)),
    "after pooling": (lambda net, x: net.plain(F.avg_pool2d(x, 2)), "plain.weight", ()),
    "after a border": (lambda net, x: net.plain(F.pad(x, (1, 1, 1, 1), mode="reflect")), "plain.weight", ()),
    "after resizing": (lambda net, x: net.plain(F.interpolate(x, scale_factor=2, mode="bilinear")), "plain.weight", ()),
    "after a larger border": (
        lambda net, x: net.plain(F.pad(x, (2, 1, 0, 1), mode="replicate")),
        "plain.weight",
        (),
    ),
    "after bicubic resizing": (
        lambda net, x: net.plain(F.interpolate(x, scale_factor=1.5, mode="bicubic")),
        "plain.weight",
        (),
    ),
    "after shrinking": (
        lambda net, x: net.plain(F.interpolate(x, size=(5, 4), mode="bilinear", antialias=True)),
        "plain.weight",
        (),
    ),
    "after adaptive pooling": (lambda net, x: net.plain(F.adaptive_avg_pool2d(x, 4)), "plain.weight", ()),
    "after pooling with a rest": (lambda net, x: net.plain(F.avg_pool2d(x, 2, ceil_mode=True)), "plain.weight", ()),
    "after dropout": (lambda net, x: net.plain(F.dropout(x, 0.5, net.training)), "plain.weight", ()),
    "after moving": (lambda net, x: net.plain(x.flip(1).transpose(2, 3)), "plain.weight", ()),
}


@pytest.mark.parametrize("case", INTO_BIAS)
def test_constants_go_into_the_bias(case: str) -> None:
    function, weight, biases = INTO_BIAS[case]
    net = Net(function)
    assert fxc.prune(net.double(), image()).module.get_parameter("first.weight").shape[0] == 8
    result = check(net)
    assert left(result) == 5
    assert result.report.folded == {weight: 3}
    assert result.report.new_biases == biases
    added = set(result.module.state_dict()) - set(net.state_dict())
    assert len(added) == len(biases)
    assert f"3 constant inputs of {weight} folded" in str(result.report)


BEHIND_PADDING: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "conv": lambda net, x: net.padded(x),
    "two readers": lambda net, x: net.padded(x) + net.wide(x.flip(1)).flip(1),
    "one of two readers": lambda net, x: net.padded(x)[:, :, 1:-1, 1:-1] + net.plain(x),
    "transposed": lambda net, x: net.up(x),
    "twice": lambda net, x: net.padded(x) + net.padded(x * 1.0),
    "padding by name": lambda net, x: F.conv2d(x, net.plain.weight, padding="same"),
}


@pytest.mark.parametrize("case", BEHIND_PADDING)
def test_behind_zero_padding_all_constants_become_one(case: str) -> None:
    net = Net(BEHIND_PADDING[case])
    result = check(net)
    assert left(result) == 6
    assert list(result.module.state_dict()) == list(net.state_dict())


def test_a_single_constant_behind_zero_padding_stays() -> None:
    result = check(Net(lambda net, x: net.padded(x), dead=[2]))
    assert left(result) == 8
    assert not result.report.modified
    assert len(result.report.unfolded) == 1
    reason = "constant inputs of padded.weight stay: it is behind zero padding, with no other constant to merge it with"
    assert reason in str(result.report)


def test_one_that_stays_anyway_takes_the_others() -> None:
    """The depthwise convolution keeps all; nothing is gained by folding where its input goes as well."""
    result = check(Net(lambda net, x: torch.cat([net.padded(x), net.depthwise(x)], 1)))
    assert left(result) == 8
    assert not result.report.modified
    result = check(
        Net(lambda net, x: torch.cat([net.padded(x), net.plain(x).mean((2, 3), keepdim=True) * net.padded(x)], 1))
    )
    assert left(result) == 6
    assert result.report.folded == {"padded.weight": 2, "plain.weight": 2}


def test_constants_of_different_size_are_merged_into_a_large_one() -> None:
    net = Net(lambda net, x: net.padded(x), dead=[0, 1, 2]).double().eval()
    with torch.no_grad():
        for channel, shift in enumerate((-25.0, -30.0, 2.0)):
            net.norm.weight[channel], net.norm.bias[channel] = 0, shift
    result = check(net)
    assert result.module.get_parameter("norm.bias").min() > -20
    assert left(result) == 6


def test_what_becomes_constant_by_folding_is_folded_too() -> None:
    def function(net: Net, x: Tensor) -> Tensor:
        return net.last(torch.sigmoid(net.plain(x)))  # type: ignore[no-any-return, operator]

    net = Net(function)
    net.add_module("last", nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        alive = [k for k in range(8) if k not in DEAD]
        net.plain.weight[:2, alive] = 0
    result = check(net)
    assert result.report.folded == {"plain.weight": 3, "last.weight": 2}
    assert result.module.get_parameter("plain.weight").shape[:2] == (2, 5)


def test_zero_in_evaluation_alone_is_folded() -> None:
    """Without fold such a channel stays, as training sees something else."""
    net = Net(lambda net, x: net.padded(F.relu(x - 0.5)))
    with torch.no_grad():
        net.first.bias.index_fill_(0, torch.tensor(DEAD), -100.0)  # type: ignore[union-attr]
    assert fxc.prune(net.double(), image()).module.get_parameter("first.weight").shape[0] == 8
    assert left(check(net)) == 5


REFUSED: dict[str, tuple[Callable[[Net, Tensor], Tensor], str]] = {
    "weight": (lambda net, x: net.plain(x) + F.conv2d(x, net.plain.weight * 2), "mul at"),
    "bias": (lambda net, x: net.plain(x) * net.plain.bias.sum(), "sum at"),  # type: ignore[union-attr]
    "both ways": (
        lambda net, x: net.other(F.conv_transpose2d(net.plain(x), net.plain.weight)),
        "the inputs of one are the outputs of the other",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_parameters_that_something_else_reads_stay(case: str) -> None:
    function, reason = REFUSED[case]
    result = check(Net(function))
    assert left(result) == 8
    assert not result.report.modified
    assert reason in result.report.unfolded["plain.weight"]


KEPT: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "depthwise": lambda net, x: net.depthwise(x),
    "zeros at the border": lambda net, x: net.plain(F.pad(x, (1, 1, 1, 1))),
    "a mean over the border": lambda net, x: net.plain(F.avg_pool2d(x, 3, 1, 1)),
    "a divisor": lambda net, x: net.plain(F.avg_pool2d(x, 2, divisor_override=3)),
    "a size": lambda net, x: net.plain(x * x.shape[2]),
    "a jump": lambda net, x: net.plain(torch.round(x * 7)),
    "rounded division": lambda net, x: net.plain(torch.div(x, 0.1, rounding_mode="floor")),
    "infinite": lambda net, x: net.plain(1 / (x - x.clamp(0.0, 1.0))),
    "different constants": lambda net, x: net.plain(x) + net.plain(x * 2),
    "a sum with what varies": lambda net, x: net.plain(x + x.mean((1, 2, 3), keepdim=True)),
    "output": lambda net, x: x,
}


@pytest.mark.parametrize("case", KEPT)
def test_what_is_no_constant_stays(case: str) -> None:
    result = check(Net(KEPT[case]))
    assert left(result) == 8
    assert result.report.folded == {}


def test_the_border_of_a_mean_that_does_not_count_it() -> None:
    assert left(check(Net(lambda net, x: net.plain(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))))) == 5


def test_tied_weights_get_the_same_everywhere(tmp_path: Path) -> None:
    net = Net(lambda net, x: net.plain(x) - net.other(x).abs())
    net.other.weight = net.plain.weight
    result = check(net)
    assert left(result) == 5
    assert result.module.get_parameter("plain.weight") is result.module.get_parameter("other.weight")
    assert result.report.new_biases == ("other.weight",)
    fxc.save(result.module, tmp_path / "net.fxc")
    fresh = Net(net.function).double()
    fresh.other.weight = fresh.plain.weight
    assert torch.equal(fxc.load(tmp_path / "net.fxc", fresh)(image()), result.module(image()))


def test_a_batch_norm_that_reads_something_else_too_takes_nothing() -> None:
    result = check(Net(lambda net, x: net.after(net.other(x)) + net.after(net.plain(x))))
    assert left(result) == 5
    assert result.report.new_biases == ("other.weight",)


def test_training_is_the_same_where_the_constant_is() -> None:
    """The running mean takes what is folded; training subtracts the mean of the batch, whatever it is."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sigmoid(), nn.Conv2d(8, 4, 3, bias=False), nn.BatchNorm2d(4))
    with torch.no_grad():
        net.get_parameter("0.weight")[DEAD] = 0
    result = check(net)
    assert result.module.get_parameter("0.weight").shape[0] == 5
    a, b = (outputs(module, (image(),), training=True) for module in (net, result.module))
    assert difference(a, b) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    net = Net(INTO_BIAS["conv"][0]).to(dtype).eval()
    x = image().to(dtype)
    result = fxc.prune(net, x, fold=True).module
    assert result.get_parameter("first.weight").shape[0] == 5
    assert all(p.dtype == dtype for p in result.parameters())
    exact = outputs(copy.deepcopy(net).double(), (x.double(),))
    rounding = difference(exact, outputs(net, (x,)).double())
    assert difference(exact, outputs(result, (x,)).double()) <= 2 * rounding + 1e-7


def test_what_would_overflow_stays() -> None:
    net = Net(lambda net, x: net.other(x)).half().eval()
    with torch.no_grad():
        net.other.weight[0] = 60_000
    result = fxc.prune(net, image().half(), fold=True)
    assert not result.report.modified


def test_a_wrong_constant_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: what the tests above compare does depend on what is folded."""
    right = fold_sites.constants_of
    monkeypatch.setattr(
        fold_sites, "constants_of", lambda site, known: right(site, known) * (1 + 0.1 * np.arange(site.entries))
    )
    for function in (INTO_BIAS["conv"][0], BEHIND_PADDING["conv"]):
        net = Net(function).double().eval()
        assert (
            difference(outputs(net, (image(),)), outputs(fxc.prune(net, image(), fold=True).module, (image(),))) > 1e-3
        )


@pytest.mark.parametrize("case", INTO_BIAS)
def test_folded_networks_are_saved_and_loaded(case: str, tmp_path: Path) -> None:
    net = Net(INTO_BIAS[case][0]).double().eval()
    result = fxc.prune(fxc.prune(net, image(), fold=True).module, image()).module
    fxc.save(result, tmp_path / "net.fxc")
    fresh = Net(INTO_BIAS[case][0]).double()
    loaded = fxc.load(tmp_path / "net.fxc", fresh)
    assert list(loaded.state_dict()) == list(result.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), result.state_dict().values(), strict=True)
    )
    assert torch.equal(loaded(image()), result(image()))


def test_optimizers_and_networks_in_training_are_refused() -> None:
    net = Net(INTO_BIAS["conv"][0])
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    visit = Fingerprint(net, optimizer)
    with pytest.raises(OptimizerError, match=r"fold=True changes the weights .* without the optimizer"):
        fxc.prune(net, image().float(), optimizer, fold=True)
    visit.check()
    with pytest.raises(UnsupportedModelError, match=r"call net\.finalize\(\)"):
        fxc.prune(fxc.compress(net, image().float()), fold=True)


def quantized(*layers: nn.Module, dead: list[int], bits: float = 4.0) -> fxc.CompressedModule:
    """A network with a first layer of which some channels have no bits."""
    net = fxc.compress(nn.Sequential(*layers).double(), image(), bits=bits)
    set_bits(net, "0.weight", dead)
    net.step()
    return net.eval()


def reader(**options: Any) -> list[nn.Module]:  # noqa: ANN401 - of a convolution
    return [nn.Conv2d(3, 8, 3), nn.Sigmoid(), nn.Conv2d(8, 6, 3, **options), nn.ReLU(), nn.Conv2d(6, 2, 1)]


def test_finalize_folds_and_keeps_weights_on_their_grid(tmp_path: Path) -> None:
    net = quantized(*reader(), dead=DEAD)
    final, plain = net.finalize(), net.finalize(fold=False)
    assert final.get_parameter("0.weight").shape[0] == 5
    assert plain.get_parameter("0.weight").shape[0] == 8
    assert difference(net(image()), final(image())) <= 1e-12
    assert fxc.save(final, tmp_path / "net.fxc") < fxc.save(plain, tmp_path / "plain.fxc")
    assert set(read(tmp_path / "net.fxc").provenance.grids) == {"0.weight", "2.weight", "4.weight"}
    loaded = fxc.load(tmp_path / "net.fxc", nn.Sequential(*reader()).double())
    assert torch.equal(loaded(image()), final(image()))


def test_a_new_bias_of_a_finalized_network_must_pay() -> None:
    """Six columns of 4 bits are not worth 32 bits for each row; a kernel of 25 is."""
    few = quantized(nn.Conv2d(3, 8, 1), nn.Sigmoid(), nn.Conv2d(8, 99, 1, bias=False), dead=[1], bits=2.0)
    folded = fold_constants(few.finalize(prune=False), few.settings.inputs)
    assert folded.channels == {}
    assert folded.refused == {"2.weight": "a bias would take more bits than what could go"}
    many = quantized(nn.Conv2d(3, 8, 1), nn.Sigmoid(), nn.Conv2d(8, 99, 5, bias=False), dead=[1], bits=2.0)
    assert many.finalize().get_parameter("2.bias").shape == (99,)


def test_weights_on_a_grid_are_not_merged() -> None:
    net = quantized(*reader(padding=1), dead=DEAD)
    folded = fold_constants(net.finalize(prune=False), net.settings.inputs)
    assert folded.channels == {}
    reason = "behind zero padding they would be merged, and its weights lie on a grid"
    assert folded.refused == {"2.weight": reason}
    assert net.finalize().get_parameter("0.weight").shape[0] == 8


def test_a_folded_network_can_be_compressed_and_folded_again(tmp_path: Path) -> None:
    layers = (
        nn.Conv2d(3, 8, 3),
        nn.Sigmoid(),
        nn.Conv2d(8, 6, 3, bias=False),
        nn.Sigmoid(),
        nn.Conv2d(6, 9, 3, bias=False),
    )
    first = quantized(*copy.deepcopy(layers), dead=DEAD).finalize()
    net = fxc.compress(first, image(), bits=6.0)
    set_bits(net, "2.weight", [0, 5])
    net.step()
    net.prune()
    final = net.eval().finalize()
    assert final.get_parameter("2.weight").shape[:2] == (4, 5)
    assert set(final.state_dict()) == {f"{i}.{name}" for i in (0, 2, 4) for name in ("weight", "bias")}
    fxc.save(final, tmp_path / "net.fxc")
    loaded = fxc.load(tmp_path / "net.fxc", nn.Sequential(*layers).double())
    assert torch.equal(loaded(image()), final(image()))


def test_mobilenet() -> None:
    """30 % of its groups have zero weights, and biases and norms as they were: hardswish makes constants of them."""
    net, x = build("mobilenet_v3_small"), image(64)
    analysis = prepare(net, x)
    units = removable_units(analysis)
    make_constant(analysis, atoms_of(analysis, np.random.default_rng(0).choice(units, int(0.3 * len(units)), False)))
    plain, result = fxc.prune(net, x), fxc.prune(net, x, fold=True)
    before, unfolded, folded = (sum(p.numel() for p in m.parameters()) for m in (net, plain.module, result.module))
    assert unfolded > 0.75 * before
    assert folded < 0.59 * before
    assert list(result.module.state_dict()) == list(net.state_dict())
    assert difference(outputs(net, (image(96, 1),)), outputs(result.module, (image(96, 1),))) <= 1e-9


def test_a_norm_that_was_left_in_training_goes_by_its_batch() -> None:
    """In an evaluated network, by hand: what its running statistics make of a constant does not count."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Sigmoid(), nn.Conv2d(8, 4, 1)).double().eval()
    norm = net.get_submodule("1")
    assert isinstance(norm, nn.BatchNorm2d)
    with torch.no_grad():
        net.get_parameter("0.weight")[[1, 5]] = 0
        norm.running_mean.normal_()  # type: ignore[union-attr]
        norm.bias.normal_()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    assert fxc.prune(net, x, fold=True).report.modified
    norm.train()
    kept = copy.deepcopy(net)
    module = fxc.prune(net, x, fold=True).module
    assert difference(kept(x), module(x)) <= 1e-9


class WritesInPlace(nn.Module):
    """With a bias, torch computes the linear layer in another way, and what is written to its result follows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv = nn.Conv2d(3, 7, 1), nn.Conv2d(7, 4, 1, bias=False)
        self.linear = nn.Linear(7, 4, bias=False)
        nn.init.zeros_(self.first.weight[1:])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        y += self.conv(x)
        return y.flatten(2)  # type: ignore[no-any-return]


def test_nothing_is_folded_where_nothing_goes_then() -> None:
    net, x = WritesInPlace().double().eval(), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    result = fxc.prune(net, x, fold=True)
    assert difference(outputs(net, (x,)), outputs(result.module, (x,))) <= 1e-9
    size = sum(p.numel() for p in net.parameters())
    assert result.report.parameters[1] < size or not result.report.modified
    assert result.report.modified or set(result.report.unfolded) == {"linear.weight", "conv.weight"}
