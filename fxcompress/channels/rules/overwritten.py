"""What a tensor holds after an op has written to another one that shares memory with it: ``h[:, 2] = x``.

Where in the tensor that was, the labels of both tell, as far as they lie along one dim each; of a part that is one
entry along a dim (``h[:, 2]``), which has no labels there, the views tell that it was made by.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fxcompress.channels.layers import move, support, vector
from fxcompress.channels.rules.movement import MOVEMENT, PERMUTE, RESHAPE, on_labels
from fxcompress.channels.rules.pointwise import SAME
from fxcompress.channels.rules.registry import Known, OpClass, equal_along
from fxcompress.channels.survivors import has_own_labels
from fxcompress.channels.values import Step, Value

_VIEWS = frozenset({MOVEMENT, PERMUTE, RESHAPE, SAME})


def single_places(whole: Value, part: Value, tape: Sequence[Step], free: frozenset[int]) -> dict[int, int]:
    """The dims of a tensor along which a view of it holds one entry, and which: {1: 2} for ``h[:, 2]``.

    Only of dims along which each entry has a label of its own: there are as many for all inputs, and numbers that stand
    in the graph name the same ones. (A number that comes from sizes of the inputs puts a step of its own before the
    view: then ``part`` is no view of ``whole`` here.)

    Args:
        whole: what the tensor holds.
        part: what the view holds.
        tape: the steps, in order; those that made the view are among them.
        free: the dims of ``whole`` whose sizes the inputs decide.
    """
    steps = _views(whole, part, tape)
    found = {}
    for dim in range(whole.rank) if steps else ():
        if dim in free or not has_own_labels(whole, dim):
            continue
        places = vector(torch.arange(whole.shape[dim], device="cpu"), whole.rank, dim)
        for step in steps:
            (places,) = move(on_labels(step.call), places, step.call.args[0].shape)[:1] or [places]
        if places.numel() == 1:
            found[dim] = int(places)
    return found


def _views(whole: Value, part: Value, tape: Sequence[Step]) -> list[Step]:
    """The steps that make a view of what a tensor holds, in order; none where others are between."""
    found: list[Step] = []
    for step in reversed(tape):
        if part.key == whole.key:
            break
        if part.key in {out.key for out in step.outputs}:
            if (
                step.op not in _VIEWS
                or len(step.outputs) > 1
                or step.anywhere
                or not isinstance(step.call.args[0], Value)
            ):
                return []
            found.append(step)
            part = step.call.args[0]
    return found[::-1] if part.key == whole.key else []


def _overwritten(step: Step, known: Known) -> list[Tensor]:
    """Each entry is what it was, or one of those that may have been written there: the same number, if all are."""
    whole, part, single = step.call.args
    before, number = (known.of(value).double() for value in (whole, part))
    if not number.numel():
        return [before]
    places = _places(whole, part)
    rest = [d for d in range(part.rank) if d not in places]
    number = equal_along(number, rest)
    there = torch.ones((1,) * whole.rank, dtype=torch.bool, device="cpu")
    order = sorted(places, key=lambda d: places[d][0])
    sizes = {places[d][0]: number.shape[d] for d in order}
    after = number.permute([*order, *rest]).reshape([sizes.get(d, 1) for d in range(whole.rank)])
    for dim, positions in places.values():
        if after.shape[dim] > 1:
            after = after.index_select(dim, positions.clamp_min(0))
        there = there & (positions >= 0).reshape([-1 if d == dim else 1 for d in range(whole.rank)])
    for dim, place in single.items():
        there = there & vector(torch.arange(whole.shape[dim], device="cpu") == place, whole.rank, dim)
    return [torch.where((before == after) | ~there, before, torch.nan)]


def _places(whole: Value, part: Value) -> dict[int, tuple[int, Tensor]]:
    """Dims of a part, and those of the whole along which the same labels lie, each once: they say where an entry is.

    Beside the dim of the whole stand the positions of its entries in the part, -1 for those that it does not hold.
    """
    pairs = [
        (min(support(own)), min(support(layer)), found)
        for layer in whole.layers
        for own in part.layers
        if len(support(layer)) == len(support(own)) == 1
        if (found := _positions(layer.reshape(-1), own.reshape(-1))) is not None
    ]
    sides = [[pair[i] for pair in pairs] for i in (0, 1)]  # labels that lie along two dims do not say along which
    return {d: (dim, found) for d, dim, found in pairs if sides[0].count(d) == sides[1].count(dim) == 1}


def _positions(atoms: Tensor, inside: Tensor) -> Tensor | None:
    """Where each of some labels is among others, -1 for nowhere; None where no label is, or where they repeat."""
    if not _distinct(atoms) or not _distinct(inside):
        return None
    ordered, places = inside.sort()
    near = torch.searchsorted(ordered, atoms.contiguous()).clamp_max(len(ordered) - 1)
    found = torch.where(ordered[near] == atoms, places[near], -1)
    return found if bool((found >= 0).any()) else None


def _distinct(atoms: Tensor) -> bool:
    """Whether each entry has a label of its own."""
    return bool(atoms.all()) and len(atoms.unique()) == len(atoms)


OVERWRITTEN = OpClass("overwritten", lambda call, space: (call.args[0].layers,), _overwritten)
"""Arguments: what the tensor held, what was written to the other one, and the places of that in it: see
:func:`single_places`."""
