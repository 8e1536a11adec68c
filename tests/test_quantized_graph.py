"""Quantizers as visible nodes, finalize, save and load, for every kind of layer."""

import copy
import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.errors import OptimizerError, StorageError, UnsupportedModelError
from fxcompress.provenance import provenance_of
from fxcompress.quantizer import Quantizer
from tests.nets import ResidualNet, batch, quantizer


class Functional(nn.Module):
    """Layers written as functions of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(6, 3, 3, 3))
        self.matrix = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.relu(F.conv2d(x, self.kernel, stride=2)).mean((2, 3)), weight=self.matrix)


class Matrices(nn.Module):
    """Layers written as products, their weights (inputs, outputs) as in GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(5, 8)), nn.Parameter(torch.randn(8, 6))
        self.third = nn.Parameter(torch.randn(6, 3))
        self.shift, self.bias = nn.Parameter(torch.full((8,), 0.1)), nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(x @ self.first + self.shift)
        h = torch.addmm(self.bias, h.flatten(0, 1), self.second).relu()
        return h.matmul(self.third)


class Turned(nn.Module):
    """Matrices that are turned before they are multiplied with, in all the ways that there are."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(8, 5)), nn.Parameter(torch.randn(6, 8))
        self.third, self.fourth = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(6, 8))
        self.fifth, self.bias = nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(x @ self.first.T)
        h = torch.relu(torch.matmul(h, self.second.t()) + h.matmul(self.third.transpose(0, -1)))
        h = torch.relu(torch.nn.functional.linear(h, torch.permute(self.fourth, (1, 0))))
        return torch.addmm(self.bias, h.flatten(0, 1), self.fifth.mT)


class Tied(nn.Module):
    """The classifier's weight is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = self.head(torch.relu(self.mix(self.embed(tokens))))
        return result


def image() -> Tensor:
    return torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(1))


def _stack(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*[copy.deepcopy(layer) for layer in layers])


LAYERS: dict[str, tuple[Callable[[], nn.Module], Any, int]] = {
    "conv1d": (_stack(nn.Conv1d(3, 6, 3), nn.ReLU(), nn.Conv1d(6, 4, 3, padding=1)), torch.randn(2, 3, 12), 2),
    "conv2d": (_stack(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3, stride=2, dilation=2)), image(), 2),
    "conv3d": (_stack(nn.Conv3d(2, 6, 3), nn.ReLU(), nn.Conv3d(6, 4, 2)), torch.randn(2, 2, 6, 6, 6), 2),
    "same padding": (_stack(nn.Conv2d(3, 6, 3, padding="same"), nn.Conv2d(6, 4, 3)), image(), 2),
    "padding modes": (
        _stack(
            nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"), nn.ReLU(),
            nn.Conv2d(6, 4, 3, padding=(1, 2), padding_mode="replicate"),
        ),
        image(), 2,
    ),
    "circular padding": (
        _stack(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular")), image(), 2,
    ),
    "transposed 1d": (_stack(nn.ConvTranspose1d(3, 6, 3), nn.ReLU(), nn.Conv1d(6, 4, 3)), torch.randn(2, 3, 12), 2),
    "transposed 2d": (
        _stack(nn.ConvTranspose2d(3, 6, 3, stride=2, output_padding=1), nn.ReLU(), nn.Conv2d(6, 4, 3)), image(), 2,
    ),
    "transposed 3d": (
        _stack(nn.ConvTranspose3d(2, 6, 2), nn.ReLU(), nn.Conv3d(6, 4, 2)), torch.randn(2, 2, 5, 5, 5), 2,
    ),
    "transposed, grouped": (
        _stack(nn.Conv2d(3, 6, 1), nn.ConvTranspose2d(6, 9, 3, groups=3), nn.ReLU(), nn.Conv2d(9, 4, 3)), image(), 3,
    ),
    "depthwise": (_stack(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 4, 1)), image(), 3),
    "linear": (_stack(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(2, 7, 5), 2),
    "functional": (Functional, image(), 2),
    "matrices": (Matrices, torch.randn(2, 7, 5), 3),
    "turned": (Turned, torch.randn(2, 7, 5), 5),
    "tied": (Tied, torch.randint(11, (2, 5)), 2),
    "residual": (ResidualNet, image(), 6),
}  # fmt: skip


def make(case: str) -> tuple[nn.Module, Any, int]:
    """The model of a case, its input and its number of quantized weights."""
    torch.manual_seed(0)
    build, x, count = LAYERS[case]
    return build(), x, count


def deaden(net: fxc.CompressedModule) -> None:
    """Give the middle third of the channels of each layer (whole groups, where there are 3) no bits and no biases."""
    with torch.no_grad():
        for name, module in net.named_modules():
            if isinstance(module, Quantizer):
                third = module.bits.numel() // 3
                module.bits[third : 2 * third] = 0.0
                module.bits[:third] = 2.5
                owner = net.get_submodule(name.rpartition(".")[0])
                bias = getattr(owner, "bias", None)
                if isinstance(bias, nn.Parameter):
                    bias[third : 2 * third] = 0.0
    for name, module in net.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.zeros_(net.get_parameter(f"{name}.bias"))
    net.step()


@pytest.mark.parametrize("case", LAYERS)
def test_quantizers_are_nodes_and_training_reaches_them(case: str) -> None:
    model, x, count = make(case)
    net = fxc.compress(model, x)
    nodes = [
        n for n in net.graph.find_nodes(op="call_module") if isinstance(net.get_submodule(str(n.target)), Quantizer)
    ]
    assert len(nodes) == count
    net.graph.lint()
    (net(x).square().mean() + net.size()).backward()
    for node in nodes:
        found = net.get_submodule(str(node.target))
        assert isinstance(found, Quantizer)
        assert found.bits.grad is not None
        assert found.bits.grad.abs().sum().item() > 0
    assert net.size("eq4").item() == pytest.approx(8.0)


@pytest.mark.parametrize("case", LAYERS)
def test_eight_bits_stay_close_to_the_model(case: str) -> None:
    model, x, _ = make(case)
    expected = model.eval()(x)
    result = fxc.compress(model, x).eval()(x)
    assert (result - expected).abs().max().item() < 0.05 * expected.abs().max().item()


@pytest.mark.parametrize("case", LAYERS)
def test_finalize_gives_the_same_network_without_quantizers(case: str) -> None:
    model, x, _ = make(case)
    net = fxc.compress(model, x)
    deaden(net)
    expected = net.eval()(x)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    final = net.finalize()
    torch.testing.assert_close(final.eval()(x), expected, rtol=1e-5, atol=1e-6)
    assert not any(isinstance(module, Quantizer) for module in final.modules())
    assert list(final.state_dict()) == list(model.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    plain = net.finalize(prune=False)
    assert [tuple(t.shape) for t in plain.state_dict().values()] == [
        tuple(t.shape) for t in model.state_dict().values()
    ]
    kinds = [type(module) for module in model.modules()][1:]
    assert [type(module) for module in plain.modules()][1:] == kinds


@pytest.mark.parametrize("case", LAYERS)
def test_save_and_load_give_it_back_bit_for_bit(case: str, tmp_path: Path) -> None:
    model, x, _ = make(case)
    net = fxc.compress(model, x)
    deaden(net)
    net.prune()
    final = net.finalize().eval()
    size = fxc.save(final, tmp_path / "net.fxc")
    assert size == (tmp_path / "net.fxc").stat().st_size
    fresh = LAYERS[case][0]()
    state = {name: value.clone() for name, value in fresh.state_dict().items()}
    loaded = fxc.load(tmp_path / "net.fxc", fresh)
    assert torch.equal(loaded(x), final(x))
    own, other = final.state_dict(), loaded.state_dict()
    assert list(own) == list(other)
    assert all(torch.equal(own[name], other[name]) for name in own)
    assert all(torch.equal(value, state[name]) for name, value in fresh.state_dict().items())
    assert provenance_of(loaded) is not None


def test_pruned_shapes_are_smaller_than_the_originals() -> None:
    """The cases above are not vacuous: channels really go, in every kind of layer that has some to lose.

    Circular padding writes its input into a new tensor piece by piece, which labels do not follow: a known gap.
    """
    for case in sorted(set(LAYERS) - {"tied", "circular padding"}):
        model, x, _ = make(case)
        net = fxc.compress(model, x)
        deaden(net)
        assert net.prune().modified, case
        assert sum(p.numel() for p in net.finalize().parameters()) < sum(p.numel() for p in model.parameters()), case


def test_a_dead_branch_is_saved_and_loaded(tmp_path: Path) -> None:
    model = ResidualNet()
    x = batch()[0].float()
    net = fxc.compress(model, x)
    with torch.no_grad():
        quantizer(net, "block1.conv2.weight").bits.zero_()
        net.get_parameter("block1.bn2.bias").zero_()
    net.step()
    assert net.prune().branches
    final = net.finalize().eval()
    fxc.save(final, tmp_path / "net.fxc")
    loaded = fxc.load(tmp_path / "net.fxc", ResidualNet())
    assert torch.equal(loaded(x), final(x))
    assert not any("block1" in name for name in loaded.state_dict())


def test_load_refuses_another_model(tmp_path: Path) -> None:
    fxc.save(fxc.compress(ResidualNet(), image()).finalize(), tmp_path / "net.fxc")
    with pytest.raises(StorageError, match=r"stem\.0\.weight of shape \(8, 3, 3, 3\), ResidualNet has \(6, 3, 3, 3\)"):
        fxc.load(tmp_path / "net.fxc", ResidualNet(channels=6))


def test_the_model_stays_as_it_is() -> None:
    model = ResidualNet().train()
    model.block1.eval()
    model(image()).sum().backward()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    grads = {name: p.grad for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    net = fxc.compress(model, image())
    net(image())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is grads[name] for name, p in model.named_parameters())
    assert [module.training for module in model.modules()] == modes
    assert not {p.data_ptr() for p in net.parameters()} & {p.data_ptr() for p in model.parameters()}


def test_compressing_twice_is_refused() -> None:
    net = fxc.compress(ResidualNet(), image())
    with pytest.raises(UnsupportedModelError, match="compressed already"):
        fxc.compress(net, image())


def test_nothing_to_compress_is_refused() -> None:
    model = ResidualNet().requires_grad_(requires_grad=False)
    with pytest.raises(UnsupportedModelError, match=r"(?s)no weight to quantize.*it is frozen; set requires_grad=True"):
        fxc.compress(model, image())


@pytest.mark.parametrize(("option", "text"), [({"bits": 0.0}, "bits=0.0"), ({"bias_shrink": 0.0}, "bias_shrink")])
def test_options_out_of_range(option: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        fxc.compress(ResidualNet(), image(), **option)


def test_a_finalized_network_can_be_compressed_again() -> None:
    final = fxc.compress(ResidualNet(), image()).finalize()
    again = fxc.compress(final, image())
    assert again.size("eq4").item() == pytest.approx(8.0)


def test_what_was_cut_before_is_remembered(tmp_path: Path) -> None:
    """Pruned, compressed, pruned, finalized: the file still loads into a fresh original."""
    torch.manual_seed(0)
    model = ResidualNet()
    with torch.no_grad():
        model.block1.conv1.weight[2] = 0
        model.block1.bn1.bias[2] = 0
    net = fxc.compress(fxc.prune(model, image()).module, image())
    deaden(net)
    net.prune()
    final = net.finalize().eval()
    fxc.save(final, tmp_path / "net.fxc")
    assert torch.equal(fxc.load(tmp_path / "net.fxc", ResidualNet())(image()), final(image()))


def test_prune_of_a_compressed_network_works_on_a_copy() -> None:
    net = fxc.compress(ResidualNet(), image())
    deaden(net)
    result = fxc.prune(net)
    assert result.report.modified
    assert isinstance(result.module, fxc.CompressedModule)
    assert net.get_parameter("fc.weight").shape == (5, 8)
    torch.testing.assert_close(result.module.eval()(image()), net.eval()(image()))
    with pytest.raises(OptimizerError, match=r"net\.prune\(optimizer\)"):
        fxc.prune(net, optimizer=torch.optim.SGD(net.parameters(), 0.1))


class FunctionalByMode(nn.Module):
    """A function of a parameter of a child, in a network with another graph in training."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Module()
        self.part.weight = nn.Parameter(torch.randn(4, 3, 3, 3))
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.part.weight)  # type: ignore[arg-type]
        return self.head(y.relu() if self.training else y)  # type: ignore[no-any-return]


def test_functional_weights_in_a_network_with_two_graphs() -> None:
    x = torch.randn(2, 3, 8, 8)
    net = fxc.compress(FunctionalByMode(), x)
    for mode in (True, False):
        net.train(mode)(x).sum().backward()
    assert quantizer(net, "part.weight").bits.grad is not None
    assert not torch.equal(net.train()(x), net.eval()(x))


def test_half_precision() -> None:
    net = fxc.compress(ResidualNet().bfloat16(), image().bfloat16())
    assert net(image().bfloat16()).dtype == torch.bfloat16
    assert quantizer(net, "fc.weight").bits.dtype == torch.float32


def test_a_weight_that_is_looked_at_and_not_used_gets_no_quantizer() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.extra = nn.Linear(4, 3), nn.Parameter(torch.zeros(3, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.extra.abs  # noqa: B018 - leaves a node that nothing reads
            return self.layer(x)  # type: ignore[no-any-return]

    net = fxc.compress(Unused(), torch.zeros(1, 4))
    assert not hasattr(net, "extra_quantizer")


class Shaped(nn.Module):
    """One of several networks of the same shapes."""

    def __init__(self, activation: nn.Module, *, stride: int = 1, slope: float = 0.1) -> None:
        super().__init__()
        self.conv, self.activation, self.head = nn.Conv2d(3, 6, 3, stride=stride), activation, nn.Linear(6, 4)
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.nn.functional.leaky_relu(self.activation(self.conv(x)), self.slope)
        result: Tensor = self.head(hidden.mean((2, 3)))
        return result


def test_load_tells_a_network_of_the_same_shapes_that_computes_something_else(tmp_path: Path) -> None:
    final = fxc.compress(Shaped(nn.ReLU()), image()).finalize()
    fxc.save(final, tmp_path / "net.fxc")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(fxc.load(tmp_path / "net.fxc", Shaped(nn.ReLU()))(image()), final.eval()(image()))
    for other in (Shaped(nn.GELU()), Shaped(nn.ReLU(), stride=2), Shaped(nn.ReLU(), slope=0.2)):
        with pytest.warns(UserWarning, match="same shapes as this Shaped, .* may compute something else"):
            fxc.load(tmp_path / "net.fxc", other)


MOVED = """
import torch
from torch import fx, nn

def scaled(x, n):
    return x * n

fx.wrap("scaled")

class Moved(nn.Module):
    def __init__(self, slope):
        super().__init__()
        self.conv, self.head, self.slope = nn.Conv2d(3, 6, 3), nn.Linear(6, 4), slope

    def forward(self, x):
        if x.shape[2] > 100:  # a decision: the graph is that of a run, and names this line
            x = x[:, :, ::2]
        return self.head(torch.relu(scaled(self.conv(x), self.slope)).mean((2, 3)))
"""


def moved(path: Path, text: str, name: str) -> Callable[[float], nn.Module]:
    """The class in a file of its own, imported under a name of its own."""
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made: Callable[[float], nn.Module] = module.Moved
    return made


def test_load_takes_the_same_code_from_another_place(tmp_path: Path) -> None:
    before = moved(tmp_path / "before.py", MOVED, "before")
    after = moved(tmp_path / "after.py", f"# moved\n\n{MOVED}", "after")
    fxc.save(fxc.compress(before(0.5), image()).finalize(), tmp_path / "net.fxc")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fxc.load(tmp_path / "net.fxc", after(0.5))
    with pytest.warns(UserWarning, match="same shapes as this Moved, .* may compute something else"):
        fxc.load(tmp_path / "net.fxc", after(0.7))


class Decides(nn.Module):
    """It has no graph as a whole."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x)
        return result if result.sum() > 0 else -result


def test_load_tells_a_piece_of_the_same_shapes_that_computes_something_else(tmp_path: Path) -> None:
    final = fxc.compress(Decides(Shaped(nn.ReLU())), image()).finalize()
    fxc.save(final, tmp_path / "net.fxc")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = fxc.load(tmp_path / "net.fxc", Decides(Shaped(nn.ReLU())), image())
    assert torch.equal(loaded(image()), final.eval()(image()))
    with pytest.warns(UserWarning, match="same shapes as this Decides, .* may compute something else"):
        fxc.load(tmp_path / "net.fxc", Decides(Shaped(nn.GELU())), image())
