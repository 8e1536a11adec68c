"""Modes that code switches while it runs, and that a graph does not know: gradients off, inference."""

import torch

from fxcompress.trace.trees import replace

ordinary = torch.inference_mode(mode=False)
"""Decorator: tensors that are made inside can be trained, also where inference mode is on outside."""


def without_gradient(value: object) -> object:
    """A value of any kind; tensors in it without gradients, in the same memory.

    >>> without_gradient((torch.ones(2, requires_grad=True), 3))
    (tensor([1., 1.]), 3)
    """
    return replace(lambda t: t.detach() if t.is_floating_point() or t.is_complex() else t, value)
