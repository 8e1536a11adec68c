"""From what is dead to what may go: a fixpoint that keeps whatever cannot be proved."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fxcompress.channels.analysis import Analysis
from fxcompress.channels.reads import Check, ProductCheck, SiteCheck, SumCheck
from fxcompress.channels.rules.registry import Known
from fxcompress.channels.sites import SiteAtoms
from fxcompress.channels.space import PART, Reason, Slots, Space, distinct
from fxcompress.channels.worklist import Rule, Worklist
from fxcompress.trace.basics.garbage_collection import without_collections


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Which atoms go.

    Attributes:
        alive: bool (atoms,), False for what goes.
        kept: for components that were asked for and stay, the reason; by the component's root atom.
        spare: roots of those that nothing needs: they stay as something is to keep a channel, or as many as another
            has, and others would do as well.
    """

    alive: np.ndarray
    kept: dict[int, Reason] = field(default_factory=dict)
    spare: tuple[int, ...] = ()

    @property
    def changes(self) -> bool:
        """Whether anything goes."""
        return not self.alive.all()

    def indices(self, space: Space) -> dict[tuple[str, int], Tensor]:
        """The indices that stay along each dim that loses some, int64, by the name of the tensor and the dim."""
        left = np.flatnonzero(self.alive)
        starts = np.array([block.start for block in space.blocks], dtype=np.int64)
        ends = starts + np.array([block.size for block in space.blocks], dtype=np.int64)
        places = zip(space.blocks, *(np.searchsorted(left, edge).tolist() for edge in (starts, ends)), strict=True)
        return {
            (block.name, block.dim): torch.from_numpy(left[first:last] - block.start)
            for block, first, last in places
            if block.name and last - first < block.size
        }


@without_collections
def make_plan(
    analysis: Analysis,
    knowns: dict[str, list[Known]],
    request: np.ndarray | None = None,
    rectangular: frozenset[int] = frozenset(),
) -> Plan:
    """Which of the requested components may go without changing what the network computes.

    A fixpoint from above: assume that all go, and put back what breaks a constraint until nothing does. An entry may go
    when at each site that reads it, it is zero, or all that survives multiplies it by zero. Where a constraint asks for
    some entries and does not say which (as many in each head, the last channel of a layer), the first ones come back.
    One that came back for one constraint may be all that another one needs, which had chosen before. So it is chosen
    again among what is left, until nothing more goes.

    Args:
        analysis: of the network.
        knowns: for each graph, what is known in each mode that can run it (evaluation, training).
        request: bool (atoms,), what to try; everything that is not pinned by default.
        rectangular: positions in ``analysis.joints`` of those whose slices must all keep the same entries; the slices
            of the others may keep different ones, if they are as many.
    """
    return _Fixpoint(analysis, knowns, rectangular).run(request)


RAGGED = Reason("ragged", "what is left would not be rectangular")
SLOT = Reason("slot", "it belongs to a slice, such as a head, that is in use")


class _Fixpoint:
    def __init__(self, analysis: Analysis, knowns: dict[str, list[Known]], rectangular: frozenset[int]) -> None:
        self.analysis = analysis
        self.component = analysis.component
        self.reasons: list[Reason] = []
        self.why = np.full(len(self.component), -1)  # which reason keeps a component, by its root
        self.dead = ~analysis.pinned
        self.gone = np.zeros_like(self.dead)  # what no choice brings back: an earlier one could do without
        ragged, uneven = _joint_rules(analysis.joints, rectangular, self.gone)
        empty, hollow = _slot_rules(analysis.space.slots, self.gone)
        self.forced = Worklist([*_checks(analysis, knowns), *ragged, *empty], self.component)
        # Where it does not matter which of several entries come back: later, when it is known how many.
        self.choices = Worklist([*hollow, *uneven], self.component)

    def run(self, request: np.ndarray | None) -> Plan:
        if request is not None:
            self.dead &= self._whole(request)
        start = self.dead.copy()
        while True:
            self._force()
            unforced = self.dead.copy()
            self._choose()
            alone = self._alone() if (unforced & ~self.dead).any() else np.zeros(0, dtype=np.int64)
            if not unforced[alone].any():
                break
            self._begin_again(start, alone)
        roots = np.flatnonzero(self.why >= 0).tolist()
        kept = dict(zip(roots, map(self.reasons.__getitem__, self.why[roots].tolist()), strict=True))
        return Plan(~self.dead, kept, tuple(root for root in kept if unforced[root]))

    def _choose(self) -> None:
        """Put back some entries where there would be none, or as many as others have, and what these need."""
        self._settle()
        # Backwards: one channel kept at the end keeps what it reads, and then the layers before it need no help.
        for sites in reversed(self.analysis.sites):
            for atoms in (sites.rows, sites.entries):
                self._keep_some(sites, atoms)
        for product in reversed(self.analysis.products):
            self._keep_one(product.entries, Reason("last-channel", "a product keeps at least one entry", product.place))
        for layer in self.analysis.layers:  # of what nobody reads
            self._keep_one(layer, Reason("last-channel", "a tensor keeps at least one channel"))

    def _keep_some(self, sites: SiteAtoms, atoms: np.ndarray) -> None:
        """A layer keeps a channel; a grouped convolution two groups.

        With a single group it would be another layer, whose channels can go one by one: then the same network, cut in
        one step or in two, would not be the same.
        """
        groups = sites.site.groups
        if groups == 1:
            self._keep_one(atoms, Reason("last-channel", "a layer keeps at least one channel", sites.place))
            return
        reason = Reason("last-group", "a grouped convolution keeps at least two groups", sites.place)
        for _ in range(2):
            gone = self.dead[atoms].reshape(groups, -1).all(axis=1)
            if groups - gone.sum() >= 2:
                return
            self._keep_one(atoms.reshape(groups, -1)[gone], reason)

    def _keep_one(self, atoms: np.ndarray, reason: Reason) -> None:
        """Put the first of some atoms back where all of them are dead."""
        if self.dead[atoms].all():
            self._restore(atoms[~self.gone[atoms]][:1], reason)
            self._settle()

    def _alone(self) -> np.ndarray:
        """The atoms that are left alone along a dim: after the cut it has no labels, and whatever they meet stays."""
        blocks = [block for block in self.analysis.space.blocks if block.name and block.dim != PART]
        dims = [np.arange(block.start, block.start + block.size) for block in blocks]
        alive = (atoms[~self.dead[atoms]] for atoms in (*dims, *(layer.numpy() for layer in self.analysis.all_layers)))
        return np.array([left[0] for left in alive if len(left) == 1], dtype=np.int64)

    def _begin_again(self, start: np.ndarray, alone: np.ndarray) -> None:
        """Back to what was dead at the start, but for what is alone; what is dead now stays so, whatever is chosen."""
        self.gone |= self.dead
        why = self.why.copy()
        self.dead[:] = start
        self.why[:] = -1
        self.forced.reopen_all()
        self.choices.reopen_all()
        roots = distinct(self.component[alone])
        self.dead[self.analysis.members.of(roots)] = False
        self.why[roots] = why[roots]

    def _force(self) -> None:
        """Put back what is still read, or lies inside what stays, until nothing changes."""
        while self.forced.sweep(self._restore, self.dead):
            pass

    def _settle(self) -> None:
        """The same, and in slices that lack some entries the first of these."""
        while self.forced.sweep(self._restore, self.dead) or self.choices.sweep(self._restore, self.dead):
            pass

    def _whole(self, request: np.ndarray) -> np.ndarray:
        """Components all of whose atoms are requested."""
        partly = np.zeros(len(request), dtype=bool)
        partly[self.component[~request]] = True
        whole: np.ndarray = ~partly[self.component]
        return whole

    def _restore(self, atoms: np.ndarray, reason: Reason) -> None:
        roots = distinct(self.component[atoms])
        self.dead[self.analysis.members.of(roots)] = False
        self.forced.reopen(roots)
        self.choices.reopen(roots)
        self.why[roots[self.why[roots] < 0]] = len(self.reasons)
        self.reasons.append(reason)


def _checks(analysis: Analysis, knowns: dict[str, list[Known]]) -> Iterator[Rule]:
    """What is read must stay."""
    checks: list[Check] = [check for s in analysis.sites for check in _site_checks(s, knowns[s.mode])]
    checks += [ProductCheck(p, known) for p in analysis.products for known in knowns[p.mode]]
    checks += [SumCheck(s, known) for s in analysis.sums for known in knowns[s.mode]]
    for check in reversed(checks):  # what is read keeps what lies before it
        yield Rule(check.broken, check.reason, check.reads)


def _site_checks(sites: SiteAtoms, knowns: list[Known]) -> list[SiteCheck]:
    """The checks of a site in each mode, without those that would find what an earlier one has found."""
    checks: list[SiteCheck] = []
    for check in (SiteCheck(sites, known) for known in knowns):
        if not any(check.equals(other) for other in checks):
            checks.append(check)
    return checks


def _joint_rules(
    joints: list[np.ndarray], rectangular: frozenset[int], gone: np.ndarray
) -> tuple[list[Rule], list[Rule]]:
    """What is left of a joint layer must be rectangular: at once, and those whose slices may keep different entries."""
    ragged, uneven = [], []
    for i, joint in enumerate(joints):
        dim = None if i in rectangular else _inner(joint)
        if dim is None:
            ragged.append(Rule(partial(_ragged, joint), RAGGED, (joint,)))
        else:
            uneven.append(Rule(partial(_uneven, joint, dim, gone), RAGGED, (joint,)))
    return ragged, uneven


def _slot_rules(found: list[Slots], gone: np.ndarray) -> tuple[list[Rule], list[Rule]]:
    """A slot is there when some member is; and a slot that is there has members."""
    reads = [(slots, (slots.atoms, slots.members)) for slots in found]
    return (
        [Rule(partial(_in_use, slots), SLOT, atoms) for slots, atoms in reads],
        [Rule(partial(_hollow, slots, gone), SLOT, atoms) for slots, atoms in reads],
    )


def _in_use(slots: Slots, dead: np.ndarray) -> np.ndarray:
    """The dead slots that have a member."""
    atoms: np.ndarray = slots.atoms[dead[slots.atoms] & ~dead[slots.members].all(axis=1)]
    return atoms


def _hollow(slots: Slots, gone: np.ndarray, dead: np.ndarray) -> np.ndarray:
    """The members to bring back of slices that have lost all of theirs, and whose slot stays.

    As many as the other slices have, and where they have them: what is left is to be rectangular, and small.
    """
    member = ~dead[slots.members]
    empty = ~dead[slots.atoms] & ~member.any(axis=1)
    members, free = slots.members[empty], ~gone[slots.members[empty]]
    columns = np.flatnonzero(member.any(axis=0))[: member.sum(axis=1).max()]
    chosen = np.zeros_like(free)
    chosen[:, columns] = free[:, columns]
    first = np.cumsum(free, axis=1) == 1
    chosen |= free & first & ~chosen.any(axis=1, keepdims=True)
    atoms: np.ndarray = members[chosen]
    return atoms


def _ragged(joint: np.ndarray, dead: np.ndarray) -> np.ndarray:
    """The dead entries that lie on a kept row and column of a joint layer."""
    alive = ~dead[joint]
    product = np.full(alive.shape, not alive.all())
    for axis in range(alive.ndim):
        others = tuple(a for a in range(alive.ndim) if a != axis)
        shape = [alive.shape[axis] if a == axis else 1 for a in range(alive.ndim)]
        product &= alive.any(axis=others).reshape(shape)
    atoms: np.ndarray = joint[product & ~alive]
    return atoms


def _inner(joint: np.ndarray) -> int | None:
    """The dim along which a joint runs through neighbouring atoms, as those of one head do; None for none."""
    found = (d for d in range(joint.ndim) if bool((np.diff(joint, axis=d) == 1).all()))
    return next(found, None)


def _uneven(joint: np.ndarray, dim: int, gone: np.ndarray, dead: np.ndarray) -> np.ndarray:
    """The dead entries to bring back so that all slices that stay keep as many, and form a product themselves."""
    rows = np.moveaxis(joint, dim, -1)
    alive, free = ~dead[rows], dead[rows] & ~gone[rows]
    counts = alive.sum(axis=-1)
    slices = np.ones(counts.shape, dtype=bool)
    for axis in range(counts.ndim):
        others = tuple(a for a in range(counts.ndim) if a != axis)
        slices &= np.moveaxis((counts > 0).any(axis=others).reshape(-1, *[1] * len(others)), 0, axis)
    missing = np.where(slices, counts.max() - counts, 0)[..., None]
    atoms: np.ndarray = rows[free & (np.cumsum(free, axis=-1) <= missing)]
    return atoms
