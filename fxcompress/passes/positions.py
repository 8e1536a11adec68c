"""Whether an op that moves entries still moves the same ones.

Labels alone do not prove it: entries of one label (those of an input of the network, or the pixels of one channel after
a flatten) cannot be told apart. Here each entry of a cut dim is followed by its position.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxcompress.channels.layers import compress, move, vector
from fxcompress.channels.rules.contraction import MATMUL
from fxcompress.channels.rules.einsum import operands_of
from fxcompress.channels.rules.group_sums import GROUP_SUM, left_of
from fxcompress.channels.rules.indexing import INDEX
from fxcompress.channels.rules.movement import MOVEMENT, PAD, PERMUTE, RESHAPE
from fxcompress.channels.rules.pointwise import SAME
from fxcompress.channels.rules.products import BATCHED
from fxcompress.channels.rules.puts import INDEX_PUT, same_puts
from fxcompress.channels.rules.scatter import INDEX_ADD, scatter_of
from fxcompress.channels.rules.sums import EXTREME
from fxcompress.channels.survivors import Survivors
from fxcompress.channels.values import Call, Step, Value, find, leaves, replace

_PRODUCT = frozenset({MATMUL, BATCHED, RESHAPE, SAME})
_ADD = torch.ops.aten.add.Tensor
_AROUND = {torch.ops.aten.t.default, torch.ops.aten.transpose.int, torch.ops.aten.expand.default}
_TURNS = {torch.ops.aten.permute.default, torch.ops.aten.transpose.int, torch.ops.aten.t.default}
_COPIES = {torch.ops.aten.alias.default, torch.ops.aten.clone.default}
"""Where torch copies is a matter of strides, which change with sizes."""
_PICKING = {MOVEMENT, INDEX}
"""A slice, and the same entries by their numbers."""
_MOVING = frozenset({MOVEMENT, PERMUTE, INDEX, PAD})


def pair_up(before: list[Step], after: list[Step], left: Survivors) -> list[tuple[Step, Step]] | None:
    """The steps of a node before and after a cut, side by side; None where they are not the same ops.

    A slice may disappear, once it takes all that is left. A matrix product may be folded in another way, as torch
    decides by sizes and strides: there is nothing to compare then, none of its steps picks entries or holds a number.
    """
    if all(map(_is_product, before)) and all(map(_is_product, after)):
        return []
    before, after = ([s for s in steps if not _is_copy(s)] for steps in (before, after))
    surplus = len(before) - len(after)
    rest, pairs = iter(after), []
    for step in before:
        if surplus and step.op is MOVEMENT and same_entries(step, None, left):
            surplus -= 1
            continue
        other = next(rest, None)
        if other is None or (other.op is not step.op and {other.op, step.op} != _PICKING):
            return None
        pairs.append((step, other))
    return pairs if next(rest, None) is None else None


def _is_copy(step: Step) -> bool:
    return step.op is SAME and step.call.func in _COPIES


def _is_product(step: Step) -> bool:
    """Whether a step is a matrix product, or what torch puts around one to fold its operands and to add a bias."""
    if step.call.func is _ADD:
        return all(isinstance(leaf, Value) for leaf in leaves((step.call.args, step.call.kwargs)))
    return step.op in _PRODUCT or (step.op in _MOVING and (step.call.func in _AROUND or _picks_a_copy(step)))


def _picks_a_copy(step: Step) -> bool:
    """Whether a step picks one of the entries of an expanded dim, all the same: the matrix of a whole batch."""
    source = step.call.args[0]
    if step.call.func is not torch.ops.aten.select.int or not isinstance(source, Value):
        return False
    return int(source.meta.stride(step.call.args[1])) == 0


def same_entries(before: Step, after: Step | None, left: Survivors) -> bool:
    """Whether ``after`` does to what is left what ``before`` did to the whole; None stands for doing nothing.

    Args:
        before: a step of the original tape.
        after: the step that takes its place.
        left: of the cut.
    """
    if before.op in _PLACES and after is not None:
        return _PLACES[before.op](before.call, after.call, left)
    if before.op not in _MOVING:
        return True
    source = before.call.args[0] if before.call.args else None
    if not isinstance(source, Value) or find(Value, before.call.args[1:]) or _is_same_turn(before, after):
        return True
    ragged = left.ragged(source)  # there each entry has a label of its own
    masks = {dim: torch.from_numpy(mask) for dim, mask in left.masks(source).items() if dim not in ragged}
    shape = list(left.shape(source))
    changed = after is not None and not _same_arguments(before.call, after.call)
    if changed:  # a size, perhaps, that says where to look along another dim
        others = {
            d: torch.ones(n, dtype=torch.bool, device="cpu") for d, n in enumerate(source.shape) if d not in ragged
        }
        masks = others | masks
    for dim, mask in masks.items():
        if changed or after is None or not mask.all():
            whole = vector(torch.arange(1, len(mask) + 1, device="cpu"), source.rank, dim)
            rest = whole.index_select(dim, mask.nonzero().flatten())
            moved = zip(_run(before.call, whole), before.outputs, strict=False)
            expected = [compress(left.pack(out, value)) for out, value in moved]
            try:
                found = [compress(rest)] if after is None else _run(after.call, rest, shape)
            except (IndexError, RuntimeError):  # the index points at what is gone; shapes on meta do not show it
                return False
            if len(expected) != len(found) or not all(map(torch.equal, expected, found)):
                return False
    return True


def _is_same_turn(before: Step, after: Step | None) -> bool:
    """Whether both order the dims anew, in the same way: that does the same to entries whatever the sizes are."""
    func = before.call.func
    return func in _TURNS and after is not None and after.call.func is func and _same_arguments(before.call, after.call)


def _same_arguments(before: Call, after: Call) -> bool:
    """Whether two calls have the same numbers and tensors beside what they move."""
    a, b = (leaves((call.args[1:], call.kwargs)) for call in (before, after))
    return len(a) == len(b) and all(
        torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x is y or x == y
        for x, y in zip(a, b, strict=True)
    )


def _same_targets(before: Call, after: Call, left: Survivors) -> bool:
    """Whether what is left of one tensor is added to the entries of the other that it was added to before."""
    old, new = scatter_of(before), scatter_of(after)
    if old is None or new is None:
        return old is new
    everything = (np.ones(value.shape[old.dim], dtype=bool) for value in (old.whole, old.source))
    values = zip((old.whole, old.source), everything, strict=True)
    whole, source = (left.masks(value).get(old.dim, whole) for value, whole in values)
    index = old.index.numpy()  # torch's would pick out a number where it has one entry
    if not np.array_equal(whole[index], source):
        return False
    expected = (np.cumsum(whole) - 1)[index[source]]
    return old.dim == new.dim and np.array_equal(expected, new.index.numpy())


def _same_groups(before: Call, after: Call, left: Survivors) -> bool:
    """Whether what is left of each group is summed, and nothing else with it."""
    value, groups = before.args[0], before.args[3]
    kept = left.masks(value).get(1, np.ones(sum(groups), dtype=bool))
    return bool(after.args[3] == left_of(groups, kept))


def _same_extremes(before: Call, after: Call, left: Survivors) -> bool:
    """Whether zero is among the numbers to choose from as it was, if entries of zero are gone."""
    value, dims, _, zero = before.args
    shape = left.shape(value)
    zero |= any(shape[d] < value.shape[d] for d in dims)
    return bool(after.func is before.func and after.args[3] == zero)


_PLACES = {INDEX_ADD: _same_targets, INDEX_PUT: same_puts, GROUP_SUM: _same_groups, EXTREME: _same_extremes}
"""Classes whose calls say where entries go."""


def _run(call: Call, positions: Tensor, shape: list[int] | None = None) -> list[Tensor]:
    """The positions after the call; 0 where it pads."""
    if call.func is torch.ops.aten.constant_pad_nd.default:
        return [compress(torch.constant_pad_nd(positions.expand(shape or call.args[0].shape), call.args[1], 0))]
    args, kwargs = replace(lambda index: index.cpu(), Tensor, (call.args[1:], call.kwargs))
    return move(lambda x: call.func(x, *args, **kwargs), positions, shape or call.args[0].shape)


def same_sums(before: tuple[Any, ...], now: tuple[Any, ...]) -> bool:
    """Whether the operands of an einsum agree in the size of each index that they agreed in before the cut.

    torch takes a size of 1 for all sizes, so an operand that has one entry left would meet all that others have left.

    Args:
        before: the arguments of the call before the cut.
        now: the same after it.
    """
    agreed, found = _sizes(before), _sizes(now)
    return all(len(found[index]) == 1 for index, sizes in agreed.items() if len(sizes) == 1)


def _sizes(args: tuple[Any, ...]) -> dict[object, set[int]]:
    """The sizes of each index of an einsum."""
    sizes: dict[object, set[int]] = {}
    for operand, term in zip(*operands_of(args), strict=True):
        for index, size in zip(term, operand.shape, strict=True):
            sizes.setdefault(index, set()).add(size)
    return sizes
