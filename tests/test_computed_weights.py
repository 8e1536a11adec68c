"""Weights that a network computes by mixing their channels: they become parameters, and channels go from them."""

import copy
import logging
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import fxcompress as fxc
from tests.exactness import TOLERANCE, Fingerprint, difference


def by_batch_norm(weight: Tensor, gain: Tensor) -> Tensor:
    flat = weight.reshape(1, weight.shape[0], -1)
    return F.batch_norm(flat, None, None, None, training=True, eps=1e-6).reshape_as(weight) * gain


def by_moments(weight: Tensor, gain: Tensor) -> Tensor:
    variance, mean = torch.var_mean(weight.flatten(1), 1, correction=0, keepdim=True)
    return gain * ((weight.flatten(1) - mean) * torch.rsqrt(variance + 1e-6)).view_as(weight)


def by_deviation(weight: Tensor, gain: Tensor) -> Tensor:
    dims = tuple(range(1, weight.dim()))
    return gain * (weight - weight.mean(dims, keepdim=True)) / (weight.std(dims, keepdim=True) + 1e-4)


def in_place(weight: Tensor, gain: Tensor) -> Tensor:
    dims = tuple(range(1, weight.dim()))
    result = weight - weight.mean(dims, keepdim=True)
    result /= weight.std(dims, keepdim=True) + 1e-4
    result *= gain
    return result


def by_length(weight: Tensor, gain: Tensor) -> Tensor:
    return gain * F.normalize(weight.flatten(1)).view_as(weight)


def by_norm(weight: Tensor, gain: Tensor) -> Tensor:
    length: Tensor = weight.norm(dim=1, keepdim=True)
    return gain * weight / length.detach()


def by_layer_norm(weight: Tensor, gain: Tensor) -> Tensor:
    return F.layer_norm(weight, weight.shape[1:]) * gain


def by_softmax(weight: Tensor, gain: Tensor) -> Tensor:
    return weight.softmax(1) * gain


def centred(weight: Tensor, gain: Tensor) -> Tensor:
    return (weight - weight.mean(1, keepdim=True)) * gain


def over_outputs(weight: Tensor, gain: Tensor) -> Tensor:
    length: Tensor = weight.norm(dim=0, keepdim=True)
    return weight / length * gain


@fx.wrap
def whole(weight: Tensor, gain: Tensor) -> Tensor:
    length: Tensor = weight.norm()
    return weight / length * gain


Style = Callable[[Tensor, Tensor], Tensor]
STYLES: dict[str, Style] = {
    style.__name__: style
    for style in (
        by_batch_norm, by_moments, by_deviation, in_place, by_length, by_norm, by_layer_norm, by_softmax, centred,
        over_outputs, whole,
    )
}  # fmt: skip
X = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Computes(nn.Module):
    """A layer whose weight is computed from the one of ``like`` and a factor for each output."""

    def __init__(self, like: Any, op: Callable[..., Tensor], style: Style) -> None:  # noqa: ANN401 - a layer of torch.nn
        super().__init__()
        self.op, self.style = op, style
        self.weight, self.bias = nn.Parameter(like.weight.detach().clone()), nn.Parameter(torch.rand_like(like.bias))
        dim = int(getattr(like, "transposed", False))
        size = [n if d == dim else 1 for d, n in enumerate(self.weight.shape)]
        self.gain = nn.Parameter(torch.rand(size) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x, self.style(self.weight, self.gain), self.bias)


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor]]] = {
    "conv1d": (lambda: nn.Conv1d(8, 8, 3), F.conv1d),
    "conv2d": (lambda: nn.Conv2d(8, 8, 3), F.conv2d),
    "pointwise": (lambda: nn.Conv2d(8, 8, 1), F.conv2d),
    "transposed": (lambda: nn.ConvTranspose2d(8, 8, 3), F.conv_transpose2d),
    "linear": (lambda: nn.Linear(8, 8), F.linear),
    "grouped": (lambda: nn.Conv2d(8, 8, 3, groups=4), partial(F.conv2d, groups=4)),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8), partial(F.conv2d, groups=8)),
}


def around(layer: nn.Module, kind: str = "conv2d") -> nn.Sequential:
    """A layer before and one behind, with the same number of dims; 3 channels in, 8 to and from the layer, 2 out."""
    make: Any = {"linear": nn.Linear, "conv1d": partial(nn.Conv1d, kernel_size=1)}.get(
        kind, partial(nn.Conv2d, kernel_size=1)
    )
    return nn.Sequential(make(3, 8), nn.ReLU(), layer, nn.ReLU(), make(8, 2)).double().eval()


def network(style: str = "by_moments", kind: str = "conv2d") -> nn.Sequential:
    like, op = LAYERS[kind]
    return around(Computes(like(), op, STYLES[style]), kind)


def inputs(kind: str) -> Tensor:
    return {"linear": X[:, :, 0, 0], "conv1d": X[:, :, 0]}.get(kind, X)


def kill(net: nn.Sequential, dead_in: list[int], dead_out: list[int]) -> None:
    with torch.no_grad():
        for name in ("0.weight", "0.bias"):
            net.get_parameter(name)[dead_in] = 0
        net.get_parameter("2.gain").view(-1)[dead_out] = 0
        net.get_parameter("2.bias")[dead_out] = 0


def weight(module: nn.Module) -> Tensor:
    return module.get_parameter("2.weight_plain")


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("style", STYLES)
def test_dead_inputs_and_outputs_go(style: str, kind: str) -> None:
    if kind == "depthwise" and style in {"by_softmax", "by_norm", "centred"}:
        return  # over the one input of each output
    torch.manual_seed(0)
    net, x = network(style, kind), inputs(kind)
    split = kind in {"grouped", "depthwise"}
    kill(net, [2, 3], [2, 3] if split else [1, 4, 6])
    visit, before = Fingerprint(net), net(x)
    result = fxc.prune(net, x)
    visit.check()
    assert torch.equal(before, net(x))
    for training in (False, True):
        assert difference(before, result.module.train(training)(x)) <= TOLERANCE
    shape = {"transposed": (6, 5), "grouped": (6, 2), "depthwise": (6, 1)}.get(kind, (5, 6))
    assert weight(result.module).shape[:2] == shape
    made_from = result.report.computed_weights["2.weight_plain"]
    assert sorted(made_from) == ["2.gain", "2.weight"]
    assert f"2.weight_plain is a plain parameter now; it was computed from {', '.join(made_from)}" in str(result.report)
    again = fxc.prune(result.module, x)
    assert (again.report.modified, again.report.computed_weights) == (False, {})


@settings(max_examples=25)
@given(
    st.sampled_from(sorted(STYLES)),
    st.sampled_from(["conv1d", "conv2d", "pointwise", "transposed", "linear"]),
    st.sets(st.integers(0, 7), max_size=7),
    st.sets(st.integers(0, 7), max_size=7),
    st.integers(0, 99),
)
def test_any_set_of_dead_channels(style: str, kind: str, dead_in: set[int], dead_out: set[int], seed: int) -> None:
    torch.manual_seed(seed)
    net, x = network(style, kind), inputs(kind)
    kill(net, sorted(dead_in), sorted(dead_out))
    module = fxc.prune(net, x).module
    assert difference(net(x), module(x)) <= TOLERANCE
    assert module.get_parameter("0.weight").shape[0] == 8 - len(dead_in)
    assert module.get_parameter("4.weight").shape[1] == 8 - len(dead_out)


def test_without_dead_channels_the_cut_would_show() -> None:
    """The negative control: channels that are not zero stay."""
    net = network()
    kill(net, [1], [])
    with torch.no_grad():
        net.get_parameter("0.bias")[1] = 0.1
    module = fxc.prune(net, X).module
    assert weight(module).shape == (8, 8, 3, 3)
    assert difference(net(X), module(X)) <= TOLERANCE


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("style", ["by_batch_norm", "whole"])
def test_a_state_dict_of_the_original_loads(style: str, kind: str) -> None:
    x = inputs(kind)
    other, own = network(style, kind), network(style, kind)
    state = copy.deepcopy(other.state_dict())
    module = fxc.prune(own, x).module
    twin = copy.deepcopy(module)
    pickled = pickle.loads(pickle.dumps(module))
    for made in (module, twin, pickled):
        made.load_state_dict(state)
        assert difference(other(x), made(x)) <= 1e-12
        made.load_state_dict(copy.deepcopy(made.state_dict()))  # and not a second time
        assert difference(other(x), made(x)) <= 1e-12
    compressed = fxc.compress(own, x)
    assert not compressed.load_state_dict(copy.deepcopy(other.state_dict()), strict=False).unexpected_keys
    assert difference(weight(module), weight(compressed)) <= 1e-12
    assert list(state) == list(other.state_dict())
    del state["2.gain"]
    with pytest.raises(RuntimeError, match=r"Missing key.*2.weight_plain"):
        module.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"2.weight_plain"):
        module.load_state_dict({**other.state_dict(), "2.weight": torch.zeros(5, 5)})


def test_training_saving_and_checkpoints(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = network()
    with caplog.at_level(logging.WARNING, "fxcompress"):
        net = fxc.compress(model, X, bits=6.0)
    assert "computes 1 of its weights from parameters" in caplog.text
    assert "2.weight_plain, which was 2.weight, 2.gain. A state_dict" in caplog.text
    assert net.unquantized() == ()
    optimizer = torch.optim.Adam(net.param_groups(lr=1e-2))
    for _ in range(3):
        before = weight(net).clone()
        optimizer.zero_grad()
        (net(X).square().mean() + 0.01 * net.size()).backward()
        optimizer.step()
        net.step()
        assert not torch.equal(before, weight(net))
    with torch.no_grad():
        for name, channel in (("0", 3), ("2", 5)):
            leaf = "weight" if name == "0" else "weight_plain"
            net.get_parameter(f"{name}.{leaf}_quantizer.bits")[channel] = 0
            net.get_parameter(f"{name}.bias")[channel] = 0
    net.step()
    expected = net(X)
    net.prune(optimizer)
    assert weight(net).shape == (7, 7, 3, 3)
    assert optimizer.state[weight(net)]["exp_avg"].shape == (7, 7, 3, 3)
    assert difference(expected, net(X)) <= TOLERANCE
    fxc.save_checkpoint(tmp_path / "run.pt", net, optimizer)
    fresh = fxc.compress(network(), X)
    fxc.load_checkpoint(tmp_path / "run.pt", fresh, torch.optim.Adam(fresh.param_groups(lr=1e-2)))
    assert torch.equal(net(X), fresh(X))
    fresh = fxc.compress(network(), X)
    fresh.load_state_dict(net.state_dict())
    assert torch.equal(net(X), fresh(X))
    final = net.eval().finalize()
    fxc.save(final, tmp_path / "net.fxc")
    original = network()
    visit = Fingerprint(original)
    loaded = fxc.load(tmp_path / "net.fxc", model=original)
    visit.check()
    assert torch.equal(final(X), loaded(X))
    assert torch.equal(copy.deepcopy(loaded)(X), loaded(X))
    again = fxc.compress(loaded, X)
    assert weight(again).shape == (7, 7, 3, 3)
    with pytest.raises(fxc.FxCompressError, match="saved from another network"):
        fxc.load(tmp_path / "net.fxc", model=around(nn.Conv2d(8, 8, 3)))
    with pytest.raises(fxc.FxCompressError, match="saved from another network"):
        fxc.load(tmp_path / "net.fxc", model=network(kind="pointwise"))


def test_an_optimizer_keeps_what_it_holds(tmp_path: Path) -> None:
    """Its state is that of what the weight is computed from, so the weight goes on being computed."""
    net = network()
    kill(net, [1], [2, 5])
    optimizer = torch.optim.Adam(net.parameters())
    result = fxc.prune(net, X, optimizer)
    assert result.report.computed_weights == {}
    assert result.module.get_parameter("2.weight").shape == (6, 8, 3, 3)
    assert difference(net(X), result.module(X)) <= TOLERANCE
    fxc.save(result.module, tmp_path / "net.fxc")
    assert torch.equal(fxc.load(tmp_path / "net.fxc", network())(X), result.module.eval()(X))
    assert "2.weight" in fxc.prune(result.module, X).module.state_dict()  # as the file of it would not fit


class Twice(nn.Module):
    """One layer at two places and under two names, in a network that does something else in training."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.layer = self.again = Computes(nn.Conv2d(8, 8, 1), F.conv2d, by_length)
        self.last = nn.Conv2d(8, 2, 1)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        y = self.again(self.layer(self.first(x).relu()).relu())
        return self.last(y * 2 if self.training else y)  # type: ignore[no-any-return]


def test_a_layer_that_is_called_twice() -> None:
    net, other = Twice(), Twice()
    with torch.no_grad():
        net.layer.gain[[2]] = net.layer.bias[[2]] = 0
        net.first.weight[[2]], net.first.bias[[2]] = 0, 0  # type: ignore[index]
    expected = [net.train(mode)(X) for mode in (True, False)]
    module = fxc.prune(net, X).module
    assert module.get_parameter("layer.weight_plain").shape == (7, 7, 1, 1)
    assert module.get_parameter("again.weight_plain") is module.get_parameter("layer.weight_plain")
    assert [difference(e, module.train(mode)(X)) <= TOLERANCE for e, mode in zip(expected, (True, False), strict=True)]
    whole_module = fxc.prune(other, X).module
    whole_module.load_state_dict(net.state_dict())
    assert difference(net(X), whole_module.eval()(X)) <= TOLERANCE


def test_what_is_trained_stays_so() -> None:
    net = network()
    for name in ("weight", "gain"):
        net.get_parameter(f"2.{name}").requires_grad_(False)
    assert not weight(fxc.prune(net, X).module).requires_grad
    assert weight(fxc.prune(network().float(), X.float()).module).dtype == torch.float32
    assert weight(fxc.prune(network().bfloat16(), X.bfloat16()).module).dtype == torch.bfloat16


def test_a_layer_alone_and_constants() -> None:
    """The network is the layer; what it computes with lies in buffers, some of which are not saved."""

    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3))
            self.eps: Tensor
            self.fan: Tensor
            self.register_buffer("eps", torch.tensor(1e-2))
            self.register_buffer("fan", torch.tensor(3.0), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            variance, mean = torch.var_mean(self.weight, 1, keepdim=True)
            scale = torch.rsqrt(torch.maximum(variance * self.fan, self.eps)) * torch.tensor([0.5])
            return F.linear(x, (self.weight - mean) * scale)

    net, other = Alone().double(), Alone().double()
    x = torch.randn(2, 3, dtype=torch.float64)
    module = fxc.prune(net, x).module
    assert list(module.state_dict()) == ["weight_plain", "eps"]
    for made in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert difference(net(x), made(x)) <= 1e-12
        made.load_state_dict(other.state_dict())
        assert difference(other(x), made(x)) <= 1e-12


class Loop(nn.Module):
    """Can only be traced by running it, and looks at the sizes of its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight / self.weight.norm() if self.weight.shape[1] > 1 else self.weight
        steps = [F.linear(self.first(x[:, :, i]).relu(), weight) for i in range(x.shape[2])]
        return self.last(torch.stack(steps).relu().sum(0))  # type: ignore[no-any-return]


def test_a_network_that_is_traced_by_running() -> None:
    net, x = Loop(), X[:, :, :4, 0]
    with torch.no_grad():
        net.first.weight[[2, 5]], net.first.bias[[2, 5]] = 0, 0
    result = fxc.prune(net, x)
    assert result.module.get_parameter("weight_plain").shape == (8, 6)
    assert difference(net(x), result.module(x)) <= TOLERANCE


def test_pieces(tmp_path: Path) -> None:
    class ReadsValues(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.body(x)
            return y * 2 if y.sum().item() > 0 else y

    net, other = ReadsValues().eval(), ReadsValues().eval()
    kill(net.body, [1], [3])
    visit = Fingerprint(net)
    result = fxc.prune(net, X)
    compressed = fxc.compress(net, X)
    visit.check()
    assert result.report.computed_weights == {"body.2.weight_plain": ("body.2.weight", "body.2.gain")}
    assert result.module.get_parameter("body.2.weight_plain").shape == (7, 7, 3, 3)
    assert difference(net(X), result.module(X)) <= TOLERANCE
    compressed.load_state_dict(other.state_dict(), strict=False)
    final = compressed.eval().finalize()
    fxc.save(final, tmp_path / "net.fxc")
    loaded = fxc.load(tmp_path / "net.fxc", ReadsValues(), X)
    assert torch.equal(final(X), loaded(X))
    loaded.load_state_dict(other.state_dict())
    assert difference(other(X), loaded.eval()(X)) <= 1e-12


def test_a_checkpointed_region() -> None:
    """It computes the weight anew in the backward pass; the parameter is read inside of it."""

    class Saves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network()

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.body, x * 2, use_reentrant=False)  # type: ignore[no-any-return]

    net = Saves().train()
    kill(net.body, [1], [3])
    module = fxc.prune(net, X).module
    assert module.get_parameter("body.2.weight_plain").shape == (7, 7, 3, 3)
    assert difference(net(X), module(X)) <= TOLERANCE
    module(X).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


class Odd(nn.Module):
    """Two layers with a weight between them that ``how`` computes from ``self``."""

    def __init__(self, how: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.how = how
        self.mask: Tensor
        self.seen: Tensor
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)
        self.weight, self.gain = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.rand(8, 1) + 0.5)
        self.left, self.right = nn.Parameter(torch.randn(8, 2)), nn.Parameter(torch.randn(2, 8))
        self.register_buffer("mask", (torch.rand(8, 8) > 0.2).double())
        self.register_buffer("seen", torch.ones(()))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.last(F.linear(x, self.how(self, x)).relu())  # type: ignore[no-any-return]


def normal(weight: Tensor) -> Tensor:
    return F.normalize(weight)


def counting(net: "Odd", _: Tensor) -> Tensor:
    net.seen += 1
    return normal(net.weight) * net.seen


def one_more(net: "Odd", _: Tensor) -> Tensor:
    weight = net.weight - net.weight.mean(1, keepdim=True)
    weight.mul_(2)  # which nobody reads
    return weight


KEPT: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "data": lambda net, x: normal(net.weight + x.mean(0)),
    "type of the data": lambda net, x: normal(net.weight).to(x.dtype),
    "dropout": lambda net, _: F.dropout(normal(net.weight), 0.5, net.training),
    "noise": lambda net, _: normal(net.weight) + torch.randn_like(net.weight) * 0,
    "mode": lambda net, _: normal(net.weight) if net.training else normal(net.weight * 2) * 2,
    "used elsewhere": lambda net, x: normal(net.weight) + x.mean() * net.weight,
    "written": counting,
    "written later": one_more,
    "mask": lambda net, _: normal(net.weight * net.mask),
    "rounded": lambda net, _: (net.weight / net.weight.abs().mean()).round() * net.weight.abs().mean(),
    "gain": lambda net, _: net.weight * net.gain,
    "turned": lambda net, _: net.weight.t().flip(0),
    "product": lambda net, _: net.left @ net.right,
    "small": lambda net, _: normal(net.left @ net.right),
    "symmetric": lambda net, _: net.weight + net.weight.t(),
    "not finite": lambda net, _: net.weight / (net.weight - net.weight).norm().clamp(min=0).detach(),
}


@pytest.mark.parametrize("how", KEPT)
def test_what_stays_computed(how: str) -> None:
    torch.manual_seed(0)
    net, x = Odd(KEPT[how]).eval(), torch.randn(4, 3, dtype=torch.float64)
    with torch.no_grad():
        net.first.weight[[1, 6]], net.first.bias[[1, 6]] = 0, 0
    visit = Fingerprint(net)
    result = fxc.prune(net, x)
    visit.check()
    assert result.report.computed_weights == {}
    assert {"weight", "gain", "left", "right"} <= {name for name, _ in result.module.named_parameters()}
    for training in (False, True):
        pair = [copy.deepcopy(module).train(training) for module in (net, result.module)]
        found = []
        for module in pair:
            torch.manual_seed(1)
            found.append(module(x))
        if how != "not finite":
            assert difference(*found) <= TOLERANCE


class OneBuffer(nn.Module):
    """Two weights that are computed with one buffer, which the first one ``writes`` to or not."""

    def __init__(self, *, writes: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))
        self.eps: Tensor
        self.register_buffer("eps", torch.tensor(0.1))
        self.writes = writes
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, normal(self.a) + (self.eps.add_(1) if self.writes else self.eps)).relu()
        return F.linear(x, normal(self.b) * self.eps)


@pytest.mark.parametrize("writes", [False, True])
def test_a_buffer_of_two_weights(writes: bool) -> None:  # noqa: FBT001
    net, x = OneBuffer(writes=writes), torch.randn(2, 4, dtype=torch.float64)
    result = fxc.prune(net, x)
    assert len(result.report.computed_weights) == (0 if writes else 2)
    other = OneBuffer(writes=writes)
    other.eps.fill_(0.7)
    result.module.load_state_dict(other.state_dict())
    for _ in range(2):
        assert difference(other(x), result.module(x)) <= TOLERANCE


class Shares(nn.Module):
    """Two layers with parameters in common: ``both`` of them, or one."""

    def __init__(self, *, both: bool) -> None:
        super().__init__()
        self.a, self.b = (Computes(nn.Linear(4, 4), F.linear, by_length) for _ in range(2))
        self.b.weight = self.a.weight
        if both:
            self.b.gain = self.a.gain
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())  # type: ignore[no-any-return]


@pytest.mark.parametrize("both", [False, True])
def test_parameters_that_two_layers_share_stay(both: bool) -> None:  # noqa: FBT001
    net, x = Shares(both=both), torch.randn(2, 4, dtype=torch.float64)
    result = fxc.prune(net, x)
    assert result.report.computed_weights == {}
    assert difference(net(x), result.module(x)) <= TOLERANCE


def test_names_that_are_taken() -> None:
    net = network()
    net[2].weight_plain = nn.Parameter(torch.zeros(1))
    module = fxc.prune(net, X).module
    assert module.get_parameter("2.weight_plain_").shape == (8, 8, 3, 3)
    assert "2.weight_plain" in fxc.ChannelGraph.of(network(), X).explain("2", 3)


def test_a_model_of_timm() -> None:
    timm = pytest.importorskip("timm")
    layers = pytest.importorskip("timm.layers")
    assert timm.__version__
    for kind in (layers.StdConv2d, layers.StdConv2dSame, layers.ScaledStdConv2d, layers.ScaledStdConv2dSame):
        net, x = around(kind(8, 8, 3)), torch.randn(2, 3, 16, 16, dtype=torch.float64)
        with torch.no_grad():
            net.get_parameter("0.weight")[[1, 6]] = net.get_parameter("0.bias")[[1, 6]] = 0
        module = fxc.prune(net, x).module
        assert weight(module).shape == (8, 6, 3, 3)
        assert difference(net(x), module(x)) <= TOLERANCE
