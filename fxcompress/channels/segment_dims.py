"""Along which dims the segments of a value lie: what its map of segments cannot tell once one channel is left.

A mean over channels ends their segments, one over pixels carries them on. Of a single channel the map has size 1 along
all dims; so the dims are followed from where channels are made, lest a removal change what the objectives count.
"""

from collections.abc import Sequence

from torch import Tensor

from fxcompress.channels.dim_places import op_name, places_in
from fxcompress.channels.layers import blocks, support
from fxcompress.channels.rules.movement import RESHAPE
from fxcompress.channels.rules.reductions import reduced_dims
from fxcompress.channels.values import Step, Value, find

NONE: frozenset[int] = frozenset()
REDUCTIONS = frozenset({"mean", "variance", "product", "reduction", "pick", "sum", "extreme"})
"""Classes of ops that join all entries along some dims into one, with or without a dim of size 1 in their place."""
_OWN_PLACES = frozenset({"squeeze", "unsqueeze"})
_UNALIGNED = frozenset({"movement", "index"})
_ALIGNED = frozenset({"expand", "repeat", "tile"})
"""Of these, those that put the dims which they make before all others."""


class SegmentDims:
    """The dims of the segments of each value, by the value's key."""

    def __init__(self) -> None:
        self._dims: dict[int, frozenset[int]] = {}

    def of(self, value: Value) -> frozenset[int]:
        """The dims along which the segments of a value lie, or lay before channels went."""
        return self._dims.get(value.key, NONE)

    def make(self, value: Value, found: Tensor, dims: frozenset[int] = NONE) -> None:
        """Note the dims of new segments: these, and all along which they vary."""
        self._dims[value.key] = dims | support(found)

    def follow(self, step: Step, value: Value, found: Tensor) -> None:
        """Note the dims of segments that a step has carried on, or joined."""
        operands = find(Value, (step.call.args, step.call.kwargs))
        self.make(value, found, NONE.union(*(self._moved(step, x, value) for x in operands)))

    def _moved(self, step: Step, value: Value, out: Value) -> frozenset[int]:
        """Where the dims of an operand are in a result."""
        dims = self.of(value)
        if not dims:
            return NONE
        if step.op.name in REDUCTIONS and value is step.call.args[0]:
            dims -= reduced_dims(step.call)
        if step.op is RESHAPE and op_name(step.call) not in _OWN_PLACES:
            return _reshaped(dims, value.shape, out.shape)
        aligned = out.rank <= value.rank or step.op.name not in _UNALIGNED or op_name(step.call) in _ALIGNED
        places = places_in(step.op, step.call, value, out) if aligned else None
        return NONE if places is None else frozenset(p for d in dims if (p := places[d]) is not None)


def _reshaped(dims: frozenset[int], old: Sequence[int], new: Sequence[int]) -> frozenset[int]:
    """Where dims are after a reshape.

    Of channels that become heads with dims of their own, one head may be left, or one dim of each: so where a dim is
    put beside others than samples and channels alone, the channels may lie along it.
    """
    left, right = ([d for d, n in enumerate(shape) if n != 1] for shape in (old, new))
    runs = blocks([old[d] for d in left], [new[d] for d in right])
    runs = [run for run in runs if all(run)]  # of a tensor without entries, one side may have none
    pairs = [([left[i] for i in before], [right[j] for j in after]) for before, after in runs]
    found = {d for before, after in pairs if dims.intersection(before) for d in after}
    found = found.union(*(_one_placed(dim, len(old), len(new), pairs) for dim in dims.difference(left)))
    if len(new) == len(old) + 1 > 3:
        found |= {d for d, n in enumerate(new) if n == 1 and not found.isdisjoint({d - 1, d + 1})}
    return frozenset(found)


def _one_placed(dim: int, old: int, new: int, pairs: list[tuple[list[int], list[int]]]) -> list[int]:
    """Where a dim of size 1 is after a reshape: between those that it was between, or part of one of these.

    Args:
        dim: the dim.
        old: the number of dims before.
        new: the number behind.
        pairs: the other dims before and behind, in the smallest runs of equal size.
    """
    within = next((after for before, after in pairs if before[0] < dim < before[-1]), None)
    if within is not None:
        return within
    count = sum(before[-1] < dim for before, _ in pairs)
    first, last = (pairs[count - 1] if count else ([-1], [-1])), (*pairs, ([old], [new]))[count]
    places = range(first[1][-1] + 1, last[1][0])
    if places:
        return [places[min(dim - first[0][-1] - 1, len(places) - 1)]]
    joined = last if not count or (len(last[0]) > 1 and count < len(pairs)) else first
    return joined[1] if pairs else []
