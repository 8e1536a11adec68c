"""A copy of a module tree that shares every tensor with the original.

Passes work on skeletons: modules, attributes and hooks are the copy's own, so nothing that a pass sets can reach the
caller's model, and no weight is copied before it must be.
"""

import copy
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import nn

from fxcompress.errors import UnsupportedModelError

_M = TypeVar("_M", bound=nn.Module)


def skeleton(module: _M) -> _M:
    """Copy ``module`` without copying a tensor.

    Raises:
        UnsupportedModelError: something in the module refuses to be copied.
    """
    memo: dict[int, object] = {id(tensor): tensor for tensor in _tensors(module)}
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(module).__name__} cannot be copied: {error}\n"
            "  fxcompress works on a copy so that your model stays as it is; make copy.deepcopy(model) work "
            "(locks, files and generators must not be stored on modules)"
        ) from error


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    for child in module.modules():
        yield from (p for p in child._parameters.values() if p is not None)
        yield from (b for b in child._buffers.values() if b is not None)
        yield from (v for v in child.__dict__.values() if isinstance(v, torch.Tensor))


def own_tensors(result: nn.Module, fresh: set[int]) -> dict[int, torch.Tensor]:
    """Give a module copies of the tensors that it shares with the original, in place.

    Args:
        result: a skeleton, or what a rewrite made of one.
        fresh: ids of the tensors that it does not share.

    Returns:
        the copies by the id of the original.
    """
    copies: dict[int, torch.Tensor] = {}
    for module in result.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None and id(tensor) not in fresh:
                    fresh.add(id(copies.setdefault(id(tensor), _copy(tensor))))
                    table[name] = copies[id(tensor)]  # type: ignore[assignment]
    return copies


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    data = tensor.detach().clone()
    if not isinstance(tensor, nn.Parameter):
        return data
    new = nn.Parameter(data, requires_grad=tensor.requires_grad)
    new.grad = None if tensor.grad is None else tensor.grad.clone()
    return new
