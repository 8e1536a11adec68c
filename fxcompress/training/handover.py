"""What hangs on a parameter goes over to what is left of it: attributes, hooks, and gradients that are still to come.

A loss that was computed before a removal has a graph that ends in the parameters as they were. What its backward pass
brings them is cut and handed on, so that it makes no difference whether a removal comes before or after it.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable

from torch import Tensor, nn

from fxcompress.errors import OptimizerError
from fxcompress.training.optimizer import Replacement, kept_entries

_GRADIENT, _ACCUMULATED = "_backward_hooks", "_post_accumulate_grad_hooks"
"""Where torch keeps the hooks of a tensor: dicts, or None."""


def hand_over(changes: Iterable[Replacement], *, wrapped: bool) -> None:
    """Let new parameters take the place of old ones for hooks, attributes and backward passes to come.

    Args:
        changes: with the gradients that there are by now cut already.
        wrapped: whether a wrapper averages gradients over processes: it knows nothing of gradients that come late.
    """
    for change in changes:
        old, new = change.old, change.new
        if new is not None:
            new.__dict__.update(old.__dict__)
            for kind in (_GRADIENT, _ACCUMULATED):  # the same dict: who holds a handle can remove its hook
                setattr(new, kind, getattr(old, kind))
        old.grad = None
        setattr(old, _ACCUMULATED, OrderedDict())
        if old.requires_grad:
            old.register_post_accumulate_grad_hook(_refuse if wrapped else _handing_on(change))


def _handing_on(change: Replacement) -> Callable[[Tensor], None]:
    new, indices = change.new, change.indices  # not the change: a hook that holds its own tensor keeps it for ever

    def hand_on(old: Tensor) -> None:
        grad, old.grad = old.grad, None
        if new is not None and grad is not None:
            _accumulate(new, kept_entries(grad.detach(), indices))

    return hand_on


def _accumulate(parameter: nn.Parameter, grad: Tensor) -> None:
    """What the end of a backward pass does; a parameter that was cut again meanwhile hands it on in turn."""
    parameter.grad = grad if parameter.grad is None else parameter.grad + grad
    for hook in list((getattr(parameter, _ACCUMULATED) or {}).values()):
        hook(parameter)


def _refuse(old: Tensor) -> None:
    old.grad = None
    raise OptimizerError(
        f"a gradient came for a parameter of shape {tuple(old.shape)} as it was before prune(): the loss was computed "
        "before it, and a wrapper over processes averages gradients of what is computed after it alone; call prune() "
        "after backward(), or compute the loss again"
    )
