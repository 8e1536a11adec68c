"""Weights that a network masks, scales or turns before it multiplies, or reads both ways, have quantizers."""

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.errors import UnsupportedModelError
from fxcompress.objectives import OBJECTIVES
from fxcompress.quantizer import Quantizer

pytestmark = pytest.mark.usefixtures("double")

I, H, O = 6, 8, 2


class Layer(nn.Module):
    """A linear layer that computes its weight; ``by_hand`` it multiplies with a matrix (I, O)."""

    mask: Tensor

    def __init__(self, inputs: int, outputs: int, way: str) -> None:
        super().__init__()
        self.by_hand = "product" in way
        shape = (inputs, outputs) if self.by_hand else (outputs, inputs)
        self.weight, self.bias, self.way = nn.Parameter(torch.randn(shape) / 2), nn.Parameter(torch.zeros(outputs)), way
        self.gain = nn.Parameter(torch.rand(outputs if self.by_hand else (outputs, 1)) + 0.5)
        self.register_buffer("mask", (torch.rand(shape) < 0.7).to(self.weight.dtype))
        with torch.no_grad():
            self.mask[0] = self.mask[:, 0] = 1

    def forward(self, x: Tensor) -> Tensor:
        weight = WAYS[self.way](self)
        return torch.addmm(self.bias, x, weight) if self.by_hand else F.linear(x, weight, self.bias)


WAYS: dict[str, Callable[[Layer], Tensor]] = {
    "mask": lambda m: m.weight * m.mask,
    "mask first": lambda m: m.mask * m.weight,
    "mask, turned twice": lambda m: (m.mask.t() * m.weight.t()).t(),
    "number": lambda m: m.weight * 0.3,
    "divided": lambda m: -m.weight / m.weight.shape[0] ** 0.5,
    "gain first": lambda m: m.gain * m.weight,
    "gain and mask": lambda m: (m.gain.exp() * m.weight) * m.mask,
    "tanh": lambda m: m.weight.tanh(),
    "where": lambda m: torch.where(m.mask > 0, m.weight, 0.0),
    "masked_fill": lambda m: m.weight.masked_fill(m.mask == 0, 0.0),
    "type": lambda m: m.weight.to(m.mask.dtype).clone(),
    "product": lambda m: m.gain * m.weight,
    "product, mask first": lambda m: m.mask * m.weight,
}


def chain(way: str) -> nn.Module:
    return nn.Sequential(Layer(I, H, way), nn.ReLU(), Layer(H, H, way), nn.ReLU(), Layer(H, O, way))


class MaskedConv(nn.Conv2d):
    """Of a PixelCNN: the mask is multiplied with, or written into the weight before it is read."""

    mask: Tensor

    def __init__(self, inputs: int, outputs: int, *, writes: bool) -> None:
        super().__init__(inputs, outputs, 3, padding=1)
        self.writes = writes
        mask = torch.ones_like(self.weight)
        mask[:, :, 1, 2:] = mask[:, :, 2:] = 0
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        if self.writes:
            self.weight.data *= self.mask
            return super().forward(x)
        return F.conv2d(x, self.weight * self.mask, self.bias, padding=1)


def pixels(*, writes: bool) -> nn.Module:
    return nn.Sequential(
        MaskedConv(3, H, writes=writes), nn.ReLU(), MaskedConv(H, H, writes=writes), nn.ReLU(), nn.Conv2d(H, O, 1)
    )


class Tied(nn.Module):
    """An autoencoder whose decoder reads the weights of its encoder: ``way`` says how."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        if way.startswith("conv"):
            self.enc, self.inner = nn.Conv2d(3, H, 3, bias=False), nn.Conv2d(H, H, 1)
        else:
            self.enc, self.inner = nn.Linear(I, H), nn.Linear(H, H)  # type: ignore[assignment]
        if way == "conv, by module":
            self.dec = nn.ConvTranspose2d(H, 3, 3)
            self.dec.weight = self.enc.weight
        self.bias = nn.Parameter(torch.zeros(I))
        self.scale = 0.5

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(self.enc(x).relu()).relu()
        w = self.enc.weight
        if self.way == "conv, by module":
            return self.dec(h)  # type: ignore[no-any-return]
        if self.way == "conv":
            return F.conv_transpose2d(h, w)
        if self.way == "product":
            return h @ w + self.bias  # type: ignore[no-any-return]
        return F.linear(h, w.t() * self.scale if self.way == "scaled" else w.t(), self.bias)


Case = tuple[Callable[[], nn.Module], Callable[[], Tensor]]


def row() -> Tensor:
    return torch.randn(4, I)


def image() -> Tensor:
    return torch.randn(2, 3, 6, 6)


CASES: dict[str, Case] = {
    **{way: (partial(chain, way), row) for way in WAYS},
    "pixels": (lambda: pixels(writes=False), image),
    "pixels, written": (lambda: pixels(writes=True), image),
    **{f"tied {way}": (partial(Tied, way), row) for way in ("linear", "product", "scaled")},
    **{f"tied {way}": (partial(Tied, way), image) for way in ("conv", "conv, by module")},
}


def quantizers(net: nn.Module) -> dict[str, Quantizer]:
    return {name: module for name, module in net.named_modules() if isinstance(module, Quantizer)}


def kill(net: fxc.CompressedModule, count: int) -> None:
    """No bits and no bias for the first hidden channels of each layer but the last."""
    parameters = dict(net.named_parameters())
    with torch.no_grad():
        for name, quantizer in quantizers(net).items():
            if quantizer.bits.numel() > O:
                quantizer.bits[:count] = 0
                bias = parameters.get(name.replace("weight_quantizer", "bias"))
                if bias is not None:
                    bias[:count] = 0
    net.step()


@pytest.mark.parametrize("name", CASES)
def test_dead_channels_go_and_nothing_changes(name: str, tmp_path: Path) -> None:
    make, inputs = CASES[name]
    model, x = make(), inputs()
    net = fxc.compress(model, x)
    assert net.unquantized() == ()
    hidden = {n for n, q in quantizers(net).items() if q.bits.numel() == H}
    assert len(hidden) == 2  # by row of the encoder, where a weight is read both ways
    optimizer = torch.optim.Adam(net.param_groups(lr=1e-3))
    for round_ in (2, 3):
        optimizer.zero_grad()
        (net(x).square().mean() + net.size()).backward()
        assert all(q.bits.grad is not None and bool((q.bits.grad != 0).any()) for q in quantizers(net).values())
        optimizer.step()
        net.step()
        kill(net, 3 if round_ == 2 else 2)
        before = net.eval()(x)
        assert net.prune(optimizer).modified
        torch.testing.assert_close(net(x), before, rtol=1e-9, atol=1e-12)
        net.train()
    assert {q.bits.numel() for n, q in quantizers(net).items() if n in hidden} == {H - 5}
    finished = net.eval().finalize()
    torch.testing.assert_close(finished(x), net(x), rtol=1e-12, atol=1e-14)
    assert quantizers(finished) == {}
    fxc.save(finished, tmp_path / "net.fxc")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as that the graph is another one
        loaded = fxc.load(tmp_path / "net.fxc", model=make())
    torch.testing.assert_close(loaded(x), finished(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_sizes_count_each_weight_once(name: str) -> None:
    """By equation 4 a weight costs the bits of its channel, whoever reads it; what could go costs nothing."""
    make, inputs = CASES[name]
    net = fxc.compress(make(), inputs())
    with torch.no_grad():
        for quantizer in quantizers(net).values():
            quantizer.bits.copy_(torch.rand(quantizer.bits.shape) * 4 + 0.5)
    net.step()
    total = bits = 0.0
    for path, quantizer in quantizers(net).items():
        weight = net.get_parameter(path.removesuffix("_quantizer"))
        total += weight.numel()
        bits += quantizer.bits.detach().sum().item() * weight.numel() / quantizer.bits.numel()
    assert net.weights == total
    assert net.size("eq4").item() == pytest.approx(bits / total)
    kill(net, 3)
    before = [net.size(objective).item() for objective in OBJECTIVES] + [net.stored_size(), float(net.channels_left())]
    assert net.prune().modified
    after = [net.size(objective).item() for objective in OBJECTIVES] + [net.stored_size(), float(net.channels_left())]
    assert after == pytest.approx(before, rel=1e-9)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", CASES)
def test_pressure_takes_channels(name: str) -> None:
    make, inputs = CASES[name]
    x = inputs()
    net = fxc.compress(make(), x, bits=1.0)
    optimizer = torch.optim.Adam(net.param_groups(lr=1e-2, bits_lr=0.05))
    removed = False
    for _ in range(60):
        optimizer.zero_grad()
        (1e-3 * net(x).square().mean() + net.size()).backward()
        optimizer.step()
        net.step()
        before = net.eval()(x)
        removed |= net.prune(optimizer).modified
        torch.testing.assert_close(net(x), before, rtol=1e-9, atol=1e-12)
        net.train()
    assert removed


@pytest.mark.parametrize("name", CASES)
def test_a_latency_table_of_the_original_holds_them(name: str) -> None:
    """Also where a weight has several names: that of the first module that holds it."""
    make, inputs = CASES[name]
    model, x = make(), inputs()
    table = fxc.LatencyTable.measure(model, x, repeats=1, progress=False)
    assert fxc.compress(model, x, objective=table).size().isfinite()  # they are times: none is held against another


def test_multiply_adds_of_a_tied_decoder() -> None:
    """Each weight of a decoder costs the bits of the hidden channel that it reads."""
    x = image()
    net = fxc.compress(Tied("conv"), x)
    own = {name.partition(".")[0]: q.bits for name, q in quantizers(net).items()}
    with torch.no_grad():
        for bits in own.values():
            bits.copy_(torch.rand(H) * 4 + 0.5)
    net.step()
    enc, inner = (own[n].detach().sum() for n in ("enc", "inner"))
    pixels = 2 * 4 * 4  # that the encoder writes, and the decoder reads
    macs = pixels * (2 * 3 * 9 * H + H * H)
    # Encoder, inner layer with what feeds it, decoder.
    cost = pixels * (3 * 9 * enc + H * inner + H * enc + 3 * 9 * enc)
    torch.testing.assert_close(net.size("macs").detach(), cost / macs)


class Noisy(nn.Module):
    """A NoisyLinear of DQN: zero bits of ``mu`` would leave the noise."""

    noise: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.mu, self.sigma, self.last = (
            nn.Parameter(torch.randn(H, I)),
            nn.Parameter(torch.ones(H, I)),
            nn.Linear(H, 2),
        )
        self.register_buffer("noise", torch.randn(H, I))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.linear(x, self.mu + self.sigma * self.noise).relu())  # type: ignore[no-any-return]


class Positive(nn.Module):
    """Zeros are no zeros in the weight."""

    def __init__(self, *, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.last, self.function = nn.Parameter(torch.randn(H, I)), nn.Linear(H, 2), function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.linear(x, self.function(self.weight)).relu())  # type: ignore[no-any-return]


class Beside(Positive):
    """What is made of the weight is a weight, and something else as well."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.function(self.weight)
        return self.last(F.linear(x, weight).relu()) + weight.sum()  # type: ignore[no-any-return]


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "noisy": (Noisy, "mu (48): add at tests/test_weight_steps.py:"),
    "softplus": (lambda: Positive(function=F.softplus), "computes a weight from it, the entries of which are not"),
    "rolled": (lambda: Positive(function=lambda w: w.roll(1, 0)), "computes a weight from it"),
    "beside": (lambda: Beside(function=F.softplus), "weight (48): softplus at tests/test_weight_steps.py:"),
}


def test_what_is_linear_in_its_parameter_needs_no_zeros_of_zeros() -> None:
    """A channel without bits is no channel of zeros then, and stays."""
    for model in (Positive(function=lambda w: w + 0.5), Beside(function=lambda w: w * 2)):
        x = row()
        net = fxc.compress(model, x)
        assert net.unquantized() == ()
        with torch.no_grad():
            quantizers(net)["weight_quantizer"].bits[:3] = 0.0
        net.step()
        before = net(x)
        net.prune()
        torch.testing.assert_close(net(x), before, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_entry_by_entry_is_named(name: str) -> None:
    make, reason = REFUSED[name]
    net = fxc.compress(make(), row())
    assert any(reason in str(item) for item in net.unquantized())
    assert list(quantizers(net)) == ["last.weight_quantizer"]


def test_a_network_of_such_weights_alone_says_so() -> None:
    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(H, I))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, F.softplus(self.weight))

    with pytest.raises(UnsupportedModelError, match=r"softplus .* computes a weight from it"):
        fxc.compress(Alone(), row())


def test_a_weight_that_is_written_to_between_two_layers_has_none() -> None:
    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.last = nn.Parameter(torch.randn(I, I)), nn.Linear(I, 2)
            self.mask: Tensor
            self.register_buffer("mask", torch.ones(I, I).tril())

        def forward(self, x: Tensor) -> Tensor:
            x = F.linear(x, self.weight)
            self.weight.data *= self.mask
            return self.last(F.linear(x, self.weight))  # type: ignore[no-any-return]

    net = fxc.compress(Between(), row())
    assert [item.name for item in net.unquantized()] == ["weight"]
