"""Transposed convolutions that are told the size of their result: quantized, cut, stored and saved like others."""

import copy
import io
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.quantizer import Quantizer, quantize_reference
from tests.exactness import TOLERANCE, difference

pytestmark = pytest.mark.usefixtures("double")

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
FUNCTION = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class UNet(nn.Module):
    """Goes down and up to the size that it came from; ``again`` calls the same layer a second time without a size."""

    def __init__(self, dims: int, *, bias: bool = True, groups: int = 1, again: bool = False) -> None:
        super().__init__()
        self.dims, self.again = dims, again
        self.stem, self.down = CONV[dims](2, 6, 3, padding=1), CONV[dims](6, 8, 3, stride=2, padding=1)
        self.up = TRANSPOSED[dims](8, 8, 3, stride=2, padding=1, bias=bias, groups=groups)
        self.head = CONV[dims](14, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.stem(x).relu()
        low = self.down(skip).relu()
        high = self.up(low, output_size=skip.shape[2:]).relu()
        if self.again:
            high = high + self.up(low).mean(tuple(range(2, x.ndim)), keepdim=True)
        return self.head(torch.cat([skip, high], 1))  # type: ignore[no-any-return]


CASES = {
    "1d": {"dims": 1}, "2d": {"dims": 2}, "3d": {"dims": 3}, "no bias": {"dims": 2, "bias": False},
    "groups": {"dims": 2, "groups": 4}, "without a size too": {"dims": 2, "again": True},
}  # fmt: skip


def example(dims: int, size: int = 6) -> Tensor:
    return torch.randn(2, 2, *[size, size + 1, size + 2][:dims])


@pytest.mark.parametrize("name", CASES)
def test_quantized_dead_channels_go_and_nothing_changes(name: str, tmp_path: Path) -> None:
    model = UNet(**CASES[name])  # type: ignore[arg-type]
    x, other = example(model.dims), example(model.dims, 9)
    net = fxc.compress(model, x)
    assert net.unquantized() == ()
    optimizer = torch.optim.Adam(net.param_groups(lr=1e-3))
    (net(x).square().mean() + net.size()).backward()
    optimizer.step()
    quantizer = net.get_submodule("up.weight_quantizer")
    assert isinstance(quantizer, Quantizer)
    assert quantizer.bits.grad is not None
    with torch.no_grad():
        quantizer.bits[:2] = 0
        if CASES[name].get("bias", True):
            net.get_parameter("up.bias")[:2] = 0
    net.step()
    before = [net(value).detach() for value in (x, other)]
    report = net.prune(optimizer)
    assert report.parameters[1] < report.parameters[0], str(report)
    for value, expected in zip((x, other), before, strict=True):
        assert difference(expected, net(value)) <= TOLERANCE
    net(x).square().mean().backward()
    optimizer.step()
    net.step()
    final = net.finalize().eval()
    layer = final.get_submodule("up")
    assert type(layer) is TRANSPOSED[model.dims]
    assert layer.get_parameter("weight").numel() < model.up.weight.numel()
    for value in (x, other):
        assert torch.equal(final(value), net.eval()(value))
    fxc.save(final, tmp_path / "net")
    loaded = fxc.load(tmp_path / "net", UNet(**CASES[name]))  # type: ignore[arg-type]
    file = io.BytesIO()
    torch.save(final, file)
    file.seek(0)
    for again in (loaded, torch.load(file, weights_only=False), copy.deepcopy(final)):
        assert torch.equal(again(other), final(other))


class Alone(nn.Module):
    def __init__(self, dims: int) -> None:
        super().__init__()
        self.layer = TRANSPOSED[dims](3, 4, 3, stride=2)
        self.size = [9] * dims

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, self.size)  # type: ignore[no-any-return]


@pytest.mark.parametrize("dims", TRANSPOSED)
def test_the_layer_multiplies_with_the_quantized_weight(dims: int) -> None:
    model, x = Alone(dims), torch.randn(2, 3, *[4] * dims)
    net = fxc.compress(model, x)
    quantizer = net.get_submodule("layer.weight_quantizer")
    assert isinstance(quantizer, Quantizer)
    with torch.no_grad():
        quantizer.bits.copy_(torch.tensor([2.0, 3.0, 4.0, 8.0]))
    ends = [1, 4, *[1] * dims]
    bits, exponent = quantizer.bits.detach().reshape(ends), quantizer.exponent.detach().reshape(ends)
    weight = quantize_reference(model.layer.weight.detach(), bits, exponent)
    expected = FUNCTION[dims](x, weight, model.layer.bias, stride=2)
    assert difference(expected, net(x)) <= TOLERANCE
