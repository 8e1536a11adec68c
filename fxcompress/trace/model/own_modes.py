"""Models with a ``train`` of their own, which leave some of their modules in the other mode: a frozen batch norm."""

import torch
from torch import nn

from fxcompress.errors import UnsupportedModelError
from fxcompress.trace.basics.modules import modules_in
from fxcompress.trace.effects.undo import UndoWrites
from fxcompress.trace.model.skeleton import copy_tensors, skeleton

Modes = tuple[tuple[str, ...], tuple[str, ...]]
"""The modules that are in training after ``eval()``, and those that are in evaluation after ``train()``, by name."""


def _chooses_modes(kind: type[nn.Module]) -> bool:
    """Whether a class of modules, and no class of torch, says what ``train`` and ``eval`` do."""
    found = [next((c for c in kind.__mro__ if name in c.__dict__), nn.Module) for name in ("train", "eval")]
    return any(not c.__module__.startswith(("torch.", "fxcompress.")) for c in found)


def own_modes(model: nn.Module) -> Modes:
    """Which modules ``model`` leaves in the other mode, found on a copy.

    Raises:
        UnsupportedModelError: changing the mode changes weights, too.
    """
    if not _have_modes(model):
        return (), ()
    copy = skeleton(model)
    copy_tensors(copy, set(), lent=True)
    before = {name: tensor for name, tensor in copy.state_dict().items() if torch.is_tensor(tensor)}  # share memory
    other = []
    for mode in (False, True, model.training):
        with UndoWrites() as undone:
            copy.train() if mode else copy.eval()
            now = copy.state_dict()
            changed = [n for n, t in now.items() if n not in before or not _same(undone.as_it_was(before[n]), t)]
            changed += before.keys() - now.keys()
        other.append(tuple(name for name, module in copy.named_modules() if module.training != mode))
        if changed:
            raise UnsupportedModelError(
                f"{'train' if mode else 'eval'}() of {type(model).__name__} changes {min(changed)}, as where adapters "
                "are merged into weights; a graph has the same weights in both modes: merge them for good, or switch "
                "that off, first"
            )
    return other[0], other[1]


def _have_modes(model: nn.Module) -> bool:
    return any(map(_chooses_modes, {type(module) for module in modules_in(model)}))


def forget_runs(copy: nn.Module) -> None:
    """Let ``train`` and ``eval`` of a copy's modules throw away what they throw away, and leave the modes as they were.

    That is what was computed from weights in evaluation, such as a table of attention biases, and kept for the next
    run. In a graph it would be a constant, also when the weights have been trained.
    """
    if not _have_modes(copy):
        return
    modes = [(module, module.training) for module in modules_in(copy)]
    copy.train()
    copy.eval()
    for module, training in modes:
        module.training = training


def _same(a: torch.Tensor, b: object) -> bool:
    if not isinstance(b, torch.Tensor) or a.shape != b.shape:
        return False
    return (a.data_ptr() == b.data_ptr() and a.stride() == b.stride() and a.dtype == b.dtype) or torch.equal(a, b)
