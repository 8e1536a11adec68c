"""Dims that a reshape has joined with others whose size the inputs decide: what stands where in them follows the input.

``h.flatten(1)`` is (N, C * H * W): entry 20 belongs to channel 1 of images of 4 by 4, and to channel 2 of 3 by 3. A
layer that reads all of them fixes their number. What picks some of them reads others in the next run: what has labels
there stays, and what is constant must be so along all of the dim.
"""

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import torch

from fxcompress.channels.dim_places import REDUCE, Places, op_name, places_in
from fxcompress.channels.factories import SPREAD
from fxcompress.channels.given_sizes import GivenSize
from fxcompress.channels.layers import along, blocks, support
from fxcompress.channels.layouts import Block, Pair, is_doubtful, stays
from fxcompress.channels.rules.contraction import CONVOLUTION, site_of
from fxcompress.channels.rules.indexing import INDEX, indexed_dims
from fxcompress.channels.rules.movement import CAT, PERMUTE, RESHAPE
from fxcompress.channels.rules.pointwise import SAME, unexpanded
from fxcompress.channels.rules.puts import INDEX_PUT
from fxcompress.channels.rules.reductions import SOFTMAX, reduced_dims
from fxcompress.channels.rules.registry import OpClass
from fxcompress.channels.values import Call, Value, find

NONE: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True, eq=False)
class _Join:
    """What dims were before they became others.

    Attributes:
        before: their sizes.
        after: the sizes of what they have become, but for ones.
        own: what each of them was before that, where a reshape had joined it.
        free: which of them may have another size for other inputs.
    """

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    own: tuple["_Join | None", ...] = ()
    free: tuple[bool, ...] = ()


class Joined:
    """Follows such dims through the steps of an interpretation.

    Args:
        made: keys of the values that are made of parameters alone: none of their sizes is another one for other inputs.

    Attributes:
        written: the sizes that stand in the graph where the node that runs reshapes a tensor.
        given: what it is given as the size of each dim of its result.
        repeated: of each of its last dims, whether the node that runs repeats one entry as often for all inputs.
        flattens: the dims that it makes one of; None where it is no such node.
        lists: whether it is given a list of tensors, as many as stand in the graph.
        elsewhere: gives the shapes of its first argument and of its result on inputs of other sizes.
    """

    def __init__(self, made: AbstractSet[int]) -> None:
        self._made = made
        self._joins: dict[int, dict[int, _Join]] = {}
        self._ones: dict[int, frozenset[int]] = {}  # dims of one entry, for all inputs
        self._parts: dict[int, frozenset[int]] = {}  # dims of more, split off channels or repeated
        self.written: Collection[int] = ()
        self.given: Sequence[GivenSize] = ()
        self.repeated: Sequence[bool] = ()
        self.flattens: range | None = None
        self.lists = False
        self.elsewhere: Callable[[], list[Pair]] = list

    def free(self, value: Value) -> list[bool]:
        """Of each dim of a value, whether its size may be another one for other inputs."""
        return [not self._is_fixed(value, d) for d in range(value.rank)]

    def dims(self, value: Value) -> frozenset[int]:
        """The dims of a value along which the places of its entries follow the input."""
        return frozenset(self._joins.get(value.key, NONE))

    def picked(self, op: OpClass, call: Call) -> frozenset[int]:
        """The dims among these of the first argument of a call of which it picks entries by their places."""
        source = call.args[0] if self._joins and call.args else None
        if not isinstance(source, Value) or source.key not in self._joins:
            return NONE
        if op is INDEX or op is INDEX_PUT:
            return self.dims(source) & indexed_dims(call)
        picks = _PICKS.get(op_name(call))
        return NONE if picks is None else self.dims(source) & {d % source.rank for d in picks(call)}

    def spread_over(self, op: OpClass, call: Call) -> Iterator[torch.Tensor]:
        """The labels of parameters that meet one entry of a dim of the inputs: for as many they would meet one by one.

        ``(N, 1, C) + (4, C)``: there may be four in the next run.
        """
        operands = find(Value, call.args)
        if not op.name.startswith(_POINTWISE) or len(operands) < 2:
            return
        rank = call.metas[0].ndim
        for value in operands:
            shape, ones = unexpanded(value), self._ones.get(value.key, NONE)
            places = [d for d, n in enumerate(value.shape) if n == 1 == shape[d] and d not in ones]
            dims = frozenset(d + rank - value.rank for d in places if value.key not in self._made)
            for other in (x for x in operands if dims and x.key in self._made):
                own = frozenset(d - rank + other.rank for d in dims)
                yield from (layer for layer in other.layers if support(layer) & own)

    def follow(self, op: OpClass, call: Call, outputs: tuple[Value, ...], *, moving: bool) -> frozenset[int]:
        """Note what a step makes of such dims.

        Args:
            op: its class.
            call: what was called.
            outputs: what it made.
            moving: whether numbers that come from sizes are among what was given.

        Returns:
            the dims of its first argument that a reshape has turned into others in a way that depends on their sizes.
        """
        source = call.args[0] if call.args else None
        if op is RESHAPE and isinstance(source, Value) and op_name(call) not in {"squeeze", "unsqueeze"}:
            return NONE if source.key in self._made else self._reshape(source, outputs[0])
        made = NONE if moving or not outputs else _ones_made(call, outputs[0])
        if self._joins or self._ones or made:
            operands = [v for v in find(Value, call.args) if v.key not in self._made]
            for out in outputs:
                moved = [(v, places_in(op, call, v, out)) for v in operands]
                joins = self._of_groups(call) if op is CONVOLUTION else {}
                ones = made if moving else made | self._ones_in(out, moved)
                self._note(out, joins | self._joins_in(out, moved), ones)
                parts = self._repeats(call, out)
                if op is CAT and self.lists:
                    parts |= self._stacked(call, out)
                stays = op in _IN_PLACE or op.name.startswith(_POINTWISE) or op_name(call) in REDUCE
                if self._parts and stays:
                    parts |= self._parts_in(out, moved)
                self._note_parts(out, parts)
        return NONE

    def _of_groups(self, call: Call) -> dict[int, _Join]:
        """The channels that a convolution makes where samples are its groups: those of a sample behind each other."""
        site = site_of(call)
        if site is None or site.groups == 1:
            return {}
        if 1 not in self.dims(site.source) and 0 not in self.dims(site.weight):
            return {}
        return {1: _Join((site.groups, site.rows // site.groups), (site.rows,), (None, None), (True, False))}

    def _note(self, value: Value, joins: dict[int, _Join], ones: frozenset[int]) -> None:
        if joins:
            self._joins[value.key] = joins
        if ones:
            self._ones[value.key] = ones

    def _note_parts(self, value: Value, parts: AbstractSet[int]) -> None:
        if parts:
            self._parts[value.key] = frozenset(parts)

    def _repeats(self, call: Call, out: Value) -> set[int]:
        """The dims of a result that repeat one entry as often for all inputs: ``h[:, :, None].repeat(1, 1, 4)``."""
        source = call.args[0] if self.repeated and op_name(call) in _REPEAT else None
        if not isinstance(source, Value):
            return set()
        ones = {d + out.rank - source.rank for d in self._ones.get(source.key, NONE)}
        return {d for d in ones if out.rank - d <= len(self.repeated) and self.repeated[d - out.rank]}

    def _stacked(self, call: Call, out: Value) -> set[int]:
        """The dim along which tensors are put behind each other, where each has as many entries for all inputs."""
        dim, tensors = call.arg(1, "dim", 0) % out.rank, call.args[0]
        return {dim} if all(isinstance(t, Value) and self._is_fixed(t, dim) for t in tensors) else set()

    def _parts_in(self, out: Value, moved: list[tuple[Value, Places | None]]) -> set[int]:
        """Where such dims are in a result; as wide as there, as what is broadcast has one entry."""
        pairs = [(value, places, d) for value, places in moved for d in self._parts.get(value.key, NONE)]
        found = {places[d] for value, places, d in pairs if places is not None and _is_as_wide(value, d, out, places)}
        return {d for d in found if d is not None}

    def _joins_in(self, out: Value, moved: list[tuple[Value, Places | None]]) -> dict[int, _Join]:
        found: dict[int, _Join] = {}
        for value, places in moved:
            own = self._joins.get(value.key, {})
            if own and places is None:
                found = {d: _Join() for d in range(out.rank)} | found
            elif places is not None:
                found = {p: join for d, join in own.items() if (p := places[d]) is not None} | found
        return found

    def _ones_in(self, out: Value, moved: list[tuple[Value, Places | None]]) -> frozenset[int]:
        """The dims that have one entry in all operands that have them."""
        found: set[int | None] = set()
        for value, places in moved:
            ones = self._ones.get(value.key, NONE)
            found |= set() if places is None else {places[d] for d in ones}
        for value, places in moved:
            ones = self._ones.get(value.key, NONE)
            found -= found if places is None else {places[d] for d in range(value.rank) if d not in ones}
        return frozenset(d for d in found if d is not None and out.shape[d] == 1)

    def _reshape(self, source: Value, out: Value) -> frozenset[int]:
        """Note what a reshape makes of the dims of a tensor.

        Args:
            source: the tensor.
            out: the result.

        Returns:
            as :meth:`follow`.
        """
        joins, ones = self._joins.get(source.key, {}), self._ones.get(source.key, NONE)
        found, kept, mixed, parts = dict[int, _Join](), set[int](), set[int](), set[int]()
        stated = self._stated(out) or [None] * out.rank
        open_ended = any(size is None and n == 1 for size, n in zip(stated, out.shape, strict=True))
        split = self._blocks(source, out)
        opens = any(self._is_open(out, d) for old, new in split if not old for d in new)
        for old, new in split:
            wide = [d for d in new if out.shape[d] > 1]
            if opens and joins.keys() & set(old) and wide and not any(self._is_open(out, d) for d in wide):
                mixed |= set(old)  # what of it is beyond the stated sizes goes into dims of one entry
            if (
                not open_ended
                and sum(stated[d] is None for d in new) < 2
                and all(self._is_fixed(source, d) for d in old)
            ):
                parts |= {d for d in new if out.shape[d] > 1}
            if 1 in self.written and not any(source.shape[d] == 1 and not self._is_fixed(source, d) for d in old):
                kept |= {d for d in new if out.shape[d] == 1}
            if self._stated(out) and self._changes_sides(source, out, old, new):
                mixed |= {d for d in old if self._is_fixed(source, d)}
            if self._is_by_chance(source, out, split, old, new) or self._moves_elsewhere(
                source, out, split, (old, new)
            ):
                mixed |= set(old)
            if len(old) == len(new) == 1:
                found |= {new[0]: joins[old[0]]} if old[0] in joins else {}
                kept |= {new[0]} if old[0] in ones else set()
            elif old and new:
                after = tuple(out.shape[d] for d in new)
                made, irregular = self._join(source, old, after, self._given(out, new))
                found |= {d: join for d, join in zip(new, made, strict=True) if join is not None}
                mixed |= set(old) if irregular else set()
        found |= {d: _Join() for d in self._beside(source, out, split) if d not in found}
        self._note(out, found, frozenset(kept))
        self._note_parts(out, parts - found.keys())
        return frozenset(mixed)

    def _beside(self, source: Value, out: Value, split: list[Block]) -> Iterator[int]:
        """The dims that channels become which may take in one entry behind them as well, that may be more for others.

        ``(N, C, 1, L).flatten(1, 2)``: there are C channels here, and ``C * 2`` where there are two.
        """
        known = len(self.given) == out.rank
        for old, new in split:
            if not old or not new or not all(self._is_fixed(source, d) and source.shape[d] > 1 for d in old):
                continue
            behind = itertools.takewhile(lambda d: source.shape[d] == 1, range(max(old) + 1, source.rank))
            ones = itertools.takewhile(lambda d: out.shape[d] == 1, range(max(new) + 1, out.rank))
            free = sum(not self._is_fixed(source, d) for d in behind)
            if self.flattens is not None and source.rank - len(self.flattens) + 1 == out.rank:
                vanishes = max(old) in self.flattens and max(old) + 1 in self.flattens and free > 0
            else:
                vanishes = free > sum(not known or self.given[d].follows is not False for d in ones)
            if vanishes:
                yield from (d for d in new if not known or self.given[d].follows is not False)

    def _is_by_chance(self, source: Value, out: Value, split: list[Block], old: list[int], new: list[int]) -> bool:
        """Whether channels, whose number is fixed, become dims that follow the inputs: as large as they by chance.

        ``h.mT.reshape(n, 16, -1)`` of as many channels as pixels: the -1 is the number of pixels. So is that of
        ``h.reshape(n, 2, 4, -1)``, of two words, and not 2 of 8 channels. A batch of one sample is none of them: 16
        channels are all of ``n * 16``.
        """
        if not old or not all(self._is_fixed(source, d) for d in old):
            return False
        wide = [d for d in new if out.shape[d] > 1]
        given = self._given(out, wide)
        follows = [size.follows for size in given]
        if any(follows) and math.prod(size.part for size in given) == math.prod(out.shape[d] for d in wide):
            return False
        stated = self._stated(out) or [None] * out.rank
        pairs = [(a[0], b[0]) for a, b in split if len(a) == len(b) == 1]
        replaced = {source.shape[a] for a, b in pairs if stated[b] is not None and not self._is_fixed(source, a)}
        absorbs = len(wide) > 1 and any(n > 1 for n in replaced)  # beside numbers, -1 takes what these leave
        return any(follows) or (None in follows and (absorbs or math.prod(source.shape[d] for d in old) in replaced))

    def _moves_elsewhere(self, source: Value, out: Value, split: list[Block], own: Block) -> bool:
        """Whether channels lie among other dims for inputs of other sizes; see :func:`is_doubtful`."""
        old, new = own
        if (
            len(self.given) != out.rank
            or not new
            or not any(self._is_fixed(source, d) and source.shape[d] > 1 for d in old)
        ):
            return False
        if not is_doubtful(split, own, self.free(source), self.given):
            return False
        return not stays(own, (source.shape, out.shape), self.elsewhere())

    def _given(self, out: Value, new: list[int]) -> list[GivenSize]:
        """What a reshape is given as the sizes of some dims; where that is not known, as if all of them were stated."""
        return (
            [self.given[d] for d in new] if len(self.given) == out.rank else [GivenSize(None, follows=False)] * len(new)
        )

    def _stated(self, out: Value) -> list[int | None]:
        """The sizes of what a reshape makes that stand in the graph, None for others; none where not known."""
        return [size.stated for size in self.given] if len(self.given) == out.rank else []

    def _is_open(self, out: Value, dim: int) -> bool:
        """Whether a dim of what a reshape makes may have any number of entries in the next run: none is stated."""
        if stated := self._stated(out):
            return stated[dim] is None
        return out.shape[dim] not in self.written

    def _changes_sides(self, source: Value, out: Value, old: list[int], new: list[int]) -> bool:
        """Whether a size of the inputs, one here, is before some channels in a tensor and behind them in the result.

        ``h.reshape(n, 8, -1)`` of (n, 1, 8): with more words, entries of the 8 are of all channels.
        """
        own = [d for d in old if self._is_fixed(source, d)]
        if not own or not new or all(source.shape[d] == 1 for d in own):
            return False
        free = [not self._is_fixed(source, d) for d in range(source.rank)]
        first, last = min(own), max(own)
        wide = [d for d in new if out.shape[d] > 1]
        start, stop = min(wide, default=new[0]), max(wide, default=new[-1])
        unstated = [size is None for size in self._stated(out)]
        one = [size is None and n == 1 for size, n in zip(self._stated(out), out.shape, strict=True)]
        behind = any(one[stop + 1 :]) and not any(free[last + 1 :]) and sum(free[:first]) > sum(unstated[:start])
        before = any(one[:start]) and not any(free[:first]) and sum(free[last + 1 :]) > sum(unstated[stop + 1 :])
        return behind or before

    def _join(
        self, source: Value, old: list[int], after: tuple[int, ...], given: list[GivenSize]
    ) -> tuple[Sequence[_Join | None], bool]:
        """What a reshape makes of some dims, and whether for other sizes it would make something else of them.

        Args:
            source: the tensor.
            old: the dims, one behind the other.
            after: the sizes of what they become.
            given: what it is given for these.
        """
        joins = self._joins.get(source.key, {})
        before, own = tuple(source.shape[d] for d in old), tuple(joins.get(d) for d in old)
        fixed = [self._is_fixed(source, d) for d in old]
        met = {x for x in own if x is not None}
        join = next(iter(met), None)
        if join is not None and len(met) == 1 and (join.after, join.before) == (_several(before), after):
            fits = all(n == 1 or not free or n not in self.written for n, free in zip(after, join.free, strict=True))
            if fits:
                return join.own, False  # as it was before
        made, irregular = _rejoined(before, after, own, fixed, given)
        if any(x is not None and any(x.free) for x in own) and len(after) > 1:
            # One entry, of a size of the inputs: which of all that was joined it is, only the order of before tells.
            irregular |= any(n == 1 and size.follows is not False for n, size in zip(after, given, strict=True))
        if not irregular:
            return made, False
        parts = list(self._parts_of(source, old))
        sizes, origins = tuple(n for n, _, _ in parts), tuple(x for _, x, _ in parts)
        known = [own for _, _, own in parts]
        if len(parts) == len(old) or not _starts_alike(sizes, known, after, given):
            return made, True
        return _rejoined(sizes, after, origins, known, given)

    def _parts_of(self, source: Value, dims: list[int]) -> Iterator[tuple[int, "_Join | None", bool]]:
        """What dims are made of: size, what it was before, and whether it is fixed, of each dim that became one.

        A reshape of what a reshape has made is one of what was before. So ``(N, C * 9, L)``, of the windows of an
        ``unfold``, which becomes ``(N, groups, C / groups, 9, L)``, is looked at as ``(N, C, 3, 3, L)``, whose C is
        that of channels for all inputs, where nobody could tell what of ``C * 9`` is.
        """
        joins = self._joins.get(source.key, {})
        for d in dims:
            join = joins.get(d)
            if join is not None and len(join.after) == 1 and math.prod(join.before) == source.shape[d]:
                yield from zip(join.before, join.own, (not free for free in join.free), strict=True)
            else:
                yield source.shape[d], join, self._is_fixed(source, d)

    def _is_fixed(self, value: Value, dim: int) -> bool:
        """Whether the size of a dim is as it is for all inputs: that of channels, or of all of them several times."""
        layer = along(value.layers, dim)
        labelled = layer is not None and bool(layer.all()) and dim not in self._joins.get(value.key, NONE)
        return labelled or any(dim in dims.get(value.key, NONE) for dims in (self._ones, self._parts))

    def _blocks(self, source: Value, out: Value) -> list[tuple[list[int], list[int]]]:
        """As :func:`blocks`; what has one entry here and may have more goes with its neighbour where it vanishes."""
        found: list[tuple[list[int], list[int]]] = []
        front: list[int] = []
        for old, new in blocks(source.shape, out.shape):
            if new or all(self._is_fixed(source, d) for d in old):
                found.append((front + old, new))
                front = []
            elif found and found[-1][0]:
                found[-1][0].extend(old)
            else:
                front += old
        return list(self._with_ones_behind(source, out, found))

    def _with_ones_behind(self, source: Value, out: Value, split: list[Block]) -> Iterator[Block]:
        """Blocks, of which those that were joined have the sizes of inputs behind them, which are one here.

        ``(N * C,).unflatten(0, (-1, n))`` of one sample: the new dim has no entry to show whether it is the N.
        """
        joins, stated = self._joins.get(source.key, {}), self._stated(out)
        last: Block | None = None
        for old, new in split:
            if last and not old and stated and joins.keys() & set(last[0]) and any(stated[d] is None for d in new):
                last = (last[0], last[1] + new)
                continue
            if last:
                yield last
            last = (old, new)
        if last:
            yield last


def _rejoined(
    before: tuple[int, ...],
    after: tuple[int, ...],
    own: tuple[_Join | None, ...],
    fixed: list[bool],
    given: list[GivenSize],
) -> tuple[list[_Join | None], bool]:
    """As :meth:`Joined._join`, of dims of sizes ``before`` that have not been what they become."""
    rest = [] if all(fixed) else _split(before, after, fixed, _open_ends(before, after, fixed, given))
    rest = [i for i in rest if after[i] > 1] or rest
    vanished = any(n == 1 and not known for n, known in zip(before, fixed, strict=True))
    irregular = sum(after[i] > 1 for i in rest) > 1 or (vanished and len(after) > 1 and 1 in after[:-1])
    join = _Join(before, _several(after), own, tuple(not known for known in fixed))
    return [join if i in rest else None for i in range(len(after))], irregular


def _starts_alike(before: tuple[int, ...], known: list[bool], after: tuple[int, ...], given: list[GivenSize]) -> bool:
    """Whether sizes begin with those of channels, and become numbers of the graph that take up just these.

    Then the rest becomes the rest, whatever its sizes are: in a row, what is first decides where all else lies.
    """
    count = next((i for i, own in enumerate(known) if not own), len(known))
    whole, taken = math.prod(before[:count]), 1
    for size, entry in zip(given, after, strict=True):
        if taken == whole or size.stated is None:
            break
        taken *= entry
    return count > 0 and whole > 1 and taken == whole


def _is_as_wide(value: Value, dim: int, out: Value, places: Places) -> bool:
    """Whether a dim of an argument has as many entries in a result."""
    place = places[dim]
    return place is not None and out.shape[place] == value.shape[dim]


def _several(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Those above one, if there are any."""
    return tuple(n for n in sizes if n > 1) or (1,)


def _open_ends(
    before: tuple[int, ...], after: tuple[int, ...], fixed: list[bool], given: list[GivenSize]
) -> list[bool]:
    """Which dims of ``after`` follow the inputs: not what is left where the others take up all of ``before`` that does.

    (B, 12) -> (B * 3, -1): the -1 is 4 for all inputs, as a size in its place is. (B, 12) -> (4, -1): it is B * 3.
    """
    free = math.prod(n for n, own in zip(before, fixed, strict=True) if not own)
    moving = [_moving(n, size) if size.follows else 1 for n, size in zip(after, given, strict=True)]
    taken = math.prod(n for n, size in zip(after, given, strict=True) if size.follows)
    left = [i for i, n in enumerate(moving) if n > 1 and math.prod(moving) == n * free]
    return [
        taken % max(free, 1) != 0 if size.follows is None else size.follows and left != [i]
        for i, size in enumerate(given)
    ]


def _moving(n: int, size: GivenSize) -> int:
    """What of a size that follows the inputs is no fixed factor of it."""
    return n if n % max(size.part, 1) else n // max(size.part, 1)


def _split(before: tuple[int, ...], after: tuple[int, ...], fixed: list[bool], follows: list[bool]) -> list[int]:
    """The dims of ``after`` that hold others than the fixed ones: those at both ends may be parts of the fixed ones.

    (B, 12) -> (B * 3, 4), where 12 is fixed: the 4 is a part of it. What follows the inputs is none.
    """
    left = list(range(len(after)))
    for first, place in ((True, 0), (False, -1)):
        order = fixed if first else fixed[::-1]
        count = next((i for i, own in enumerate(order) if not own), len(order))
        whole = math.prod(before[:count] if first else before[len(before) - count :])
        while (
            len(left) > 1
            and count
            and not follows[left[place]]
            and after[left[place]]
            and not whole % after[left[place]]
        ):
            whole //= after[left.pop(place)]
    return left


def _ones_made(call: Call, out: Value) -> frozenset[int]:
    """The dims of a result that have one entry whatever the op is given."""
    name, source = op_name(call), call.args[0] if call.args else None
    if name == "unsqueeze":
        return frozenset({call.args[1] % out.rank})
    if name in REDUCE and isinstance(source, Value) and out.rank == source.rank:
        return reduced_dims(call)
    return frozenset(d for d in range(2, out.rank) if out.shape[d] == 1) if name in _POOLS else NONE


_POINTWISE = ("pointwise", "multiply", "divide", "choice")
_IN_PLACE = frozenset({PERMUTE, SAME, SOFTMAX, SPREAD})
"""Ops after which a dim is what it was."""
_REPEAT = frozenset({"expand", "repeat"})
_POOLS = frozenset({
    f"{name}{n}d" for n in (1, 2, 3) for name in ("adaptive_avg_pool", "_adaptive_avg_pool", "adaptive_max_pool")
})  # fmt: skip


_Dims = Callable[[Call], AbstractSet[int]]


def _at(position: int, default: int = 0) -> _Dims:
    return lambda call: {call.arg(position, "dim", default)}


def _sliced(call: Call) -> frozenset[int]:
    whole = not call.arg(2, "start") and (call.arg(3, "end") or _END) == _END and call.arg(4, "step", 1) == 1
    return NONE if whole else frozenset({call.arg(1, "dim", 0)})


_END = 2**63 - 1
_PICKS: dict[str, _Dims] = {
    "slice": _sliced,
    "select": _at(1),
    "narrow": _at(1),
    "unbind": _at(1),
    "unfold": _at(1),
    "split": _at(2),
    "split_with_sizes": _at(2),
    "chunk": _at(2),
    "diagonal": lambda call: {call.arg(2, "dim1", 0), call.arg(3, "dim2", 1)},
    "pixel_shuffle": lambda call: {-3},
    "pixel_unshuffle": lambda call: {-3, -2, -1},
    "channel_shuffle": lambda call: {1},
    "index_add": _at(1),
    "roll": lambda call: frozenset(call.arg(2, "dims", []) or range(call.args[0].rank)),
}
"""The dims along which these pick entries by their places."""


def labels_along(value: Value, dims: frozenset[int]) -> list[torch.Tensor]:
    """The layers of a value that vary along some of its dims."""
    return [layer for layer in value.layers if support(layer) & dims]
