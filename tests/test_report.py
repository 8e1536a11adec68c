"""Multiply-adds and sizes by hand."""

import pytest
import torch
from torch import nn

import fxcompress as fxc
from fxcompress.report.layers import layer_widths
from fxcompress.report.measure import first_and_last, multiply_adds, quantized_weights, sizes
from tests.nets import ResidualNet, set_bits


@pytest.mark.parametrize(
    ("layer", "shape", "count"),
    [
        (nn.Conv2d(3, 8, 3, padding=1), (1, 3, 10, 10), 3 * 8 * 9 * 100),
        (nn.Conv2d(8, 8, 3, groups=4), (2, 8, 10, 10), 2 * 8 * 2 * 9 * 64),
        (nn.Linear(5, 7), (3, 5), 3 * 5 * 7),
        (nn.BatchNorm2d(4), (2, 4, 3, 3), 0),
        # four projections, two products of attention, two linear layers
        (
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(),
            (3, 5, 8),
            3 * (4 * 5 * 8 * 8 + 2 * 5 * 5 * 8 + 2 * 5 * 8 * 16),
        ),
    ],
)
def test_multiply_adds(layer: nn.Module, shape: tuple[int, ...], count: int) -> None:
    assert multiply_adds(layer, torch.zeros(shape)) == count


def test_sizes_of_a_finalized_network() -> None:
    torch.manual_seed(0)
    net = fxc.compress(
        nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(4, 2, 1, bias=False)), torch.zeros(1, 3, 8, 8)
    )
    set_bits(net, "0.weight", [0, 1, 2, 3], 3.0)
    set_bits(net, "1.weight", [0, 1], 2.5)
    found = sizes(net.finalize(prune=False), 100)
    weights = 108 + 8
    assert found.fractional == pytest.approx((108 * 3 + 8 * 2.5) / (32 * weights))
    # 2.5 bits emit 6 codes, which take 3 whole bits; each channel costs 5 bytes more.
    assert found.stored == pytest.approx((108 * 3 + 8 * 3 + 6 * 40) / (32 * weights))
    assert found.file == pytest.approx(800 / (32 * weights))


def test_the_report_agrees_with_the_network_in_training() -> None:
    net = fxc.compress(ResidualNet(), torch.zeros(2, 3, 10, 10))
    set_bits(net, "block1.conv1.weight", [1, 4])
    net.step()
    net.prune()
    final = net.finalize()
    found = sizes(final, 0)
    assert found.fractional == pytest.approx(net.fractional_size(), rel=1e-6)
    assert found.stored == pytest.approx(net.stored_size(), rel=1e-6)
    assert quantized_weights(final) / net.weights == pytest.approx(net.weights_left())


def test_layer_widths() -> None:
    net = fxc.compress(ResidualNet(), torch.zeros(2, 3, 10, 10))
    set_bits(net, "block1.conv1.weight", [1, 4])
    net.step()
    net.prune()
    widths = {w.name: w for w in layer_widths(net.finalize())}
    assert widths["block1.conv1"].before == (8, 8)
    assert widths["block1.conv1"].after == (6, 8)
    assert widths["block1.conv2"].after == (8, 6)
    assert widths["fc"].bits == pytest.approx(8.0)


def test_first_and_last() -> None:
    assert first_and_last([5.0, 1.0, 1.2, 3.0, 0.5, 0.6]) == (1.2, 0.6)
