"""What a pruning run removed, what it kept although it looks dead, and why."""

import math
from dataclasses import dataclass, field

import numpy as np
from torch import nn

from fxcompress.channels.analysis import Analysis
from fxcompress.channels.coverage import Uncovered, uncovered
from fxcompress.channels.groups import NO_MAKER
from fxcompress.channels.plan import Plan
from fxcompress.channels.rules.contraction import may_read, pattern_of
from fxcompress.channels.rules.registry import Known
from fxcompress.channels.sites import SiteAtoms
from fxcompress.channels.space import Reason
from fxcompress.passes.fold_constants import Folded
from fxcompress.passes.narrow_branches import Narrowed, NarrowedPath, WidePath
from fxcompress.passes.prune_channels import Pruned
from fxcompress.trace.basics.modules import elements_in
from fxcompress.trace.graph.described import Place

_SHOWN = 12


@dataclass(frozen=True, slots=True)
class KeptChannel:
    """A channel whose weights are all zero, and which stays all the same.

    Attributes:
        tensor: the weight that makes it.
        channel: its index there.
        reason: why it stays.
    """

    tensor: str
    channel: int
    reason: str

    def __str__(self) -> str:
        return f"{self.tensor}[{self.channel}] stays: {self.reason}"


@dataclass(frozen=True, slots=True)
class SizesDecide:
    """What is known of the paths through a model's own code that its example inputs do not take.

    Attributes:
        lines: of the model, where sizes decide between them.
        proved: inputs on paths that were proved to compute the same.
        ran: inputs on paths that ran and gave the same, of which not all can be proved.
        open: lines of the model where sizes decide, with the same outcome on all inputs that were tried.
        more: whether there are more paths than were looked at.
    """

    lines: tuple[str, ...]
    proved: tuple[str, ...]
    ran: tuple[str, ...]
    open: tuple[str, ...]
    more: bool

    @property
    def is_proved(self) -> bool:
        """Whether no other path was found than those that are proved to compute the same."""
        return not (self.ran or self.open or self.more)

    def __str__(self) -> str:
        text = []
        if self.lines:
            text.append(f"sizes decide which way the model's code goes, {_some(self.lines)}")
            text += [f"  proved to compute the same on {_some(self.proved, ' and on ')}"] if self.proved else []
            text += [f"  gave the same, which is no proof, on {_some(self.ran, ' and on ')}"] if self.ran else []
        if self.open:
            text.append(f"sizes decide {_some(self.open)}, and went one way on all inputs that were tried")
        text += ["  nothing is proved of sizes that go yet another way"] if self.more or self.open else []
        return "\n".join(text)


def _some(items: tuple[str, ...], between: str = ", ") -> str:
    more = f" and {len(items) - _LINES} more" if len(items) > _LINES else ""
    return between.join(item.strip() for item in items[:_LINES]) + more


_LINES = 3


@dataclass(frozen=True, slots=True)
class PruneReport:
    """What :func:`fxcompress.prune` did; ``print(report)`` shows it.

    Attributes:
        removed: for each tensor that was cut, its shape before and after, by name.
        branches: graph nodes that were replaced by one of their operands, as their branch was all zero.
        gone: parameters and buffers that went with those branches.
        parameters: number of parameters (elements) before and after.
        kept: channels that are zero where they are made and stay all the same, each with the reason.
        uncovered: ops without a rule, where they are called, and how many parameters they keep.
        folded: how many constant channels were folded into each weight's layer, by the weight's name.
        new_biases: weights whose layers got a bias for that.
        unfolded: weights that read constant channels which were to be folded and were not, with the reason.
        narrowed: paths into sums that lost channels which the sum still has.
        left_wide: paths that could have lost some and did not, with the reason.
        pieces: the modules that were pruned, each on its own, where the network as a whole has no graph.
        why_pieces: why it has none.
        outside: parameters that lie in none of the pieces, with the reason.
        plain_weights: weights that weight norm computed, and which are parameters from now on.
        computed_weights: parameters from now on that the model computed, from those of its own that are named; it
            standardised them, say.
        places: where the nodes of ``branches`` are in the model.
        sizes_decide: where the model's own code stays and sizes decide which way it goes: what is known of the others.
    """

    removed: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    branches: tuple[str, ...]
    gone: tuple[str, ...]
    parameters: tuple[int, int]
    kept: tuple[KeptChannel, ...]
    uncovered: tuple[Uncovered, ...]
    folded: dict[str, int] = field(default_factory=dict)
    new_biases: tuple[str, ...] = ()
    unfolded: dict[str, str] = field(default_factory=dict)
    narrowed: tuple[NarrowedPath, ...] = ()
    left_wide: tuple[WidePath, ...] = ()
    pieces: tuple[str, ...] = ()
    why_pieces: str = ""
    outside: dict[str, str] = field(default_factory=dict)
    plain_weights: tuple[str, ...] = ()
    computed_weights: dict[str, tuple[str, ...]] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)
    sizes_decide: SizesDecide | None = None

    @property
    def modified(self) -> bool:
        """Whether anything was removed."""
        return bool(self.removed or self.branches or self.folded)

    @property
    def unknown_ops(self) -> dict[str, tuple[str, ...]]:
        """Ops without a rule, with the nodes that call them."""
        return {op.op: tuple(place.node for place in op.places) for op in self.uncovered}

    @property
    def channels(self) -> int:
        """Output channels removed, counted over the weights that lost some."""
        return sum(b[0] - a[0] for b, a in self.removed.values() if len(b) > 1)

    def __str__(self) -> str:
        before, after = self.parameters
        lines = [f"parameters {before:,} -> {after:,} ({after / max(before, 1):.1%} left)"]
        lines += self._on_pieces()
        lines += [f"  {name} {b} -> {a}" for name, (b, a) in self.removed.items() if len(b) > 1]
        lines += [f"  the branch into {self.places.get(name, name)} is gone" for name in self.branches]
        lines += [f"  {count} constant inputs of {name} folded" for name, count in self.folded.items()]
        lines += [f"  the layer of {name} got a bias" for name in self.new_biases]
        lines += [f"  constant inputs of {name} stay: {reason}" for name, reason in self.unfolded.items()]
        lines += [f"  {path}" for path in self.narrowed]
        lines += [f"  {path}" for path in self.left_wide]
        lines += [f"  {name} was computed by weight norm and is a plain parameter now" for name in self.plain_weights]
        lines += self._on_computed_weights()
        lines += [f"  {line}" for line in str(self.sizes_decide or "").splitlines()]
        lines += [f"  {kept}" for kept in self.kept[:_SHOWN]]
        if len(self.kept) > _SHOWN:
            lines.append(f"  and {len(self.kept) - _SHOWN} more channels that are zero and stay (report.kept)")
        lines += [f"  {line}" for op in self.uncovered for line in str(op).splitlines()]
        return "\n".join(lines) if self.modified else "\n".join(["nothing to remove", *lines])

    def _on_computed_weights(self) -> list[str]:
        computed = list(self.computed_weights.items())
        lines = [f"  {name} is a plain parameter now; it was computed from {', '.join(s)}" for name, s in computed]
        more = len(lines) - _SHOWN
        return lines[:_SHOWN] + ([f"  and {more} more such parameters (report.computed_weights)"] if more > 0 else [])

    def _on_pieces(self) -> list[str]:
        if not self.pieces:
            return []
        lines = [
            f"  in {len(self.pieces)} pieces, what each takes and returns stays: {', '.join(self.pieces)}",
            f"    the network as a whole has no graph: {self.why_pieces}",
        ]
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.outside.items():
            by_reason.setdefault(reason, []).append(name)
        for reason, names in by_reason.items():
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            lines.append(f"    not in a piece: {', '.join(names[:4])}{more}: {reason}")
        return lines


def make_report(
    before: nn.Module,
    *removals: Pruned,
    folded: Folded | None = None,
    narrowed: Narrowed | None = None,
    explain: bool = True,
    within: str = "",
) -> PruneReport:
    """The report of a pruning run.

    Args:
        before: the network as it was.
        removals: the results of the run, one for each time that something was removed.
        folded: what was folded.
        narrowed: which paths into sums were narrowed.
        explain: find out why channels that are zero stay.
        within: path of the network in the model, where it is a piece of one, for the reasons.
    """
    last = removals[-1]
    return PruneReport(
        removed=_shapes(removals),
        branches=tuple(place for removal in removals for place, _ in removal.branches),
        gone=tuple(name for removal in removals for name in removal.gone),
        parameters=(elements_in(before), elements_in(last.module)),
        places={place: where for removal in removals for place, where in removal.places.items()},
        kept=tuple(_kept(last, within)) if explain else (),
        uncovered=uncovered(last.analysis),
        folded={} if folded is None else folded.channels,
        new_biases=() if folded is None else folded.biases,
        unfolded={} if folded is None else folded.refused,
        narrowed=() if narrowed is None else narrowed.paths,
        left_wide=() if narrowed is None else narrowed.wide,
    )


def _shapes(removals: tuple[Pruned, ...]) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """The shapes of each tensor that was cut, before all and after."""
    found: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    for removal in removals:
        for name in removal.gone:
            found.pop(name, None)
        for name, cut in removal.cuts.items():
            first = found.get(name, (tuple(cut.old.shape),))[0]
            found[name] = (first, tuple(cut.new.shape))
    return found


def _kept(pruned: Pruned, within: str) -> list[KeptChannel]:
    """Channels that are zero where they are made and stay."""
    analysis, plan, knowns = pruned.analysis, pruned.plan, pruned.knowns
    why = WhyKept(analysis, plan, knowns, within)
    found: dict[tuple[str, int], KeptChannel] = {}
    for sites in analysis.sites:
        if not sites.weight_name or sites.site.groups > 1:
            continue
        weights = pattern_of(sites.site, knowns[sites.mode][0])
        zero = ~weights.rows_with(np.ones(weights.columns, dtype=bool))
        for row in np.flatnonzero(zero & plan.alive[sites.rows]).tolist():
            reason = why(int(sites.rows[row])) if len(sites.rows) > 1 else "a layer keeps at least one channel"
            kept = KeptChannel(sites.weight_name, row, reason)
            found.setdefault((sites.weight_name, row), kept)
    return list(found.values())


class WhyKept:
    """Why the channel of an atom stays, in words.

    Args:
        analysis: of a network.
        plan: made from it.
        knowns: that the plan was made with.
        within: path of the network in the model that it is a piece of.
    """

    def __init__(self, analysis: Analysis, plan: Plan, knowns: dict[str, list[Known]], within: str = "") -> None:
        self.within = within
        self.analysis = analysis
        self.plan = plan
        component = analysis.component
        self._places = [(s, known) for s in analysis.sites for known in knowns[s.mode]]
        # By the root of each component: what pins it, where it is read, and which entry that is; -1 for nothing. Of
        # several assignments to one root the last one stays, so all go backwards.
        self._pin, self._place, self._entry = (np.full(analysis.space.size, -1) for _ in range(3))
        for i, (atoms, _) in reversed(list(enumerate(analysis.space.pins))):
            self._pin[component[atoms]] = i
        for i, (sites, known) in reversed(list(enumerate(self._places))):
            read = np.flatnonzero(may_read(sites.site, known))[::-1]
            roots = component[sites.entries[read]]
            self._place[roots], self._entry[roots] = i, read

    def __call__(self, atom: int) -> str:
        """The reason for one atom."""
        root = int(self.analysis.component[atom])
        if self.analysis.pinned[atom]:
            pin = int(self._pin[root])
            return NO_MAKER if pin < 0 else self._text(self.analysis.space.pins[pin][1])
        place = int(self._place[root])
        if place >= 0:
            return self._text(_value(*self._places[place], int(self._entry[root])))
        reason = self.plan.kept.get(root)
        return "something that goes with it is in use" if reason is None else self._text(reason)

    def _text(self, reason: Reason) -> str:
        return str(reason.within(self.within) if self.within else reason)


def _value(sites: SiteAtoms, known: Known, entry: int) -> Reason:
    mode = "training" if known.training else "evaluation"
    source = known.of(sites.site.source).double()
    others = [d for d in range(source.ndim) if d != sites.site.source_dim]
    values = source.amax(dim=others) if others else source
    value = float(values.expand(sites.site.entries)[entry])
    what = "it is not constant" if math.isnan(value) else f"its constant value is {value:.3g}"
    return Reason("not-zero", f"in {mode} {what} where {sites.place} reads it", sites.place)
