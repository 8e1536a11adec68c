"""Which channels would need another number in the model's own code, where that has to stay.

h.view(n, -1, 16)   heads go: the code stays      h.view(n, -1, 12)   dims of heads go: 16 stands in the code
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, fx

from fxcompress.channels.layers import support
from fxcompress.channels.space import Reason
from fxcompress.channels.values import Value, find
from fxcompress.trace.described import Place

Blame = tuple[np.ndarray, Reason]
"""Atoms that must stay, and why."""


@dataclass(slots=True)
class CodeChanges:
    """The changes to the graph of one mode that a cut has needed.

    Attributes:
        alive: bool (atoms,), what the cut has left.
        sizes: changes of sizes, with the channels along the dims that have these.
        others: all other ones, with all channels that go there.
    """

    alive: np.ndarray
    sizes: list[Blame] = field(default_factory=list)
    others: list[Blame] = field(default_factory=list)

    def note(
        self, place: Place, result: object, layers: Iterable[Tensor], old: Sequence[Any], new: Sequence[Any]
    ) -> None:
        """Remember that a node needs other arguments.

        Args:
            place: of the node.
            result: what it returned before the cut, Values in place of tensors.
            layers: the labels of its operands, before the cut.
            old: its arguments.
            new: those that it needs.
        """
        reason = Reason("code", f"without it, the model's code would need another number: {place}", place)
        dims = _changed_sizes(result, old, new)
        lines = [_missing(layer, dim, self.alive) for layer, dim in dims]
        if any(len(atoms) for atoms in lines):
            self.sizes.append((np.concatenate(lines), reason))
            return
        both = [layer.numpy().reshape(-1) for layer in (*layers, *_layers(result))]
        atoms = np.concatenate(both) if both else np.zeros(0, dtype=np.int64)
        self.others.append((atoms[~self.alive[atoms]], reason))

    @property
    def blamed(self) -> list[Blame]:
        """Those that are known for sure; all others are looked at again once these are out of the way."""
        return self.sizes or self.others


def _layers(result: object) -> list[Tensor]:
    return [layer for value in find(Value, result) for layer in value.layers]


def _changed_sizes(result: object, old: Sequence[Any], new: Sequence[Any]) -> list[tuple[Tensor, int]]:
    """Where a node names the sizes of its result: the dims whose size changes in the code, with the labels there."""
    if not isinstance(result, Value):
        return []
    before, after = _sizes(old[1:], result.rank), _sizes(new[1:], result.rank)
    if before is None or after is None:
        return []
    changed = {d for d, (a, b) in enumerate(zip(before, after, strict=True)) if a is not b and a != b}
    return [(layer, d) for layer in result.layers for d in support(layer) & changed]


def _sizes(given: Sequence[Any], rank: int) -> list[Any] | None:
    """The sizes that a view is given, in either form."""
    flat = list(given[0]) if len(given) == 1 and isinstance(given[0], tuple | list) else list(given)
    numbers = all(type(size) is int or isinstance(size, fx.Node) for size in flat)
    return flat if len(flat) == rank and numbers else None


def _missing(layer: Tensor, dim: int, alive: np.ndarray) -> np.ndarray:
    """What goes of each line along ``dim`` of which something stays."""
    lines = np.moveaxis(layer.numpy(), dim, -1)
    stays = alive[lines]
    atoms: np.ndarray = lines[~stays & stays.any(axis=-1, keepdims=True)]
    return atoms
