"""The module that quantizes a weight, with its trained bit depths and exponents."""

from typing import Any

import torch
from torch import Tensor, nn

from fxcompress.errors import UnsupportedModelError
from fxcompress.quantizer.arithmetic import EAGER, FUSED, Kernels, codes_of, wide
from fxcompress.quantizer.function import quantize, quantize_by
from fxcompress.quantizer.layout import channels_of, is_grouped, per_channel, rows, split_groups

__all__ = ["Quantizer", "compile_quantizers"]

_SMALLEST = 2.0**-100
"""Channels are scaled as if their largest weight were at least this, so that 2**-e stays a finite float32."""


_FEW = 7.0
"""Below so many bits it pays to clip the largest weights for a finer grid of the others."""


def _spanning(matrix: Tensor, bits: float) -> Tensor:
    """The least exponents (O,) at which no weight of the matrix (O, M) is clipped, 2^(b-1) itself being no code."""
    half = 2.0 ** (bits - 1)
    least, most = -matrix.amin(1) / half, matrix.amax(1) / max(half - 1, half / 2)
    largest = torch.maximum(least, most)
    largest = torch.where(largest > 0, largest, torch.where(largest.max() > 0, largest.max(), 1 / half))
    return largest.clamp(min=_SMALLEST).log2()


def _least_error(matrix: Tensor, bits: float, exponent: Tensor) -> Tensor:
    """Of exponents down to ``exponent`` - 2, those with the least squared error in each row."""
    depths = torch.full_like(exponent, bits)[:, None]
    tried = torch.stack([exponent - step / 4 for step in range(9)])
    errors = [(quantize(matrix, depths, e[:, None]) - matrix).square().sum(1) for e in tried]
    return tried.gather(0, torch.stack(errors).argmin(0, keepdim=True))[0]


class Quantizer(nn.Module):
    """Quantizes a weight with one bit depth and one exponent for each of its output channels.

    The number of channels is that of ``bits``, read at each call: cutting channels means replacing ``bits`` and
    ``exponent`` by shorter parameters, and for a grouped transposed convolution setting ``groups``.

    Attributes:
        bits: b, parameter of shape (O,), in float32 at least. To be kept >= 0 by whoever trains it.
        exponent: e, parameter of shape (O,).
        channel_dim: the dim of the weight that holds its output channels: 0, and 1 for transposed convolutions.
        keep_range: whether the gradient of bits is that at a fixed range, see :func:`quantize`. Whoever trains it then
            lets exponents follow.
        groups: with ``channel_dim == 1``, the groups that dim 0 is split into: the weight is (I, O/groups, *k), and
            channel c is entry c % (O/groups) of group c // (O/groups). Without meaning for ``channel_dim == 0``.
        batch_dims: dims beside ``channel_dim`` along which each entry has channels of its own, as each expert of a
            weight (E, I, O) has with ``channel_dim == 2`` and ``batch_dims == (0,)``: channel c is entry c % O of
            expert c // O. They are counted in the order of the dims.

    >>> conv = nn.Conv2d(3, 8, 3)
    >>> quantizer = Quantizer.for_weight(conv.weight, bits=4.0)
    >>> quantizer(conv.weight).shape, int(quantizer.codes(conv.weight).abs().max()) <= 8
    (torch.Size([8, 3, 3, 3]), True)
    """

    def __init__(
        self, bits: Tensor, exponent: Tensor, *, channel_dim: int = 0, groups: int = 1, batch_dims: tuple[int, ...] = ()
    ) -> None:
        super().__init__()
        self.bits = nn.Parameter(bits)
        self.exponent = nn.Parameter(exponent)
        self.channel_dim = channel_dim
        self.groups = groups
        self.batch_dims = batch_dims
        self.keep_range = False

    @classmethod
    def for_weight(
        cls,
        weight: Tensor,
        *,
        bits: float = 8.0,
        channel_dim: int = 0,
        groups: int = 1,
        batch_dims: tuple[int, ...] = (),
    ) -> "Quantizer":
        """A quantizer for a float ``weight`` of any rank >= 1, on its device, with all bit depths at ``bits``.

        Exponents start where the grid of each channel just spans its weights, so that nothing is clipped; with few
        bits, where the error of rounding and clipping is least. A channel of zeros takes the grid of weights of the
        size of the largest of the others.

        Raises:
            UnsupportedModelError: the weight is not float, or has not the dims that the arguments speak of.
        """
        shape = tuple(weight.shape)
        if not weight.is_floating_point() or not 0 <= channel_dim < len(shape):
            raise UnsupportedModelError(
                f"cannot quantize a weight of shape {shape} and dtype {weight.dtype}: it must be float and have "
                f"a dim {channel_dim}, which holds the output channels; leave this weight out"
            )
        if is_grouped(channel_dim, groups) and shape[0] % groups:
            raise UnsupportedModelError(f"a weight of shape {shape} cannot have {groups} groups along dim 0")
        matrix = wide(rows(weight.detach(), channel_dim, groups, batch_dims))
        exponent = _spanning(matrix, bits)
        if bits < _FEW:
            exponent = _least_error(matrix, bits, exponent)
        layout: dict[str, Any] = {"channel_dim": channel_dim, "groups": groups, "batch_dims": batch_dims}
        return cls(torch.full_like(exponent, bits), exponent, **layout)

    def forward(self, weight: Tensor) -> Tensor:
        """The quantized weight, of the same shape and dtype; see :func:`quantize`.

        Raises:
            UnsupportedModelError: ``weight`` has another number of output channels than ``bits``.
        """
        blocks, kernels = self._blocks(weight), self.kernels
        if self.channel_dim == 0 and not self.batch_dims:
            return quantize_by(kernels, blocks, self.bits, self.exponent, keep_range=self.keep_range, rows=True)
        bits, exponent = self._broadcast(self.bits, weight), self._broadcast(self.exponent, weight)
        result = quantize_by(kernels, blocks, bits, exponent, keep_range=self.keep_range, rows=False)
        return result.reshape(weight.shape)

    @property
    def kernels(self) -> Kernels:
        """The passes over a weight; see :func:`compile_quantizers`."""
        kernels: Kernels = self.__dict__.get("_kernels", EAGER)
        return kernels

    def codes(self, weight: Tensor) -> Tensor:
        """The integers that ``forward(weight)`` is the ``scale(weight)``-fold of; int32, of the weight's shape."""
        with torch.no_grad():
            bits, exponent = self._broadcast(self.bits, weight), self._broadcast(self.exponent, weight)
            return codes_of(self._blocks(weight), bits, exponent).to(torch.int32).reshape(weight.shape)

    def scale(self, weight: Tensor) -> Tensor:
        """2^e in ``exponent``'s dtype, of a shape that broadcasts against ``weight``; without gradient.

        For (O, I, k, k) that is (O, 1, 1, 1). A grouped transposed (I, O/g, k, k) gets (I, O/g, 1, 1).
        """
        scale = self._broadcast(torch.exp2(wide(self.exponent.detach())), weight)
        if scale.ndim == weight.ndim:
            return scale
        return scale.expand(-1, weight.shape[0] // self.groups, *[-1] * (scale.ndim - 2)).flatten(0, 1)

    def extra_repr(self) -> str:
        """Channels and layout; no values, which would wait for the device."""
        batch = f", batch_dims={self.batch_dims}" if self.batch_dims else ""
        return f"channels={self.bits.numel()}, channel_dim={self.channel_dim}, groups={self.groups}{batch}"

    def _broadcast(self, values: Tensor, weight: Tensor) -> Tensor:
        return per_channel(values, weight.shape, self.channel_dim, self.groups, self.batch_dims)

    def _blocks(self, weight: Tensor) -> Tensor:
        channels = channels_of(weight.shape, self.channel_dim, self.groups, self.batch_dims)
        if channels != self.bits.numel():
            raise UnsupportedModelError(
                f"the weight of shape {tuple(weight.shape)} has {channels} output channels (channel_dim="
                f"{self.channel_dim}, groups={self.groups}, batch_dims={self.batch_dims}), but its quantizer has "
                f"{self.bits.numel()} bit depths; both must be cut together"
            )
        return split_groups(weight, self.channel_dim, self.groups)


def compile_quantizers(module: nn.Module, **options: Any) -> None:  # noqa: ANN401
    """Compile the passes of all quantizers in ``module``, and nothing else of it.

    One kernel serves weights of all sizes, so removing channels compiles nothing anew. The first steps compile, which
    takes some ten seconds and, on a CPU, a C++ compiler.

    Args:
        module: a network with quantizers, changed in place.
        options: of ``torch.compile``, such as ``backend``.

    >>> net = nn.Sequential(Quantizer(torch.full((4,), 8.0), torch.zeros(4)))
    >>> compile_quantizers(net, backend="eager")
    >>> net(torch.ones(4, 3)).shape
    torch.Size([4, 3])
    """
    kernels = Kernels(*(torch.compile(kernel, dynamic=True, **options) for kernel in FUSED))
    for quantizer in module.modules():
        if isinstance(quantizer, Quantizer):
            quantizer.__dict__["_kernels"] = kernels
