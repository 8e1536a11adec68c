"""Models that are refused at the door, each with the reason and the remedy."""

import dis
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from fxcompress.errors import UnsupportedModelError
from fxcompress.trace.basics.modules import named_modules_in
from fxcompress.trace.forward_hooks import hooks_of_its_own
from fxcompress.trace.model.chosen_forward import chosen_forward
from fxcompress.trace.model.own_modes import own_modes
from fxcompress.trace.weights.norm import is_weight_norm, is_weight_norm_hook
from fxcompress.trace.weights.opened import can_be_opened, computes_weight

_HOOKS = {
    "_forward_hooks": "forward hook",
    "_forward_pre_hooks": "forward pre-hook",
    "_backward_hooks": "backward hook",
    "_backward_pre_hooks": "backward pre-hook",
}


def check_supported(model: nn.Module) -> None:
    """Raise an error when ``model`` cannot be analysed at all.

    Raises:
        TypeError: it is no nn.Module.
        UnsupportedModelError: meta tensors, lazy or quantized parameters, NaN or infinite weights, parametrizations of
            recurrent layers, hooks (but for those of torch that compute the weights of layers, and forward hooks that
            the model's own code registers), ScriptModules, a ``train()`` that changes weights.
    """
    check_module(model)
    own = hooks_of_its_own(model)
    for name, module in named_modules_in(model).items():
        reason = _module_reason(module, own)
        if reason:
            raise UnsupportedModelError(f"module {name or '<root>'!r} ({type(module).__name__}): {reason}")
    if not _only_calls_on(type(model).__call__):
        raise UnsupportedModelError(
            f"{type(model).__name__} has a __call__ of its own, and what is traced is its forward\n"
            "  do in forward what __call__ does, or put the model into a module that calls it in its forward"
        )
    named = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in named:
        reason = _tensor_reason(tensor)
        if reason:
            raise UnsupportedModelError(f"tensor {name!r} {tuple(tensor.shape)}: {reason}")
    own_modes(model)
    check_finite(model)


def check_module(model: object) -> None:
    """Raise an error when ``model`` is no module, as where arguments are swapped.

    Raises:
        TypeError: it says what it is.
    """
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got the class {model.__name__}; pass an object of it")
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}; the model is the first argument")


def check_finite(model: nn.Module) -> None:
    """Raise an error when a parameter holds NaN or infinite values.

    Raises:
        UnsupportedModelError: it names the first one.
    """
    bad = next(_not_finite(list(model.named_parameters())), None)
    if bad is not None:
        raise UnsupportedModelError(
            f"parameter {bad!r} holds NaN or infinite values; the training that produced it has diverged: "
            "load a sound checkpoint first"
        )


_QUANTIZED = ("torch.ao.nn.quantized.", "torch.ao.nn.intrinsic.quantized.")  # but for sums in float numbers


def _is_of(*prefixes: str) -> Callable[[nn.Module], bool]:
    return lambda module: f"{type(module).__module__}.{type(module).__name__}".startswith(prefixes)


_REFUSED: tuple[tuple[Callable[[nn.Module], bool], str], ...] = (
    (
        lambda module: isinstance(module, LazyModuleMixin) and module.has_uninitialized_params(),
        "it is lazy and has no shape yet; run the model once on an input",
    ),
    (
        lambda module: _is_of(*_QUANTIZED)(module) and "FloatFunctional" not in type(module).__name__,
        "it is quantized already; pass the float model",
    ),
    (
        lambda module: isinstance(module, torch.jit.ScriptModule),
        "a ScriptModule has no Python code to trace; pass the eager model",
    ),
    (
        lambda module: isinstance(module, nn.parallel.DataParallel | nn.parallel.DistributedDataParallel),
        "pass the wrapped model (model.module), and wrap the result again",
    ),
    (
        lambda module: (
            isinstance(module, nn.RNNBase) and parametrize.is_parametrized(module) and not is_weight_norm(module)
        ),
        (
            "it is recurrent, and computes its weights by a parametrization other than weight norm; call "
            "torch.nn.utils.parametrize.remove_parametrizations(module, name) first"
        ),
    ),
    (
        lambda module: chosen_forward(module) is None,
        "its forward was replaced on the instance by what is no method of it; define it in a class",
    ),
)


def _only_calls_on(call: Any) -> bool:  # noqa: ANN401 - a function
    """Whether ``__call__`` of a module is that of torch, or does no more than hand its arguments on to it."""
    if call.__module__.partition(".")[0] in {"torch", "fxcompress"}:
        return True
    code = getattr(call, "__code__", None)
    if code is None or not {"super", "__call__"}.issuperset(code.co_names) or set(code.co_consts[1:]) - {None}:
        return False
    working = ("BINARY", "COMPARE", "UNARY", "STORE_A", "STORE_G", "STORE_S", "STORE_D", "POP_JUMP", "JUMP", "FOR")
    return not any(step.opname.startswith(working) for step in dis.get_instructions(code))


def _module_reason(module: nn.Module, own: frozenset[int]) -> str | None:
    hooks = [(kind, hook) for name, kind in _HOOKS.items() for hook in getattr(module, name).values()]
    known = {id(hook) for _, hook in hooks if is_weight_norm_hook(hook) or can_be_opened(module, hook)} | own
    reasons = (_hook_reason(kind, hook) for kind, hook in hooks if id(hook) not in known)
    return next((reason for applies, reason in _REFUSED if applies(module)), next(reasons, None))


def _hook_reason(kind: str, hook: object) -> str:
    owner = type(hook).__name__
    if computes_weight(hook):
        return f"it computes its weight in a hook ({owner}); call the matching torch.nn.utils.remove_* function first"
    label = getattr(hook, "__qualname__", owner)
    return f"it has a {kind} ({label}), which may change what it computes; remove it, and register it on the result"


def _tensor_reason(tensor: torch.Tensor) -> str | None:
    if is_lazy(tensor):
        return "it is lazy and has no shape yet; run the model once on an input"
    if tensor.is_meta:
        return (
            "it is on the meta device and has no values; materialise the model first (model.to_empty, load_state_dict)"
        )
    if tensor.is_quantized:
        return "it is quantized already; pass the float model"
    return None


def _not_finite(named: list[tuple[str, nn.Parameter]]) -> Iterator[str]:
    """Names of the parameters with NaN or infinite values.

    A sum is finite unless a value is not (or it overflows, in float32 at the latest, which the second look tells
    apart): one pass over the weights, and one host synchronisation for each device.
    """
    floating = [(name, p.detach()) for name, p in named if p.is_floating_point() and p.numel()]
    for device in {p.device for _, p in floating}:
        here = [(name, p) for name, p in floating if p.device == device]
        sums = torch.stack([p.sum().float() for _, p in here])
        for i in (~torch.isfinite(sums)).nonzero().flatten().tolist():
            name, parameter = here[i]
            if not bool(torch.isfinite(parameter).all()):
                yield name
