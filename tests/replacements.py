"""Parameters in the place of others, as a removal makes them."""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn
from torch.optim import Optimizer

from fxcompress.training.optimizer import Replacement, kept_entries, prepare_resize


def slice_parameter(old: nn.Parameter, indices: Mapping[int, Tensor]) -> Replacement:
    """A parameter that keeps some entries of another one, with their gradient."""
    new = nn.Parameter(kept_entries(old.detach(), indices), requires_grad=old.requires_grad)
    if old.grad is not None:
        new.grad = kept_entries(old.grad.detach(), indices)
    return Replacement(old, new, dict(indices))


def resize_optimizer(optimizer: Optimizer, changes: Iterable[Replacement]) -> None:
    """Work out what becomes of an optimizer, and make it so."""
    prepare_resize(optimizer, changes).commit()
