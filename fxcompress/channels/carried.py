"""Which tensors hold a parameter, entry by entry: itself, or what a network computes of it before it multiplies.

A weight that is quantized, turned, masked or scaled is a weight of that parameter all the same: what is made with it
has the bits of the parameter. Where two parameters of the same shape make one, as in ``mu + sigma * noise``, it is
neither.
"""

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain, count

import torch
from torch import Tensor

from fxcompress.channels.factories import SPREAD
from fxcompress.channels.layers import Layers, support
from fxcompress.channels.rules.indexing import INDEX
from fxcompress.channels.rules.movement import MOVEMENT, PERMUTE
from fxcompress.channels.rules.places import ANYWHERE
from fxcompress.channels.rules.pointwise import CHOICE, DIVIDE, MULTIPLY, POINTWISE, SAME
from fxcompress.channels.rules.quantize import QUANTIZE
from fxcompress.channels.space import Space
from fxcompress.channels.values import Call, Step, Value, find

_ENTRYWISE = frozenset({MULTIPLY, DIVIDE, POINTWISE, CHOICE, SAME})
_LABELS_ALONE = frozenset({"reshape"})
"""Beside turns, broadcasts and quantizers: ops through which the labels say where the entries are."""
_PAIRS = frozenset({"complex as real", "real as complex"})
"""The same, of numbers that are half of an entry of the other tensor."""
_TWO_PARTS = "pointwise, two reals as complex"


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """What a value holds.

    Attributes:
        name: of the parameter.
        layers: its labels, where they are in the value. Those of the value may be others, which these are coupled with.
        rank: of the parameter.
    """

    name: str
    layers: Layers
    rank: int

    def is_merged(self, dim: int, atoms: Mapping[int, Tensor]) -> bool:
        """Whether a dim of a value is some dims of the parameter, one behind the other.

        Args:
            dim: of the value.
            atoms: of the parameter, by its dims.
        """
        own = [layer.reshape(-1) for layer in self.layers if layer.shape[dim] > 1]
        return any(not any(torch.equal(labels, layer) for labels in atoms.values()) for layer in own)

    def is_shuffled(self, dim: int, atoms: Mapping[int, Tensor]) -> bool:
        """Whether a dim of a value is one of the parameter, with its entries in another order."""
        own = [layer.reshape(-1) for layer in self.layers if layer.shape[dim] > 1]
        same = [(a, b) for a in own for b in atoms.values() if len(a) == len(b) and torch.equal(a.sort()[0], b)]
        return any(not torch.equal(a, b) for a, b in same)

    def dims(self, atoms: Mapping[int, Tensor], rank: int) -> list[int]:
        """For each dim of a value of ``rank`` the dim of the parameter that lies along it.

        Args:
            atoms: of the parameter, by its dims; those of size 1 have none, and follow in order.
            rank: of the value.
        """
        found = {
            d: own
            for layer in self.layers
            for d in support(layer)
            for own, labels in atoms.items()
            if torch.equal(labels, layer.reshape(-1))
        }
        free = [d for d in range(rank + len(found)) if d not in found.values()]
        merged = {d for layer in self.layers for d in support(layer)} - found.keys()
        if merged:  # what has one entry stays where it is, and is none of the dims that have become one
            free = [d for d in range(self.rank) if d not in atoms]
        rest = chain(free, count(self.rank))
        inner = chain((d for d in atoms if d not in found.values()), count(self.rank))
        return [found[d] if d in found else next(inner if d in merged else rest) for d in range(rank)]


def carried(
    tape: Iterable[Step], held: Mapping[int, Held], parameters: Container[str], *, picked: bool = False
) -> dict[int, Held]:
    """What the values of a tape hold, by their keys.

    Args:
        tape: the steps of one graph.
        held: what the values at its start hold.
        parameters: the names that stand for parameters, not for buffers: masks and scales are none of the weight.
        picked: whether some of the entries of a parameter count as it: the weights of experts that are chosen, or one
            of the matrices that are packed in it.
    """
    found, fixed = dict(held), set(held)
    for step in tape:
        values = find(Value, (step.call.args, step.call.kwargs))
        moved = _moved(step, found, picked=picked)
        if fixed.issuperset(value.key for value in values):
            fixed.update(value.key for value in step.outputs)
            moved = moved or _computed(step, values, found, parameters)
        found.update((value.key, one) for value, one in zip(step.outputs, moved, strict=False))
    return found


def _moved(step: Step, found: Mapping[int, Held], *, picked: bool) -> list[Held]:
    """What the outputs of a step hold that quantizes its first argument, or puts its entries in other places."""
    source = step.call.args[0] if step.call.args else None
    if not isinstance(source, Value) or source.key not in found:
        return []
    held = found[source.key]
    if step.op in {QUANTIZE, ANYWHERE}:
        return [held]
    by_labels = step.op is PERMUTE or step.op.name in _LABELS_ALONE
    by_labels |= picked and (step.op is MOVEMENT or step.op.name in _PAIRS)
    if not by_labels and not (picked and step.op is INDEX) and not _is_broadcast(step):
        return []
    if len(held.layers) == len(source.layers) and all(a is b for a, b in zip(held.layers, source.layers, strict=True)):
        return [replace(held, layers=value.layers) for value in step.outputs]
    if not by_labels:
        return []
    call = Call(
        step.call.func, (Value(source.meta, held.layers), *step.call.args[1:]), step.call.kwargs, step.call.metas
    )
    return [replace(held, layers=layers) for layers in step.op.labels(call, Space())]


def _is_broadcast(step: Step) -> bool:
    """Whether a step repeats a tensor along a new dim, or takes one of the repetitions."""
    if step.call.func is torch.ops.aten.select.int:
        source, dim = step.call.args[0], step.call.arg(1, "dim", 0)
        return all(layer.shape[dim] == 1 for layer in source.layers)
    return step.op is SPREAD or step.call.func is torch.ops.aten.expand.default


def _computed(step: Step, values: list[Value], found: Mapping[int, Held], parameters: Container[str]) -> list[Held]:
    """What each entry of a result is computed from, if that is one parameter of its shape, and no input."""
    if not (step.op in _ENTRYWISE or step.op.name == _TWO_PARTS) or len(step.outputs) != 1:
        return []
    own = [found[v.key] for v in values if v.key in found and v.shape == step.outputs[0].shape]
    if len(values) > 1:
        own = [held for held in own if held.name in parameters]
    return own[:1] if len({held.name for held in own}) == 1 else []
