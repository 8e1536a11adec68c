"""Collects the terms of the objectives from the analysis of a network."""

from collections.abc import Collection
from math import prod
from typing import Any

import numpy as np
import torch

from fxcompress.channels.analysis import Analysis
from fxcompress.channels.plan import Plan
from fxcompress.channels.segments import Segments
from fxcompress.channels.sites import Maker, PlainAtoms, SiteAtoms, TableAtoms
from fxcompress.channels.survivors import Survivors
from fxcompress.objectives.terms import LayerUse, SizeTerms, Start

EVALUATION = "eval"
"""The graph whose multiply-adds, activations and seconds count."""

_KINDS: dict[str, type[np.generic]] = {
    "rows": np.int64, "row_block": np.int64, "kernel": np.float64, "macs": np.float64, "writes": np.float64,
    "inputs": np.float64, "outputs": np.float64, "cell_block": np.int64, "cell_count": np.float64,
    "feed_cell": np.int64, "feed_row": np.int64, "free": np.bool_,
}  # fmt: skip


def multiplied(sites: SiteAtoms, left: Survivors) -> int:
    """How often a use of a layer multiplies with each of its weights: the pixels or tokens that it is applied at.

    They may be channels of other layers, as where tokens are mixed; those that are gone count for nothing.
    """
    site = sites.site
    value, dim = (site.source, site.source_dim) if site.transposed else (sites.result, site.out_dim)
    return prod(n for d, n in enumerate(left.shape(value)) if d != dim)


def met(plain: PlainAtoms, left: Survivors) -> float:
    """How often each entry of a parameter that is no layer's weight is multiplied with, on average."""
    return sum(share * prod(left.shape(value)[dim] for dim in dims) for value, dims, share in plain.meets)


def written(maker: Maker, left: Survivors) -> int:
    """The values that a use of a layer, or a lookup in a table, writes for each output channel."""
    if isinstance(maker, PlainAtoms):
        return 0
    dim = maker.site.out_dim if isinstance(maker, SiteAtoms) else maker.result.rank - 1
    return prod(n for d, n in enumerate(left.shape(maker.result)) if d != dim)


def starting_costs(analysis: Analysis, weights: Collection[str]) -> Start:
    """What a network costs before anything is removed.

    Args:
        analysis: of the network.
        weights: names of the quantized weights.
    """
    uses = [s for s in analysis.sites if s.mode == EVALUATION and s.weight_name in weights]
    whole = Survivors(np.ones(analysis.space.size, dtype=bool))
    written = [m for m in analysis.makers if m.mode == EVALUATION and m.weight_name in weights and m.has_bits]
    return Start(
        macs=sum(multiplied(s, whole) * prod(s.site.weight.shape) for s in uses)
        + round(sum(met(m, whole) * prod(m.weight.shape) for m in written if isinstance(m, PlainAtoms))),
        activations=sum(prod(m.result.shape) for m in written if not isinstance(m, PlainAtoms)),
        uses=tuple(LayerUse(s.weight_name, s.site.rows, s.site.entries) for s in uses),
    )


def size_terms(
    analysis: Analysis, plan: Plan, rows: dict[str, tuple[int, int]], weights: int, start: Start | None = None
) -> SizeTerms:
    """Collect the terms of a network.

    Args:
        analysis: of the network with quantizers.
        plan: what is gone already, or could go at once; it counts for nothing.
        rows: for each quantized weight, where its bits start in the concatenation of all bits, and how many they are.
        weights: N.
        start: of the starting network; of this one by default.
    """
    builder = _Builder(plan, rows)
    for mode in analysis.trails:
        builder.makers, builder.segments = analysis.segments[mode]
        for maker in builder.makers:
            builder.add(maker)
    return builder.build(weights, start if start is not None else starting_costs(analysis, rows))


class _Builder:
    def __init__(self, plan: Plan, rows: dict[str, tuple[int, int]]) -> None:
        self.alive = plan.alive
        self.left = Survivors(plan.alive)
        self.row_start = rows
        self.makers: list[Maker] = []
        self.segments = Segments()
        self.seen: set[str] = set()
        self.blocks = 0
        self.parts: dict[str, list[np.ndarray]] = {name: [] for name in _KINDS}
        self.cells = 0
        self.uses: list[LayerUse] = []

    def add(self, maker: Maker) -> None:
        """Add one use of a weight; of one that is used twice, the second use adds no weights, only work."""
        name, runs = maker.weight_name, maker.mode == EVALUATION
        if name not in self.row_start or (name in self.seen and not runs):
            return
        if isinstance(maker, TableAtoms):
            self._table(maker, runs=runs)
        elif isinstance(maker, PlainAtoms):
            left = self.alive[maker.rows] | (maker.rows == 0)
            self._columns(name, maker.others(self.alive), left, 1, multiplied=met(maker, self.left) * runs, written=0)
        elif maker.reads_columns:
            self._tied(maker, runs=runs)
        else:
            self._layer(maker, runs=runs)
        self.seen.add(name)

    def _table(self, table: TableAtoms, *, runs: bool) -> None:
        """Each column has as many weights as the table has rows, which are there for good."""
        left = self.alive[table.rows] | (table.rows == 0)
        self._columns(
            table.weight_name, table.table.shape[0], left, 1, multiplied=0, written=written(table, self.left) * runs
        )

    def _tied(self, sites: SiteAtoms, *, runs: bool) -> None:
        """A layer that reads a table, or the weight of another one turned: its weights have the bits of its inputs."""
        site = sites.site
        kernel = prod(n for d, n in enumerate(site.weight.shape) if d not in {site.row, site.column})
        rows = int((self.alive[sites.rows] | (sites.rows == 0)).sum())
        left = self.alive[sites.entries] | (sites.entries == 0)
        if runs:
            self.uses.append(LayerUse(sites.weight_name, rows, int(left.sum()), (self.blocks, 1), bits_of_inputs=True))
        self._columns(
            sites.weight_name, rows, left, kernel, multiplied=kernel * multiplied(sites, self.left) * runs, written=0
        )

    def _columns(self, name: str, rows: int, left: np.ndarray, kernel: int, *, multiplied: float, written: int) -> None:
        self._put(
            rows=self.row_start[name][0] + np.flatnonzero(left), row_block=np.full(left.sum(), self.blocks),
            kernel=np.full(1, kernel * (name not in self.seen)),
            macs=np.full(1, multiplied), writes=np.full(1, written),
            inputs=np.full(1, rows), outputs=np.full(1, left.sum()), cell_block=np.full(1, self.blocks),
            cell_count=np.full(1, rows), free=np.ones(1, dtype=bool),
        )  # fmt: skip
        self.cells += 1
        self.blocks += 1

    def _layer(self, sites: SiteAtoms, *, runs: bool) -> None:
        name, site, g = sites.weight_name, sites.site, sites.site.groups
        start, count = self.row_start[name]
        kernel = prod(n for d, n in enumerate(site.weight.shape) if d not in {site.row, site.column})
        alive = self.alive[sites.entries] | (sites.entries == 0)
        left = self.alive[sites.rows] | (sites.rows == 0)
        self._put(
            rows=np.arange(start, start + count)[left],
            row_block=np.repeat(np.arange(self.blocks, self.blocks + g), count // g)[left],
            kernel=np.full(g, kernel * (name not in self.seen)),
            macs=np.full(g, kernel * multiplied(sites, self.left) * runs),
            writes=np.full(g, written(sites, self.left) * runs),
            inputs=alive.reshape(g, -1).sum(1), outputs=left.reshape(g, -1).sum(1),
        )  # fmt: skip
        self._cells(site_segments=self.segments.along(site.source, site.source_dim), alive=alive, groups=g)
        if runs:
            self.uses.append(LayerUse(name, int(left.sum()), int(alive.sum()), (self.blocks, g)))
        self.blocks += g

    def _cells(self, site_segments: np.ndarray, alive: np.ndarray, groups: int) -> None:
        block = np.repeat(np.arange(self.blocks, self.blocks + groups), len(site_segments) // groups)
        pairs, counts = np.unique(np.stack([block, site_segments])[:, alive], axis=1, return_counts=True)
        feeds = [self._feeding(int(segment)) for segment in pairs[1]]
        cells = np.arange(self.cells, self.cells + len(feeds))
        lengths = [len(rows) for rows, _ in feeds]
        self._put(
            cell_block=pairs[0], cell_count=counts, feed_cell=np.repeat(cells, lengths),
            feed_row=np.array([row for rows, _ in feeds for row in rows], dtype=np.int64),
            free=np.array([free for _, free in feeds], dtype=bool),
        )  # fmt: skip
        self.cells += len(feeds)

    def _feeding(self, segment: int) -> tuple[list[int], bool]:
        """The rows that feed a segment, and whether something without bits feeds it too."""
        rows, free = [], segment == 0
        for position, row in self.segments.sources[segment]:
            maker = self.makers[position]
            name = maker.weight_name
            if name in self.row_start and maker.has_bits:
                rows.append(self.row_start[name][0] + row)
            else:
                free = True
        return rows, free

    def _put(self, **arrays: np.ndarray) -> None:
        for name, array in arrays.items():
            self.parts[name].append(array)

    def build(self, weights: int, start: Start) -> SizeTerms:
        """Join the parts."""
        joined: dict[str, np.ndarray] = {
            name: np.concatenate(parts).astype(_KINDS[name]) if parts else np.zeros(0, _KINDS[name])
            for name, parts in self.parts.items()
        }
        tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in joined.items()}
        return SizeTerms(**tensors, weights=weights, start=start, uses=tuple(self.uses))
