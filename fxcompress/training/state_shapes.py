"""What the tensors in an optimizer's state belong to: mostly to the entries of a parameter, and sometimes not.

A preconditioner of a square weight has the shape of the weight, and is no tensor of its entries. What it is shows where
the same optimizer holds one for a parameter that is not square::

    weight (8, 8)   state["left"] (8, 8)       weight (5, 8)   state["left"] (5, 5)
"""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from fxcompress.errors import OptimizerError


def follows(tensor: Tensor, parameter: Tensor) -> bool:
    """Whether a tensor has the shape of a parameter, or size 1 along some of its dims.

    >>> import torch
    >>> follows(torch.zeros(3, 1), torch.zeros(3, 4)), follows(torch.zeros(3, 3), torch.zeros(3, 4))
    (True, False)
    """
    sizes = zip(tensor.shape, parameter.shape, strict=False)
    return tensor.ndim == parameter.ndim and all(size in {1, full} for size, full in sizes)


def check_shapes(optimizer: Optimizer, cut: Iterable[nn.Parameter], remedy: str) -> None:
    """Check that what looks like the entries of a parameter that is cut does so for all others of its group.

    Raises:
        OptimizerError: for one of them it does not.
    """
    ids = {id(parameter) for parameter in cut}
    for group in optimizer.param_groups:
        states = [(p, list(_by_key(optimizer.state.get(p)))) for p in group["params"]]
        odd: dict[Any, tuple[Tensor, nn.Parameter]] = {}
        for p, entries in states:
            for key, tensor in entries:
                if not follows(tensor, p):
                    odd.setdefault(key, (tensor, p))
        for parameter, entries in states:
            for key, tensor in entries if id(parameter) in ids else ():
                other, owner = odd.get(key, (tensor, parameter))
                if owner is not parameter:
                    raise OptimizerError(
                        f"cannot cut the state of {type(optimizer).__name__}: state[{key!r}] has shape "
                        f"{tuple(tensor.shape)} for a parameter of shape {tuple(parameter.shape)}, but "
                        f"{tuple(other.shape)} for one of shape {tuple(owner.shape)}, from which it does not follow; "
                        f"{remedy}"
                    )


def _by_key(state: Any) -> Iterator[tuple[Any, Tensor]]:  # noqa: ANN401
    """The tensors of the state of one parameter, each with the key that it lies under; no single numbers."""
    for key, value in state.items() if isinstance(state, dict) else ():
        yield from ((key, tensor) for tensor in _within(value) if tensor.numel() > 1)


def _within(value: Any) -> Iterator[Tensor]:  # noqa: ANN401
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _within(item)
