"""Modes that code switches while it runs, and that a graph does not know: gradients off, inference, autocast."""

import torch

from fxcompress.trace.trees import replace

ordinary = torch.inference_mode(mode=False)
"""Decorator: tensors that are made inside can be trained, also where inference mode is on outside."""


def autocast_mode() -> tuple[bool, bool]:
    """Whether autocast is on, on a CPU and on a GPU."""
    return torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")


def without_gradient(value: object) -> object:
    """A value of any kind; tensors in it without gradients, in the same memory.

    >>> without_gradient((torch.ones(2, requires_grad=True), 3))
    (tensor([1., 1.]), 3)
    """
    return replace(lambda t: t.detach() if t.is_floating_point() or t.is_complex() else t, value)
