"""Which groups of a network are made dead."""

import numpy as np
from torch import nn

from fxcompress.channels.analysis import Analysis
from fxcompress.passes.replay import MismatchError
from fxcompress.passes.rewrite import carry_out
from tests.exactness import forced, removable_units

SHARE = 0.3


def chosen_units(analysis: Analysis, seed: int) -> np.ndarray:
    """30 % of the units that can be made dead, at random; those that a layer must keep are left out."""
    units = np.intersect1d(removable_units(analysis), made_units(analysis))
    chosen = np.random.default_rng(seed).choice(units, int(SHARE * len(units)), replace=False)
    return with_members(analysis, spared(analysis, chosen))


def made_units(analysis: Analysis) -> np.ndarray:
    """The units that some parameter makes, by a row of a weight or by what is no weight: these can be made dead.

    A unit that is only read (the columns of a weight that a table of constants meets) goes when nobody reads it.
    """
    made = np.zeros(len(analysis.units), dtype=bool)
    parameters = dict(analysis.module.named_parameters(remove_duplicate=False))
    for sites in analysis.sites:
        if sites.weight_name in parameters:
            made[sites.rows] = True
    for name in parameters.keys() - {sites.weight_name for sites in analysis.sites}:
        for atoms in analysis.atoms.get(name, {}).values():
            made[atoms.numpy()] = True
    return np.unique(analysis.units[made])


def spared(analysis: Analysis, units: np.ndarray) -> np.ndarray:
    """``units`` without those that a layer must keep: a channel, or two groups where it has groups."""
    for sites in analysis.sites:
        groups = sites.site.groups
        for atoms in (sites.rows, sites.entries):
            parts = analysis.units[atoms].reshape(groups if groups > 1 else len(atoms), -1)
            gone = np.isin(parts, units).all(axis=1)
            missing = min(groups, 2) - int((~gone).sum())
            if missing > 0:
                units = np.setdiff1d(units, parts[gone][:missing])
    return units


def with_members(analysis: Analysis, units: np.ndarray) -> np.ndarray:
    """``units`` without what stands for a slice (a head's bias), unless all of the slice is dead as well."""
    left = units
    for slots in analysis.space.slots:
        alive = ~np.isin(analysis.units[slots.members], units).all(axis=1)
        left = np.setdiff1d(left, analysis.units[slots.atoms[alive]])
    return units if len(left) == len(units) else with_members(analysis, left)


def forced_rewrite(analysis: Analysis, units: np.ndarray, tries: int = 60) -> nn.Module:
    """The network without these units, whether they are dead or not, but for those that no rewrite can take out."""
    try:
        return carry_out(analysis, forced(analysis, units)).module.eval()
    except MismatchError as error:
        left = np.setdiff1d(units, analysis.units[error.atoms])
        if len(left) == len(units) or not tries:
            raise ValueError(f"no rewrite: {error.reason}") from error
    return forced_rewrite(analysis, left, tries - 1)
