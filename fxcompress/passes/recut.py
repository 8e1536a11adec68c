"""Cuts a network to the shape of another one that was made from the same original.

The provenance of both says what each has lost; what the other has lost and this one has not is taken out::

    conv1.weight (8, 3, 3, 3)   kept in the other: 0, 1, 4      conv1.weight (3, 3, 3, 3)
    conv2.weight (16, 8, 3, 3)                             ->   conv2.weight (16, 3, 3, 3)
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import zip_longest

import numpy as np

from fxcompress.channels.analysis import Analysis, analyse
from fxcompress.channels.plan import Plan
from fxcompress.channels.space import components
from fxcompress.channels.survivors import kept_masks
from fxcompress.channels.values import Value
from fxcompress.passes.branches import Branch, remove_branches
from fxcompress.passes.cutting import Cut
from fxcompress.passes.history import kept_after
from fxcompress.passes.narrow_paths import NarrowPath, close_joins, open_joins
from fxcompress.passes.prune_channels import Pruned
from fxcompress.passes.replay import MismatchError
from fxcompress.passes.rewrite import carry_out
from fxcompress.provenance import Narrowing, Provenance
from fxcompress.trace.model.skeleton import skeleton


class ShapeError(Exception):
    """A network cannot be cut to the wanted shape; the message says why, and is for the caller to put into words."""


def recut(analysis: Analysis, have: Provenance, want: Provenance) -> Pruned:
    """A copy of a network, cut to another's shape; what lost nothing is shared, and the network stays as it is.

    Args:
        analysis: of the network.
        have: what was cut out of it until now.
        want: what was cut out of the other one. Tensors that it does not name (those of quantizers, buffers that are
            not saved) lose what belongs to the channels that go.

    Raises:
        ShapeError: the other one has what this one has lost, or is made of another network.
    """
    branches = missing_branches(have, want)
    joins = missing_joins(have, want)
    gone: list[str] = []
    if branches:
        module = analysis.module
        try:
            for branch in branches:
                module = skeleton(module)  # as when they were found: which names are free decides how copies are called
                gone += remove_branches(module, [branch])
        except KeyError as error:
            raise ShapeError(f"its graph has no node {error}") from error
        analysis = analyse(module, analysis.inputs)
    if joins:
        analysis = _with_joins(analysis, joins, have, want)
    result = _cut(analysis, have, want)
    close_joins(result.module)
    return replace(result, branches=branches, gone=tuple(gone))


def _cut(analysis: Analysis, have: Provenance, want: Provenance) -> Pruned:
    """Take out channels, all at once where that is possible, and else in portions, as they went from the other one."""
    alive = _alive(analysis, have, want)
    plan = Plan(analysis.without_empty_slots(alive))
    try:
        result = carry_out(analysis, plan)
    except MismatchError as mismatch:
        refused = mismatch
    else:
        return Pruned(result.module, analysis, {}, plan, result.cuts)
    for left in _portions(analysis, alive, want, refused.atoms):
        first = Plan(analysis.without_empty_slots(left))
        if first.changes and not np.array_equal(first.alive, plan.alive):
            try:
                result = carry_out(analysis, first)
            except MismatchError:
                continue
            now = replace(have, kept=kept_after(have.kept, result.cuts))
            rest = _cut(analyse(result.module, analysis.inputs), now, want)
            return replace(rest, cuts=_joined_cuts(result.cuts, rest.cuts))
    raise ShapeError(str(refused.reason)) from refused


def _portions(analysis: Analysis, alive: np.ndarray, want: Provenance, refused: np.ndarray) -> Iterator[np.ndarray]:
    """What may go first; for each portion, which atoms are left, bool (atoms,).

    Some channels can go only after others: those of several experts (or heads) that lie along one dim, once a single
    expert is left. What is pinned now has gone later.

    Args:
        analysis: of the network.
        alive: which atoms are to be left.
        want: what was cut out of the other network.
        refused: the atoms that meet at the node which could not be rewritten for all that is to go.
    """
    whole: np.ndarray = ~np.isin(analysis.component, analysis.component[_of_tensors(analysis, want) & alive])
    left = alive | ~whole  # a slot hangs together with no tensor, and goes when its members do
    yield left | analysis.pinned
    yield left
    kinds = _kinds(analysis)
    here = np.unique(kinds[refused[~alive[refused]]])
    yield alive | np.isin(kinds, here)
    for kind in here:
        yield alive | (kinds != kind)


def _kinds(analysis: Analysis) -> np.ndarray:
    """The smallest atom of all that are, with others between them, entries of one dim or coupled: int64 (atoms,)."""
    blocks = [np.arange(block.start, block.start + block.size) for block in analysis.space.blocks if block.name]
    edges = [(block[1:], np.broadcast_to(block[:1], len(block) - 1)) for block in blocks]
    size = analysis.space.size
    return components(size, [(np.arange(size), analysis.component), *edges])


def _joined_cuts(first: dict[str, Cut], second: dict[str, Cut]) -> dict[str, Cut]:
    joined = first | second
    for name in first.keys() & second.keys():
        indices = dict(first[name].indices)
        for dim, index in second[name].indices.items():
            indices[dim] = indices[dim][index] if dim in indices else index
        joined[name] = Cut(first[name].old, second[name].new, indices)
    return joined


def _of_tensors(analysis: Analysis, want: Provenance) -> np.ndarray:
    """Which atoms are of tensors that the other network has, bool (atoms,)."""
    found = np.zeros(analysis.space.size, dtype=bool)
    for name, dims in analysis.atoms.items():
        for atoms in dims.values() if name in want.shapes else ():
            found[atoms.numpy()] = True
    return found


def missing_branches(have: Provenance, want: Provenance) -> tuple[Branch, ...]:
    """The branches that the other network has lost and this one has not, in order.

    Raises:
        ShapeError: this one has lost others.
    """
    done = len(have.cuts)
    if want.cuts[:done] != have.cuts:
        lost = next(own for own, other in zip_longest(have.cuts, want.cuts[:done]) if own != other)
        raise ShapeError(f"it has lost the branch at {lost[0]} already")
    return want.cuts[done:]


def missing_joins(have: Provenance, want: Provenance) -> tuple[Narrowing, ...]:
    """The sums that have a narrow path in the other network and not in this one."""
    return tuple(join for join in want.joins if join not in have.joins)


def _with_joins(analysis: Analysis, joins: tuple[Narrowing, ...], have: Provenance, want: Provenance) -> Analysis:
    """Of the network with joins that add the channels which the other network has on those paths.

    A first analysis, with joins that add all channels, tells which atoms those are.
    """
    paths = [_path(analysis, join) for join in joins]
    trial = _joined(analysis, paths)
    alive = trial.without_empty_slots(_alive(trial, have, want))
    for i, path in enumerate(paths):
        part = trial.trails[path.mode].args[path.node][1]
        stays = kept_masks(part, alive).get(path.dim, np.ones(path.size, dtype=bool))
        paths[i] = replace(path, index=tuple(np.flatnonzero(stays).tolist()))
    return _joined(analysis, paths)


def _path(analysis: Analysis, join: Narrowing) -> NarrowPath:
    """The path that a join is to narrow, with all of its channels.

    Raises:
        ShapeError: there is no such path.
    """
    mode, _, node = join.place.partition(":")
    trail = analysis.trails.get(mode)
    args = trail.args.get(node, ()) if trail is not None else ()
    part = args[join.operand] if join.operand < len(args) else None
    if not isinstance(part, Value) or join.dim >= part.rank:
        raise ShapeError(f"its graph has no sum {join.place}")
    size = part.shape[join.dim]
    return NarrowPath(join.place, join.operand, join.dim, part.rank, tuple(range(size)), size, join.place)


def _joined(analysis: Analysis, paths: list[NarrowPath]) -> Analysis:
    module = skeleton(analysis.module)
    try:
        open_joins(module, paths)
    except (KeyError, ValueError) as error:
        raise ShapeError(f"its graph has no sum {error}") from error
    return analyse(module, analysis.inputs)


def _alive(analysis: Analysis, have: Provenance, want: Provenance) -> np.ndarray:
    """Which atoms are left, bool (atoms,)."""
    alive = np.ones(analysis.space.size, dtype=bool)
    for name, dims in analysis.atoms.items():
        for dim, atoms in dims.items() if name in want.shapes else ():
            alive[atoms.numpy()[_lost(name, dim, have, want)]] = False
    lost = np.zeros_like(alive)
    lost[analysis.component[~alive]] = True
    for block in analysis.space.blocks:
        if block.name not in want.shapes:  # slots and what factories make have no name
            span = np.arange(block.start, block.start + block.size)
            alive[span] = ~lost[analysis.component[span]]
    return alive


def _lost(name: str, dim: int, have: Provenance, want: Provenance) -> np.ndarray:
    """What goes along one dim, by its position in what is there now; int64 (n,)."""
    everything = range(want.shapes[name][dim])
    own = np.array(have.kept.get(name, {}).get(dim, everything), dtype=np.int64)
    other = np.array(want.kept.get(name, {}).get(dim, everything), dtype=np.int64)
    extra = np.setdiff1d(other, own)
    if len(extra):
        raise ShapeError(f"it has lost entry {extra[0]} of {name} along dim {dim} already ({len(extra)} such in all)")
    return np.flatnonzero(~np.isin(own, other))
