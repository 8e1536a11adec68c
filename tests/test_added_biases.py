"""Biases that a model adds itself are those of its layers: channels die by them in the same way."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress as fxc

pytestmark = pytest.mark.usefixtures("double")

Rows = Callable[[Tensor, Tensor, Tensor], Tensor]
ROWS: dict[str, Rows] = {
    "in one": lambda x, w, b: torch.addmm(b, x, w),
    "sum": lambda x, w, b: x @ w + b,
    "first": lambda x, w, b: b + x @ w,
    "in place": lambda x, w, b: (x @ w).add_(b),
    "turned": lambda x, w, b: F.linear(x, w.T) + b,
    "all of it": lambda x, w, b: x @ w + torch.ops.aten.slice(b, 0, 0, None),
}
MAPS: dict[str, Rows] = {
    "in one": lambda x, w, b: F.conv2d(x, w, b, padding=1),
    "view": lambda x, w, b: F.conv2d(x, w, padding=1) + b.view(1, -1, 1, 1),
    "index": lambda x, w, b: F.conv2d(x, w, padding=1) + b[:, None, None],
    "last dim": lambda x, w, b: (F.conv2d(x, w, padding=1).permute(0, 2, 3, 1) + b).permute(0, 3, 1, 2),
    "laid out": lambda x, w, b: F.conv2d(x, w, padding=1) + b,
    "laid out, in place": lambda x, w, b: F.conv2d(x, w, padding=1).add_(b[0]),
}


class Layer(nn.Module):
    def __init__(self, rows: Rows, weight: Tensor) -> None:
        super().__init__()
        bias = 0.02 * torch.randn(weight.shape[0] if weight.ndim == 4 else weight.shape[1])
        laid_out = rows in {MAPS["laid out"], MAPS["laid out, in place"]}
        self.rows, self.weight = rows, nn.Parameter(weight)
        self.bias = nn.Parameter(bias[None, :, None, None] if laid_out else bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.rows(x, self.weight, self.bias)


def chain(rows: Rows) -> nn.Module:
    sizes = [(6, 12), (12, 10), (10, 3)]
    layers = [Layer(rows, torch.randn(i, o) / i**0.5) for i, o in sizes]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


def maps(rows: Rows) -> nn.Module:
    sizes = [(3, 8), (8, 6), (6, 2)]
    layers = [Layer(rows, torch.randn(o, i, 3, 3) / (3 * i**0.5)) for i, o in sizes]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


def trained(make: Callable[[Rows], nn.Module], rows: Rows, x: Tensor) -> tuple[list[tuple[int, ...]], Tensor]:
    """The shapes of the weights after a training under much pressure, and the outputs."""
    torch.manual_seed(0)
    net = fxc.compress(make(rows), x, bits=1.5)
    optimizer = torch.optim.Adam(net.param_groups(lr=1e-2, bits_lr=0.05))
    for _ in range(90):
        optimizer.zero_grad()
        (1e-2 * net(x).square().mean() + net.size()).backward()
        optimizer.step()
        net.step()
        before = net.eval()(x)
        net.prune(optimizer)
        torch.testing.assert_close(net.train()(x), before, rtol=1e-9, atol=1e-12)
    return [tuple(p.shape) for name, p in net.named_parameters() if name.endswith("weight")], net(x).detach()


@pytest.mark.parametrize("name", [name for name in ROWS if name != "in one"])
def test_rows(name: str) -> None:
    x = torch.randn(16, 6)
    shapes, outputs = trained(chain, ROWS["in one"], x)
    found, same = trained(chain, ROWS[name], x)
    assert found == shapes != [(6, 12), (12, 10), (10, 3)]
    torch.testing.assert_close(same, outputs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in MAPS if name != "in one"])
def test_maps(name: str) -> None:
    x = torch.randn(2, 3, 5, 5)
    shapes, outputs = trained(maps, MAPS["in one"], x)
    found, same = trained(maps, MAPS[name], x)
    assert found == shapes != [(8, 3, 3, 3), (6, 8, 3, 3), (2, 6, 3, 3)]
    torch.testing.assert_close(same, outputs, rtol=1e-6, atol=1e-9)
