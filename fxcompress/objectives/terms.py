"""The sums behind all objectives, as flat index arrays, so that a whole network takes a handful of kernels."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class LayerUse:
    """One use of one quantized layer in evaluation.

    Attributes:
        weight: name of the parameter.
        outputs, inputs: channels that are not gone, over all groups.
        blocks: where its blocks start in the terms, and how many they are.
        bits_of_inputs: whether the channels of its blocks are the inputs of the layer: its weight is a table as well,
            or that of another layer, turned.
    """

    weight: str
    outputs: int
    inputs: int
    blocks: tuple[int, int] = (0, 0)
    bits_of_inputs: bool = False


@dataclass(frozen=True, slots=True)
class Start:
    """What the starting network costs. Objectives are stated over it, so removing channels does not change their scale.

    Attributes:
        macs: multiply-adds of its quantized layers, in evaluation, on the example inputs.
        activations: values that these layers write.
        uses: the same layers with their widths, in the order in which they run.
    """

    macs: int = 0
    activations: int = 0
    uses: tuple[LayerUse, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class SizeTerms:
    """What an objective can be made of.

    A block is one use of a layer, or one group of a use of a grouped convolution. Rows are positions in the
    concatenation of all bits.

    Attributes:
        rows, row_block: (P,) int64, each pair of a block and one of its output channels that are not gone.
        kernel: (B,) weights for each pair of an output and an input channel of the block; 0 where an earlier block has
            counted the same weights.
        macs: (B,) multiply-adds for the same pair, on the example inputs; 0 for what runs in training alone.
        writes: (B,) values that an output channel of the block writes, on the example inputs; likewise.
        inputs, outputs: (B,) channels of each block that are not gone.
        cell_block, cell_count: (C,) input cells: input channels of a block that the same channels feed, and how many.
        feed_cell, feed_row: (F,) which rows feed which cell.
        free: (C,) cells that no quantized channel feeds: alive for good.
        weights: N, the quantized weights of the starting network.
        start: what else is known of the starting network.
        uses: the layers behind the blocks that run in evaluation.
    """

    rows: Tensor
    row_block: Tensor
    kernel: Tensor
    macs: Tensor
    writes: Tensor
    inputs: Tensor
    outputs: Tensor
    cell_block: Tensor
    cell_count: Tensor
    feed_cell: Tensor
    feed_row: Tensor
    free: Tensor
    weights: int
    start: Start = Start()
    uses: tuple[LayerUse, ...] = ()
    _cache: dict[object, Any] = field(default_factory=dict, init=False, repr=False)

    def to(self, device: torch.device, dtype: torch.dtype) -> "SizeTerms":
        """The same on a device, with counts in a floating dtype."""
        tensors = {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
        moved: dict[str, Any] = {
            n: t.to(device, dtype) if t.is_floating_point() else t.to(device) for n, t in tensors.items()
        }
        return replace(self, **moved)

    def once(self, key: object, compute: Callable[["SizeTerms"], T]) -> T:
        """What ``compute`` gives on these terms, worked out at the first call; new terms come when channels die.

        Args:
            key: hashable, the caller's own.
            compute: a function of the terms.
        """
        if key not in self._cache:
            self._cache[key] = compute(self)
        found: T = self._cache[key]
        return found

    def out_bits(self, bits: Tensor) -> Tensor:
        """The bits of the output channels of each block, summed; (B,).

        Args:
            bits: (R,) all bit depths, one after the other.
        """
        return bits.new_zeros(self.kernel.numel()).index_add(0, self.row_block, bits[self.rows])

    def pairs(self, bits: Tensor, own: Tensor, read: Tensor) -> Tensor:
        """The sum over connected pairs (i, j) of ``own`` alive[j] b[i] + ``read`` alive[i] b'[j], a scalar.

        With ``own = read = kernel`` this is equation 5, but for the division by N.

        Args:
            bits: (R,) all bit depths, one after the other.
            own: (B,) what a bit of an output channel costs for each input channel, in each block.
            read: (B,) what a bit of what feeds an input channel costs for each output channel.
        """
        zero = bits.new_zeros(self.kernel.numel())
        alive = (bits > 0).to(bits.dtype)
        out_alive = zero.index_add(0, self.row_block, alive[self.rows])
        empty = bits.new_zeros(self.cell_block.numel())
        feeding = empty.index_add(0, self.feed_cell, alive[self.feed_row])
        in_bits = empty.index_add(0, self.feed_cell, bits[self.feed_row]) / feeding.clamp(min=1)
        in_alive = torch.where(self.free, 1.0, (feeding > 0).to(bits.dtype)) * self.cell_count
        read_alive = zero.index_add(0, self.cell_block, in_alive)
        read_bits = zero.index_add(0, self.cell_block, in_bits * self.cell_count)
        return (own * read_alive * self.out_bits(bits) + read * out_alive * read_bits).sum()


def joined_terms(parts: Mapping[str, SizeTerms], rows: Sequence[int]) -> SizeTerms:
    """The terms of several networks that are weighed as one.

    Args:
        parts: by the paths that the names of their weights go under.
        rows: how many bit depths each part has; those of all parts stand one after the other.
    """
    row = block = cell = 0
    moved: list[SizeTerms] = []
    for (path, terms), count in zip(parts.items(), rows, strict=True):
        moved.append(_moved(terms, f"{path}." if path else "", row, block, cell))
        row, block, cell = row + count, block + terms.kernel.numel(), cell + terms.cell_block.numel()
    names = [f.name for f in fields(SizeTerms) if isinstance(getattr(moved[0], f.name), Tensor)]
    tensors: dict[str, Any] = {name: torch.cat([getattr(terms, name) for terms in moved]) for name in names}
    starts = [terms.start for terms in moved]
    start = Start(
        macs=sum(one.macs for one in starts),
        activations=sum(one.activations for one in starts),
        uses=tuple(use for one in starts for use in one.uses),
    )
    uses = tuple(use for terms in moved for use in terms.uses)
    return SizeTerms(**tensors, weights=sum(terms.weights for terms in moved), start=start, uses=uses)


def _moved(terms: SizeTerms, prefix: str, row: int, block: int, cell: int) -> SizeTerms:
    """Terms behind others, with so many rows, blocks and cells."""
    start = replace(terms.start, uses=tuple(_named(use, prefix, block) for use in terms.start.uses))
    return replace(
        terms, rows=terms.rows + row, row_block=terms.row_block + block, cell_block=terms.cell_block + block,
        feed_cell=terms.feed_cell + cell, feed_row=terms.feed_row + row, start=start,
        uses=tuple(_named(use, prefix, block) for use in terms.uses),
    )  # fmt: skip


def _named(use: LayerUse, prefix: str, block: int) -> LayerUse:
    return replace(use, weight=prefix + use.weight, blocks=(use.blocks[0] + block, use.blocks[1]))
