"""One rewrite: plan, cut, replay; what cannot be rewritten is kept, and the plan is made again."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fxcompress.channels.analysis import Analysis
from fxcompress.channels.plan import Plan, make_plan
from fxcompress.channels.rules.registry import Known
from fxcompress.channels.space import Reason
from fxcompress.passes.code_changes import Blame, CodeChanges
from fxcompress.passes.cutting import Cut, cut_module
from fxcompress.passes.renumber import renumber_joins
from fxcompress.passes.replay import MismatchError, Replay
from fxcompress.progress import stage
from fxcompress.provenance import keeps_code
from fxcompress.trace.basics.garbage_collection import without_collections
from fxcompress.trace.traced import TracedModule


class CodeChangeError(MismatchError):
    """The code of the model would have to change, and must not.

    Args:
        blamed: which atoms must stay, and why; not empty.
    """

    def __init__(self, blamed: list[Blame]) -> None:
        super().__init__(np.concatenate([blame.atoms for blame in blamed]), blamed[0].reason)
        self.blamed = blamed


@dataclass(frozen=True, slots=True)
class Rewritten:
    """The result of a rewrite.

    Attributes:
        module: shares every tensor that lost nothing with the original.
        cuts: what was taken out of each tensor, by name.
        plan: that was carried out.
    """

    module: TracedModule
    cuts: dict[str, Cut]
    plan: Plan


def rewrite(
    analysis: Analysis,
    knowns: dict[str, list[Known]],
    request: np.ndarray | None = None,
    reasons: Mapping[int, Reason] | None = None,
) -> Rewritten:
    """Remove what can be proved removable, and check the result node by node.

    Args:
        analysis: of the network, which stays as it is.
        knowns: see :func:`fxcompress.channels.plan.make_plan`.
        request: bool (atoms,), what to try.
        reasons: why the rest is not tried, by the root atom of a component.
    """
    wanted = np.ones(analysis.space.size, dtype=bool) if request is None else request.copy()
    kept: dict[int, Reason] = dict(reasons or {})
    rectangular: frozenset[int] = frozenset()
    while True:
        stage("rewrite")
        plan = make_plan(analysis, knowns, wanted, rectangular)
        for root, reason in kept.items():
            plan.kept.setdefault(root, reason)
        try:
            return carry_out(analysis, plan)
        except CodeChangeError as changes:
            if not len(changes.atoms):  # nothing to blame in particular
                wanted[:] = False
            for blame in changes.blamed:
                wanted[blame.atoms] = False
                roots = np.unique(analysis.component[blame.atoms]).tolist()
                kept |= {root: kept.get(root, blame.reason) for root in roots}
        except MismatchError as mismatch:
            atoms = mismatch.atoms
            near = _joints_near(analysis, atoms) - rectangular
            if near:  # perhaps it is only that slices lost different entries
                rectangular |= near
                continue
            if plan.alive[atoms].all():  # nothing to blame in particular: keep all
                atoms = np.flatnonzero(~plan.alive)
                wanted[:] = False
            wanted[atoms] = False
            for root in np.unique(analysis.component[atoms]).tolist():
                kept.setdefault(root, mismatch.reason)


def _joints_near(analysis: Analysis, atoms: np.ndarray) -> frozenset[int]:
    """The joints that hang together with ``atoms``."""
    near = np.zeros(analysis.space.size, dtype=bool)
    near[analysis.component[atoms]] = True
    return frozenset(i for i, joint in enumerate(analysis.joints) if near[analysis.component[joint]].any())


@without_collections
def carry_out(analysis: Analysis, plan: Plan) -> Rewritten:
    """Cut by a given plan. The result is compiled when it is first called.

    Raises:
        MismatchError: the cut network is not what the plan says, or would be other code where that has to stay.
    """
    changes = CodeChanges(analysis, plan.alive) if keeps_code(analysis.module) else None
    cut = cut_module(analysis, plan)
    if plan.changes:
        renumber_joins(cut.module, analysis, plan)
    for mode, graph in cut.module.graphs.items() if plan.changes else ():
        replay = Replay(cut, analysis, mode, plan, changes)
        replay.run(graph, analysis.inputs)
        replay.check_couplings()
    if changes is not None and (blamed := changes.settle(cut.module)):
        raise CodeChangeError(blamed)
    return Rewritten(cut.module, cut.cuts, plan)
