"""Elementwise ops: labels that meet are coupled."""

import math
import operator
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxcompress.channels.computed_numbers import Computed, is_written
from fxcompress.channels.layers import Layers, crosses, pad_rank, slices, support
from fxcompress.channels.rules.registry import Known, OpClass, nothing_known, register, zero_where
from fxcompress.channels.space import Space
from fxcompress.channels.values import Call, LabelTensor, Step, Value, find, leaves, replace

Operand = tuple[torch.Size, Layers]


def couple_aligned(operands: list[Operand], rank: int, space: Space) -> Layers:
    """Couple the labels of operands that are broadcast against each other; the layers of the result.

    Labels of equal support are coupled. Where one support holds the other (heads, and dims of heads), the smaller
    labels stand for slices of the larger ones. Where supports cross, slices along the dims that they share can still
    go; the others keep their size, as do those that meet a fixed size.
    """
    shapes = [(1,) * (rank - len(shape)) + tuple(shape) for shape, _ in operands]
    stacks = [[pad_rank(layer, rank) for layer in layers] for _, layers in operands]
    if len(operands) == 1:
        return tuple(stacks[0])
    everything = {support(layer) for layers in stacks for layer in layers}
    leads: dict[frozenset[int], Tensor] = {}
    for layer in (layer for layers in stacks for layer in layers):
        dims = support(layer)
        crossing = {d for other in everything if crosses(dims, other) for d in dims - other}
        fixed = {d for shape, own in zip(shapes, stacks, strict=True) for d in _uncovered(shape, own, dims)}
        held: Tensor | None = layer
        if crossing:
            held = space.hold(layer, crossing | fixed, "crossing", "its labels cross others of another shape")
        elif fixed:
            held = space.hold(layer, fixed, "fixed-operand", "it meets a tensor whose size is fixed")
        if held is not None and support(held) in leads:
            space.couple(leads[support(held)], held)
        elif held is not None:
            leads[support(held)] = held
    return _largest(leads, space)


def _uncovered(shape: tuple[int, ...], layers: list[Tensor], dims: frozenset[int]) -> list[int]:
    """The ``dims`` along which an operand has entries and no labels."""
    return [d for d in dims if shape[d] > 1 and not any(layer.shape[d] > 1 for layer in layers)]


def _largest(leads: dict[frozenset[int], Tensor], space: Space) -> Layers:
    """The layers that no other one holds; the others stand for slices of the next larger one."""
    result = []
    for dims, layer in leads.items():
        if any(crosses(dims, other) for other in leads):
            space.pin(layer, "crossing", "its labels cross others of another shape")
            continue
        larger = [other for other in leads if dims < other]
        if larger:
            space.nest(layer.reshape(-1), slices(leads[min(larger, key=len)], dims))
        else:
            result.append(layer)
    return tuple(result)


def operands_of(call: Call) -> list[tuple[torch.Size, Layers]]:
    """Shape and layers of each tensor operand; size 1 where an operand was expanded, to a size that may be another."""
    found: list[tuple[torch.Size, Layers]] = []
    for leaf in leaves((call.args, call.kwargs)):
        if isinstance(leaf, Value):
            found.append((unexpanded(leaf), leaf.layers))
        elif isinstance(leaf, Tensor):
            found.append((leaf.shape, ()))
    return found


def unexpanded(value: Value) -> torch.Size:
    """The shape of a value, of size 1 where it was expanded: it follows the size of what it meets."""
    strides, layers = value.meta.stride(), value.layers
    if all(strides):
        return value.shape
    expanded = {d for d, step in enumerate(strides) if not step and not any(x.shape[d] > 1 for x in layers)}
    return torch.Size([1 if d in expanded else n for d, n in enumerate(value.shape)])


def _labels(call: Call, space: Space) -> tuple[Layers, ...]:
    layers = couple_aligned(operands_of(call), max(meta.ndim for meta in call.metas), space)
    return tuple(layers for _ in call.metas)


def run_known(step: Step, known: Known) -> list[Tensor]:
    """Run the op itself where all operands are known; NaN elsewhere."""
    return _of_zeros(step, known) or _run(step, known)


def _of_zeros(step: Step, known: Known) -> list[Tensor] | None:
    """The same for a tensor and numbers, where all that is known of the tensor is zero; None for others.

    Most activations meet nothing else: what each makes of zero is asked once.
    """
    call = step.call
    source, *numbers = call.args or (None,)
    if (
        type(source) is not Value
        or source.meta.is_complex()
        or call.kwargs
        or len(step.outputs) > 1
        or not all(type(x) in _NUMBERS for x in numbers)
    ):
        return None
    before = known.of(source)
    if before.dtype is not torch.float64 or not step.outputs[0].meta.is_floating_point():
        return None
    array = before.numpy()
    zero = array == 0
    if not zero.any():
        return nothing_known(step, known) if np.isnan(array).all() else None
    if not (zero | np.isnan(array)).all():
        return None
    at_zero = known.once(call.func, tuple(numbers), lambda: _at_zero(call.func, numbers))
    if not at_zero:
        return [before]
    return [torch.from_numpy(np.where(zero, at_zero, np.nan))]


_NUMBERS = frozenset({bool, int, float})
_ZERO = torch.zeros((), dtype=torch.float64, device="cpu")


def _at_zero(func: Callable[..., Any], numbers: Sequence[Any]) -> float:
    """What a function makes of zero; NaN if it tells -0.0 from it."""
    here, there = (float(func(zero, *numbers)) for zero in (_ZERO, -_ZERO))
    return here if here == there else math.nan


def _run(step: Step, known: Known) -> list[Tensor]:
    tree = (step.call.args, step.call.kwargs)
    values = {value.key: value for value in find(Value, tree)}
    maps = [known.of(value) for value in values.values()]
    plain = any(isinstance(leaf, Tensor | Computed) for leaf in leaves(tree))
    followed = all(v.meta.is_floating_point() or v.meta.is_complex() for v in step.outputs)
    if plain or not followed or any(_none(m) for m in maps):
        return nothing_known(step, known)
    varies = torch.tensor(False, device="cpu")
    for value, own in zip(values.values(), maps, strict=True):
        varies = varies | (own != 0 if value.meta.is_complex() or _jumps(step.call) else own.isnan())
    choices = [_with_signs(known.of(value), value) for value in values.values()]
    first, *turned = (_outputs(step.call, dict(zip(values, numbers, strict=True))) for numbers in product(*choices))
    rank, found = step.outputs[0].rank, []
    for out, *same in zip(first, *turned, strict=True):
        differs = varies
        for other in same:
            differs = differs | (other != out)
        real = torch.where(out == 0, 0.0, torch.nan) if out.is_complex() else out
        found.append(pad_rank(torch.where(differs, torch.nan, real.to(torch.float64)), rank))
    return found


def _with_signs(channels: Tensor, value: Value) -> list[Tensor]:
    """What is known, with zeros of either sign: which one a zero has, the inputs may decide, as in ``0 * x``.

    A map holds one number where a complex entry has two, so of these zeros alone are known.
    """
    numbers = channels.double().nan_to_num(posinf=math.inf, neginf=-math.inf)
    zero = numbers == 0
    if not zero.any():
        return [numbers]
    signs = [torch.where(zero, number, numbers) for number in (0.0, -0.0)]
    return [torch.complex(a, b) for a, b in product(signs, signs)] if value.meta.is_complex() else signs


def _outputs(call: Call, numbers: dict[int, Tensor]) -> Sequence[Tensor]:
    """What a call returns for numbers in place of its values, by their keys."""
    args, kwargs = replace(lambda value: numbers[value.key], Value, (call.args, call.kwargs))
    result = call.func(*args, **kwargs)
    return result if isinstance(result, tuple | list) else [result]


_JUMPS = frozenset(
    {
        "floor", "ceil", "round", "trunc", "fix", "frac", "sign", "sgn", "fmod", "remainder", "floor_divide",
        "heaviside", "hardshrink", "threshold", "atan2", "angle",
    }
)  # fmt: skip


def _jumps(call: Call) -> bool:
    """Whether the rounding of a constant may decide what the result is."""
    return call.func.overloadpacket.__name__ in _JUMPS or call.kwargs.get("rounding_mode") is not None


def _none(known: Tensor) -> bool:
    return known.numel() == 1 and bool(known.isnan())


def _multiply(step: Step, known: Known) -> list[Tensor]:
    """As :func:`run_known`; beside that, zero times anything (finite) is zero. What is known to be infinite is not."""
    (result,) = run_known(step, known)
    factors, rank = step.call.args[:2], step.outputs[0].rank
    if any(isinstance(x, float) and not isinstance(x, Computed) and not math.isfinite(x) for x in factors):
        return [result]
    values = find(Value, factors)
    infinite = [pad_rank(known.of(value), rank).isinf() for value in values]
    for value in values:
        zero = pad_rank(known.of(value), rank) == 0
        for other in infinite if zero.any() else ():
            zero = zero & ~other
        if zero.any():
            result, zero = torch.broadcast_tensors(result, zero)
            result = torch.where(zero, 0.0, result)
    return [result]


def _is_number(below: object) -> bool:
    """Whether a divisor is a tensor that the graph holds, of one number for all entries, neither 0 nor NaN."""
    return type(below) is Tensor and below.ndim == 0 and (below.is_meta or bool(below.abs() > 0))


def _divide(step: Step, known: Known) -> list[Tensor]:
    """As :func:`run_known`; beside that, zero over what its neighbours are divided by as well is zero.

    If that were zero, the neighbours would be infinite. A number of its own may be zero where its numerator is; so is
    the length of a vector of zeros.
    """
    (result,) = run_known(step, known)
    above, below = step.call.args[:2]
    if isinstance(above, Value) and isinstance(below, Computed):
        return [zero_where(known.of(above) == 0)]
    if isinstance(above, Value) and _is_number(below):
        return [torch.where(known.of(above) == 0, 0.0, result)]
    if not isinstance(above, Value) or not isinstance(below, Value) or step.call.kwargs.get("rounding_mode"):
        return [result]
    rank = step.outputs[0].rank
    zero = pad_rank(known.of(above), rank) == 0
    shape = (1,) * (rank - below.rank) + tuple(unexpanded(below))
    for dim, own in enumerate(shape):  # along such a dim there are other numbers to divide by
        if own > 1:
            zero = zero.all(dim, keepdim=True)
    if zero.any():
        zero = zero & (pad_rank(known.of(below), rank) != 0)
        result, zero = torch.broadcast_tensors(result, zero)
        result = torch.where(zero, 0.0, result)
    return [result]


def _untouched(step: Step, known: Known) -> list[Tensor]:
    value = find(Value, step.call.args)[0]
    if all(v.meta.is_complex() for v in step.outputs):
        return [_zeros_alone(known.of(value))] * len(step.outputs)
    floating = all(v.meta.is_floating_point() for v in step.outputs)
    floating &= value.meta.is_floating_point() or value.meta.dtype is torch.bool
    return [known.of(value)] * len(step.outputs) if floating else nothing_known(step, known)


def _dropped(step: Step, known: Known) -> list[Tensor]:
    """Dropout as the op of accelerators, which runs in evaluation too: it drops nothing there, and zero stays zero."""
    value, _, train = step.call.args
    found = known.of(value)
    kept = found if train is False else torch.where(found == 0, found, torch.nan)
    return [kept, *nothing_known(step, known)[1:]]


def _copied(step: Step, known: Known) -> list[Tensor]:
    """What is copied replaces what was there."""
    source, (out,) = step.call.args[1], step.outputs
    if not isinstance(source, Value) or not (source.meta.is_floating_point() or source.meta.is_complex()):
        return nothing_known(step, known)
    found = pad_rank(known.of(source), out.rank)
    return [_zeros_alone(found) if out.meta.is_complex() else found]


def _zeros_alone(found: Tensor) -> Tensor:
    """What is known of complex entries: a map holds one number where they have two, so of zeros alone."""
    return torch.where(found == 0, 0.0, torch.nan).double()


_FILLS = {"zero": 0.0, "zeros_like": 0.0, "ones_like": 1.0, "empty_like": 0.0}
"""What ops fill a tensor with. In what nobody has filled there may be any number, so zero as well."""


_FILL_WITH = frozenset({"fill", "full_like"})
"""Those that are given the number."""


def _filled(step: Step, known: Known) -> list[Tensor]:
    """The same number everywhere, whatever was there."""
    (out,) = step.outputs
    if not out.meta.is_floating_point():
        return nothing_known(step, known)
    name = step.call.func.overloadpacket.__name__
    number = step.call.arg(1, "fill_value") if name in _FILL_WITH else _FILLS[name]
    if type(number) not in _NUMBERS:  # one that is computed from sizes may be another one next time
        return nothing_known(step, known)
    return [torch.full((1,) * out.rank, float(number), dtype=torch.float64, device="cpu")]


def _where(condition: Tensor, *choices: Any) -> Any:  # noqa: ANN401 - what torch.where takes and returns
    """``torch.where`` where one of both is a number, of which torch makes a tensor that nothing would be known of."""
    tensors = [x for x in choices if isinstance(x, LabelTensor) and x.is_floating_point()]
    if len(choices) == 2 and tensors:
        choices = tuple(torch.zeros_like(tensors[0]) + x if type(x) in {int, float} else x for x in choices)
    return torch.where(condition, *choices)


def _assign(whole: Any, index: Any, written: Any) -> None:  # noqa: ANN401 - what an assignment takes
    """``x[mask] = number``, as the choice that it is: each entry is what it was, or the number.

    ``x[:, [0, 2]] = number``, of which torch makes a tensor that nothing would be known of, as a copy of a part.
    """
    mask = isinstance(index, Tensor) and index.dtype is torch.bool and 0 < index.ndim <= whole.ndim
    if mask and isinstance(whole, LabelTensor) and type(written) in _NUMBERS:
        whole.masked_fill_(index.reshape((*index.shape, *[1] * (whole.ndim - index.ndim))), written)
    elif type(written) in _NUMBERS and any(isinstance(item, list) for item in _items(index)):
        whole[index] = torch.full_like(whole[index], written)
    else:
        whole[index] = written


def _items(index: object) -> Sequence[object]:
    return index if isinstance(index, tuple) else (index,)


ON_LABELS: dict[object, Callable[..., Any]] = {torch.where: _where, operator.setitem: _assign}
"""Functions of a graph, and what runs on labels in their place, if the graph holds their numbers."""


def _choose(step: Step, known: Known) -> list[Tensor]:
    """Where all that may be chosen is the same, the choice is."""
    (out,) = step.outputs
    choices = [_choice(leaf, known) for leaf in leaves(step.call.args) if not _is_mask(leaf)]
    if not out.meta.is_floating_point() or any(c is None for c in choices):
        return nothing_known(step, known)
    maps = torch.broadcast_tensors(*[pad_rank(c, out.rank) for c in choices if c is not None])
    same = torch.stack([m == maps[0] for m in maps]).all(0)
    return [torch.where(same, maps[0], torch.nan)]


def _is_mask(leaf: object) -> bool:
    dtype = leaf.meta.dtype if isinstance(leaf, Value) else getattr(leaf, "dtype", None)
    return dtype is torch.bool


def _choice(leaf: object, known: Known) -> Tensor | None:
    """What is known of one of the tensors or numbers to choose from; None for nothing."""
    if isinstance(leaf, Value):
        return known.of(leaf).double() if leaf.meta.is_floating_point() else None
    return torch.tensor(float(leaf), dtype=torch.float64, device="cpu") if is_written(leaf) else None


POINTWISE = OpClass("pointwise", _labels, run_known)
OPAQUE_VALUES = OpClass("pointwise, values unknown", _labels, nothing_known)
MULTIPLY = register(OpClass("multiply", _labels, _multiply), ["mul", "multiply"])
DIVIDE = register(OpClass("divide", _labels, _divide), ["div"])
SAME = register(OpClass("same values", _labels, _untouched), ["clone", "detach", "alias", "lift_fresh", "_to_copy"])

CHOICE = register(OpClass("choice", _labels, _choose), ["where", "masked_fill"])

# Elementwise, but without the pointwise tag.
register(POINTWISE, ["hardswish", "hardsigmoid"])
FILLED = register(OpClass("pointwise, filled", _labels, _filled), [*_FILLS, *_FILL_WITH])
register(OpClass("copy", _labels, _copied), ["copy"])
register(OpClass("dropout", _labels, _dropped), ["native_dropout"])
# Elementwise, but what they return where an operand is unknown need not be unknown, or is random.
register(
    OPAQUE_VALUES,
    [
        "nan_to_num", "fmax", "fmin", "bernoulli", "rand_like", "randn_like", "uniform", "exponential",
        "geometric", "log_normal", "cauchy", "normal_functional", "rrelu_with_noise",
        "rrelu_with_noise_functional",
    ],
)  # fmt: skip
