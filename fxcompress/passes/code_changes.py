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
from torch import Tensor, fx, nn

from fxcompress.channels.analysis import Analysis
from fxcompress.channels.layers import support
from fxcompress.channels.space import Reason
from fxcompress.channels.values import Value, find
from fxcompress.trace.graph.attribute_number import Origin
from fxcompress.trace.graph.described import Place
from fxcompress.trace.retrace.size_attributes import is_of_torch, own_numbers, read_numbers, sizes_in
from fxcompress.trace.traced import TracedModule

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
    """The changes to the graphs of a network that a cut has needed.

    Attributes:
        analysis: of the network before the cut.
        alive: bool (atoms,), what the cut has left.
        numbers: changes of what stands in the code.
        attributes: changes of sizes that are attributes of modules.
    """

    analysis: Analysis
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

    def settle(self, after: TracedModule) -> list[Blame]:
        """What must stay, once all graphs have been looked at.

        An attribute that is a size may change if it changes to the same number wherever it is one, in all modes. What
        the cut itself makes of the attributes of a layer must agree with that, and must not change one of which the
        code makes something else. Where some blames are sure, the others wait until these are out of the way.

        Args:
            after: the cut network.
        """
        before = self.analysis.module
        sizes, read = _sizes_by_origin(before, after), read_numbers(before)
        blames = list(self.numbers)
        for origin in dict.fromkeys((*sizes, *sorted(read))):
            old, new = (vars(_module(traced, origin[0])).get(origin[1]) for traced in (before, after))
            numbers = set(sizes.get(origin, ()))
            if old != new or is_of_torch(_module(before, origin[0])):
                numbers.add((old, new))
            if len(numbers) > 1 or (origin in read and any(a != b for a, b in (*numbers, (old, new)))):
                blames += self.attributes.get(origin, [])
                blames += [self._blame_layer(origin, old)] if old != new else []
        return [blame for blame in blames if blame.sure] or blames

    def _blame_layer(self, origin: Origin, number: object) -> Blame:
        """What goes of the tensors of a layer of which an attribute changes: along dims of that size, if along any."""
        path, name = origin
        layer = _module(self.analysis.module, path)
        prefix = f"{path}." if path else ""
        tensors = {
            leaf: t for table in (layer._parameters, layer._buffers) for leaf, t in table.items() if t is not None
        }
        found = [
            (tensor.shape[dim] == number, atoms.numpy())
            for leaf, tensor in tensors.items()
            for dim, atoms in self.analysis.atoms.get(prefix + leaf, {}).items()
        ]
        place = Place(module=path, kind=type(layer).__name__, name=path)
        reason = Reason("code", f"without it, the model's code would read another number: {name} of {place}", place)
        for some in ([atoms for same, atoms in found if same], [atoms for _, atoms in found]):
            gone = np.concatenate([_NONE, *some])
            gone = gone[~self.alive[gone]]
            if len(gone):
                return Blame(gone, reason, sure=True)
        return Blame(_NONE, reason, sure=False)

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


def attributes_changed(before: TracedModule, after: TracedModule) -> bool:
    """Whether an attribute that is a size is another number after a cut."""
    return any(old != new for pairs in _sizes_by_origin(before, after).values() for old, new in pairs)


def _sizes_by_origin(before: TracedModule, after: TracedModule) -> dict[Origin, set[tuple[object, object]]]:
    """What each attribute was, and what it is now, wherever it is a size; something else where it is no number now."""
    found = defaultdict[Origin, set[tuple[object, object]]](set)
    for mode, graph in before.graphs.items():
        now = {node.name: node for node in after.graphs[mode].nodes}
        for old in graph.nodes:
            own = own_numbers(old)
            pair = [sizes_in(node.target, node.args) or [] for node in (old, now[old.name])] if own else []
            for position, origin in own.items():
                was, new = (sizes[position] if -position <= len(sizes) else None for sizes in pair)
                found[origin].add((was, new if type(new) is int else old.name))
    return found


def _module(traced: TracedModule, path: str) -> nn.Module:
    try:
        return traced.get_submodule(path)
    except AttributeError:  # nothing of it runs
        return nn.Module()


def _missing(layer: Tensor, dim: int, alive: np.ndarray) -> np.ndarray:
    """What goes of each line along ``dim`` of which something stays."""
    lines = np.moveaxis(layer.numpy(), dim, -1)
    stays = alive[lines]
    atoms: np.ndarray = lines[~stays & stays.any(axis=-1, keepdims=True)]
    return atoms


_NONE = np.zeros(0, dtype=np.int64)
