"""Dims all entries of which have labels of their own, and which may be wider or narrower for other inputs all the same.

``cat([h, x.new_zeros(n, n - 1)], 1)`` is as wide as h has channels in a batch of one: what reads its width is given
another one in the next run. The outputs of a layer are as many as its weight has rows, whatever it is given.
"""

from torch import Tensor

from fxcompress.channels.dim_places import op_name, places_in
from fxcompress.channels.layers import blocks
from fxcompress.channels.rules.contraction import CONTRACTIONS, site_of
from fxcompress.channels.rules.movement import CAT, RESHAPE
from fxcompress.channels.rules.registry import OpClass
from fxcompress.channels.values import Call, Value, find

_NONE: frozenset[int] = frozenset()
_AS_GIVEN = ("pointwise", "multiply", "divide", "choice", "anywhere", "spread", "same values", "permute", "softmax")
"""Classes of ops, by how their names begin, whose results are as wide as what they are given."""
_FROM_ONE = frozenset({"expand"})
"""Ops that change the width of dims of one entry alone, which have no labels."""


class Widths:
    """Follows such dims through the steps of an interpretation."""

    def __init__(self) -> None:
        self._dims: dict[int, frozenset[int]] = {}

    def of(self, value: Value) -> frozenset[int]:
        """The dims of a value whose width may follow a size of the inputs though their entries have labels."""
        return self._dims.get(value.key, _NONE)

    def note(self, value: Value, dims: frozenset[int]) -> None:
        """Note that the widths of some dims of a value follow a size."""
        if dims:
            self._dims[value.key] = self.of(value) | dims

    def follow(self, op: OpClass, call: Call, outputs: tuple[Value, ...], *, moving: bool) -> None:
        """Note what a step makes of such dims.

        Args:
            op: its class.
            call: what was called.
            outputs: what it made.
            moving: whether numbers that come from sizes may decide how wide its results are.
        """
        if op is CAT and (dim := _dim_beside_nothing(call)) is not None:
            self.note(outputs[0], frozenset({dim}))
        moving = moving and op is not RESHAPE and not op.name.startswith(_AS_GIVEN) and op_name(call) not in _FROM_ONE
        if not moving and not self._dims:
            return
        operands = [(value, own) for value in find(Value, call.args) if (own := self.of(value))]
        for out in outputs:
            dims = set(range(out.rank)) if moving else set[int]()
            for value, own in operands:
                dims |= _moved(op, call, value, out, own)
            if op in CONTRACTIONS:
                dims -= self._made_by_rows(call)
            self.note(out, frozenset(dims))

    def _made_by_rows(self, call: Call) -> set[int]:
        """The dim of a layer's outputs, where its weight has as many rows for all inputs."""
        site = site_of(call)
        return {site.out_dim} if site is not None and site.row not in self.of(site.weight) else set()


def _dim_beside_nothing(call: Call) -> int | None:
    """The dim along which a ``cat`` joins something with nothing, which may be something in the next run."""
    dim = call.arg(1, "dim", 0) % call.metas[0].ndim
    parts = [part for part in call.args[0] if isinstance(part, Value | Tensor) and len(part.shape) > dim]
    return dim if any(part.shape[dim] == 0 for part in parts) else None


def _moved(op: OpClass, call: Call, value: Value, out: Value, own: frozenset[int]) -> set[int]:
    """Where some dims of an argument are in a result."""
    if op is RESHAPE:
        return {d for old, new in blocks(value.shape, out.shape) if own.intersection(old) for d in new}
    if op in CONTRACTIONS and (site := site_of(call)) is not None and value is site.weight:
        return {site.out_dim} if site.row in own else set()
    places = places_in(op, call, value, out)
    return set(range(out.rank)) if places is None else {p for d in own if (p := places[d]) is not None}
