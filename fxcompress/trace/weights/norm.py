"""Weights that weight norm computes from a length and a direction, as plain parameters.

Weight norm along the outputs ties all inputs of a row together by their common length: without an input that is dead,
but whose direction is not zero, the others would grow. What the network computes depends on the weight alone; so on
the skeleton of a model the weight itself becomes the parameter, from which channels can be taken out exactly, and which
a quantizer can round::

    weight_g (O, 1, 1, 1), weight_v (O, I, H, W)   ->   weight (O, I, H, W) = weight_g * weight_v / |weight_v|

The function is the same; training goes on in the weight. A state_dict of the original loads all the same.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm

from fxcompress.errors import UnsupportedModelError
from fxcompress.trace.basics.modules import modules_in
from fxcompress.trace.inputs import ExampleInputs
from fxcompress.trace.model.flat_weights import renew_weights
from fxcompress.trace.model.skeleton import skeleton
from fxcompress.trace.model.state_dict_hooks import StateDictHook
from fxcompress.trace.verify import agree, stirred

_HOOK = "WeightNorm"  # the class of the hook of torch.nn.utils.weight_norm, whose module the function of its name hides


@dataclass(frozen=True, slots=True, eq=False)
class _Computed:
    """A weight that a module computes from a length and a direction."""

    module: nn.Module
    name: str
    dim: int
    g: nn.Parameter
    v: nn.Parameter

    @property
    def key(self) -> tuple[int, int, int]:
        """The same for the same weight in two modules."""
        return id(self.g), id(self.v), self.dim


@dataclass(frozen=True)
class PlainWeight(StateDictHook):
    """Before a state_dict is loaded into a module: turn a length and a direction in it into the weight.

    Attributes:
        name: of the weight in the module.
        dim: along which each slice has a length of its own; -1 where all of the weight has one.
    """

    name: str
    dim: int

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
        """As torch calls it; changes ``state`` in place."""
        whole, parts = f"{prefix}{self.name}", f"{prefix}parametrizations.{self.name}"
        for g, v in ((f"{parts}.original0", f"{parts}.original1"), (f"{whole}_g", f"{whole}_v")):
            if g in state and v in state:
                state[whole] = torch._weight_norm(state.pop(v), state.pop(g), self.dim)


def is_weight_norm(module: nn.Module) -> bool:
    """Whether weight norm, and nothing else, computes the parametrized tensors of ``module``."""
    lists = getattr(module, "parametrizations", {}).values()
    return all(len(steps) == 1 and isinstance(steps[0], _WeightNorm) for steps in lists)


def is_weight_norm_hook(hook: object) -> bool:
    """Whether a forward pre-hook is the one of ``torch.nn.utils.weight_norm``."""
    return type(hook).__name__ == _HOOK and type(hook).__module__.startswith("torch.nn.utils.")


def make_weights_plain(root: nn.Module) -> None:
    """Replace each length and direction in ``root``, a skeleton, by the weight, in place.

    Raises:
        UnsupportedModelError: something else uses a length or a direction as well, or a weight is not finite.
    """
    found = [computed for module in modules_in(root) for computed in _computed(module)]
    if not found:
        return
    _check_alone(root, found)
    made: dict[tuple[int, int, int], nn.Parameter] = {}
    for computed in found:
        if computed.key not in made:
            made[computed.key] = _weight(computed)
    for module in {id(computed.module): computed.module for computed in found}.values():
        own = [computed for computed in found if computed.module is module]
        _strip(module, own)
        module._parameters = {**{c.name: made[c.key] for c in own}, **module._parameters}
        for computed in own:
            module.register_load_state_dict_pre_hook(PlainWeight(computed.name, computed.dim))
        renew_weights(module)


def with_plain_weights(model: nn.Module) -> nn.Module:
    """``model`` itself, or a copy of it that shares all other tensors where weight norm computes a weight."""
    if not has_weight_norm(model):
        return model
    result = skeleton(model)
    make_weights_plain(result)
    return result


def check_plain_weights(model: nn.Module, inputs: ExampleInputs) -> None:
    """Whether the code of ``model`` computes the same where the weights themselves are its parameters.

    It does, unless it asks how they are made: ``hasattr(layer, "parametrizations")``, ``layer.weight_g``.

    Args:
        model: any model; one without weight norm passes.
        inputs: to run on.

    Raises:
        UnsupportedModelError: it computes something else.
    """
    if not has_weight_norm(model):
        return
    changed = stirred(model)
    if not agree(changed, with_plain_weights(changed), inputs):
        raise UnsupportedModelError(
            f"{type(model).__name__} computes something else where the weights that weight norm computes become "
            "parameters themselves: its code asks how they are made, or reads a length or a direction\n"
            "  ask that in __init__ instead, or remove the weight norm first: "
            "torch.nn.utils.parametrize.remove_parametrizations(module, 'weight')"
        )


def has_weight_norm(model: nn.Module) -> bool:
    """Whether weight norm computes a weight of ``model``."""
    return any(True for module in modules_in(model) for _ in _computed(module))


def _computed(module: nn.Module) -> Iterator[_Computed]:
    if parametrize.is_parametrized(module) and is_weight_norm(module):
        for name, steps in module.parametrizations.items():  # type: ignore[union-attr, operator]
            yield _Computed(module, name, steps[0].dim, steps.original0, steps.original1)
    for hook in filter(is_weight_norm_hook, module._forward_pre_hooks.values()):
        found: Any = hook
        g, v = (getattr(module, f"{found.name}_{part}") for part in "gv")
        yield _Computed(module, found.name, found.dim, g, v)


def _weight(computed: _Computed) -> nn.Parameter:
    g, v = computed.g.detach(), computed.v.detach()
    weight = torch._weight_norm(v, g, computed.dim)
    if not bool(torch.isfinite(weight).all()):
        raise UnsupportedModelError(
            f"the weight norm of {type(computed.module).__name__} makes NaN or infinite values in {computed.name!r}: "
            "a direction of length 0, which has none; give it another value (its length may be 0)"
        )
    return nn.Parameter(weight, requires_grad=computed.g.requires_grad or computed.v.requires_grad)


def _check_alone(root: nn.Module, found: list[_Computed]) -> None:
    """A length or a direction that something else holds as well would no longer be shared with it."""
    holders: Counter[int] = Counter(id(p) for m in modules_in(root) for p in m._parameters.values() if p is not None)
    keys: dict[int, set[tuple[int, int, int]]] = {}
    uses: Counter[int] = Counter()
    for computed in found:
        for part in (computed.g, computed.v):
            keys.setdefault(id(part), set()).add(computed.key)
            uses[id(part)] += 1
    for computed in found:
        if any(len(keys[id(p)]) > 1 or holders[id(p)] != uses[id(p)] for p in (computed.g, computed.v)):
            raise UnsupportedModelError(
                f"the length or the direction of the weight norm of {type(computed.module).__name__} "
                f"({computed.name!r}) is a parameter of something else as well; remove the weight norm first: "
                "torch.nn.utils.parametrize.remove_parametrizations(module, 'weight')"
            )


def _strip(module: nn.Module, own: list[_Computed]) -> None:
    """Take weight norm off a module of a skeleton. Its class may be that of the original: it stays as it is."""
    if parametrize.is_parametrized(module):
        del module._modules["parametrizations"]
        module.__class__ = type(module).__bases__[0]
    for key in [key for key, hook in module._forward_pre_hooks.items() if is_weight_norm_hook(hook)]:
        del module._forward_pre_hooks[key]
    for key in [key for key, hook in module._load_state_dict_pre_hooks.items() if _is_compat_hook(hook)]:
        del module._load_state_dict_pre_hooks[key]
    for computed in own:
        module.__dict__.pop(computed.name, None)
        for part in "gv":
            module._parameters.pop(f"{computed.name}_{part}", None)


def _is_compat_hook(hook: object) -> bool:
    """Whether it is that of torch's weight norm for the names of old, which is a local function and cannot be pickled.

    :class:`PlainWeight` knows these names.
    """
    name = getattr(getattr(hook, "hook", hook), "__qualname__", "")
    return bool(name == "weight_norm.<locals>._weight_norm_compat_hook")
