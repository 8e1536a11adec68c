"""Decides what is folded: only constants whose channels can then go, and only where that makes the network smaller."""

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np

from fxcompress.channels.analysis import Analysis
from fxcompress.channels.plan import Plan, make_plan
from fxcompress.channels.rules.contraction import pattern_of
from fxcompress.channels.rules.registry import Known
from fxcompress.passes.fold_sites import Foldable, Knowns, foldable
from fxcompress.passes.rewrite import rewrite
from fxcompress.provenance import Grid
from fxcompress.quantizer import channels_of

_FLOAT_BITS = 32
_CHANNEL_BITS = 40
_LARGE_ENOUGH = 1 / 16
"""Of the largest constant, for one that the others are merged into: dividing by a small one would magnify rounding."""


@dataclass(frozen=True, slots=True, eq=False)
class Fold:
    """What is folded at one weight.

    Attributes:
        layer: the weight.
        entries: the inputs that go, int64 (n,).
        target: the input that they are merged into; None where they go into the bias.
    """

    layer: Foldable
    entries: np.ndarray
    target: int | None


class FoldPlan:
    """What to fold in a network as it stands.

    Args:
        analysis: of the network.
        knowns: for each graph what is known in evaluation, then what is known in training.
        grids: the number formats of its weights, where they lie on a grid.

    Attributes:
        folds: what to fold.
        refused: weights that read constants other than zero which are not folded, with the reason.
    """

    def __init__(self, analysis: Analysis, knowns: Knowns, grids: dict[str, Grid]) -> None:
        self.analysis, self.knowns, self.grids = analysis, knowns, grids
        self.stays = np.zeros(analysis.space.size, dtype=bool)
        self.layers, self.refused = foldable(analysis, knowns, frozenset(grids))
        self.folds: list[Fold] = []
        if self.layers:
            self._run()

    def _run(self) -> None:
        self._drop_dear_biases(self._with_targets())
        plan = rewrite(self.analysis, self._assumed(), ~self.stays).plan
        for layer in self.layers:
            needed = self._needed(layer, plan)
            target = None if layer.into_bias else self._target(layer, needed, plan)
            merged = needed if layer.into_bias or target is not None else needed & (layer.constants == 0)
            if merged.any():
                self.folds.append(Fold(layer, np.flatnonzero(merged), target))
            left = layer.may & (layer.constants != 0) & plan.alive[layer.entries] & layer.read(self.knowns, plan.alive)
            if not layer.into_bias and left.sum() == 1 and target is None:
                self.refused[layer.weight] = "it is behind zero padding, with no other constant to merge it with"

    def _assumed(self) -> Knowns:
        """What would be known if all that can be folded were."""
        zero = {id(sites): layer.may for layer in self.layers for sites in layer.sites}
        result: Knowns = {}
        for mode, knowns in self.knowns.items():
            here = [sites for sites in self.analysis.sites if sites.mode == mode and id(sites) in zero]
            result[mode] = []
            for known in knowns:
                patterns = dict(known.patterns)
                for sites in here:
                    site = sites.site
                    without = pattern_of(site, known).without(zero[id(sites)])
                    patterns[site.weight.key, site.row, site.column] = without
                result[mode].append(Known(known.maps, patterns, training=known.training))
        return result

    def _plan(self) -> Plan:
        return make_plan(self.analysis, self._assumed(), ~self.stays)

    def _needed(self, layer: Foldable, plan: Plan) -> np.ndarray:
        """The inputs that go if they are folded here, bool (K,)."""
        going = ~plan.alive[layer.entries] & layer.read(self.knowns, plan.alive)
        needed: np.ndarray = layer.may & going
        return needed

    def _with_targets(self) -> Plan:
        """A plan that keeps, for each weight behind zero padding, one constant that the others are merged into."""
        while True:
            plan = self._plan()
            lacking = [found for layer in self.layers if (found := self._candidates(layer, plan))]
            if not lacking:
                return plan
            while lacking:
                counts = Counter(root for found in lacking for root in found)
                best = max(counts, key=lambda root: (counts[root], max(f.get(root, 0.0) for f in lacking)))
                self.stays |= self.analysis.component == best
                lacking = [found for found in lacking if best not in found]

    def _candidates(self, layer: Foldable, plan: Plan) -> dict[int, float]:
        """Where a weight lacks a constant to merge others into: the constants that would do, by their component."""
        if layer.into_bias:
            return {}
        needed = self._needed(layer, plan) & (layer.constants != 0)
        if not needed.any() or self._target(layer, needed, plan) is not None:
            return {}
        size = np.abs(layer.constants)
        chosen = np.flatnonzero(needed & (size >= _LARGE_ENOUGH * size[needed].max()))
        roots = self.analysis.component[layer.entries[chosen]]
        return dict(zip(roots.tolist(), size[chosen].tolist(), strict=True))

    def _target(self, layer: Foldable, needed: np.ndarray, plan: Plan) -> int | None:
        """The largest constant that stays, if it is large enough to merge others into it."""
        size = np.where(layer.may & (layer.constants != 0), np.abs(layer.constants), -1.0)
        staying = np.where(plan.alive[layer.entries], size, -1.0)
        best, largest = int(staying.argmax()), float(size[needed].max(initial=0.0))
        return best if largest > 0 and staying[best] >= _LARGE_ENOUGH * largest else None

    def _drop_dear_biases(self, plan: Plan) -> None:
        """Drop weights whose new bias would take more bits than what goes with it saves."""
        for layer in [layer for layer in self.layers if self._new_bias(layer, plan)]:
            kept, self.layers = self.layers, [other for other in self.layers if other is not layer]
            without = self._plan()
            if self._bits(without, self.layers) <= self._bits(plan, kept):
                self.refused[layer.weight] = "a bias would take more bits than what could go"
                plan = without
            else:
                self.layers = kept

    def _bits(self, plan: Plan, layers: list[Foldable]) -> float:
        """The bits of all tensors that are left, with the new biases of ``layers``."""
        state, total = self.analysis.module.state_dict(keep_vars=True), 0.0
        for name, dims in self.analysis.atoms.items():
            if name not in state:
                continue
            tensor = state[name]
            left = [int(plan.alive[dims[d].numpy()].sum()) if d in dims else n for d, n in enumerate(tensor.shape)]
            grid = self.grids.get(name)
            each = _FLOAT_BITS if grid is None else sum(grid.bits) / max(len(grid.bits), 1)
            total += math.prod(left) * each
            if grid is not None:
                total += _CHANNEL_BITS * channels_of(left, grid.channel_dim, grid.groups, grid.batch_dims)
        return total + sum(_FLOAT_BITS * self._new_bias(layer, plan) for layer in layers)

    def _new_bias(self, layer: Foldable, plan: Plan) -> int:
        """The number of entries of the bias that a weight's layer would get."""
        needed = layer.lacks_bias and layer.into_bias and (self._needed(layer, plan) & (layer.constants != 0)).any()
        if not needed:
            return 0
        return int(plan.alive[layer.sites[0].rows].sum())
