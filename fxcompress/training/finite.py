"""A loss or a gradient that is not finite: noticed before the optimizer's step would carry it into the weights."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from fxcompress.trace.basics.trees import replace
from fxcompress.training.batches import Batch

IN_THE_DATA = "of this batch hold nan or inf already"
EMPTY = "of this batch have no entries"


class Forward:
    """What a forward pass in training writes into a network, so that it can be taken back.

    Batch norm takes its statistics from a batch before anybody knows what the loss makes of it.

    Args:
        net: before the pass.
    """

    def __init__(self, net: nn.Module) -> None:
        self._kept = [(b, b.detach().clone()) for b in net.buffers() if b.is_floating_point()]

    @torch.no_grad()
    def undo(self) -> None:
        """Put back what the pass has written over."""
        for buffer, before in self._kept:
            buffer.copy_(before)


def what_is_not_finite(loss: Tensor, parameters: Iterable[tuple[str, Tensor]]) -> str:
    """The loss, or the gradient of a parameter, in words; empty where all are finite. One transfer from the device.

    Args:
        loss: of a step.
        parameters: that are trained, each with what it is called.
    """
    grads = {name: _values(p.grad) for name, p in parameters if p.grad is not None}
    largest = get_total_norm(grads.values(), norm_type=float("inf")).to(loss.device)
    value = loss.detach().abs().reshape(()).to(largest)
    if bool(torch.isfinite(torch.maximum(value, largest))):
        return ""
    if not bool(torch.isfinite(loss)):
        return f"the loss is {float(loss.detach())}"
    wrong = [name for name, grad in grads.items() if not bool(torch.isfinite(grad).all())]
    more = f" and of {len(wrong) - 1} more parameters" if len(wrong) > 1 else ""
    return f"the loss is {float(loss.detach()):.4g}, and the gradient of {wrong[0]}{more} is not finite"


def why_not_finite(net: nn.Module, batch: Batch) -> str:
    """Whether it is the data that is not finite or not there, or the network by now, in words."""
    found: list[str] = []

    def see(where: str, tensor: Tensor) -> Tensor:
        if not tensor.numel():
            found.append(f"{where} {EMPTY}")
        elif (tensor.is_floating_point() or tensor.is_complex()) and not bool(torch.isfinite(tensor).all()):
            found.append(f"{where} {IN_THE_DATA}")
        return tensor

    replace(lambda tensor: see("inputs", tensor), [batch.args, batch.kwargs])
    replace(lambda tensor: see("target", tensor), batch.target)
    if found:
        return f"; the {found[0]}"
    wrong = next(((n, p) for n, p in net.named_parameters() if not bool(torch.isfinite(p).all())), None)
    if wrong is None:
        return ""
    small = "; the eps of Adam must be 1e-7 or more in float16, where less is 0" if wrong[1].dtype == torch.half else ""
    return f"; {wrong[0]} holds nan or inf since a step that the optimizer made of finite gradients{small}"


def _values(grad: Tensor) -> Tensor:
    return grad.coalesce().values() if grad.is_sparse else grad
