"""Weights that the original computes, and that are plain parameters here: what they share, whoever computed them.

A module with such a weight has a hook that turns the tensors of the original in a state_dict into the weight.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn


class StateDictHook(ABC):
    """Before a state_dict is loaded into a module: put a weight in the place of what the original computes it from.

    Attributes:
        name: of the weight in the module.
    """

    name: str

    @abstractmethod
    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
        """As torch calls it; changes ``state`` in place."""


def hooks_of(module: nn.Module) -> Iterator[StateDictHook]:
    """Those that one module has."""
    wrapped = (getattr(hook, "hook", None) for hook in module._load_state_dict_pre_hooks.values())
    yield from (hook for hook in wrapped if isinstance(hook, StateDictHook))


def plain_weights(model: nn.Module) -> dict[str, StateDictHook]:
    """The hook of each weight that the original computes, and which is a parameter of ``model``, by its name."""
    named = model.named_modules()
    return {f"{path}.{hook.name}".lstrip("."): hook for path, module in named for hook in hooks_of(module)}


def plain_state(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """A state_dict for ``model`` with each such weight in the place of what it is computed from."""
    result = dict(state)
    for path, module in model.named_modules(remove_duplicate=False):
        for hook in hooks_of(module):
            hook(module, result, f"{path}." if path else "")
    return result


def pass_on_hooks(source: nn.Module, target: nn.Module) -> None:
    """Let ``target``, which takes the tensors of ``source`` over, load the same state_dicts."""
    known = {hook.name for hook in hooks_of(target)}
    for hook in hooks_of(source):
        if hook.name not in known:
            target.register_load_state_dict_pre_hook(hook)
