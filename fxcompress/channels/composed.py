"""Ops that run on labels as the products, sums and reshapes that they are made of; torch does not decompose them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fxcompress.channels.values import Dispatcher


def _distances(run: Dispatcher, x: Tensor, y: Tensor, p: float = 2.0, mode: object = None) -> Tensor:
    """``cdist``: the norms of all differences, (..., P, M) and (..., R, M) to (..., P, R)."""
    norms: Tensor = torch.linalg.vector_norm(x.unsqueeze(-2) - y.unsqueeze(-3), p, -1)
    return norms


def _trilinear(  # noqa: PLR0917 - the arguments of the op
    run: Dispatcher,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    expand_a: Sequence[int],
    expand_b: Sequence[int],
    expand_c: Sequence[int],
    summed: Sequence[int],
    unroll_dim: int = 1,
) -> Tensor:
    """What ``bilinear`` runs: the sum over some dims of the product of three tensors, with new dims of size 1."""
    pairs = ((a, expand_a), (b, expand_b), (c, expand_c))
    a, b, c = (_unsqueezed(tensor, dims) for tensor, dims in pairs)
    return (a * b * c).sum(list(summed))


def _unsqueezed(tensor: Tensor, dims: Sequence[int]) -> Tensor:
    for dim in sorted(dims):
        tensor = tensor.unsqueeze(dim)
    return tensor


COMPOSED: dict[Any, Callable[..., Any]] = {
    torch.ops.aten._cdist_forward.default: _distances,  # noqa: SLF001
    torch.ops.aten._euclidean_dist.default: _distances,  # noqa: SLF001
    torch.ops.aten._trilinear.default: _trilinear,  # noqa: SLF001
}
"""From the op to a function of whoever runs ops on labels, and the arguments of the op."""
