"""Where the dims of what an op is given are in what it makes."""

from collections.abc import Callable
from collections.abc import Set as AbstractSet

import torch

from fxcompress.channels.rules.contraction import CONTRACTIONS
from fxcompress.channels.rules.movement import PERMUTE
from fxcompress.channels.rules.products import BATCHED
from fxcompress.channels.rules.recurrent import STATE
from fxcompress.channels.rules.reductions import reduced, reduced_dims
from fxcompress.channels.rules.regions import GRID
from fxcompress.channels.rules.registry import OpClass
from fxcompress.channels.values import Call, Value

Places = list[int | None]
"""For each dim of an argument the dim of a result, None where it is gone."""


def op_name(call: Call) -> str:
    """The op that is called; "" for a step that is none."""
    return getattr(getattr(call.func, "overloadpacket", None), "__name__", "")


def places_in(op: OpClass, call: Call, value: Value, out: Value) -> Places | None:
    """Where the dims of an argument are in a result; None where that is not known."""
    if op is BATCHED:
        return [0, None, 2] if value is call.args[-1] else [0, 1, None]
    if op in CONTRACTIONS or (op is STATE and value is call.args[1]):
        return _behind_product(op, call, value)
    if op is PERMUTE or op is GRID:
        return _turned(call, value) if op is PERMUTE else _sampled(call, value)
    if op_name(call) == "unsqueeze":
        made = call.args[1] % out.rank
        return [d + (d >= made) for d in range(value.rank)]
    gone = _GONE.get(op_name(call))
    if out.rank < value.rank and gone is not None:
        left, dims = iter(range(out.rank)), {d % value.rank for d in gone(call)}
        return [None if d in dims else next(left) for d in range(value.rank)]
    return None if out.rank < value.rank else [d + out.rank - value.rank for d in range(value.rank)]


def _turned(call: Call, value: Value) -> Places:
    told = torch.empty([d + 2 for d in range(value.rank)], device="meta")
    shape = call.func(told, *call.args[1:], **call.kwargs).shape
    return [shape.index(d + 2) for d in range(value.rank)]


def _sampled(call: Call, value: Value) -> Places:
    """Those of (N, C, H, W) that is read at points of (N, H', W', 2)."""
    return [0, 1, *[None] * (value.rank - 2)] if value is call.args[0] else [0, *range(2, value.rank), None]


def _behind_product(op: OpClass, call: Call, value: Value) -> Places:
    """Those of what a layer multiplies by its weight; a recurrent one is such a layer."""
    source = op is STATE or value is _source(call)
    return [0 if source else None, None, *([d if source else None for d in range(2, value.rank)])]


def _source(call: Call) -> object:
    """What a contraction reads."""
    return call.args[1] if op_name(call) == "addmm" else call.args[0]


def _squeezed(call: Call) -> frozenset[int]:
    shape = call.args[0].shape
    return frozenset(d for d in reduced(call.arg(1, "dim"), len(shape)) if shape[d] == 1)


REDUCE = frozenset({
    "mean", "sum", "amax", "amin", "max", "min", "var", "std", "prod", "linalg_vector_norm", "logsumexp", "median",
})  # fmt: skip
"""Ops that join all entries along some dims into one."""
_GONE: dict[str, Callable[[Call], AbstractSet[int]]] = {
    "select": lambda call: {call.arg(1, "dim", 0)},
    "unbind": lambda call: {call.arg(1, "dim", 0)},
    "squeeze": _squeezed,
    **dict.fromkeys(REDUCE, reduced_dims),
}
"""The dims that these leave out."""
