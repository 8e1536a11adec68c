"""Sees each op that code runs on tensors with values, what it writes to, and which memory it has made itself."""

from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode

from fxcompress.trace.basics.trees import tensors_in


class OpWatch(TorchDispatchMode):
    """Calls :meth:`before` in front of each op.

    Attributes:
        made: what stands for the memory that ops have made meanwhile, see :func:`memory_of`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made = set[int]()

    def before(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ANN401 - an op
        """Look at an op that is about to run."""

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 - an op
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):  # torch.cond: its functions write to nothing
            return func(*args, **kwargs)
        self.before(func, args, kwargs)
        result = func(*args, **kwargs)
        self.made |= _memory_in(result) - _memory_in([args, kwargs])  # else it is a view, or what was written to
        return result


def _memory_in(tree: Any) -> set[int]:  # noqa: ANN401 - a tree of anything
    return {memory for tensor in tensors_in(tree) for memory in memory_of(tensor)}


def written_to(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:  # noqa: ANN401 - an op
    """The tensors that an op writes to, as its schema says; of norms in training it does not say so."""
    schema = func._schema
    norm = func.overloadpacket in _NORMS
    if not (schema.is_mutable or norm):
        return []
    named = zip(schema.arguments, args, strict=False)
    given = [(a, v) for a, v in named] + [(a, kwargs[a.name]) for a in schema.arguments if a.name in kwargs]
    if norm:
        trains = any(a.name == "training" and value for a, value in given)
        return [value for a, value in given if a.name in _STATISTICS and value is not None] if trains else []
    return list(tensors_in([v for a, v in given if a.alias_info is not None and a.alias_info.is_write]))


_NORMS = frozenset(
    {torch.ops.aten.native_batch_norm, torch.ops.aten.cudnn_batch_norm, torch.ops.aten.miopen_batch_norm}
)
_STATISTICS = ("running_mean", "running_var")


def only_views(schema: Any) -> bool:  # noqa: ANN401
    """Whether an op returns the memory that it is given, and changes nothing of it."""
    return not schema.is_mutable and bool(schema.returns) and all(r.alias_info is not None for r in schema.returns)


def memory_of(tensor: Tensor) -> list[int]:
    """What stands for the memory of a tensor, which its views share; empty for tensors of another make."""
    if tensor.layout != torch.strided:
        return []
    return [tensor.untyped_storage()._cdata]  # noqa: SLF001 - the only name of memory that holds no data
