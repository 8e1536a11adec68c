"""The places that read channels, and which channels each of them still needs."""

from typing import Protocol

import numpy as np

from fxcompress.channels.rules.contraction import may_read, pattern_of
from fxcompress.channels.rules.products import may_multiply
from fxcompress.channels.rules.registry import Known
from fxcompress.channels.sites import ProductAtoms, SiteAtoms, SumAtoms
from fxcompress.channels.space import Reason
from fxcompress.trace.graph.described import Place


class Check(Protocol):
    """One place that reads channels, in one mode."""

    reason: Reason
    reads: tuple[np.ndarray, ...]

    def broken(self, dead: np.ndarray) -> np.ndarray:
        """The dead atoms that are still read there; depends on no other entries of ``dead`` than those of ``reads``."""
        ...


class SiteCheck:
    """A convolution or matrix product."""

    def __init__(self, sites: SiteAtoms, known: Known) -> None:
        self.sites = sites
        self.known = known
        self.may_read = may_read(sites.site, known)
        self.reason = _not_zero(known, sites.place)
        self.reads: tuple[np.ndarray, ...] = (sites.entries, sites.rows)

    def equals(self, other: "SiteCheck") -> bool:
        """Whether another check of the same site asks for the same atoms, whatever is dead."""
        same_weight = pattern_of(self.sites.site, other.known) is pattern_of(self.sites.site, self.known)
        return same_weight and np.array_equal(self.may_read, other.may_read)

    def broken(self, dead: np.ndarray) -> np.ndarray:
        """The atoms of entries that may not go."""
        suspects = dead[self.sites.entries] & self.may_read
        if suspects.any():
            suspects = suspects & self._read(~dead[self.sites.rows], suspects)
        atoms: np.ndarray = self.sites.entries[suspects]
        return atoms

    def _read(self, surviving: np.ndarray, asked: np.ndarray) -> np.ndarray:
        """Which of the entries asked for a surviving row multiplies by something that may not be zero: bool (K,)."""
        site = self.sites.site
        weights, g = pattern_of(site, self.known), site.groups
        if g == 1:
            return weights.columns_of(surviving, asked)
        may = weights.dense()
        if site.transposed:
            read: np.ndarray = (may & np.repeat(surviving.reshape(g, -1).T, site.entries // g, axis=1)).any(axis=0)
        else:
            read = (may & surviving[:, None]).reshape(g, -1, may.shape[1]).any(axis=1).reshape(-1)
        return read


class ProductCheck:
    """A batched product: an entry matters where both factors may not be zero and some result of them survives."""

    def __init__(self, product: ProductAtoms, known: Known) -> None:
        left, right = may_multiply(product.product, known)
        self.entries, self.results = product.entries, product.results
        self.left, self.right = left.numpy(), right.numpy()
        self.reason = _not_zero(known, product.place)
        self.reads: tuple[np.ndarray, ...] = (self.entries, *self.results)

    def broken(self, dead: np.ndarray) -> np.ndarray:
        """The atoms of entries that may not go."""
        alive: np.ndarray = np.ones((1, 1, 1), dtype=bool)
        for layer in self.results:
            alive = np.logical_and(alive, ~dead[layer])
        rows = alive.any(axis=1, keepdims=True)
        read = self.left & (self.right & rows).any(axis=2)
        entries, read = np.broadcast_arrays(self.entries, read)
        atoms: np.ndarray = entries[read & dead[entries]]
        return atoms


class SumCheck:
    """A sum or a norm: each entry matters that may not be zero, as long as the result for its slice survives."""

    def __init__(self, sums: SumAtoms, known: Known) -> None:
        self.entries, self.slots = sums.entries, sums.slots
        may = (known.held(sums.source) != 0).cpu()
        others = [d for d, n in enumerate(self.entries.shape) if n == 1]
        self.may_read = (may.any(dim=others, keepdim=True) if others else may).numpy()
        self.reason = _not_zero(known, sums.place)
        self.reads: tuple[np.ndarray, ...] = (self.entries, self.slots)

    def broken(self, dead: np.ndarray) -> np.ndarray:
        """The atoms of entries that may not go."""
        suspects = dead[self.entries] & self.may_read
        if self.slots.size:
            suspects = suspects & ~dead[self.slots]
        atoms: np.ndarray = self.entries[suspects]
        return atoms


def _not_zero(known: Known, place: Place) -> Reason:
    mode = "training" if known.training else "evaluation"
    return Reason("not-zero", f"in {mode} it is not always zero where {place} reads it", place)
