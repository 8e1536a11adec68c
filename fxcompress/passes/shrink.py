"""All that can be removed in one call: what is zero, what is constant, and paths that are narrower than their sum."""

from dataclasses import dataclass, replace
from typing import Literal

from fxcompress.channels.analysis import Analysis
from fxcompress.passes.fold_constants import Folded, fold_constants
from fxcompress.passes.held import NOTHING, Held, held_after
from fxcompress.passes.history import extended
from fxcompress.passes.narrow_branches import Narrowed, narrow_branches
from fxcompress.passes.prune_channels import Pruned, prune_channels
from fxcompress.provenance import attach
from fxcompress.trace.basics.modules import elements_in
from fxcompress.trace.inputs import ExampleInputs
from fxcompress.trace.traced import TracedModule

Narrow = bool | Literal["measure"]
"""Whether paths into sums are narrowed: none, all that can be, or those that make the network faster."""


def check_narrow(narrow: object, *, keep_code: bool = False) -> None:
    """Whether a value is one of :data:`Narrow`, and none that asks for other code where that has to stay.

    Raises:
        ValueError: it is not.
    """
    if narrow and keep_code:
        raise ValueError(
            "narrow makes other sums, and keep_code=True leaves the model's code as it is: pass one of both"
        )
    if not isinstance(narrow, bool) and narrow != "measure":
        raise ValueError(f'narrow={narrow!r}: pass True, False, or "measure" to narrow what is measured to pay')


@dataclass(frozen=True, slots=True)
class Shrunk:
    """The result of :func:`shrink`.

    Attributes:
        removals: what was removed, in one to three steps; the module of the last one is the result.
        folded: what was folded after the first of them; None where nothing was to be folded.
        narrowed: which paths were narrowed in the last one; None where none was to be narrowed.
    """

    removals: tuple[Pruned, ...]
    folded: Folded | None = None
    narrowed: Narrowed | None = None

    @property
    def module(self) -> TracedModule:
        """The rewritten network, with its provenance; tensors that are as they were are shared with the original."""
        return self.removals[-1].module


def shrink(
    module: TracedModule,
    inputs: ExampleInputs,
    analysis: Analysis | None = None,
    *,
    fold: bool = True,
    narrow: Narrow = False,
    held: Held = NOTHING,
) -> Shrunk:
    """Remove all that can be, and fold and narrow where that is asked for; ``module`` stays as it is.

    What is zero goes first: where a branch or the last channel of a layer is left alone, folding would gain nothing,
    and a path need not be narrower than its sum where the sum itself loses the channel. Nothing is folded if nothing
    goes then, as the network cannot be rewritten.

    Args:
        module: a traced network.
        inputs: that it runs on.
        analysis: of ``module``, when there is one already.
        fold: constants other than zero; then only evaluation stays the same.
        narrow: paths into sums.
        held: what is to stay whatever is proved.
    """
    first = prune_channels(module, inputs, analysis=analysis, held=held)
    attach(first.module, extended(module, first))
    removals = [first]
    folded = fold_constants(first.module, inputs) if fold else None
    if folded is not None and folded.channels:
        left = held_after(held, first.cuts)
        second = prune_channels(folded.module, inputs, analysis=folded.analysis, held=left)
        if second.modified and elements_in(second.module) <= elements_in(first.module):
            attach(second.module, extended(folded.module, second))
            removals.append(second)
        else:  # with a new bias a layer may take another path, which cannot be rewritten
            refused = dict.fromkeys(folded.channels, "the network cannot be rewritten without them") | folded.refused
            folded = replace(folded, module=first.module, channels={}, biases=(), refused=refused)
    narrowed = narrow_branches(removals[-1].module, inputs, measure=narrow == "measure") if narrow else None
    if narrowed is not None and narrowed.removal is not None:
        removals.append(narrowed.removal)
    return Shrunk(tuple(removals), folded, narrowed)
