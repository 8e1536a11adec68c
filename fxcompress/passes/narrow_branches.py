"""Lets one path into a sum be narrower than the sum.

A channel of a sum goes when it is zero on both paths. Where it is zero on one of them only, that path can lose it:

conv2.weight (8, 8, 3, 3)   channels 1 and 4 are zero          conv2.weight (6, 8, 3, 3)
bn2.weight   (8,)                                        ->    bn2.weight   (6,)
y = x + bn2(conv2(h))                                          y = x.index_add(1, [0, 2, 3, 5, 6, 7], bn2(conv2(h)))

The sum is first told to take from the path only the channels that are not zero. Then nobody reads the others, and
PruneChannels takes them out, with its proofs and its check. Where some of them stay for another reason, the sum takes
them as well.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import fx

from fxcompress.channels.analysis import analyse
from fxcompress.channels.constants import knowns_of, values_known
from fxcompress.channels.survivors import kept_masks, kept_shape
from fxcompress.channels.values import Value, find
from fxcompress.passes.base import Pass, PassResult, traced
from fxcompress.passes.history import extended
from fxcompress.passes.join import join_at
from fxcompress.passes.narrow_paths import NarrowPath, close_joins, find_paths, grown, open_joins
from fxcompress.passes.narrow_timing import speedups
from fxcompress.passes.prune_channels import Pruned, prune_channels
from fxcompress.provenance import Narrowing, attach
from fxcompress.trace.graph.described import Place, place_of_node
from fxcompress.trace.inputs import ExampleInputs
from fxcompress.trace.model.skeleton import skeleton
from fxcompress.trace.traced import TracedModule

_MARGIN = 1.05
"""How many times faster a narrow path must be to be taken, where it is measured."""

_IN_USE = "its zero channels are in use elsewhere"


@dataclass(frozen=True, slots=True)
class NarrowedPath:
    """A path that was narrowed.

    Attributes:
        place: ``"mode:node"``, the node that adds.
        name: what makes its channels.
        before, after: how many channels it had and has.
        where: the sum in the model.
        speedup: how many times faster the layers that became smaller and the sum are together; None if not measured.
    """

    place: str
    name: str
    before: int
    after: int
    where: Place
    speedup: float | None = None

    def __str__(self) -> str:
        measured = "" if self.speedup is None else f"; measured {self.speedup:.2f} times faster"
        return f"narrowed {self.name} {self.before} -> {self.after}, index_add in place of {self.where}{measured}"


@dataclass(frozen=True, slots=True)
class WidePath:
    """A path with zero channels that was not narrowed.

    Attributes:
        place: ``"mode:node"``, the node that adds.
        name: what makes its channels.
        reason: why it was not.
        where: the sum in the model.
    """

    place: str
    name: str
    reason: str
    where: Place

    def __str__(self) -> str:
        return f"left wide: {self.name} into {self.where}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Narrowed:
    """The result of :func:`narrow_branches`.

    Attributes:
        removal: what was removed, with the network that is left; None where no path was narrowed.
        paths: that were narrowed.
        wide: paths with zero channels that were not.
    """

    removal: Pruned | None
    paths: tuple[NarrowedPath, ...]
    wide: tuple[WidePath, ...]


@dataclass(frozen=True, slots=True)
class NarrowBranches(Pass):
    """Narrow the paths into sums, see the picture above; what the network computes stays the same, in both modes.

    Attributes:
        inputs: that the network runs on.
        measure: narrow only those paths that make the network faster on these inputs.
    """

    inputs: ExampleInputs
    measure: bool = False

    def __call__(self, module: fx.GraphModule) -> PassResult:
        """The rewritten network; tensors that lose nothing are shared with the original."""
        whole = traced(module)
        removal = narrow_branches(whole, self.inputs, measure=self.measure).removal
        if removal is None:
            return PassResult(skeleton(whole), modified=False)
        return PassResult(removal.module, modified=True)


def narrow_branches(module: TracedModule, inputs: ExampleInputs, *, measure: bool = False) -> Narrowed:
    """Narrow the paths into sums that are zero in some channels, always; ``module`` stays as it is.

    Args:
        module: a traced network that nothing else can be removed from: zeros that both paths share are left to
            :func:`fxcompress.passes.prune_channels.prune_channels`.
        inputs: that it runs on; with ``measure`` their values are used.
        measure: narrow only what pays.
    """
    with torch.no_grad():
        analysis = analyse(module, inputs)
        options, wide = find_paths(analysis, knowns_of(analysis, values_known))
        search = _Search(module, inputs, options, wide)
        removal = search.settle()
        if measure and removal is not None:
            removal = search.drop_what_does_not_pay(removal)
    if removal is None:
        return Narrowed(None, (), tuple(search.left_wide()))
    provenance = extended(module, removal)
    new = [Narrowing(p.place, p.operand, p.dim) for p in search.paths if join_at(module, _node(module, p)) is None]
    attach(removal.module, replace(provenance, joins=(*provenance.joins, *new)))
    return Narrowed(removal, tuple(search.described(removal)), tuple(search.left_wide()))


class _Search:
    """Finds the paths that can be narrowed, and what each of them can lose.

    Args:
        module: the network.
        inputs: that it runs on.
        options: for each sum the paths that may be narrowed, the best first.
        wide: the others, with the reason; filled here.
    """

    def __init__(
        self,
        module: TracedModule,
        inputs: ExampleInputs,
        options: dict[str, tuple[NarrowPath, ...]],
        wide: dict[NarrowPath, str],
    ) -> None:
        self.module, self.inputs = module, inputs
        self.options = {place: list(paths) for place, paths in options.items()}
        self.wide = wide
        self.measured: dict[str, float] = {}

    @property
    def paths(self) -> list[NarrowPath]:
        """The path that is to be narrowed at each sum."""
        return [paths[0] for paths in self.options.values() if paths]

    def settle(self) -> Pruned | None:
        """The network with all paths narrowed, once each sum takes just what its path has left; None for no path.

        What a sum takes only grows from one round to the next, so this ends.
        """
        while self.paths:
            module = skeleton(self.module)
            open_joins(module, self.paths)
            pruned = prune_channels(module, self.inputs)
            if not self._adjust(pruned):
                close_joins(pruned.module)
                return pruned
        return None

    def _adjust(self, pruned: Pruned) -> bool:
        """Let each sum take what stays on its path; whether that changes anything."""
        changed = False
        for path in self.paths:
            stays = _left(pruned, path)
            wanted = path if stays is None else grown(path, stays)
            if wanted == path:
                continue
            changed = True
            if len(wanted.index) < path.size:
                self.options[path.place][0] = wanted
            else:
                self._leave_wide(path, _IN_USE)
        return changed

    def _leave_wide(self, path: NarrowPath, reason: str) -> None:
        del self.options[path.place][0]
        self.wide[path] = reason

    def drop_what_does_not_pay(self, removal: Pruned) -> Pruned | None:
        """The network with only those paths narrowed that make it faster, where ``removal`` has narrowed all."""
        groups = {p.place: set(_smaller(removal, p)) for p in self.paths if p.mode == "eval"}
        try:
            self.measured = speedups(self.module, removal.module, self.inputs, groups)
        except Exception as error:  # noqa: BLE001 - whatever stops a network from running, it stays as it is
            slow = dict.fromkeys(self.paths, f"it could not be measured: {error}")
        else:
            slow = {p: self._verdict(p) for p in self.paths if self.measured.get(p.place, _MARGIN) < _MARGIN}
        for path, reason in slow.items():
            self.options[path.place] = [path]
            self._leave_wide(path, reason)
        return self.settle() if slow else removal

    def _verdict(self, path: NarrowPath) -> str:
        return (
            f"{path.size} -> {len(path.index)} was measured {self.measured[path.place]:.2f} times as fast, and "
            f"{_MARGIN} times are asked for"
        )

    def described(self, removal: Pruned) -> Iterator[NarrowedPath]:
        """What was narrowed, for people; not those paths that went as a whole after all."""
        for path in self.paths:
            stays = _left(removal, path)
            if stays is not None:
                left, measured = int(stays.sum()), self.measured.get(path.place)
                yield NarrowedPath(path.place, path.name, path.size, left, self._where(path), measured)

    def left_wide(self) -> Iterator[WidePath]:
        """What was not narrowed, for people."""
        for path, reason in self.wide.items():
            yield WidePath(path.place, path.name, reason, self._where(path))

    def _where(self, path: NarrowPath) -> Place:
        return place_of_node(_node(self.module, path))


def _node(module: TracedModule, path: NarrowPath) -> fx.Node:
    found: fx.Node = next(node for node in module.graphs[path.mode].nodes if node.name == path.node)
    return found


def _operand(pruned: Pruned, path: NarrowPath) -> Value | None:
    """What a join adds, before channels were cut; None where the join has gone with a branch."""
    args = pruned.analysis.trails[path.mode].args.get(path.node)
    return args[1] if args is not None and isinstance(args[1], Value) else None


def _left(pruned: Pruned, path: NarrowPath) -> np.ndarray | None:
    """Which channels of a path stay, bool (size,)."""
    value = _operand(pruned, path)
    everything = np.ones(path.size, dtype=bool)
    return None if value is None else kept_masks(value, pruned.plan.alive).get(path.dim, everything)


def _smaller(pruned: Pruned, path: NarrowPath) -> Iterator[str]:
    """The nodes of a path that have become smaller, and all that read them, the join too."""
    values = pruned.analysis.trails[path.mode].values
    left = [_node(pruned.analysis.module, path).args[1]] if path.node in values else []
    seen: set[fx.Node] = set()
    while left:
        node = left.pop()
        if not isinstance(node, fx.Node) or node in seen or not _shrinks(values[node.name], pruned.plan.alive):
            continue
        seen.add(node)
        yield node.name
        yield from (user.name for user in node.users)
        left += node.all_input_nodes


def _shrinks(result: object, alive: np.ndarray) -> bool:
    return any(kept_shape(value, alive) != tuple(value.shape) for value in find(Value, result))
