"""torch.compile and networks that shrink: no graph break, nothing compiled anew but after a removal."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fxcompress as fxc
from fxcompress.quantizer import Quantizer, compile_quantizers


class Residual(nn.Module):
    """A residual network with what the quantizers have layouts for: convolutions, a transposed one, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.inner, self.outer = nn.Conv2d(12, 10, 3, padding=1), nn.Conv2d(10, 12, 3, padding=1)
        self.up, self.head = nn.ConvTranspose2d(12, 8, 2, stride=2), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.outer(torch.relu(self.inner(x)))
        result: Tensor = self.head(self.up(x).mean((2, 3)))
        return result


class Run:
    """A network, a compiled form of it or of its parts, and one step of training."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        torch._dynamo.reset()
        self.x, self.target = torch.randn(4, 3, 8, 8), torch.randn(4, 4)
        self.net = fxc.compress(Residual(), self.x)
        self.optimizer = torch.optim.Adam(self.net.param_groups(lr=1e-3))

    def step(self, forward: Callable[[Tensor], Tensor]) -> None:
        loss = (forward(self.x) - self.target).square().mean() + 0.01 * self.net.size()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.net.step()

    def remove(self, count: int) -> None:
        """Take ``count`` channels out of the branch."""
        quantizer, bias = self.net.get_submodule("inner.weight_quantizer"), self.net.get_parameter("inner.bias")
        with torch.no_grad():
            quantizer.get_parameter("bits")[:count] = 0
            bias[:count] = 0
        self.net.step()
        assert self.net.prune(self.optimizer).modified


def test_a_compiled_network_compiles_anew_after_a_removal_only() -> None:
    run, backend = Run(), CompileCounterWithBackend("eager")
    compiled = torch.compile(run.net, backend=backend, fullgraph=True)
    counts = []
    for removed in (0, 2):
        if removed:
            run.remove(removed)
        for _ in range(3):
            run.step(compiled)
        counts.append(backend.frame_count)
        torch.testing.assert_close(compiled(run.x), run.net(run.x))
    assert counts == [1, 2]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo, of its own inputs
def test_compiled_quantizers_survive_removals_without_compiling_anew() -> None:
    run, plain = Run(), Run()
    backend = CompileCounterWithBackend("eager")
    run.net.compile_quantizers(backend=backend)
    run.step(run.net)
    plain.step(plain.net)
    count = backend.frame_count
    for removed in (2, 3):
        for each in (run, plain):
            each.remove(removed)
            each.step(each.net)
    assert backend.frame_count == count
    for mine, other in zip(run.net.parameters(), plain.net.parameters(), strict=True):
        torch.testing.assert_close(mine, other)
    torch.testing.assert_close(run.net.finalize()(run.x), plain.net.finalize()(run.x))


LAYOUTS: dict[str, tuple[Tensor, dict[str, Any]]] = {
    "matrix": (torch.randn(5, 8), {}),
    "kernel": (torch.randn(5, 4, 3, 3), {}),
    "channels last": (torch.randn(5, 4, 3, 3).contiguous(memory_format=torch.channels_last), {}),
    "transposed, grouped": (torch.randn(4, 3, 3), {"channel_dim": 1, "groups": 2}),
    "experts": (torch.randn(3, 4, 5), {"channel_dim": 2, "batch_dims": (0,)}),
    "vector": (torch.randn(6), {}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_quantizers_compute_the_same(layout: str, dtype: torch.dtype) -> None:
    weight, options = LAYOUTS[layout]
    found = []
    for compiled in (False, True):
        own = weight.to(dtype).clone().requires_grad_()
        quantizer = Quantizer.for_weight(own, bits=3.0, **options)
        quantizer.keep_range = True
        if compiled:
            compile_quantizers(quantizer, backend="aot_eager")
        result = quantizer(own)
        gradients = torch.autograd.grad(result.square().sum(), [own, quantizer.bits, quantizer.exponent])
        found.append([result, *gradients])
    for plain, mine in zip(*found, strict=True):
        assert plain.dtype == mine.dtype
        assert plain.stride() == mine.stride()
        torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_quantizes_in_float32_and_computes_in_half(dtype: torch.dtype) -> None:
    run = Run()
    seen: list[torch.dtype] = []
    quantizer = run.net.get_submodule("inner.weight_quantizer")
    quantizer.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    with torch.autocast("cpu", dtype):
        loss = (run.net(run.x).float() - run.target).square().mean()
    loss.backward()
    assert seen == [torch.float32]
    assert quantizer.get_parameter("bits").grad is not None


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("way", ["script", "trace", "export"])
def test_a_finished_network_goes_through_torchscript_and_export(way: str) -> None:
    run = Run()
    run.remove(4)
    final = run.net.finalize().eval()
    assert final.get_parameter("inner.weight").shape[0] == 6
    ways: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
        "script": lambda: torch.jit.script(final),
        "trace": lambda: torch.jit.trace(final, run.x),
        "export": lambda: torch.export.export(final, (run.x,)).module(),
    }
    torch.testing.assert_close(ways[way]()(run.x), final(run.x))
