"""Ops that run on labels as the products, sums and reshapes that they are made of; torch does not decompose them."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.modules.padding import _CircularPadNd
from torch.overrides import TorchFunctionMode

from fxcompress.channels.values import Dispatcher, LabelTensor, Value


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
    """What ``bilinear`` runs: the sum over some dims of the product of three tensors, with new dims of size 1.

    The weight is the second one. It comes last, so that what is summed is a product of features and of a weight.
    """
    pairs = ((a, expand_a), (b, expand_b), (c, expand_c))
    a, b, c = (_unsqueezed(tensor, dims) for tensor, dims in pairs)
    return (a * c * b).sum(list(summed))


def _sparse_product(
    run: Dispatcher, added: Tensor, left: Tensor, right: Tensor, beta: float = 1.0, alpha: float = 1.0
) -> Tensor:
    """What ``torch.sparse.mm`` runs: on labels it is the same whether zeros are stored."""
    product = left.mm(right)
    product = product if alpha == 1 else product * alpha
    return product if beta == 0 else product + (added if beta == 1 else added * beta)


def _slice_scattered(
    run: Dispatcher,
    x: Tensor,
    written: Tensor,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Tensor:
    """``slice_scatter`` as what it stands for. Torch returns what is written where that is all, as it need not be."""
    labelled = isinstance(x, LabelTensor)
    whole = x.clone() if labelled else LabelTensor(Value(x.to("meta")), run, x.device)
    torch.ops.aten.slice.Tensor(whole, dim, start, end, step).copy_(written)
    return whole


def _stacked(run: Dispatcher, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """``stack`` with a dim of its own from the start; torch puts channels behind each other, and parts them again."""
    return torch.cat([tensor.unsqueeze(dim) for tensor in tensors], dim)


def _unsqueezed(tensor: Tensor, dims: Sequence[int]) -> Tensor:
    for dim in sorted(dims):
        tensor = tensor.unsqueeze(dim)
    return tensor


COMPOSED: dict[Any, Callable[..., Any]] = {
    torch.ops.aten._cdist_forward.default: _distances,  # noqa: SLF001
    torch.ops.aten._euclidean_dist.default: _distances,  # noqa: SLF001
    torch.ops.aten._trilinear.default: _trilinear,  # noqa: SLF001
    torch.ops.aten._sparse_addmm.default: _sparse_product,  # noqa: SLF001
    torch.ops.aten.slice_scatter.default: _slice_scattered,
    torch.ops.aten.stack.default: _stacked,
}
"""From the op to a function of whoever runs ops on labels, and the arguments of the op."""


_MASKED = frozenset({torch.ops.aten.index.Tensor, torch.ops.aten.masked_select.default})


def by_places(func: object, args: tuple[Any, ...]) -> Callable[..., Any] | None:
    """What runs a choice by masks of known numbers as one by the places where they are set: of these there is a shape.

    None for any other call; a mask that the network computes has no numbers.
    """
    if func not in _MASKED:
        return None
    masks = args[1] if isinstance(args[1], list | tuple) else args[1:]
    return _chosen if any(map(_is_known_mask, masks)) else None


def _is_known_mask(index: object) -> bool:
    return type(index) is Tensor and index.dtype in {torch.bool, torch.uint8} and not index.is_meta


def _chosen(x: Tensor, masks: Tensor | Sequence[Tensor | None]) -> Tensor:
    """``x[masks]``, or ``x.masked_select(mask)``.

    Raises:
        IndexError: a mask has another size than the dims that it chooses from, as torch says for real tensors.
    """
    if isinstance(masks, Tensor):
        x, mask = torch.broadcast_tensors(x, masks)
        masks = [mask]
    places: list[Tensor | None] = []
    for mask in masks:
        if mask is None or not _is_known_mask(mask):
            places.append(mask)
            continue
        if mask.shape != x.shape[len(places) : len(places) + mask.ndim]:
            raise IndexError(f"a mask of shape {tuple(mask.shape)} chooses from a tensor of shape {tuple(x.shape)}")
        places += mask.nonzero(as_tuple=True)
    chosen: Tensor = torch.ops.aten.index.Tensor(x, places)
    return chosen


def in_pieces(callee: object) -> AbstractContextManager[object]:
    """While ``callee`` runs: circular padding as slices and joins. Torch writes it into memory that has no labels."""
    by_itself = callee is functional.pad or isinstance(callee, _CircularPadNd)
    circular = by_itself or getattr(callee, "padding_mode", "") == "circular"
    return _InPieces() if circular else nullcontext()


class _InPieces(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401 - any function of torch
        kwargs = kwargs or {}
        if func is functional.pad and _mode(*args, **kwargs) == "circular":
            return _wrapped_around(*args, **kwargs)
        return func(*args, **kwargs)


def _mode(input: Tensor, pad: object, mode: str = "constant", value: object = None) -> str:  # noqa: A002 - named so
    return mode


def _wrapped_around(input: Tensor, pad: Sequence[int], mode: object = None, value: object = None) -> Tensor:  # noqa: A002
    """``pad`` in the circular mode: along each dim its end, itself, and its beginning; a negative width crops."""
    functional.pad(torch.empty(input.shape, device="meta"), list(pad), "circular")  # its errors
    result = input
    for i in range(len(pad) // 2):
        dim, (before, after) = input.ndim - 1 - i, pad[2 * i : 2 * i + 2]
        start, stop = max(-before, 0), input.shape[dim] - max(-after, 0)
        body = result.narrow(dim, start, stop - start)
        end = [body.narrow(dim, stop - start - before, before)] if before > 0 else []
        result = torch.cat([*end, body, *([body.narrow(dim, 0, after)] if after > 0 else [])], dim)
    return result
