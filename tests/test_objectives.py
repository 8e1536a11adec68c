"""The objectives against counts by hand, on a chain, a residual net, a concat net and grouped convolutions."""

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.quantizer import Quantizer


class Residual(nn.Module):
    """y = conv0(x); z = conv2(y + conv1(y))."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(3, 4, 3, bias=False)
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(4, 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv0(x)
        result: Tensor = self.conv2(y + self.conv1(y))
        return result


class Concat(nn.Module):
    """conv2 reads conv0(x) and conv1(x) side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(3, 2, 3, bias=False)
        self.conv1 = nn.Conv2d(3, 3, 3, bias=False)
        self.conv2 = nn.Conv2d(5, 4, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.conv2(torch.cat([self.conv0(x), self.conv1(x)], 1))
        return result


def compressed(model: nn.Module, **bits: list[float]) -> fxc.CompressedModule:
    """The compressed model with the given bits for each layer, after a step."""
    net = fxc.compress(model, torch.zeros(1, 3, 8, 8))
    for name, values in bits.items():
        quantizer = net.get_submodule(f"{name}.weight_quantizer")
        assert isinstance(quantizer, Quantizer)
        quantizer.bits.data = torch.tensor(values)
    net.step()
    return net


def sizes(net: fxc.CompressedModule) -> tuple[float, float]:
    """Both objectives, times N."""
    return net.size("eq4").item() * net.weights, net.size("eq5").item() * net.weights


def chain() -> nn.Sequential:
    conv0, conv1 = nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(4, 2, 3, bias=False)
    return nn.Sequential(conv0, nn.ReLU(), conv1)


def test_all_at_eight_bits() -> None:
    net = compressed(chain())
    assert net.weights == 3 * 4 * 9 + 4 * 2 * 9
    assert net.size("eq4").item() == 8.0
    assert net.fractional_size() == 0.25


def test_chain() -> None:
    net = compressed(chain(), **{"0": [8.0, 4.0, 2.0, 1.0], "2": [3.0, 5.0]})
    # eq. 4: 3 inputs * 9 * 15 bits, and 4 inputs * 9 * 8 bits.
    # eq. 5: the input of the network is alive and has no bits: 9 * 3 * 15; then 9 * (4 alive * 8 + 2 alive * 15).
    assert sizes(net) == pytest.approx((27 * 15 + 36 * 8, 27 * 15 + 9 * (4 * 8 + 2 * 15)))


def test_chain_with_a_dead_channel() -> None:
    net = compressed(chain(), **{"0": [8.0, 0.0, 2.0, 1.0], "2": [3.0, 5.0]})
    assert sizes(net) == pytest.approx((27 * 11 + 27 * 8, 27 * 11 + 9 * (3 * 8 + 2 * 11)))


def test_a_channel_without_bits_but_with_a_bias_still_counts_as_an_input() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3, bias=False))
    net = compressed(model, **{"0": [8.0, 0.0, 2.0, 1.0], "1": [3.0, 5.0]})
    # It is no input of equation 5, which asks for bits, but its weights are still there for equation 4.
    assert sizes(net) == pytest.approx((27 * 11 + 36 * 8, 27 * 11 + 9 * (3 * 8 + 2 * 11)))


def test_residual() -> None:
    bits0, bits1, bits2 = [8.0, 4.0, 2.0, 1.0], [2.0, 4.0, 0.0, 3.0], [3.0, 5.0]
    net = compressed(Residual(), conv0=bits0, conv1=bits1, conv2=bits2)
    eq4 = 27 * 15 + 4 * 9 * 9 + 4 * 8
    # conv2 reads sums; each counts with the mean of the bits that feed it, dead ones left out: 5, 4, 2, 2.
    eq5 = 27 * 15 + 9 * (4 * 9 + 3 * 15) + (4 * 8 + 2 * (5 + 4 + 2 + 2))
    assert sizes(net) == pytest.approx((eq4, eq5))


def test_concat() -> None:
    net = compressed(Concat(), conv0=[2.0, 0.0], conv1=[4.0, 3.0, 1.0], conv2=[1.0, 2.0, 3.0, 4.0])
    eq4 = 27 * 2 + 27 * 8 + 4 * 10
    eq5 = 27 * 2 + 27 * 8 + (4 * 10 + 4 * (2 + 8))
    assert sizes(net) == pytest.approx((eq4, eq5))


def test_depthwise_and_grouped() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1, bias=False),
        nn.Conv2d(4, 4, 3, groups=4, bias=False),
        nn.Conv2d(4, 6, 1, groups=2, bias=False),
    )
    bits: dict[str, list[float]] = {
        "0": [1.0, 2.0, 3.0, 4.0],
        "1": [5.0, 6.0, 7.0, 8.0],
        "2": [1.0, 1.0, 2.0, 2.0, 3.0, 3.0],
    }
    net = compressed(model, **bits)
    eq4 = 3 * 10 + 9 * 26 + 2 * 12
    depthwise = 9 * sum(own + fed for own, fed in zip(bits["1"], bits["0"], strict=True))
    grouped = (2 * 4 + 3 * (5 + 6)) + (2 * 8 + 3 * (7 + 8))
    assert sizes(net) == pytest.approx((eq4, 3 * 10 + depthwise + grouped))


def test_flatten_into_linear() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 7, bias=False), nn.Flatten(), nn.Linear(8, 3, bias=False))
    net = compressed(model, **{"0": [2.0, 6.0], "2": [1.0, 2.0, 3.0]})
    # Each channel of the convolution is read 4 times by the linear layer.
    assert sizes(net) == pytest.approx((147 * 8 + 8 * 6, 147 * 8 + (8 * 6 + 3 * 4 * 8)))


class Attention(nn.Module):
    """Two heads of two dims among the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(3, 4, bias=False) for _ in range(3))
        self.out = nn.Linear(4, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)[:, :2]  # as many tokens as dims: sizes must not be mistaken for each other
        q, k, v = (layer(x).unflatten(-1, (2, 2)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return self.out(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def test_attention() -> None:
    bits = {"q": [1.0, 2.0, 3.0, 4.0], "k": [2.0, 2.0, 2.0, 2.0], "v": [8.0, 6.0, 4.0, 0.5], "out": [3.0, 5.0]}
    net = compressed(Attention(), **bits)
    made = 3 * (10 + 8 + 18.5)
    # What the last layer reads is fed by the values.
    assert sizes(net) == pytest.approx((made + 4 * 8, made + 4 * 8 + 2 * 18.5))


def test_a_layer_that_is_called_twice_counts_once() -> None:
    conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)
    net = compressed(nn.Sequential(conv, nn.ReLU(), conv))
    assert net.weights == 81
    assert net.size("eq4").item() == 8.0


def test_gradient_of_the_size() -> None:
    net = compressed(chain(), **{"0": [8.0, 4.0, 2.0, 1.0], "2": [3.0, 5.0]})
    net.size("eq5").backward()
    first, second = (net.get_parameter(f"{i}.weight_quantizer.bits").grad for i in "02")
    assert first is not None
    assert second is not None
    # b of layer 0 costs 27 itself and 9 for each of the 2 outputs of layer 2; b of layer 2 costs 9 for each input.
    torch.testing.assert_close(first * net.weights, torch.full((4,), 27.0 + 18.0))
    torch.testing.assert_close(second * net.weights, torch.full((2,), 36.0))


def test_removal_does_not_change_the_size() -> None:
    net = compressed(Residual(), conv0=[8.0, 0.0, 2.0, 1.0], conv1=[2.0, 0.0, 0.0, 3.0], conv2=[3.0, 5.0])
    before = sizes(net)
    assert net.prune().modified
    assert net.get_parameter("conv2.weight").shape == (2, 3, 1, 1)
    assert sizes(net) == pytest.approx(before)


def test_unknown_objective() -> None:
    with pytest.raises(ValueError, match="'eq6' is none of eq4, eq5"):
        fxc.compress(chain(), torch.zeros(1, 3, 8, 8), objective="eq6")
