"""Whether an optimizer and an objective can train the number formats of a network, before the first step is made."""

import logging
from collections.abc import Iterable
from functools import partial

import torch
from torch.optim import Optimizer

from fxcompress.errors import OptimizerError
from fxcompress.quantizer import Quantizer
from fxcompress.training.batches import check_callable
from fxcompress.training.network import SizedNetwork
from fxcompress.training.optimizer import check_optimizers

_NO_CLOSURE = (
    "fit() makes one forward and backward pass for each step: with an optimizer that asks for several, such as LBFGS, "
    "write the loop yourself, see docs/training.md"
)

_HARDLY = "with those of the weights they hardly move. Take net.param_groups()"
"""What follows from :func:`what_is_mixed`."""
_MIXED = "_fxc_mixed"
_LOG = logging.getLogger("fxcompress")


def check_suited(optimizer: Optimizer, net: SizedNetwork) -> None:
    """Check that an optimizer is one for a compressed network, and can make a step after a backward pass.

    Raises:
        TypeError: it is no optimizer, or its ``step`` needs a closure.
        OptimizerError: it holds parameters that are not the network's and lacks some of them, or lacks bits.
    """
    check_optimizers([optimizer], net.parameters())
    # of the class: a scheduler puts a function of its own in place of the method
    check_callable("optimizer.step", partial(type(optimizer).step, optimizer), (), _NO_CLOSURE)
    missing = what_lacks(optimizer, net)
    if missing:
        raise OptimizerError(
            f"{missing}, so they would never shrink; build it from net.param_groups(), or say "
            "requires_grad_(False) of bits that are to stay"
        )


def what_lacks(optimizer: Optimizer, net: SizedNetwork) -> str:
    """How many of the bits that can be trained an optimizer does not hold, in words; empty where it holds all."""
    quantizers, held = _quantizers(net), {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = sum(q.bits.requires_grad and id(q.bits) not in held for q in quantizers)
    return f"the optimizer lacks the bits of {missing} of {len(quantizers)} weights" if missing else ""


def what_is_mixed(optimizer: Optimizer, net: SizedNetwork) -> str:
    """The group of an optimizer that treats bits as it treats weights, in words; empty where there is none."""
    special = {id(p) for q in _quantizers(net) for p in (q.bits, q.exponent)}
    for number, group in enumerate(optimizer.param_groups):
        if len({id(p) in special for p in group["params"]}) == 2:
            return (
                f"param_groups[{number}] of the optimizer holds bits together with weights, but they need a learning "
                "rate and an eps of their own"
            )
    return ""


def tell_of_mixed(net: SizedNetwork, optimizers: Iterable[Optimizer]) -> None:
    """Warn, once for a network, of an optimizer that trains bits as it trains weights."""
    for optimizer in optimizers:
        mixed = what_is_mixed(optimizer, net) if _MIXED not in net.__dict__ else ""
        if mixed:
            net.__dict__[_MIXED] = True
            _LOG.warning("fxcompress: %s: %s", mixed, _HARDLY)


@torch.enable_grad()
def check_objective(net: SizedNetwork) -> None:
    """Check that the objective of a network can be trained for.

    Raises:
        ValueError: what it returns is no scalar, or has no gradient although there are bits to train.
    """
    if not net.size().requires_grad and any(bits.requires_grad for bits in net.fxc_bits):
        raise ValueError(
            f"objective {net.settings.objective!r} returned a number without a gradient, so the network would never "
            "shrink: it must be computed from the bits by what has gradients (no detach(), item(), comparison or "
            "rounding)"
        )


def _quantizers(net: SizedNetwork) -> list[Quantizer]:
    return [module for module in net.modules() if isinstance(module, Quantizer)]
