"""Weights that torch computes for a layer, each time that it is called, in a form that tracing sees into.

    weight.original ──(parametrizations)──▶ weight          torch.nn.utils.parametrize, a property of the layer's class
    weight_orig, weight_mask ──(a hook)──▶ weight           torch.nn.utils.prune, torch.nn.utils.spectral_norm

On the skeleton of a model, what a hook computes becomes a property as well. The layers are traced into, so that the
steps are in the graph, and in training what they write: the estimates of spectral norm. Afterwards only tensors and
names are left of these modules. Weight norm is no case of it, see norm.py.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.prune import BasePruningMethod

from fxcompress.errors import TraceError
from fxcompress.trace.basics.modules import modules_in
from fxcompress.trace.code.locations import place

# A function hides the module of its name.
_SPECTRAL_NORM: Any = sys.modules["torch.nn.utils.spectral_norm"].SpectralNorm
_OF_TORCH = frozenset({parametrize.__name__, parametrizations.__name__})
_LAYERS = frozenset(
    {
        nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear,
        nn.Bilinear, nn.Embedding,
    }
)  # fmt: skip
"""Layers that read each of their tensors once in a call: a hook has set it just before."""


class Opened(nn.Module):
    """Mark of layers whose weights were computed by hooks, and are computed where they are read."""


def is_opened(module: nn.Module) -> bool:
    """Whether tracing must see into a module, as it computes a weight, or is a step of that."""
    return isinstance(module, Opened) or parametrize.is_parametrized(module) or type(module).__module__ in _OF_TORCH


def computes_weight(hook: object) -> bool:
    """Whether a forward pre-hook is one of torch that computes a tensor of its module, but for weight norm."""
    return _computing(hook) is not None


def can_be_opened(module: nn.Module, hook: object) -> bool:
    """Whether it is such a hook on a layer that can do without."""
    return type(module) in _LAYERS and computes_weight(hook)


def was_opened(name: str) -> bool:
    """Whether a parameter of a traced network is called as what torch computes a weight from."""
    return "parametrizations" in name.split(".") or name.endswith("_orig")


def open_hooks(root: nn.Module) -> None:
    """Let the layers in ``root``, a skeleton, compute what hooks would compute for them, in place of the hooks."""
    for module in modules_in(root):
        found = {key: _computing(hook) for key, hook in module._forward_pre_hooks.items()}
        steps = {key: known for key, known in found.items() if known is not None and type(module) in _LAYERS}
        if not steps:
            continue
        for key, (name, _) in steps.items():
            del module._forward_pre_hooks[key]
            del module.__dict__[name]
        kind = type(module)
        properties = {name: property(_read(name, compute)) for name, compute in steps.values()}
        module.__class__ = type(kind.__name__, (_Called, kind), properties)


def forget_computed(root: nn.Module) -> None:
    """Put nothing in the place of the weights that hooks in ``root``, a skeleton, have left from its last call."""
    for module, name, _ in _of_hooks(root):
        module.__dict__[name] = module.__dict__[name].new_empty(0)


def renew_computed(root: nn.Module) -> None:
    """Let the weights that hooks set in a call be there before the first one, for who reads their shapes, say."""
    with torch.no_grad():
        for module, name, compute in _of_hooks(root):
            training = module.training
            module.training = False  # in training, spectral norm goes on estimating
            module.__dict__[name] = compute(module)
            module.training = training


def _of_hooks(root: nn.Module) -> Iterator[tuple[nn.Module, str, Callable[[nn.Module], Tensor]]]:
    for module in modules_in(root):
        for hook in module._forward_pre_hooks.values():
            found = _computing(hook)
            if found is not None:
                yield module, *found


def close(root: nn.Module) -> None:
    """Leave of the modules that were traced into their tensors and names alone, so that they can be saved."""
    for module in list(modules_in(root)):
        if parametrize.is_parametrized(module):
            module.parametrizations.__class__ = nn.Module
        if is_opened(module):
            module.__class__ = nn.Module


def _computing(hook: Any) -> tuple[str, Callable[[nn.Module], Tensor]] | None:  # noqa: ANN401 - whatever can be called
    """The tensor that a hook of torch sets, and how it is computed; None for other hooks."""
    if type(hook) is _SPECTRAL_NORM:
        return hook.name, lambda module: hook.compute_weight(module, do_power_iteration=module.training)
    kind = type(hook)
    if isinstance(hook, BasePruningMethod) and kind.__call__ is BasePruningMethod.__call__:
        return hook._tensor_name, hook.apply_mask  # noqa: SLF001 - there is no other name
    return None


class _Called(Opened):
    """A layer that knows whether it is being called: a hook computes nothing for who reads its weight otherwise."""

    fxc_running = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        with self._running():
            return super().forward(*args, **kwargs)

    @contextmanager
    def _running(self) -> Iterator[None]:
        self.__dict__["fxc_running"] = True
        try:
            yield
        finally:
            del self.__dict__["fxc_running"]


def _read(name: str, compute: Callable[[nn.Module], Tensor]) -> Callable[[_Called], Tensor]:
    def read(module: _Called) -> Tensor:
        if not module.fxc_running:
            raise TraceError(
                f"the {name} of a {type(module).__name__} is read{place()}, and not by the layer itself: a hook "
                "computes it when the layer is called\n  call the layer, or make its weight a plain one first "
                "(torch.nn.utils.prune.remove, torch.nn.utils.remove_spectral_norm)"
            )
        return compute(module)

    return read
