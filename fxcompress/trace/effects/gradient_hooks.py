"""Hooks that code registers on the gradients of its tensors: in the backward pass they may do anything.

``retain_grad`` is no such hook: it keeps a gradient for whoever looks at the tensor later, and a graph keeps none.
"""

from torch import Tensor

HOOKS = frozenset({"register_hook", "register_post_accumulate_grad_hook"})
"""The methods of tensors that do so."""
KEEPS = "retain_grad"
"""The one that changes nothing."""

WHAT = "registers a hook on the gradient of a tensor"
INSTEAD = (
    "let the backward of a torch.autograd.Function do what the hook does, which is a part of the graph; or leave the "
    "hook out, and register one on a layer of the result (register_full_backward_hook)"
)
METHODS = {getattr(Tensor, name): (WHAT, INSTEAD) for name in HOOKS}
"""What each of them does, and what to do instead."""
