"""Inputs of other sizes that take another way through a model than the one that was traced.

    if x.shape[0] == 1: ...              traced with two rows: one row goes the other way
    if x.shape[1] > self.window: ...     traced with ten words: as many as the window has, and one more, do

A graph that was traced by running checks each decision on sizes. So it can be asked, without the model and without any
values, which sizes take its own path. Sizes to ask for are few and small, and those that decisions compare with.
"""

from collections import Counter
from dataclasses import dataclass, field
from dataclasses import replace as replace_fields
from itertools import combinations
from typing import Any

from torch import fx, nn

from fxcompress.errors import FxCompressError
from fxcompress.trace.concrete.run import runs
from fxcompress.trace.graph.guards import check
from fxcompress.trace.inputs import ExampleInputs
from fxcompress.trace.retrace.path_probe import PathProbe, decides_on_sizes
from fxcompress.trace.retrace.resized_inputs import ChosenDims, dims_of, few_sizes, shapes_of, sizes_around, with_size
from fxcompress.trace.traced import TracedModule
from fxcompress.trace.tracer import trace_path

MOST, ALIKE = 6, 2
"""How many other paths are looked at in all, and how many that part from the known ones at the same number.

Where what decides is no number, but whether something holds, one is enough.
"""
_EFFORT = 15_000
"""How many nodes are run in all, to find them."""
_FIRST = 3
"""Where a model takes none of so many other sizes, it takes one size alone."""


@dataclass(frozen=True, slots=True, eq=False)
class OtherPath:
    """A path through a model that its graph does not take.

    Attributes:
        inputs: that take it.
        traced: the model as it was traced on these; None where it cannot be.
        training: whether that stands for training as well.
    """

    inputs: ExampleInputs
    traced: TracedModule | None
    training: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class OtherPaths:
    """What sizes decide in a model.

    Attributes:
        found: paths that were found, besides the one of the graph.
        lines: of the model, where decisions come out in another way on them.
        open: lines of the model where others decide on sizes of the inputs, and came out the same each time.
        more: whether there are more paths of the same kind.
    """

    found: tuple[OtherPath, ...] = ()
    lines: tuple[str, ...] = ()
    open: tuple[str, ...] = ()
    more: bool = False


def other_paths(model: nn.Module, traced: TracedModule, inputs: ExampleInputs) -> OtherPaths:
    """Find inputs that take other paths; nothing is looked for where no size decides anything.

    Args:
        model: stays as it is.
        traced: the model as it was traced.
        inputs: that it was traced on.
    """
    if not sizes_decide(traced):
        return OtherPaths()
    first = PathProbe(traced)
    if first.parts_at(inputs) is not True:  # an op that needs values, say
        return OtherPaths(open=tuple(dict.fromkeys(str(node.args[3]) for node in first.checks)), more=True)
    search = _Search(model, [first])
    search.around(inputs)
    for path in search.found:  # what decisions there are on these, and so on
        search.around(path.inputs)
    lines = dict.fromkeys(line for key in search.parted for line, _ in key)
    own = [str(node.args[3]) for node in first.checks] if search.is_spent else []
    undecided = dict.fromkeys(line for probe in search.probes for line in (*probe.undecided, *own) if line not in lines)
    return OtherPaths(tuple(search.found), tuple(lines), tuple(undecided), search.more)


def sizes_decide(traced: TracedModule) -> bool:
    """Whether code has taken decisions on sizes in the trace of a network."""
    return any(
        decides_on_sizes(n) for g in traced.graphs.values() for n in g.find_nodes(op="call_function", target=check)
    )


def again(model: nn.Module, known: OtherPaths) -> OtherPaths:
    """The paths that were found, of the same model with other tensors."""
    paths = (_traced_on(model, path.inputs) for path in known.found)
    return replace_fields(known, found=tuple(path for path in paths if path is not None))


def without_graphs(known: OtherPaths) -> OtherPaths:
    """What :func:`again` needs, without the tensors of the model."""
    return replace_fields(known, found=tuple(replace_fields(path, traced=None) for path in known.found))


@dataclass(slots=True, eq=False)
class _Search:
    model: nn.Module
    probes: "list[PathProbe]"
    found: list[OtherPath] = field(default_factory=list)
    parted: Counter[tuple[tuple[str, str], ...]] = field(default_factory=Counter)
    seen: set[tuple[Any, ...]] = field(default_factory=set)
    more: bool = False

    @property
    def is_spent(self) -> bool:
        """Whether enough has been tried."""
        return sum(probe.effort for probe in self.probes) > _EFFORT

    def around(self, inputs: ExampleInputs) -> None:
        """Look at inputs that differ from these in one size, wherever it stands."""
        self._look_at(inputs)
        fit = [(chosen, size) for chosen, size in dims_of(inputs) if self._takes_others(inputs, chosen, size)]
        for first, second in combinations([chosen for chosen, _ in fit], 2):
            small = with_size(inputs, first, 1)
            self._look_at(small and with_size(small, second, 1))
        for chosen, _ in fit:
            for other in sizes_around(self.probes[0].compared_with):
                self._look_at(with_size(inputs, chosen, other))

    def _takes_others(self, inputs: ExampleInputs, chosen: "ChosenDims", size: int) -> bool:
        """Look at a few inputs of other sizes; whether the model takes some of the first of them."""
        fails = 0
        for other in few_sizes(size):
            fails += not self._look_at(with_size(inputs, chosen, other))
            if fails == _FIRST:
                return False
        return True

    def _look_at(self, inputs: ExampleInputs | None) -> bool:
        """Whether the model may run on such inputs; where they take a new path, that is noted."""
        if inputs is None or (shapes := shapes_of(inputs)) in self.seen:
            return inputs is not None
        if self.is_spent:
            self.more = True
            return True
        self.seen.add(shapes)
        parted = []
        for probe in self.probes:
            end = probe.parts_at(inputs)
            if not isinstance(end, fx.Node):
                return end
            parted.append(end)
        key = tuple(dict.fromkeys(map(_decision, parted)))
        alike = 1 if all(type(node.args[1]) is bool for node in parted) else ALIKE
        if self.parted[key] >= alike or len(self.found) >= MOST:
            self.more = True
            return True
        path = _traced_on(self.model, inputs)
        if path is None:
            return False
        self.parted[key] += 1
        self.found.append(path)
        if path.traced is not None:
            self.probes.append(PathProbe(path.traced))
        return True


def _traced_on(model: nn.Module, inputs: ExampleInputs) -> OtherPath | None:
    """The path that inputs take; None where the model does not take them."""
    try:
        return OtherPath(inputs, trace_path(model, inputs))
    except FxCompressError:
        pass
    if not runs(model, inputs):
        return None
    trains = runs(model, inputs, training=True)
    try:  # one row in training, say, of which a batch norm has no variance
        return OtherPath(inputs, trace_path(model, inputs, training=False), training=not trains)
    except FxCompressError:
        return OtherPath(inputs, None, training=False)


def _decision(node: fx.Node) -> tuple[str, str]:
    """The line of a decision, and what kind it is of: several may stand in a line."""
    decision: Any = node.args[0]
    return str(node.args[3]), getattr(getattr(decision, "target", None), "__name__", "")
