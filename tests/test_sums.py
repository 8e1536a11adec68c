"""Sums, norms and means over channels: channels that are zero add nothing to them, and may go."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import fxcompress as fxc
from fxcompress.passes.means import (
    layer_norm_over,
    mean_over,
    mean_square_over,
    rms_norm_over,
    std_over,
    var_mean_over,
    var_over,
)
from fxcompress.trace.graph.variances import mean_square
from tests.exactness import Fingerprint, difference

D, HIDDEN = 10, 12


class ByHand(nn.Module):
    """RMS norm as language models write it."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(d) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.double()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-3)).to(x.dtype)


class FunctionalNorm(nn.LayerNorm):
    """Layer norm of tokens far from zero, which is where its rounding shows."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.layer_norm(100 * x, [self.weight.numel()], self.weight, self.bias, cudnn_enable=False)


class Moments(nn.LayerNorm):
    """Layer norm by the variance."""

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.var(-1, keepdim=True, unbiased=False) + 0.1)
        return (x - x.mean(-1, keepdim=True)) * scale * self.weight + self.bias


class LayerNormByHand(nn.LayerNorm):
    """Layer norm as ConvNeXt and SAM write it."""

    def __init__(self, d: int, *, power: bool = True) -> None:
        super().__init__(d)
        self.power = power

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        if self.power:
            variance = (x - mean).pow(2).mean(-1, keepdim=True)
        else:
            distance = x - mean
            variance = torch.mean(distance * distance, dim=-1, keepdim=True)
        return (x - mean) / torch.sqrt(variance + 0.1) * self.weight + self.bias


class GlobalNorm(nn.LayerNorm):
    """Norm over tokens and channels, one mean of another, as networks for speech write it."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=-1, keepdim=True).mean(dim=-2, keepdim=True)
        variance = torch.pow(x - mean, 2).mean(dim=-1, keepdim=True).mean(dim=-2, keepdim=True)
        return self.weight * (x - mean) / torch.pow(variance + 1e-8, 0.5) + self.bias


class Function(nn.Module):
    """A function of the channels."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "nn.RMSNorm": nn.RMSNorm,
    "nn.LayerNorm": nn.LayerNorm,
    "layer norm without bias": lambda d: nn.LayerNorm(d, bias=False, eps=0.1),
    "F.layer_norm": FunctionalNorm,
    "eps": lambda d: nn.RMSNorm(d, eps=0.5),
    "no weight": lambda d: nn.RMSNorm(d, elementwise_affine=False),
    "F.rms_norm": lambda d: Function(lambda x: F.rms_norm(x, (d,), eps=0.1)),
    "by hand": ByHand,
    "F.normalize": lambda d: Function(lambda x: F.normalize(x, dim=-1)),
    "1-norm": lambda d: Function(lambda x: x / (1 + x.norm(1, dim=-1, keepdim=True))),
    "maximum norm": lambda d: Function(lambda x: x / (1 + torch.linalg.vector_norm(x, torch.inf, -1, keepdim=True))),
    "mean": lambda d: Function(lambda x: x * x.mean(-1, keepdim=True)),
    "torch.mean": lambda d: Function(lambda x: x * torch.mean(x, dim=2)[..., None]),
    "numpy's names": lambda d: Function(lambda x: x * x.mean(axis=-1, keepdims=True)),  # type: ignore[call-overload]
    "tokens as well": lambda d: Function(lambda x: x * x.mean((1, 2), keepdim=True)),
    "a size": lambda d: Function(lambda x: x * (x.sum(-1, keepdim=True) / x.shape[-1])),
    "sum": lambda d: Function(lambda x: x * x.sum(-1, keepdim=True)),
    "variance": lambda d: Function(lambda x: x * x.var(-1, keepdim=True)),
    "variance of all": lambda d: Function(lambda x: x * torch.var(x, unbiased=False)),
    "deviation": lambda d: Function(lambda x: x * (0.1 + torch.std(x, (1, 2), False, True))),
    "moments": lambda d: Function(lambda x: x * sum(torch.var_mean(x, dim=2, correction=2, keepdim=True))),
    "deviation and mean": lambda d: Function(lambda x: x * torch.std_mean(x, dim=-1, keepdim=True)[0]),
    "layer norm by moments": Moments,
    "layer norm by hand": LayerNormByHand,
    "by products": lambda d: LayerNormByHand(d, power=False),
    "one mean of another": GlobalNorm,
}
STAY: dict[str, Callable[[int], nn.Module]] = {
    "layer norm": lambda d: nn.LayerNorm(d, elementwise_affine=False),
    "smallest": lambda d: Function(lambda x: x * (1 + torch.linalg.vector_norm(x, -1.0, -1, keepdim=True))),
    "not zero before it": lambda d: Function(lambda x: x * (x + 1).mean(-1, keepdim=True)),
}


class Block(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norm, self.up, self.down = norm(D), nn.Linear(D, HIDDEN), nn.Linear(HIDDEN, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.up(self.norm(x))))  # type: ignore[no-any-return]


class Stream(nn.Module):
    """A residual stream of D channels: embedding, two blocks, a norm, a head."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.embedding, self.blocks = nn.Embedding(16, D), nn.Sequential(Block(norm), Block(norm))
        self.norm, self.head = norm(D), nn.Linear(D, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embedding(tokens))))  # type: ignore[no-any-return]


TOKENS = torch.arange(14).reshape(2, 7)


def build(norm: Callable[[int], nn.Module], dead: list[int], seed: int = 0) -> Stream:
    torch.manual_seed(seed)
    net = Stream(norm).double().eval()
    kill(net, dead)
    return net


def kill(net: nn.Module, dead: list[int]) -> None:
    """Make channels of the stream zero wherever they are made."""
    with torch.no_grad():
        net.get_parameter("embedding.weight")[:, dead] = 0
        for i in range(2):
            for leaf in ("weight", "bias"):
                net.get_parameter(f"blocks.{i}.down.{leaf}")[dead] = 0
        for norm in (module for module in net.modules() if isinstance(module, nn.LayerNorm)):
            for parameter in norm.parameters():
                parameter[dead] = 0


def width(net: nn.Module) -> int:
    return net.get_parameter("embedding.weight").shape[1]


@pytest.mark.parametrize("name", NORMS)
def test_zero_channels_go_and_go_again(name: str) -> None:
    net = build(NORMS[name], [2, 7])
    visit = Fingerprint(net)
    module = fxc.prune(net, TOKENS).module
    visit.check()
    assert width(module) == D - 2
    assert list(module.state_dict()) == list(net.state_dict())
    longer = torch.arange(15).reshape(1, 15)
    for tokens in (TOKENS, longer):
        assert difference(net(tokens), module(tokens)) <= 1e-12
    assert not fxc.prune(module, TOKENS).report.modified
    kill(module, [0])
    expected = module(longer)
    again = fxc.prune(module, TOKENS).module
    assert width(again) == D - 3
    assert difference(expected, again(longer)) <= 1e-12
    assert difference(expected, copy.deepcopy(again)(longer)) <= 1e-12


@pytest.mark.parametrize("name", ["nn.RMSNorm", "nn.LayerNorm", "tokens as well", "deviation", "layer norm by hand"])
def test_the_result_is_stored_compiled_and_exported(name: str, tmp_path: Path) -> None:
    module = fxc.prune(build(NORMS[name], [2, 7]), TOKENS).module
    assert isinstance(module, fx.GraphModule)
    fxc.save(module, tmp_path / "net.fxc")
    loaded = fxc.load(tmp_path / "net.fxc", Stream(NORMS[name]).double(), TOKENS)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    exported = torch.export.export(module, (TOKENS,)).module()
    for other in (loaded, compiled, exported):
        assert difference(module(TOKENS), other(TOKENS)) <= 1e-12


def test_layer_norm_keeps_a_zero_channel_that_it_makes_something_of() -> None:
    net = build(nn.LayerNorm, [2, 7])
    with torch.no_grad():
        net.get_parameter("blocks.1.norm.weight")[7] = 0.5
    assert width(fxc.prune(net, TOKENS).module) == D - 1


def test_layer_norm_lets_go_of_a_zero_channel_that_nobody_reads_behind_it() -> None:
    net = build(nn.LayerNorm, [2, 7])
    with torch.no_grad():
        for norm, reader in (("blocks.0.norm", "blocks.0.up"), ("blocks.1.norm", "blocks.1.up"), ("norm", "head")):
            net.get_parameter(f"{norm}.bias")[2] = 0.5
            net.get_parameter(f"{norm}.weight")[2] = 0.5
            net.get_parameter(f"{reader}.weight")[:, 2] = 0
    module = fxc.prune(net, TOKENS).module
    assert width(module) == D - 2
    assert difference(net(TOKENS), module(TOKENS)) <= 1e-12


@given(st.integers(1, 6), st.floats(-1e4, 1e4), st.floats(1e-3, 10), st.integers(0, 99))
@settings(deadline=None)
def test_layer_norm_of_what_is_left_is_layer_norm_of_all(gone: int, shift: float, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 8, generator=generator) * scale + shift
    x[:, 8 - gone :] = 0
    wide, narrow = (
        F.layer_norm(x.double(), (8,))[:, : 8 - gone],
        layer_norm_over(x[:, : 8 - gone], (1,), ((1, 8),)),
    )
    assert difference(wide, narrow.double()) <= 1e-4


OVER: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "var": (lambda x: x.var(1), lambda x: var_over(x, (1,), ((1, 8),))),
    "std": (lambda x: x.std(1, correction=0), lambda x: std_over(x, (1,), ((1, 8),), 0)),
    "var_mean": (lambda x: torch.stack(torch.var_mean(x, 1)), lambda x: torch.stack(var_mean_over(x, (1,), ((1, 8),)))),
    "mean_square": (lambda x: x.var(1, correction=0), lambda x: mean_square_over(x, (1,), ((1, 8),), keepdim=False)),
}


@pytest.mark.parametrize("name", OVER)
@given(
    gone=st.integers(1, 7),
    shift=st.floats(-1e3, 1e3).map(lambda x: round(x, 6)),  # squares of smaller ones are no numbers of full precision
    scale=st.sampled_from([0.0, 1e-2, 1.0, 10.0]),
)
@settings(deadline=None, max_examples=20)
def test_spread_of_what_is_left_is_that_of_all(name: str, gone: int, shift: float, scale: float) -> None:
    of_all, of_left = OVER[name]
    x = torch.randn(3, 8, dtype=torch.float64) * scale + shift
    x[:, 8 - gone :] = 0
    x[0] = 0
    wide, narrow = x.clone().requires_grad_(), x[:, : 8 - gone].clone().requires_grad_()
    expected, found = of_all(wide), of_left(narrow)
    assert difference(expected, found) <= 1e-9
    expected.sum().backward()
    found.sum().backward()
    assert wide.grad is not None
    assert narrow.grad is not None
    assert difference(wide.grad[:, : 8 - gone], narrow.grad) <= 1e-7


def test_autocast_finds_the_squares_of_variances_by_hand() -> None:
    x = torch.rand(2, 8) * 1e-2
    with torch.autocast("cpu", torch.bfloat16):
        for power in (True, False):
            expected = mean_square(x, (1,), keepdim=True, power=power)
            found = mean_square_over(x[:, :8], (1,), (), keepdim=True, power=power)
            assert expected.dtype == found.dtype
            assert difference(expected, found) <= 1e-5


class WrittenBetween(nn.Module):
    """The distance is from the mean of what the tensor was before."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, D), nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        mean = x.mean(1, keepdim=True)
        x += 1
        spread = (x - mean).square().mean((1,))
        return self.last(x) * spread[:, None]  # type: ignore[no-any-return]


class NoVariance(WrittenBetween):
    """Something like a variance: the means are over other dims, or of another power."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        a = (x - x.mean(1, keepdim=True)).pow(2).mean(0)
        b = (x - x.mean(1, keepdim=True)).pow(3).mean(1, keepdim=True)
        c = (x - (2 * x).mean(1, keepdim=True)).pow(2).mean(1, keepdim=True)
        d = (x - x.mean(1, keepdim=True)).pow(2).mean(0, keepdim=True).mean(1, keepdim=True)
        e = (x - x.mean(1, keepdim=True).mean(0, keepdim=True)).pow(2).mean(1, keepdim=True)
        return self.last(x) * (b + c + d + e) + a.sum()  # type: ignore[no-any-return]


@pytest.mark.parametrize("model", [WrittenBetween, NoVariance])
def test_what_is_no_variance_stays_what_it_is(model: type[nn.Module]) -> None:
    net, x = model().double(), torch.randn(3, 4, dtype=torch.float64)
    with torch.no_grad():
        for name in ("first.weight", "first.bias"):
            net.get_parameter(name)[[2, 7]] = 0
    module = fxc.prune(net, x).module
    assert isinstance(module, fx.GraphModule)
    assert not any(node.target is mean_square for node in module.graph.nodes)
    assert module.get_parameter("first.weight").shape[0] == D
    assert difference(net(x), module(x)) <= 1e-12


@pytest.mark.parametrize("value", [0.0, 1.0, -3e4])
def test_layer_norm_of_equal_entries_is_finite(value: float) -> None:
    x = torch.full((2, 8), value)
    assert layer_norm_over(x, (1,), ((1, 8),)).isfinite().all()


class Functional(nn.GroupNorm):
    """As libraries write it, for images and for lists of channels."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps, cudnn_enabled=False)


class Images(nn.Module):
    """A residual stream of channels, with norms over channels and places."""

    def __init__(self, norm: type[nn.GroupNorm], *, affine: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, D, 3, padding=1)
        self.norms = nn.ModuleList(norm(1, D, affine=affine, eps=0.1) for _ in range(2))
        self.mix, self.up, self.down = nn.AvgPool2d(3, 1, 1), nn.Conv2d(D, HIDDEN, 1), nn.Conv2d(HIDDEN, D, 1)
        self.last, self.head = norm(1, D, affine=affine), nn.Linear(D, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.mix(self.norms[0](x))
        x = x + self.down(F.silu(self.up(self.norms[1](x))))
        result: Tensor = self.head(self.last(x.mean((2, 3))))
        return result


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("norm", [nn.GroupNorm, Functional])
def test_group_norm_with_one_group_lets_go_of_zero_channels(norm: type[nn.GroupNorm], *, training: bool) -> None:
    torch.manual_seed(0)
    net, dead = Images(norm).double().train(training), [2, 7]
    with torch.no_grad():
        for parameter in (p for name, p in net.named_parameters() if not name.startswith(("up", "head"))):
            if parameter.shape[0] == D:
                parameter.copy_(torch.randn_like(parameter))
                parameter[dead] = 0
    x, other = torch.randn(2, 3, 9, 9, dtype=torch.float64), torch.randn(3, 3, 5, 8, dtype=torch.float64)
    visit = Fingerprint(net)
    module = fxc.prune(net, x).module
    visit.check()
    assert list(module.state_dict()) == list(net.state_dict())
    assert module.get_parameter("stem.weight").shape[0] == module.get_parameter("last.weight").shape[0] == D - 2
    for images in (x, other):
        assert difference(net(images), module(images)) <= 1e-12
    assert not fxc.prune(module, x).report.modified
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.shape[0] == D - 2 and not name.startswith(("up", "head")):
                parameter[0] = 0
    expected = module(other)
    again = fxc.prune(module, x).module
    assert again.get_parameter("stem.weight").shape[0] == D - 3
    assert difference(expected, copy.deepcopy(again)(other)) <= 1e-12


def test_group_norm_without_weights_makes_something_of_zeros() -> None:
    torch.manual_seed(0)
    net = Images(nn.GroupNorm, affine=False).double().eval()
    with torch.no_grad():
        for name in ("stem.weight", "stem.bias", "down.weight", "down.bias"):
            net.get_parameter(name)[[2, 7]] = 0
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    module = fxc.prune(net, x).module
    assert module.get_parameter("stem.weight").shape[0] == D
    assert difference(net(x), module(x)) <= 1e-12


@pytest.mark.parametrize("name", STAY)
def test_what_zeros_make_a_difference_to_keeps_them(name: str) -> None:
    net = build(STAY[name], [2, 7])
    result = fxc.prune(net, TOKENS)
    assert width(result.module) == D
    assert difference(net(TOKENS), result.module(TOKENS)) == 0
    assert result.report.kept


@settings(max_examples=10)
@given(st.sampled_from(sorted(NORMS)), st.sets(st.integers(0, D - 1), max_size=D - 1), st.integers(0, 9))
def test_any_set_of_channels(name: str, dead: set[int], seed: int) -> None:
    net = build(NORMS[name], sorted(dead), seed)
    module = fxc.prune(net, TOKENS).module
    assert width(module) == D - len(dead)
    assert difference(net(TOKENS), module(TOKENS)) <= 1e-12


def train(net: nn.Module, optimizer: torch.optim.Optimizer, dead: list[int]) -> None:
    """Two steps; what is dead is held at zero."""
    for _ in range(2):
        optimizer.zero_grad()
        net(TOKENS).square().mean().backward()
        optimizer.step()
        kill(net, dead)


@pytest.mark.parametrize("name", ["eps", "by hand", "F.normalize", "deviation", "layer norm by hand", "by products"])
def test_training_goes_on_as_in_the_whole_network(name: str) -> None:
    """The state of the optimizer fits: no weight was changed to make up for the channels that are gone."""
    whole, other = (build(NORMS[name], [2, 7]).train() for _ in range(2))
    whole_optimizer, optimizer = (torch.optim.Adam(net.parameters()) for net in (whole, other))
    for net, stepper in ((whole, whole_optimizer), (other, optimizer)):
        train(net, stepper, [2, 7])
    small = fxc.prune(other, TOKENS, optimizer).module
    assert width(small) == D - 2
    train(whole, whole_optimizer, [2, 7])
    train(small, optimizer, [])
    assert difference(whole(TOKENS), small(TOKENS)) <= 1e-10


class Cosine(nn.Module):
    """Attention by angles. Biases of the keys are written over, on a copy, as in Swin."""

    def __init__(self, *, number: float | None) -> None:
        super().__init__()
        self.qkv, self.out, self.number = nn.Linear(6, 36), nn.Linear(12, 6), number
        self.scale = nn.Parameter(torch.rand(3, 1, 1) + 1)

    def forward(self, x: Tensor) -> Tensor:
        bias: Tensor = self.qkv.bias
        if self.number is not None:
            bias = bias.clone()
            bias[12:24].fill_(self.number)
        y = F.linear(x, self.qkv.weight, bias)
        q, k, v = y.unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
        weights = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.scale).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


@pytest.mark.parametrize("number", [None, 0.0])
def test_a_dead_head_of_cosine_attention_goes(number: float | None) -> None:
    """Queries and keys of a head that nobody reads are not zero, and their norms are nobody's either."""
    net, x = Cosine(number=number).double(), torch.randn(2, 5, 6, dtype=torch.float64)
    with torch.no_grad():
        for tensor in (net.qkv.weight, net.qkv.bias):
            tensor[24 + 4 : 24 + 8] = 0  # the values of head 1
            tensor[[0, 12]] = 0  # the first dim of queries and keys of head 0
    module = fxc.prune(net, x).module
    assert module.get_parameter("scale").shape == (2, 1, 1)
    assert module.get_parameter("qkv.weight").shape == (24, 6)
    assert difference(net(x), module(x)) <= 1e-12


def test_a_head_goes_with_the_part_of_a_bias_that_is_written_over() -> None:
    net, x = Cosine(number=1.0).double(), torch.randn(2, 5, 6, dtype=torch.float64)
    with torch.no_grad():
        for tensor in (net.qkv.weight, net.qkv.bias):
            tensor[24 + 4 : 24 + 8] = 0
    module = fxc.prune(net, x).module
    assert module.get_parameter("scale").shape == (2, 1, 1)
    assert difference(net(x), module(x)) <= 1e-12


class Standardised(nn.Conv2d):
    """A convolution whose weight has mean 0 and variance 1 for each output."""

    def __init__(self, inputs: int, outputs: int, how: str, kernel: int = 3) -> None:
        super().__init__(inputs, outputs, kernel)
        self.how, self.gain = how, nn.Parameter(torch.rand(outputs, 1, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, STANDARDS[self.how](self.weight, self.gain), self.bias)


def by_batch_norm(weight: Tensor, gain: Tensor) -> Tensor:
    flat = weight.reshape(1, weight.shape[0], -1)
    return F.batch_norm(flat, None, None, gain.view(-1), training=True, eps=1e-6).reshape_as(weight)


def by_moments(weight: Tensor, gain: Tensor) -> Tensor:
    variance, mean = torch.var_mean(weight, (1, 2, 3), correction=0, keepdim=True)
    return gain * ((weight - mean) / torch.sqrt(variance + 1e-6))


def by_deviation(weight: Tensor, gain: Tensor) -> Tensor:
    return gain * ((weight - weight.mean((1, 2, 3), keepdim=True)) / (weight.std((1, 2, 3), keepdim=True) + 1e-4))


def by_length(weight: Tensor, gain: Tensor) -> Tensor:
    return gain * F.normalize(weight.flatten(1)).view_as(weight)


STANDARDS = {"batch norm": by_batch_norm, "moments": by_moments, "deviation": by_deviation, "length": by_length}


@pytest.mark.parametrize("way", ["weight", "gain"])
@pytest.mark.parametrize("how", STANDARDS)
def test_outputs_of_standardised_convolutions_go(how: str, way: str) -> None:
    """Where the weight goes on being computed, as the optimizer holds what it is computed from."""
    torch.manual_seed(0)
    first, last = Standardised(3, 8, how), nn.Conv2d(8, 2, 1)
    net, x = nn.Sequential(first, nn.ReLU(), last).double().eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        (first.weight if way == "weight" else first.gain)[[1, 4]] = 0
        net.get_parameter("0.bias")[[1, 4]] = 0
    module = fxc.prune(net, x, torch.optim.SGD(net.parameters(), lr=0.1)).module
    assert module.get_parameter("0.weight").shape == (6, 3, 3, 3)
    assert module.get_parameter("2.weight").shape == (2, 6, 1, 1)
    assert difference(net(x), module(x)) <= 1e-12


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("how", STANDARDS)
def test_inputs_of_standardised_convolutions_count(how: str, kernel: int) -> None:
    """A dead input has kernels that are not zero: without them, the others would be scaled in another way."""
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 8, 3), Standardised(8, 4, how, kernel)
    net, x = nn.Sequential(first, nn.ReLU(), second).double().eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        first.weight[[1, 4]], first.bias[[1, 4]] = 0, 0  # type: ignore[index]
    module = fxc.prune(net, x, torch.optim.SGD(net.parameters(), lr=0.1)).module
    assert module.get_parameter("2.weight").shape == (4, 8, kernel, kernel)
    assert difference(net(x), module(x)) <= 1e-12
    module = fxc.prune(net, x).module
    assert module.get_parameter("2.weight_plain").shape == (4, 6, kernel, kernel)
    assert difference(net(x), module(x)) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_functions_are_those_of_torch_where_nothing_is_gone(dtype: torch.dtype) -> None:
    x, weight = torch.randn(3, 4, 6).to(dtype), torch.rand(4, 6).to(dtype)
    for eps in (None, 0.1):
        found = rms_norm_over(x, (1, 2), (), weight, eps)
        assert difference(F.rms_norm(x, (4, 6), weight, eps).double(), found.double()) <= torch.finfo(dtype).eps * 4
        assert found.dtype == dtype
    assert difference(x.double().mean((0, 2)), mean_over(x, (0, 2), (), dtype=torch.float64)) <= 1e-12
