"""The shapes, strides and dtypes of what an op makes: torch's own answer, on the meta device.

For many ops that answer is a decomposition in Python, and takes longer than all that the analysis does with it. So it
is asked for once for each op and kind of operands: networks repeat their blocks, and are analysed more than once.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from fxcompress.channels.rules.norms import BATCH_NORM
from fxcompress.channels.rules.registry import OpClass
from fxcompress.channels.values import Value, replace

_LIKE_OPERANDS = frozenset(
    getattr(torch.ops.aten, name)
    for name in (
        "relu",
        "hardtanh",
        "hardswish",
        "hardsigmoid",
        "silu",
        "sigmoid",
        "tanh",
        "gelu",
        "leaky_relu",
        "add",
        "mul",
    )
)


def like(tensor: Tensor) -> Tensor:
    """A tensor on the meta device with the shape, strides and dtype of another; nobody writes to one.

    Of one that has no strides it is a dense one.
    """
    if not has_strides(tensor):
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    if tensor.layout is not torch.strided:
        return torch.empty_like(tensor, device="meta")
    return _strided(tensor.shape, tensor.stride(), tensor.dtype)


def has_strides(tensor: Tensor) -> bool:
    """Whether torch says how a tensor lies in memory: not where it is sparse by rows or columns (CSR and the like)."""
    return tensor.layout in {torch.strided, torch.sparse_coo}


@functools.lru_cache(maxsize=4096)
def _strided(shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_like(torch.empty_strided(shape, stride, dtype=dtype, device="meta"))


def shapes(op: OpClass, func: Any, args: Any, kwargs: Any) -> Any:  # noqa: ANN401
    """The outputs of an ATen call on the meta device.

    Args:
        op: its class.
        func: the op, an OpOverload.
        args: its arguments, Values and plain tensors among them.
        kwargs: the same.
    """
    if op is BATCH_NORM:
        source = args[0].meta
        statistics = _strided(source.shape[1:2], (1,), source.dtype)
        return (source, *[statistics] * (len(func._schema.returns) - 1))
    if func.overloadpacket in _LIKE_OPERANDS and (like := _like(args)) is not None:
        return like
    if kwargs.get("device") is not None:
        kwargs = kwargs | {"device": torch.device("meta")}
    if func._schema.is_mutable or torch.Tag.nondeterministic_seeded in func.tags:
        return _run(func, args, kwargs)
    try:
        return _once(func, _Arguments(args, kwargs))
    except TypeError:  # an argument that has no hash
        return _run(func, args, kwargs)


def _on_meta(tensor: Value | Tensor) -> Tensor:
    return tensor.meta if isinstance(tensor, Value) else tensor.to("meta")


def _like(args: tuple[Any, ...]) -> Tensor | None:
    """Where all tensor operands are alike and floating, so is the result."""
    if not all(isinstance(a, (Value, int, float)) for a in args):
        return None
    first, *others = [a.meta for a in args if isinstance(a, Value)]
    alike = all(o.shape == first.shape and o.stride() == first.stride() and o.dtype == first.dtype for o in others)
    return first if alike and first.is_floating_point() else None


class _Arguments:
    """Arguments that are equal where an op makes the same shapes of them.

    Raises:
        TypeError: one of them has no hash.
    """

    __slots__ = ("_hash", "_key", "args", "kwargs")

    def __init__(self, args: Any, kwargs: dict[str, Any]) -> None:  # noqa: ANN401
        self.args = args
        self.kwargs = kwargs
        self._key = _key((args, *kwargs.items()))
        self._hash = hash(self._key)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Arguments) and self._key == other._key


def _key(item: Any) -> Any:  # noqa: ANN401 - an argument
    """What tells an argument from others: 1, 1.0 and True are equal, and do not make the same dtype."""
    kind = type(item)
    if kind in _PLAIN:
        return kind, item
    if isinstance(item, (tuple, list)):
        return tuple(map(_key, item))
    if kind is Value:
        item = item.meta
    if isinstance(item, Tensor):
        return item.shape, item.stride(), item.dtype, item.is_conj(), item.is_neg()
    return kind, item


_PLAIN = frozenset({int, bool, float, type(None)})


@functools.lru_cache(maxsize=4096)
def _once(func: Any, given: _Arguments) -> Any:  # noqa: ANN401
    given.args, given.kwargs = replace(_on_meta, (Value, Tensor), (given.args, given.kwargs))  # the cache holds them
    return _run(func, given.args, given.kwargs)


def _without_bits(tensor: Tensor) -> Tensor:
    """A tensor that says of itself that it is conjugated or negated, as one that is so by its entries.

    That is a matter of views, which labels know nothing of; so what would resolve it on them does not.
    """
    return tensor.resolve_conj().resolve_neg() if tensor.is_conj() or tensor.is_neg() else tensor


def _run(func: Any, args: Any, kwargs: Any) -> Any:  # noqa: ANN401
    args, kwargs = replace(_on_meta, (Value, Tensor), (args, kwargs))
    try:
        return replace(_without_bits, Tensor, func(*args, **kwargs))
    except NotImplementedError:  # torch has no meta kernel for it: its shapes are those of a run on zeros
        real = replace(lambda t: torch.zeros(t.shape, dtype=t.dtype, device="cpu"), Tensor, (args, kwargs))
        return replace(lambda t: t.to("meta"), Tensor, func(*real[0], **real[1]))
