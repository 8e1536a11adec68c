"""A copy of a module tree that shares every tensor with the original.

Passes work on skeletons: modules, attributes and hooks are the copy's own, so nothing that a pass sets can reach the
caller's model, and no weight is copied before it must be.
"""

import copy
import functools
from collections import OrderedDict
from typing import Any, TypeVar, cast

import torch
from torch import nn

from fxcompress.errors import UnsupportedModelError
from fxcompress.trace.basics.modules import modules_in
from fxcompress.trace.model.own_functions import COMPILED_FROM, COPIED, OwnFunctions
from fxcompress.trace.model.uncompiled import ORIGINAL, Uncompiled, is_compiled, state_of_compiled

_M = TypeVar("_M", bound=nn.Module)

POSTPONE = "fxcompress: compile when needed"
"""The key in the memo of copy.deepcopy which says that the copy of a TracedModule need not be compiled yet."""
OWN = "fxcompress: functions over copies"
"""The key in that memo of what copies functions."""

_ATOMS = frozenset({type(None), bool, int, float, complex, str, bytes, type, torch.dtype, torch.device, torch.layout})
_CONTAINERS = frozenset({dict, OrderedDict, list, set})
_OF_COPIES = ("__reduce_ex__", "__reduce__", "__getstate__")


def skeleton(module: _M, *, compiled: bool = True) -> _M:
    """Copy ``module`` without copying a tensor. What ``torch.compile`` has made of modules in it is not compiled.

    Args:
        module: any module.
        compiled: the copy of a :class:`~fxcompress.trace.traced.TracedModule` is compiled if that is; otherwise it is
            compiled when it is first called.

    Raises:
        UnsupportedModelError: something in the module refuses to be copied.
    """
    modules = modules_in(module)
    memo: dict[Any, Any] = {id(tensor): leaf_of(tensor) for tensor in _tensors(modules)}
    if not compiled:
        memo[POSTPONE] = True
    try:
        plain = {}
        for child in reversed(modules):
            kind: Any = Uncompiled if is_compiled(child) else type(child)
            if id(child) not in memo and _is_plain(kind):
                plain[id(child)] = child
                memo[id(child)] = kind.__new__(kind)
        memo[OWN] = OwnFunctions(modules, lambda value: _copied(value, memo))
        for child in plain.values():
            memo[id(child)].__setstate__(_copied_table(_state(child), {}, memo))
        return copy.deepcopy(module, memo)
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(module).__name__} cannot be copied: {error}\n"
            "  fxcompress works on a copy so that your model stays as it is; make copy.deepcopy(model) work "
            "(locks, files and generators must not be stored on modules)"
        ) from error


@functools.cache
def _is_plain(kind: Any) -> bool:  # noqa: ANN401 - a class of modules
    """Whether copy.deepcopy would make an empty module, and give it a copy of the state that nn.Module has."""
    own = any(hasattr(kind, name) for name in ("__deepcopy__", "__getnewargs__", "__getnewargs_ex__", "__slots__"))
    return not own and all(getattr(kind, name, None) is getattr(nn.Module, name, None) for name in _OF_COPIES)


def _state(module: nn.Module) -> dict[str, Any]:
    if is_compiled(module):
        return state_of_compiled(module)
    state: dict[str, Any] = module.__getstate__() if hasattr(nn.Module, "__getstate__") else module.__dict__
    return state


def shallow(module: nn.Module) -> nn.Module:
    """What copy.copy makes of a module, quicker: another one with the same tables, tensors and children."""
    if not _is_plain(cast(Any, type(module))):
        return copy.copy(module)
    new = type(module).__new__(type(module))
    new.__setstate__(_state(module))
    return new


def _copied_table(table: dict[Any, Any], new: dict[Any, Any], memo: dict[Any, Any]) -> dict[Any, Any]:
    """The empty dict ``new`` with copies of the entries of ``table``. As copy.deepcopy does it, in a third of the time.

    A module has some thirty attributes, nearly all of them numbers or empty tables of hooks; copy.deepcopy takes each
    apart as any object.
    """
    for key, item in table.items():
        kind = type(item)
        if kind in _ATOMS:
            copied = item
        elif id(item) in memo:
            copied = memo[id(item)]
        elif kind in _CONTAINERS and not item:
            copied = memo[id(item)] = kind()
        else:
            copied = _copied(item, memo)
        new[key if type(key) is str else _copied(key, memo)] = copied
    return new


def _copied(value: Any, memo: dict[Any, Any]) -> Any:  # noqa: ANN401 - whatever a module holds
    kind = type(value)
    if kind is tuple and id(value) not in memo:
        items = [item if type(item) in _ATOMS else _copied(item, memo) for item in value]
        same = all(new is old for new, old in zip(items, value, strict=True))
        return memo.setdefault(id(value), value if same else tuple(items))
    if isinstance(value, torch.Tensor) and not value.is_leaf:
        return memo.setdefault(id(value), leaf_of(value))
    if kind in COPIED and id(value) not in memo:
        return memo[OWN].copy(value, memo)
    if kind not in _CONTAINERS - {set} or id(value) in memo:
        return copy.deepcopy(value, memo)
    if kind is not list:
        memo[id(value)] = table = kind()
        return _copied_table(value, table, memo)
    memo[id(value)] = new = list[Any]()
    new += [item if type(item) in _ATOMS else _copied(item, memo) for item in value]
    return new


def leaf_of(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor without its history: one that is kept from a run has one, which copy.deepcopy refuses to copy."""
    return tensor if tensor.is_leaf else tensor.detach().requires_grad_(tensor.requires_grad)


def _tensors(modules: list[nn.Module]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for child in modules:
        own = child.__dict__
        for table in (own["_parameters"], own["_buffers"]):
            found += [tensor for tensor in table.values() if tensor is not None]
        found += [value for value in own.values() if isinstance(value, torch.Tensor)]
        found += [weight for weight in own.get("_flat_weights", ()) if weight is not None]  # of a recurrent module
    return found


def without_compiled(model: nn.Module) -> nn.Module:
    """``model`` itself or, where modules of it are compiled, a copy that shares all tensors and runs their code.

    A model that is compiled as a whole is the one of which it was made.
    """
    while is_compiled(model):
        model = model.get_submodule(ORIGINAL)
    compiled = any(
        is_compiled(module) or hasattr(vars(module).get("forward"), COMPILED_FROM) for module in modules_in(model)
    )
    return skeleton(model) if compiled else model


def copy_tensors(
    result: nn.Module, fresh: set[int], copies: dict[int, torch.Tensor] | None = None, *, lent: bool = False
) -> dict[int, torch.Tensor]:
    """Give a module copies of the tensors that it shares with the original, in place; of plain attributes as well.

    Args:
        result: a skeleton, or what a rewrite made of one.
        fresh: ids of the tensors that it does not share.
        copies: those that there are already, by the id of the original.
        lent: parameters are objects of their own over the memory of the original: for a run that undoes what it
            writes there, see :class:`fxcompress.trace.effects.undo.UndoWrites`.

    Returns:
        the copies by the id of the original.
    """
    copies = {} if copies is None else copies
    for module in result.modules():
        for table in (module._parameters, module._buffers, module.__dict__):
            for name, tensor in table.items():
                if isinstance(tensor, torch.Tensor) and id(tensor) not in fresh:
                    if id(tensor) not in copies:
                        copies[id(tensor)] = _lent(tensor) if lent and table is module._parameters else _copy(tensor)
                    fresh.add(id(copies[id(tensor)]))
                    table[name] = copies[id(tensor)]  # type: ignore[assignment]
    return copies


def _lent(parameter: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.data, requires_grad=parameter.requires_grad)  # counts its own writes


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    data = tensor.detach().clone()
    if not isinstance(tensor, nn.Parameter):
        return data
    new = nn.Parameter(data, requires_grad=tensor.requires_grad)
    new.grad = None if tensor.grad is None else tensor.grad.clone()
    return new


def own_buffers(model: nn.Module) -> nn.Module:
    """A copy of ``model`` that shares its parameters and has buffers, and tensors past these, of its own."""
    own = skeleton(model)
    copy_tensors(own, {id(parameter) for parameter in own.parameters()})
    return own
