"""Modes in which code runs: gradients off, inference, precisions."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from fxcompress.trace.basics.trees import replace

ordinary = torch.inference_mode(mode=False)
"""Decorator: tensors that are made inside can be trained, also where inference mode is on outside."""


@dataclass(frozen=True, slots=True)
class Precision:
    """A precision to run a model in.

    Attributes:
        around: makes what the run lies in: another mode of autocast.
        dtype: of the parameters, buffers and inputs that are no integers; None for the dtypes that they have.
    """

    around: Callable[[], AbstractContextManager[object]] = nullcontext
    dtype: torch.dtype | None = None

    @property
    def switches_autocast(self) -> bool:
        """Whether autocast is in another mode."""
        return self.around is not nullcontext

    def cast(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the model, or an input, as it is in this precision."""
        if self.dtype is None or not tensor.is_floating_point():
            return tensor
        made = tensor.detach().to(self.dtype).requires_grad_(tensor.requires_grad)
        kept = isinstance(tensor, torch.nn.Parameter)
        return torch.nn.Parameter(made, requires_grad=tensor.requires_grad) if kept else made


AS_IT_IS = Precision()


def without_gradient(value: object) -> object:
    """A value of any kind; tensors in it without gradients, in the same memory.

    >>> without_gradient((torch.ones(2, requires_grad=True), 3))
    (tensor([1., 1.]), 3)
    """
    return replace(lambda t: t.detach() if t.is_floating_point() or t.is_complex() else t, value)
