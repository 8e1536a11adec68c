"""Which channels would need another number in the model's own code, where that has to stay.

h.view(n, -1, 16)           heads go: the code stays      dims of heads go: 16 stands in the code, and they stay
h.view(n, self.heads, -1)   dims go: the code stays       heads go: the attribute changes with them
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from fxcompress.channels.layers import support
from fxcompress.channels.space import Reason
from fxcompress.channels.values import Value, find
from fxcompress.trace.described import Place
from fxcompress.trace.own_number import Origin
from fxcompress.trace.own_numbers import own_numbers, sizes_in

CODE = "code"
"""The code of the reasons."""


@dataclass(frozen=True, slots=True)
class Blame:
    """Atoms that must stay, or the code would change.

    Attributes:
        atoms: int64 (n,).
        reason: in words.
        sure: whether it is just these; else it is all that goes at a node, and perhaps too many.
    """

    atoms: np.ndarray
    reason: Reason
    sure: bool


@dataclass(slots=True)
class CodeChanges:
    """The changes to the graph of one mode that a cut has needed.

    Attributes:
        alive: bool (atoms,), what the cut has left.
        numbers: changes of what stands in the code.
        attributes: changes of sizes that are attributes of modules.
    """

    alive: np.ndarray
    numbers: list[Blame] = field(default_factory=list)
    attributes: dict[Origin, list[Blame]] = field(default_factory=lambda: defaultdict(list))

    def note(self, node: fx.Node, place: Place, result: object, met: np.ndarray, old: Sequence[Any] | None) -> None:
        """Remember that a node has got other arguments.

        Args:
            node: as it is now.
            place: of it.
            result: what it returned before the cut, Values in place of tensors.
            met: the atoms of that and of its operands, int64 (n,).
            old: its arguments before; None where it is not about arguments.
        """
        changed = [] if old is None else _changed(sizes_in(node.target, old), sizes_in(node.target, node.args))
        blame = self._blame(place, result, met, changed, _last_dim(node, result))
        own = own_numbers(node)
        if changed and set(changed) <= own.keys():
            for position in changed:
                self.attributes[own[position]].append(blame)
        else:
            self.numbers.append(blame)

    def settle(self, before: fx.Graph, after: fx.Graph) -> list[Blame]:
        """What must stay, once all of a graph has been looked at.

        An attribute that is a size may change if it changes to the same number wherever it is one. Where some blames
        are sure, the others wait until these are out of the way.
        """
        numbers = {origin: _values(origin, before, after) for origin in self.attributes}
        fixed = [blame for origin, found in numbers.items() if len(found) != 1 for blame in self.attributes[origin]]
        blames = self.numbers + fixed
        return [blame for blame in blames if blame.sure] or blames

    def _blame(self, place: Place, result: object, met: np.ndarray, changed: Sequence[int], last: int | None) -> Blame:
        """Whom to blame for the change of some sizes, the last of which is that of dim ``last`` of the result."""
        reason = Reason(CODE, f"without it, the model's code would need another number: {place}", place)
        own = [layer for value in find(Value, result) for layer in value.layers]
        dims = {last + 1 + position for position in changed} if last is not None else set()
        lines = [_missing(layer, d, self.alive) for layer in own for d in support(layer) & dims]
        sure = any(map(len, lines))
        atoms = np.concatenate(lines) if sure else met
        return Blame(atoms[~self.alive[atoms]], reason, sure)


def _last_dim(node: fx.Node, result: object) -> int | None:
    """The dim of the result that the last size in a node is of; None where its sizes are not those of dims."""
    sizes = sizes_in(node.target, node.args)
    if not isinstance(result, Value) or sizes is None:
        return None
    if node.target not in {"unflatten", torch.unflatten}:
        return result.rank - 1
    dim = node.args[1]
    return dim % (result.rank - len(sizes) + 1) + len(sizes) - 1 if isinstance(dim, int) else None


def _changed(before: list[Any] | None, after: list[Any] | None) -> list[int]:
    """The positions of the sizes that differ, from the end; none where they cannot be compared."""
    if before is None or after is None:
        return []
    if len(before) == 1 and len(set(map(str, after))) == 1:  # parts of one size
        after = after[:1]
    if before[:1] == [...] != after[:1]:
        before = before[1:]
        after = after[len(after) - len(before) :]
    if len(before) != len(after):
        return []
    return [i - len(after) for i, (a, b) in enumerate(zip(before, after, strict=True)) if a is not b and a != b]


def _values(origin: Origin, before: fx.Graph, after: fx.Graph) -> set[tuple[object, object]]:
    """What an attribute was, and what it is now, wherever it is a size; anything where it is no number now."""
    now = {node.name: node for node in after.nodes}
    found = set[tuple[object, object]]()
    for old in before.nodes:
        for position in [i for i, own in own_numbers(old).items() if own == origin]:
            pair = [sizes_in(node.target, node.args) or [] for node in (old, now[old.name])]
            numbers = tuple(sizes[position] if -position <= len(sizes) else None for sizes in pair)
            found.add((numbers[0], numbers[1] if type(numbers[1]) is int else old.name))
    return found


def _missing(layer: Tensor, dim: int, alive: np.ndarray) -> np.ndarray:
    """What goes of each line along ``dim`` of which something stays."""
    lines = np.moveaxis(layer.numpy(), dim, -1)
    stays = alive[lines]
    atoms: np.ndarray = lines[~stays & stays.any(axis=-1, keepdims=True)]
    return atoms
