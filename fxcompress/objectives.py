"""What training pays for besides its task: the size of the network, as a function of its bit depths.

Sources: Csefalvay and Imber, arXiv 2301.13142, equations 2 to 5.

For each layer l with kernel size K (the product H W), the size is

    eq. 4   z = K * sum over connected pairs (i, j) of b[i]
    eq. 5   z = K * sum over connected pairs (i, j) of (alive[j] * b[i] + alive[i] * b'[j])

where i runs over the output channels, j over the input channels that are not gone, a pair is connected unless a grouped
convolution keeps it apart, and b'[j] are the bits of what feeds j. Where several channels feed j (a sum), b'[j] is the
mean over those that are alive. An input of the network, or a channel without a quantizer, is alive and has no bits to
save. On a plain layer the sums factor into the paper's products.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fxcompress.channels.analysis import Analysis, SiteAtoms
from fxcompress.channels.plan import Plan
from fxcompress.channels.segments import Segments, trace_segments

Objective = Literal["eq4", "eq5"]
"""``"eq4"`` counts a layer's own bits; ``"eq5"`` also rewards a producer for the weights its consumers would lose."""

OBJECTIVES: tuple[Objective, ...] = ("eq4", "eq5")


@dataclass(frozen=True, slots=True, eq=False)
class SizeTerms:
    """The sums of the objectives as flat index arrays, so that a whole network takes a handful of kernels.

    A block is one layer, or one group of a grouped convolution. Rows are positions in the concatenation of all bits.

    Attributes:
        rows, row_block: (P,) int64, each pair of a block and one of its output channels.
        kernel: (B,) weights for each pair of an output and an input channel of the block.
        inputs: (B,) input channels of each block that are not gone.
        cell_block, cell_count: (C,) input cells: input channels of a block that the same channels feed, and how many.
        feed_cell, feed_row: (F,) which rows feed which cell.
        free: (C,) cells that no quantized channel feeds: alive for good.
        weights: N, the quantized weights of the starting network.
    """

    rows: Tensor
    row_block: Tensor
    kernel: Tensor
    inputs: Tensor
    cell_block: Tensor
    cell_count: Tensor
    feed_cell: Tensor
    feed_row: Tensor
    free: Tensor
    weights: int

    def to(self, device: torch.device, dtype: torch.dtype) -> "SizeTerms":
        """The same on a device, with counts in a floating dtype."""
        moved = {
            name: value.to(device, dtype) if value.is_floating_point() else value.to(device)
            for name in self.__dataclass_fields__
            if isinstance(value := getattr(self, name), Tensor)
        }
        return SizeTerms(**moved, weights=self.weights)

    def size(self, bits: Tensor, objective: Objective) -> Tensor:
        """Q of the paper, equation 3: the size over N, a scalar.

        Args:
            bits: (R,) all bit depths, one after the other.
            objective: equation 4 or 5.

        >>> # a chain of two 3x3 convs, 3 -> 8 -> 4 channels, all at 8 bits: eq. 4 gives 8 bits for each weight
        """
        blocks = self.kernel.numel()
        zero = bits.new_zeros(blocks)
        own = bits[self.rows]
        out_bits = zero.index_add(0, self.row_block, own)
        if objective == "eq4":
            return (self.kernel * self.inputs * out_bits).sum() / self.weights
        alive = (bits > 0).to(bits.dtype)
        out_alive = zero.index_add(0, self.row_block, alive[self.rows])
        empty = bits.new_zeros(self.cell_block.numel())
        feeding = empty.index_add(0, self.feed_cell, alive[self.feed_row])
        in_bits = empty.index_add(0, self.feed_cell, bits[self.feed_row]) / feeding.clamp(min=1)
        in_alive = torch.where(self.free, 1.0, (feeding > 0).to(bits.dtype)) * self.cell_count
        read_alive = zero.index_add(0, self.cell_block, in_alive)
        read_bits = zero.index_add(0, self.cell_block, in_bits * self.cell_count)
        return (self.kernel * (read_alive * out_bits + out_alive * read_bits)).sum() / self.weights


def size_terms(analysis: Analysis, plan: Plan, rows: dict[str, tuple[int, int]], weights: int) -> SizeTerms:
    """Collect the terms of a network.

    Args:
        analysis: of the network with quantizers.
        plan: what is gone already, or could go at once; it counts for nothing.
        rows: for each quantized weight, where its bits start in the concatenation of all bits, and how many they are.
        weights: N.
    """
    builder = _Builder(plan, rows)
    for mode in analysis.trails:
        sites = [s for s in analysis.sites if s.mode == mode]
        segments = trace_segments(analysis.trails[mode], sites)
        builder.sites, builder.segments = sites, segments
        for position in range(len(sites)):
            builder.add(position)
    return builder.build(weights)


class _Builder:
    def __init__(self, plan: Plan, rows: dict[str, tuple[int, int]]) -> None:
        self.alive = plan.alive
        self.row_start = rows
        self.sites: list[SiteAtoms] = []
        self.segments = Segments()
        self.seen: set[str] = set()
        self.blocks = 0
        self.parts: dict[str, list[np.ndarray]] = {name: [] for name in SizeTerms.__dataclass_fields__}
        self.cells = 0

    def add(self, position: int) -> None:
        """Add one layer; a weight that is used twice counts once."""
        sites = self.sites[position]
        if sites.weight_name not in self.row_start or sites.weight_name in self.seen:
            return
        self.seen.add(sites.weight_name)
        site, g = sites.site, sites.site.groups
        start, count = self.row_start[sites.weight_name]
        block = np.arange(self.blocks, self.blocks + g)
        weight = site.weight.shape
        kernel = int(np.prod([n for d, n in enumerate(weight) if d not in (site.row, site.column)]))
        alive = self.alive[sites.entries] | (sites.entries == 0)
        self._put(
            rows=np.arange(start, start + count), row_block=np.repeat(block, count // g),
            kernel=np.full(g, float(kernel)), inputs=alive.reshape(g, -1).sum(1).astype(np.float64),
        )  # fmt: skip
        self._cells(site_segments=self.segments.along(site.source, site.source_dim), alive=alive, groups=g)
        self.blocks += g

    def _cells(self, site_segments: np.ndarray, alive: np.ndarray, groups: int) -> None:
        block = np.repeat(np.arange(self.blocks, self.blocks + groups), len(site_segments) // groups)
        pairs, counts = np.unique(np.stack([block, site_segments])[:, alive], axis=1, return_counts=True)
        feeds = [self._feeding(int(segment)) for segment in pairs[1]]
        cells = np.arange(self.cells, self.cells + len(feeds))
        lengths = [len(rows) for rows, _ in feeds]
        self._put(
            cell_block=pairs[0], cell_count=counts.astype(np.float64), feed_cell=np.repeat(cells, lengths),
            feed_row=np.array([row for rows, _ in feeds for row in rows], dtype=np.int64),
            free=np.array([free for _, free in feeds], dtype=bool),
        )  # fmt: skip
        self.cells += len(feeds)

    def _feeding(self, segment: int) -> tuple[list[int], bool]:
        """The rows that feed a segment, and whether something without bits feeds it too."""
        rows, free = [], segment == 0
        for position, row in self.segments.sources[segment]:
            name = self.sites[position].weight_name
            if name in self.row_start:
                rows.append(self.row_start[name][0] + row)
            else:
                free = True
        return rows, free

    def _put(self, **arrays: np.ndarray) -> None:
        for name, array in arrays.items():
            self.parts[name].append(array)

    def build(self, weights: int) -> SizeTerms:
        """Join the parts."""
        kinds = {"kernel": np.float64, "inputs": np.float64, "cell_count": np.float64, "free": np.bool_}
        tensors = {
            name: torch.from_numpy(
                np.concatenate(parts).astype(kinds.get(name, np.int64))
                if parts
                else np.zeros(0, kinds.get(name, np.int64))
            )
            for name, parts in self.parts.items()
            if name != "weights"
        }
        return SizeTerms(**tensors, weights=weights)
