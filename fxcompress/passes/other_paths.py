"""What a cut does to the paths through a model's own code that were not traced, where sizes decide between paths.

A graph holds checks for the decisions that sizes take. The model's own code holds none: where inputs of another size
take another path, it goes that way on fewer channels. So each such path that can be found is traced as well, and what
goes from the network must go from it too, by the same proofs:

    if x.shape[0] == 1:
        h = h * h.shape[1] ** -0.5       one row needs all channels of h: they stay, whatever holds for two rows

Two paths share their parameters, and nothing else. So what one of them needs is held by the names of tensors.
"""

from collections.abc import Mapping
from functools import cached_property

import numpy as np
import torch
from torch import nn

from fxcompress.channels.analysis import analyse
from fxcompress.channels.constants import knowns_of, values_known
from fxcompress.channels.rules.registry import Known
from fxcompress.channels.space import Reason
from fxcompress.errors import FxCompressError
from fxcompress.passes.cutting import Cut
from fxcompress.passes.held import NOTHING, Held, joined
from fxcompress.passes.prune_report import SizesDecide, WhyKept
from fxcompress.passes.rewrite import rewrite
from fxcompress.trace.fingerprint import same_graphs
from fxcompress.trace.inputs import ExampleInputs
from fxcompress.trace.retrace.other_sizes import OtherPath, OtherPaths, again, other_paths
from fxcompress.trace.retrace.size_attributes import hold_numbers, note_own_numbers
from fxcompress.trace.traced import TracedModule
from fxcompress.trace.tracer import trace_path
from fxcompress.trace.verify import agree, computes_the_same

PATH = "path"
"""The code of the reasons."""


class Untraced:
    """The paths through a model that its graph does not take.

    Args:
        model: the model's own code on the tensors of the network, with its provenance; stays as it is.
        traced: the network.
        inputs: that it runs on.
        known: what was found before, of the same model with other tensors.
    """

    def __init__(
        self, model: nn.Module, traced: TracedModule, inputs: ExampleInputs, known: OtherPaths | None = None
    ) -> None:
        self.found = other_paths(model, traced, inputs) if known is None else again(model, known)
        self._model = model
        self._paths = [_Path(model, path) for path in self.found.found]

    def __bool__(self) -> bool:
        return bool(self._paths)

    def holds(self, cuts: Mapping[str, Cut]) -> Held:
        """Of what is cut out of the network, what some of the paths need."""
        found: Held = {}
        for path in self._paths:
            found = joined(found, path.holds(cuts))
        return found

    def hold_numbers(self) -> None:
        """See :func:`fxcompress.trace.retrace.size_attributes.hold_numbers`."""
        for path in self._paths:
            if path.traced is not None:
                hold_numbers(path.traced)

    def broken(self, own: nn.Module, *, folded: bool) -> str:
        """The inputs on which the model's code computes something else on what is left; "" for none.

        Args:
            own: that code on what is left, where :meth:`holds` has found nothing.
            folded: constants have been folded, so that only evaluation is the same.
        """
        return next((path.shapes for path in self._paths if not path.is_same(self._model, own, folded=folded)), "")

    def told(self, *, changed: bool) -> SizesDecide | None:
        """What there is to say of a cut of the network, None for nothing: no size decides, or nothing has changed."""
        found = self.found
        if not changed or not (found.lines or found.open or found.more):
            return None
        proved = tuple(path.shapes for path in self._paths if path.is_proved)
        ran = tuple(path.shapes for path in self._paths if not path.is_proved)
        return SizesDecide(found.lines, proved, ran, found.open, found.more)


class _Path:
    """One of them.

    Attributes:
        traced: the model as it was traced on it; None where it cannot be.
        shapes: of the inputs that take it, in words.
        is_proved: whether all that was said of it was proved.
    """

    def __init__(self, model: nn.Module, path: OtherPath) -> None:
        self.inputs, self.traced, self._training = path.inputs, path.traced, path.training
        self.shapes = str(path.inputs)
        self.is_proved = path.training
        self._left: TracedModule | None = None
        if self.traced is not None:
            note_own_numbers(self.traced, model, self.inputs)
            try:
                self._analysis = analyse(self.traced, self.inputs)
            except FxCompressError:
                self.traced, self.is_proved = None, False

    @cached_property
    def _knowns(self) -> dict[str, list[Known]]:
        return knowns_of(self._analysis, values_known, (False, True) if self._training else (False,))

    def holds(self, cuts: Mapping[str, Cut]) -> Held:
        """Of what is cut out of the network, what the path needs."""
        if self.traced is None or not cuts:
            self._left = self.traced
            return NOTHING
        analysis = self._analysis
        unused = [atoms for atoms, reason in analysis.space.pins if reason.code == "unused"]
        request, asked = np.ones(analysis.space.size, dtype=bool), np.zeros(analysis.space.size, dtype=bool)
        for block in analysis.space.blocks:
            if block.name:
                gone = _gone(cuts.get(block.name), block.dim, block.size)
                request[block.start : block.start + block.size] = asked[block.start : block.start + block.size] = gone
        asked[np.concatenate([_NONE, *unused])] = False
        with torch.no_grad():
            result = rewrite(analysis, self._knowns, request)
        self._left = result.module
        needed = asked & result.plan.alive
        if not needed.any():
            return NOTHING
        why = WhyKept(analysis, result.plan, self._knowns)
        found: dict[tuple[str, int], dict[int, Reason]] = {}
        for block in analysis.space.blocks:
            for entry in np.flatnonzero(needed[block.start : block.start + block.size]).tolist():
                text = f"on inputs of other sizes, {self.shapes}, the model's code needs it: {why(block.start + entry)}"
                found.setdefault((block.name, block.dim), {})[entry] = Reason(PATH, text)
        return found

    def is_same(self, model: nn.Module, own: nn.Module, *, folded: bool) -> bool:
        """Whether the model's code computes the same on what is left; where it can be, it is proved."""
        if folded:
            self.is_proved = False
            return agree(model, own, self.inputs, modes=(False,))
        ran = self._training or agree(model, own, self.inputs)
        if self._left is None or not ran:
            return ran and agree(model, own, self.inputs)
        try:
            seen = trace_path(own, self.inputs, training=self._training)
        except FxCompressError:
            return False
        return same_graphs(seen, self._left) or computes_the_same(self._left, own, self.inputs)


def _gone(cut: Cut | None, dim: int, size: int) -> np.ndarray:
    """Which entries are cut out of a dim, bool (size,)."""
    gone = np.zeros(size, dtype=bool)
    if cut is not None and dim in cut.indices:
        gone[:] = True
        gone[cut.indices[dim].numpy()] = False
    return gone


_NONE = np.zeros(0, dtype=np.int64)
