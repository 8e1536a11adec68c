"""All that is exact in evaluation: remove what is zero, fold what is constant, remove what is unused then."""

from dataclasses import dataclass

from fxcompress.channels.analysis import Analysis
from fxcompress.passes.fold_constants import Folded, fold_constants
from fxcompress.passes.history import extended
from fxcompress.passes.prune_channels import Pruned, prune_channels
from fxcompress.provenance import attach
from fxcompress.trace.inputs import ExampleInputs
from fxcompress.trace.traced import TracedModule


@dataclass(frozen=True, slots=True)
class Shrunk:
    """The result of :func:`shrink`.

    Attributes:
        removals: what was removed, in one or two steps; the module of the last one is the result.
        folded: what was folded between them.
    """

    removals: tuple[Pruned, ...]
    folded: Folded

    @property
    def module(self) -> TracedModule:
        """The rewritten network, with its provenance; tensors that are as they were are shared with the original."""
        return self.removals[-1].module


def shrink(module: TracedModule, inputs: ExampleInputs, analysis: Analysis | None = None) -> Shrunk:
    """Remove and fold all that can be, without a change in evaluation; ``module`` stays as it is.

    What is zero goes first: where a branch or the last channel of a layer is left alone, folding would gain nothing.

    Args:
        module: a traced network.
        inputs: that it runs on.
        analysis: of ``module``, when there is one already.
    """
    first = prune_channels(module, inputs, analysis=analysis)
    attach(first.module, extended(module, first))
    folded = fold_constants(first.module, inputs)
    if not folded.channels:
        return Shrunk((first,), folded)
    second = prune_channels(folded.module, inputs, analysis=folded.analysis)
    attach(second.module, extended(folded.module, second))
    return Shrunk((first, second), folded)
