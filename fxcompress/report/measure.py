"""What a network costs: multiply-adds, time, and the three sizes of a compressed one."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fxcompress.provenance import Grid, provenance_of
from fxcompress.quantizer import storage_bits

FLOAT_BITS = 32
CHANNEL_BITS = 40
"""A bit depth in one byte and an exponent in four, for each channel that is left."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of a network, each a share of the 32 N bits of the N weights that it started with.

    Attributes:
        fractional: real-valued bit depths, summed over the weights: what training sees, and the paper's measure.
        stored: whole bits for the codes that each channel can emit, and 5 bytes for its bit depth and exponent.
        file: bytes on disk, with biases, norms, index and header.
    """

    fractional: float
    stored: float
    file: float


def sizes(module: nn.Module, file_bytes: int) -> Sizes:
    """The three sizes of a network from ``finalize()``.

    Args:
        module: the network; its record of what it was made from gives N and the number formats.
        file_bytes: what ``fxcompress.save`` returned.

    Raises:
        ValueError: the network was never quantized.
    """
    provenance = provenance_of(module)
    if provenance is None or not provenance.weights:
        raise ValueError(f"{type(module).__name__} was never quantized, so it has no sizes; pass what finalize() gave")
    original = FLOAT_BITS * provenance.weights
    fractional = stored = 0.0
    for name, grid in provenance.grids.items():
        bits, each = (
            torch.tensor(grid.bits, dtype=torch.float64, device="cpu"),
            _weights_of_a_channel(module, name, grid),
        )
        whole = storage_bits(bits.float())
        fractional += float(bits.sum()) * each
        stored += int(whole.sum()) * each + CHANNEL_BITS * int((whole > 0).sum())
    return Sizes(fractional / original, stored / original, file_bytes * 8 / original)


def _weights_of_a_channel(module: nn.Module, name: str, grid: Grid) -> float:
    return module.get_parameter(name).numel() / max(1, len(grid.bits))


def quantized_weights(module: nn.Module) -> int:
    """How many weights of a network from ``finalize()`` lie on a grid: those that are left of N."""
    provenance = provenance_of(module)
    names = provenance.grids if provenance is not None else ()
    return sum(module.get_parameter(name).numel() for name in names)


def multiply_adds(module: nn.Module, *inputs: Any) -> int:  # noqa: ANN401
    """The multiplications of one call, each with its addition: those of convolutions, linear layers and attention.

    Counted where torch runs them, so it does not matter whether a module or a function called. Pointwise operations
    and norms are left out, as is customary.

    >>> multiply_adds(nn.Conv2d(3, 8, 3, padding=1), torch.zeros(1, 3, 10, 10))
    21600
    """
    # Fused attention has kernels that the counter does not know; the plain one is made of products that it does.
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            module(*inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return int(counter.get_total_flops()) // 2


@dataclass(frozen=True, slots=True)
class Latency:
    """Time of one call of two networks.

    Attributes:
        batch: samples in the call.
        baseline, compressed: milliseconds, median over the repeats.
        ratio: compressed over baseline, median over the pairs of calls: what a change of the machine's speed while
            measuring disturbs least.
    """

    batch: int
    baseline: float
    compressed: float
    ratio: float


def compare_latency(baseline: nn.Module, compressed: nn.Module, inputs: Tensor, *, repeats: int = 50) -> Latency:
    """Time both networks in turn, in evaluation mode and without gradients, after a few calls to warm up.

    Args:
        baseline: one network; it is left in evaluation mode.
        compressed: the other; the same.
        inputs: one batch.
        repeats: pairs of calls.
    """
    pair = (baseline.eval(), compressed.eval())
    with torch.no_grad():
        for network in pair * max(1, min(5, repeats)):
            network(inputs)
        times = [tuple(_milliseconds(network, inputs) for network in pair) for _ in range(repeats)]
    return Latency(
        len(inputs), median(a for a, _ in times), median(b for _, b in times), median(b / a for a, b in times)
    )


def _milliseconds(call: Callable[[Tensor], Any], inputs: Tensor) -> float:
    start = time.perf_counter()
    call(inputs)
    if inputs.is_cuda:
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


def first_and_last(seconds: Sequence[float]) -> tuple[float, float]:
    """Seconds of an epoch at the start and at the end of a run: medians over three epochs each.

    >>> first_and_last([9.0, 2.0, 2.0, 1.0, 1.0, 1.0])
    (2.0, 1.0)
    """
    return median(seconds[:3]), median(seconds[-3:])
