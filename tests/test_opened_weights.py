"""Weights that torch computes for a layer: by parametrizations, and by hooks of torch.nn.utils before each call."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
import torch.nn.utils.prune as masks
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import spectral_norm as spectral_norm_by_hook

import fxcompress as fxc
from fxcompress.errors import TraceError, UnsupportedModelError
from tests.exactness import TOLERANCE, difference
from tests.networks import randomise


class Scaled(nn.Module):
    """A factor for each output."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.rand(outputs) + 0.5)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.factor.view(-1, *[1] * (weight.ndim - 1))


class LowRank(nn.Module):
    """Adds a product of two matrices, as adapters for fine-tuning do."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(torch.randn(outputs, 2)), nn.Parameter(torch.randn(2, inputs))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.left @ self.right).view_as(weight)


class Halves(nn.Module):
    """Keeps a weight as two tensors."""

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return first + second

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return weight * 0.25, weight * 0.75


class Clamped(nn.Module):
    """Another weight in training."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.clamp(-0.2, 0.2) if self.training else weight


def by(make: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], object]:
    return lambda layer: parametrize.register_parametrization(layer, "weight", make(layer))


def wide(layer: nn.Module) -> int:
    return layer.get_parameter("weight")[0].numel()


COMPUTED: dict[str, Callable[[nn.Module], object]] = {
    "factors": by(lambda layer: Scaled(len(layer.weight))),  # type: ignore[arg-type]
    "low rank": by(lambda layer: LowRank(len(layer.weight), wide(layer))),  # type: ignore[arg-type]
    "two tensors": by(lambda layer: Halves()),
    "another weight in training": by(lambda layer: Clamped()),
    "two steps": lambda layer: [by(lambda layer: Halves())(layer), by(lambda layer: Clamped())(layer)],
    "a bias": lambda layer: parametrize.register_parametrization(layer, "bias", Clamped()),
    "spectral norm": parametrizations.spectral_norm,
    "spectral norm, three iterations": lambda layer: parametrizations.spectral_norm(layer, n_power_iterations=3),
    "spectral norm by a hook": spectral_norm_by_hook,
    "mask": lambda layer: masks.random_unstructured(layer, "weight", 0.3),
    "mask of rows": lambda layer: masks.ln_structured(layer, "weight", 0.5, n=2, dim=0),
    "two masks": lambda layer: [masks.l1_unstructured(layer, name, 0.3) for name in ("weight", "weight", "bias")],
}

NO_QUANTIZER = {name for name in COMPUTED if "spectral" in name} | {"two tensors", "two steps"}
"""What no parameter is zero of wherever the weight is: a length of 0 would make it NaN, and two parameters make one."""

LAYERS: dict[str, Callable[[], tuple[nn.Module, nn.Module, Tensor]]] = {
    "linear": lambda: (nn.Linear(5, 8), nn.Linear(8, 3), torch.randn(4, 5)),
    "conv1d": lambda: (nn.Conv1d(5, 8, 3), nn.Conv1d(8, 3, 2), torch.randn(2, 5, 7)),
    "conv2d": lambda: (nn.Conv2d(5, 8, 3, padding=1), nn.Conv2d(8, 3, 1, stride=2), torch.randn(2, 5, 6, 6)),
    "conv_transpose2d": lambda: (
        nn.Conv2d(5, 8, 1), nn.ConvTranspose2d(8, 8, 2, stride=2), torch.randn(2, 5, 4, 4),
    ),
}  # fmt: skip


class Net(nn.Module):
    """Two layers with a norm between them, which may both compute their weights."""

    def __init__(self, kind: str, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, example = LAYERS[kind]()
        self.register_buffer("example", example, persistent=False)
        for layer in (self.first, self.second):
            COMPUTED[how](layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())  # type: ignore[no-any-return]


def build(kind: str, how: str) -> tuple[nn.Module, Tensor]:
    net = randomise(Net(kind, how).double())
    x = net.get_buffer("example").double()
    with torch.no_grad():
        net.eval()(x)  # what hooks keep has no gradient then, which could not be copied
    return net.train(), x


def kill(net: nn.Module, channels: slice) -> None:
    """Zero the rows of the first layer and the columns of the second, in all that they are made of."""
    transposed = isinstance(net.second, nn.ConvTranspose2d)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            leaf = name.rpartition(".")[2]
            if name.startswith("first") and leaf not in {"right", "factor"}:
                parameter[channels] = 0
            elif name.startswith("second") and parameter.ndim > 1 and leaf != "left":
                if leaf == "right":
                    parameter.view(2, 8, -1)[:, channels] = 0
                elif parameter.shape[int(not transposed)] == 8:
                    parameter.transpose(0, int(not transposed))[channels] = 0


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv_transpose2d"])
@pytest.mark.parametrize("how", COMPUTED)
def test_channels_go_and_the_weight_is_computed_as_before(how: str, kind: str) -> None:
    net, x = build(kind, how)
    kill(net, slice(1, 4))
    result = fxc.prune(net, x)
    pruned = result.module
    assert result.report.parameters[1] < result.report.parameters[0], str(result.report)
    twin = copy.deepcopy(net)
    assert pruned.state_dict().keys() == net.state_dict().keys()
    for mode in (True, False, True):  # spectral norm goes on from the estimates that it has
        assert difference(twin.train(mode)(x), pruned.train(mode)(x)) <= TOLERANCE
        assert difference(twin(2 * x[:1]), pruned(2 * x[:1])) <= TOLERANCE
    file = io.BytesIO()
    torch.save(pruned, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(again(x), pruned(x)) or "spectral" in how


@pytest.mark.parametrize("keep_code", [False, True])
@pytest.mark.parametrize("how", COMPUTED)
def test_training_and_saving(how: str, tmp_path: object, *, keep_code: bool) -> None:
    net, x = build("conv2d", how)
    net(x)  # what hooks keep has a gradient now
    if how in NO_QUANTIZER:
        with pytest.raises(UnsupportedModelError, match=r"computes a weight from it(?s:.*)remove_parametrizations"):
            fxc.compress(net, x, keep_code=keep_code)
        return
    compressed = fxc.compress(net, x, keep_code=keep_code)
    optimizer = torch.optim.Adam(compressed.param_groups(1e-3))
    for _ in range(3):
        (compressed(x).square().mean() + 0.1 * compressed.size()).backward()
        optimizer.step()
        optimizer.zero_grad()
        compressed.step()
        compressed.prune(optimizer)
    final = compressed.finalize().eval()
    assert difference(compressed.eval()(x), final(x)) <= TOLERANCE
    fxc.save(final, f"{tmp_path}/net.fxc")
    assert torch.equal(fxc.load(f"{tmp_path}/net.fxc", build("conv2d", how)[0], x)(x), final(x))


@pytest.mark.parametrize("how", COMPUTED)
def test_the_models_own_code_computes_it_too(how: str) -> None:
    net, x = build("linear", how)
    kill(net, slice(1, 4))
    own = fxc.prune(net, x, keep_code=True).module
    assert type(own) is Net
    assert sum(p.numel() for p in own.parameters()) < sum(p.numel() for p in net.parameters())
    first = own.eval().get_submodule("first")
    assert first.weight.shape == (5, 5)  # before the first call as well
    own = copy.deepcopy(own)
    for mode in (True, False):
        assert difference(net.train(mode)(x), own.train(mode)(x)) <= TOLERANCE


def test_weight_norm_and_more() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)).double(), torch.randn(4, 5).double()
    for layer in (net[0], net[2]):
        parametrizations.weight_norm(layer)
        parametrize.register_parametrization(layer, "weight", Clamped())
    with torch.no_grad():
        for name in ("0.bias", "0.parametrizations.weight.original0"):  # the length of a row
            net.get_parameter(name)[1:4] = 0
    pruned = fxc.prune(net, x).module
    for mode in (True, False):
        assert difference(net.train(mode)(x), pruned.train(mode)(x)) <= TOLERANCE


class ReadsIt(nn.Module):
    """Uses the weight of a layer without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 3)
        masks.random_unstructured(self.first, "weight", 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(nn.functional.linear(x, self.first.weight))  # type: ignore[no-any-return]


def test_a_weight_that_a_hook_would_not_have_computed_yet() -> None:
    with pytest.raises(TraceError, match=r"the weight of a Linear is read at .*test_opened_weights.py:\d+, and not by"):
        fxc.prune(ReadsIt(), torch.randn(2, 5))


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda layer: masks.random_unstructured(layer, "weight_hh_l0", 0.5), r"hook \(RandomUnstructured\)"),
        (lambda layer: parametrizations.spectral_norm(layer, "weight_hh_l0"), "recurrent, and computes its weights by"),
    ],
)
def test_recurrent_layers_are_refused(damage: Callable[[nn.Module], object], text: str) -> None:
    layer = nn.LSTM(3, 4)
    damage(layer)
    with pytest.raises(UnsupportedModelError, match=text):
        fxc.prune(nn.Sequential(layer), torch.randn(2, 5, 3))
