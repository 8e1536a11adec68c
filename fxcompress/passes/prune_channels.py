"""Removes what is proved to be without effect: branches first, then channels.

conv1.weight (8, 3, 3, 3)   channel 3 is zero       conv1.weight (7, 3, 3, 3)
bn1.weight   (8,)                              ->   bn1.weight   (7,)
conv2.weight (16, 8, 3, 3)                          conv2.weight (16, 7, 3, 3)
"""

from dataclasses import dataclass, field

import torch
from torch import fx

from fxcompress.channels.analysis import Analysis, analyse
from fxcompress.channels.constants import Seeds, knowns_of, values_known
from fxcompress.channels.plan import Plan
from fxcompress.channels.rules.registry import Known
from fxcompress.passes.base import Pass, PassResult, traced
from fxcompress.passes.branches import Branch, dead_branches, remove_branches, unread_branches
from fxcompress.passes.cutting import Cut
from fxcompress.passes.held import NOTHING, Held, asked_for
from fxcompress.passes.rewrite import rewrite
from fxcompress.provenance import keeps_code
from fxcompress.trace.graph.described import Place
from fxcompress.trace.inputs import ExampleInputs
from fxcompress.trace.model.skeleton import skeleton
from fxcompress.trace.traced import TracedModule


@dataclass(frozen=True, slots=True)
class Pruned:
    """The result of :func:`prune_channels`.

    Attributes:
        module: the rewritten network; tensors that lost nothing are shared with the original.
        analysis: of the network just before channels were cut (branches were gone already).
        knowns: what was known there.
        plan: that was carried out.
        cuts: what was taken out of each tensor, by name.
        branches: that were taken out.
        gone: names of the tensors that went with them.
        places: where the nodes that branches name were in the model.
    """

    module: TracedModule
    analysis: Analysis
    knowns: dict[str, list[Known]]
    plan: Plan
    cuts: dict[str, Cut] = field(default_factory=dict)
    branches: tuple[Branch, ...] = ()
    gone: tuple[str, ...] = ()
    places: dict[str, Place] = field(default_factory=dict)

    @property
    def modified(self) -> bool:
        """Whether anything was removed."""
        return bool(self.cuts or self.branches)


@dataclass(frozen=True, slots=True)
class PruneChannels(Pass):
    """Remove all that is proved to be without effect, for a network as it stands; see the picture above.

    Attributes:
        inputs: that the network runs on.
    """

    inputs: ExampleInputs

    def __call__(self, module: fx.GraphModule) -> PassResult:
        """The rewritten network; tensors that lose nothing are shared with the original."""
        pruned = prune_channels(traced(module), self.inputs)
        return PassResult(pruned.module, pruned.modified)


def prune_channels(
    module: TracedModule,
    inputs: ExampleInputs,
    seeds: Seeds = values_known,
    *,
    modes: tuple[bool, ...] = (False, True),
    analysis: Analysis | None = None,
    held: Held = NOTHING,
) -> Pruned:
    """Remove all branches and channels that are proved to have no effect; ``module`` stays as it is.

    Args:
        module: a traced network.
        inputs: that it runs on.
        seeds: what is known at the start.
        modes: how batch norm normalises, see :func:`knowns_of`; a channel must be without effect in each.
        analysis: of ``module``, when there is one already.
        held: what is to stay whatever is proved.
    """
    fixed = keeps_code(module)  # branches stay, without what they can lose
    branches: list[Branch] = []
    gone: list[str] = []
    places: dict[str, Place] = {}
    with torch.no_grad():
        while True:
            analysis = analysis or analyse(module, inputs)
            knowns = knowns_of(analysis, seeds, modes)
            found = [] if fixed else dead_branches(analysis, knowns)
            if not found:
                result = rewrite(analysis, knowns, *asked_for(analysis, held))
                asked = seeds is values_known and not fixed
                found = unread_branches(analysis, knowns, result.plan.alive) if asked else []
            if not found:
                break
            places[found[0][0]] = analysis.place(*found[0][0].split(":", 1))
            module = skeleton(module)
            gone += remove_branches(module, found[:1])
            branches += found[:1]
            analysis = None
    return Pruned(result.module, analysis, knowns, result.plan, result.cuts, tuple(branches), tuple(gone), places)
