"""Channels that are to stay whatever is proved of one graph: those that another path through the code needs."""

from collections.abc import Mapping

import numpy as np

from fxcompress.channels.analysis import Analysis
from fxcompress.channels.space import Reason
from fxcompress.passes.cutting import Cut

Held = Mapping[tuple[str, int], Mapping[int, Reason]]
"""By the name of a tensor and a dim: the entries that stay, and why."""

NOTHING: Held = {}


def asked_for(analysis: Analysis, held: Held) -> tuple[np.ndarray | None, dict[int, Reason]]:
    """Which atoms to try, bool (atoms,), or None for all; and why the others stay, by the root of their component."""
    if not held:
        return None, {}
    request = np.ones(analysis.space.size, dtype=bool)
    reasons: dict[int, Reason] = {}
    for block in analysis.space.blocks:
        for entry, reason in held.get((block.name, block.dim), {}).items():
            request[block.start + entry] = False
            reasons.setdefault(int(analysis.component[block.start + entry]), reason)
    return request, reasons


def held_after(held: Held, cuts: Mapping[str, Cut]) -> Held:
    """The same entries, as they are counted once something has been cut out."""
    left: dict[tuple[str, int], Mapping[int, Reason]] = {}
    for (name, dim), entries in held.items():
        index = cuts[name].indices.get(dim) if name in cuts else None
        places = None if index is None else {old: new for new, old in enumerate(index.tolist())}
        left[name, dim] = entries if places is None else {places[i]: r for i, r in entries.items() if i in places}
    return left


def joined(a: Held, b: Held) -> Held:
    """What either holds."""
    return {key: {**b.get(key, {}), **a.get(key, {})} for key in dict.fromkeys((*a, *b))}


def all_of(cuts: Mapping[str, Cut], reason: Reason) -> Held:
    """All that was cut out."""
    return {
        (name, dim): dict.fromkeys(set(range(cut.old.shape[dim])) - set(index.tolist()), reason)
        for name, cut in cuts.items()
        for dim, index in cut.indices.items()
    }
