"""Where vectors are applied that must be zero before a channel is: biases, and the weights of norms that centre.

A channel that is zero stays what it is under most ops. A bias makes it another constant, and so do layer norm and group
norm, which take the mean of all channels off it: it then varies with the others, and is zero only where its weight
and its bias are.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fxcompress.channels.interpret import Trail
from fxcompress.channels.rules.contraction import CONTRACTIONS, live_rows, site_of
from fxcompress.channels.rules.group_sums import GROUP_SUM
from fxcompress.channels.rules.movement import RESHAPE
from fxcompress.channels.rules.norms import BATCH_NORM
from fxcompress.channels.rules.registry import Known
from fxcompress.channels.segments import Segments
from fxcompress.channels.values import Step, Value

_AT = torch.ops.aten
_ADD, _MULTIPLY = _AT.add.Tensor, _AT.mul.Tensor
_REPEAT = _AT.repeat.default
_WHOLE = frozenset({_AT.slice.Tensor, _AT.alias.default, _AT.select.int})
_CENTRES, _SCALES = frozenset({_AT.sub.Tensor}), frozenset({_AT.mul.Tensor, _AT.div.Tensor})


@dataclass(frozen=True, slots=True, eq=False)
class Use:
    """One place where a vector is applied: a bias is added, or a norm's result is scaled.

    Attributes:
        mode: of the graph.
        step: of its tape.
        vector: its name, or nothing.
        source: what must be zero for it to be free to go; None for all that a contraction makes.
        dim: of its entries there.
        along: what the channels lie along, where that is another tensor than the source; with its dim.
        statistics: of a batch norm, the names of the running mean and variance; nothing where they are not known.
        tiles: how often the vector is repeated there, as by instance norm: each sample has channels of its own.
        scales: whether it is the weight of a norm, without which nothing of the channel is left.
    """

    mode: str
    step: Step
    vector: str
    source: Value | None = None
    dim: int = 1
    along: tuple[Value, int] | None = None
    statistics: tuple[str, str] | None = None
    tiles: int = 1
    scales: bool = False

    @property
    def runs(self) -> bool:
        """Whether evaluation normalises by a running mean."""
        return self.statistics is not None and isinstance(self.step.call.args[3], Value)


def uses_of(mode: str, trail: Trail) -> list[Use]:
    """All that are applied in a graph."""
    reader = _Reader(mode, trail)
    return [use for step in trail.tape for use in reader.read(step)]


class _Reader:
    """Goes through the tape of a graph, and knows which values hold a vector."""

    def __init__(self, mode: str, trail: Trail) -> None:
        self.mode = mode
        self.names = trail.names
        self.tiles: dict[int, int] = {}
        self.made = {output.key: step for step in trail.tape for output in step.outputs}

    def read(self, step: Step) -> Iterator[Use]:
        """What a step applies."""
        if step.op is BATCH_NORM:
            yield self._batch_norm(step)
        elif step.op is GROUP_SUM:
            yield from self._group_norm(step)
        elif step.op in CONTRACTIONS:
            site = site_of(step.call)
            if site is not None and site.bias is not None:
                yield Use(self.mode, step, self._name(site.bias))
        elif step.call.func in {_ADD, _MULTIPLY}:
            yield from self._arithmetic(step)
        elif step.call.args and self._name(step.call.args[0]):
            self._follow(step)

    def _name(self, value: object) -> str:
        return self.names.get(_key(value), "")

    def _follow(self, step: Step) -> None:
        """Note what gives a vector on: ``bias.view(1, -1, 1, 1)``."""
        vector, out = step.call.args[0], step.outputs[0]
        if _lays_out(step):
            self.names[out.key] = self._name(vector)
        elif step.call.func is _REPEAT and vector.rank == len(step.call.args[1]) == 1:
            self.names[out.key], self.tiles[out.key] = self._name(vector), step.call.args[1][0]

    def _batch_norm(self, step: Step) -> Use:
        x, _, bias, mean, var = step.call.args[:5]
        tiles = max(self.tiles.get(_key(value), 1) for value in (bias, mean))
        return Use(self.mode, step, self._name(bias), x, statistics=(self._name(mean), self._name(var)), tiles=tiles)

    def _group_norm(self, step: Step) -> Iterator[Use]:
        x, weight, bias = step.call.args[:3]
        if self._name(weight):
            yield Use(self.mode, step, self._name(weight), x, scales=True)
            if self._name(bias):
                yield Use(self.mode, step, self._name(bias), weight, 0, along=(x, 1))

    def _arithmetic(self, step: Step) -> Iterator[Use]:
        """A bias that is added, a weight that is multiplied with what a norm has centred."""
        args = step.call.args
        if len(args) != 2 or step.call.kwargs.get("alpha", 1) != 1:
            return
        for source, vector in (args, args[::-1]):
            name, centred = self._name(vector), source
            dim = _dim_of(vector, source) if name and isinstance(source, Value) else None
            if step.call.func is _MULTIPLY and dim is not None:
                centred = _centred(source, dim, self.made)
            if dim is not None and centred is not None and _key(vector) not in self.tiles:
                yield Use(self.mode, step, name, centred, dim, scales=step.call.func is _MULTIPLY)


def _centred(value: Value, dim: int, made: dict[int, Step]) -> Value | None:
    """What a norm has taken the mean off, of what it then scales; None for what is no result of one.

    Args:
        value: that is scaled by a vector.
        dim: of the vector's entries.
        made: the step that made each value, by its key.
    """
    centred = False
    while (step := made.get(value.key)) is not None and step.call.func in _CENTRES | _SCALES:
        whole, other = step.call.args[:2]
        if not isinstance(whole, Value) or whole.shape != value.shape or not _is_narrow(other, dim):
            break
        centred |= step.call.func in _CENTRES
        value = whole
    return value if centred else None


def _is_narrow(other: object, dim: int) -> bool:
    """Whether an operand is the same for all entries along a dim."""
    return isinstance(other, int | float) or (isinstance(other, Value) and other.rank > dim and other.shape[dim] == 1)


def zero_before(use: Use, known: Known) -> np.ndarray:
    """Where all that must be zero is, for each entry of the vector; bool (K,)."""
    if use.source is None:
        site = site_of(use.step.call)
        assert site is not None
        return ~live_rows(site, known)
    zero = _zero_along(use.source, use.dim, known)
    return np.asarray(zero.reshape(use.tiles, -1).all(axis=0))


def fed(use: Use, segments: Segments) -> list[int]:
    """The segment of each entry of the vector."""
    if use.along is not None:
        return list(segments.along(*use.along))
    if use.source is None:
        site = site_of(use.step.call)
        assert site is not None
        return list(segments.along(use.step.outputs[0], site.out_dim))
    found = list(segments.along(use.source, use.dim))
    return found[: len(found) // use.tiles]


def _key(value: Any) -> int:  # noqa: ANN401
    return value.key if isinstance(value, Value) else -1


def _dim_of(vector: Value, source: Value) -> int | None:
    """The dim along which a vector is applied to a tensor; None where it is no vector, or larger."""
    dims = [d for d, n in enumerate(vector.shape) if n > 1]
    dim = dims[0] + source.rank - vector.rank if len(dims) == 1 else -1
    return dim if dim >= 0 and source.rank > 1 and source.shape[dim] == vector.shape[dims[0]] else None


def _lays_out(step: Step) -> bool:
    """Whether a step gives all entries of what it reads, in their order: ``bias[None, :]`` slices all of it first."""
    whole = step.call.func in _WHOLE and step.outputs[0].shape.numel() == step.call.args[0].shape.numel()
    return step.op is RESHAPE or whole


def _zero_along(source: Value, dim: int, known: Known) -> np.ndarray:
    """Which entries along a dim are zero throughout, bool (size,)."""
    found = known.of(source)
    others = [d for d in range(found.ndim) if d != dim]
    zero = (found == 0).all(dim=others) if others else found == 0
    return zero.expand(source.shape[dim]).numpy().copy()
