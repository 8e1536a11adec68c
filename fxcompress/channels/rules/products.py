"""Batched matrix products, as attention is made of: (N, L, K) times (N, K, R).

Both operands may carry joint labels: those of the heads (N) together with those of a head's dims (K, or R). The dims
that are contracted leave behind one label for each head, a slot.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fxcompress.channels.layers import Layers, slices, vector
from fxcompress.channels.rules.contraction import pin_all
from fxcompress.channels.rules.pointwise import Operand, couple_aligned
from fxcompress.channels.rules.registry import Known, OpClass, nothing_known, register
from fxcompress.channels.space import Space
from fxcompress.channels.values import Call, Step, Value


@dataclass(frozen=True, slots=True)
class Product:
    """One batched product.

    Attributes:
        left: (N, L, K).
        right: (N, K, R).
        bias: what is added, or None.
    """

    left: Value
    right: Value
    bias: Value | None


def product_of(call: Call) -> Product | None:
    """The product; None where an operand is no labelled tensor."""
    first, left, right = (None, *call.args[:2]) if call.func.overloadpacket.__name__ == "bmm" else call.args[:3]
    if not isinstance(left, Value) or not isinstance(right, Value):
        return None
    return Product(left, right, first if isinstance(first, Value) else None)


def inner(product: Product) -> tuple[Tensor | None, Tensor | None]:
    """The labels along the contracted dim, of both operands: (N, 1, K), or (N, L, K) where they vary along more."""
    left = next((x for x in product.left.layers if x.shape[2] > 1), None)
    right = next((x.transpose(1, 2) for x in product.right.layers if x.shape[1] > 1), None)
    return left, right


def _labels(call: Call, space: Space) -> tuple[Layers, ...]:
    product = product_of(call)
    if product is None:
        return pin_all(call, space)
    batch, rows, columns = call.metas[0].shape
    slots = _contract(inner(product), space)
    left = tuple(x for x in product.left.layers if x.shape[2] == 1)
    right = tuple(x for x in product.right.layers if x.shape[1] == 1)
    operands: list[Operand] = [
        (torch.Size([batch, rows, 1]), left + slots[0]),
        (torch.Size([batch, 1, columns]), right + slots[1]),
    ]
    if product.bias is not None:
        operands.append((product.bias.shape, product.bias.layers))
    return (couple_aligned(operands, 3, space),)


def _contract(pair: tuple[Tensor | None, Tensor | None], space: Space) -> tuple[Layers, Layers]:
    """Couple the labels that meet along the contracted dim; what each operand keeps of them: (N, 1, 1), or nothing."""
    found = [_uncrossed(layer, space) for layer in pair]
    a, b = found
    if a is not None and b is not None:
        couple_aligned([(a.shape, (a,)), (b.shape, (b,))], 3, space)
        return _slots(a, space), _slots(b, space)
    text = "it meets a tensor whose size is fixed"
    held = [None if x is None else space.hold(x, {2}, "fixed-operand", text) for x in found]
    left, right = [() if x is None else (x,) for x in held]
    return left, right


def _uncrossed(layer: Tensor | None, space: Space) -> Tensor | None:
    """The labels (N, 1, K); those of a computed weight, which vary along the free dim as well, go all at once."""
    if layer is None or layer.shape[1] == 1:
        return layer
    return space.hold(layer, {1}, "crossing", "a contraction reads a dim that is labelled together with another")


def _slots(layer: Tensor, space: Space) -> Layers:
    return (vector(space.slot(slices(layer, {0})), 3, 0),) if layer.shape[0] > 1 else ()


def may_multiply(product: Product, known: Known) -> tuple[Tensor, Tensor]:
    """Which entries may be other than zero: of the left operand bool (N, K), of the right one (N, K, R); or sizes 1."""
    left, right = ((known.held(value) != 0).cpu() for value in (product.left, product.right))
    return left.any(1), right


def _constants(step: Step, known: Known) -> list[Tensor]:
    """An output whose products are all zero is zero."""
    product = product_of(step.call)
    if product is None or product.bias is not None:
        return nothing_known(step, known)
    left, right = ((known.held(value) != 0).cpu().double() for value in (product.left, product.right))
    entries = max(left.shape[2], right.shape[1])
    live = left.expand(-1, -1, entries) @ right.expand(-1, entries, -1) > 0
    return [torch.where(live, torch.nan, 0.0).to(torch.float64)]


BATCHED = register(OpClass("batched matrix product", _labels, _constants), ["bmm", "baddbmm"])
