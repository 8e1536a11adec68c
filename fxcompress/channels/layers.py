"""Layers of labels, and data movement on them.

A layer is an int64 tensor of the same rank as the tensor that it describes, with size 1 along each dim where the label
does not vary. The layers of one tensor have disjoint supports. Maps of constants have the same form, so that data
movement is written once for both.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

Layers = tuple[Tensor, ...]


def support(layer: Tensor) -> frozenset[int]:
    """The dims along which a layer varies."""
    return frozenset(d for d, n in enumerate(layer.shape) if n > 1)


def pad_rank(layer: Tensor, rank: int) -> Tensor:
    """Leading dims of size 1 up to ``rank``, as broadcasting aligns them."""
    return layer if layer.ndim == rank else layer.reshape((1,) * (rank - layer.ndim) + tuple(layer.shape))


def along(layers: Layers, dim: int) -> Tensor | None:
    """The layer that varies along ``dim``, or None."""
    return next((layer for layer in layers if layer.shape[dim] > 1), None)


def vector(atoms: Tensor, rank: int, dim: int) -> Tensor:
    """The layer of ``rank`` that varies along ``dim`` alone, from atoms of shape (K,)."""
    if rank == 1:
        return atoms
    shape = [1] * rank
    shape[dim] = atoms.numel()
    return atoms.reshape(shape)


def compress(full: Tensor) -> Tensor:
    """Size 1 along each dim where ``full`` does not vary."""
    if full.dtype is torch.int64 and full.numel() == max(full.shape, default=0) > 1:  # labels along one dim
        flat = full.reshape(-1).numpy()
        if flat[0] != flat[-1]:
            return full
    array = full.numpy()  # most are small, and a slice takes a fifth of the time of torch's
    for dim, (size, step) in enumerate(zip(array.shape, array.strides, strict=True)):
        if size > 1 and step == 0:  # at first what is plain to see, so that there is less to look at
            array = array[_at(dim, slice(0, 1))]
    for dim, size in enumerate(array.shape):
        if size > 1:
            first, last = array[_at(dim, slice(0, 1))], array[_at(dim, slice(size - 1, size))]
            if (first == last).all() and (array == first).all():
                array = first
    return full if array.shape == full.shape else torch.from_numpy(array)


def _at(dim: int, place: slice) -> tuple[slice, ...]:
    """An index that picks out a place along a dim."""
    return (*(slice(None) for _ in range(dim)), place)


def expand(layer: Tensor, shape: Sequence[int]) -> Tensor:
    """The layer at the full shape of its tensor; costs no memory."""
    return layer.expand(tuple(shape))


def move(function: Callable[[Tensor], object], layer: Tensor, shape: Sequence[int]) -> list[Tensor]:
    """Run an operation that only moves entries on a layer of a tensor of ``shape``; one layer for each output."""
    result = function(expand(layer, shape))
    outputs = result if isinstance(result, tuple | list) else [result]
    return [compress(out) for out in outputs if isinstance(out, Tensor)]


def reshape(layer: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
    """A layer of a tensor of shape ``old`` after a reshape to ``new``.

    Only the blocks of dims that the reshape really mixes *and* that carry labels are laid out in full.
    """
    if 0 in old:  # there are no entries, nor blocks
        return expand(layer, old).reshape(tuple(new))
    middle: list[int] = []
    out: list[int] = []
    for old_dims, new_dims in blocks(old, new):
        varies = any(layer.shape[d] != 1 for d in old_dims)
        middle += [old[d] if varies else 1 for d in old_dims]
        out += [new[d] if varies else 1 for d in new_dims]
    return compress(layer.expand(middle).reshape(out))


def blocks(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Split two shapes of equal size into the smallest runs of dims with equal products."""
    result: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        left: list[int] = []
        right: list[int] = []
        a = b = 1
        while True:
            if a <= b and i < len(old) and (a < b or not left):
                left.append(i)
                a *= old[i]
                i += 1
            elif j < len(new) and (b < a or not right):
                right.append(j)
                b *= new[j]
                j += 1
            elif a == b or (i >= len(old) and j >= len(new)):
                break
            elif i < len(old):
                left.append(i)
                a *= old[i]
                i += 1
            else:
                right.append(j)
                b *= new[j]
                j += 1
        result.append((left, right))
    return result


def slices(layer: Tensor, dims: Iterable[int]) -> Tensor:
    """The labels of each slice along ``dims``, shape (slices, labels in one)."""
    kept = sorted(dims)
    rest = [d for d in range(layer.ndim) if d not in kept]
    return layer.permute(*kept, *rest).reshape(math.prod(layer.shape[d] for d in kept), -1)


def same_layers(a: Layers, b: Layers) -> bool:
    """Whether two tensors carry the same labels, in the same order."""
    return len(a) == len(b) and all(map(torch.equal, a, b))


def overlapping(layers: Iterable[Tensor]) -> list[Tensor]:
    """Those layers whose support meets that of another one."""
    items = [(layer, support(layer)) for layer in layers]
    return [a for i, (a, s) in enumerate(items) if any(s & t for j, (_, t) in enumerate(items) if i != j)]


def crosses(a: frozenset[int], b: frozenset[int]) -> bool:
    """Whether two supports meet, and neither holds the other."""
    return bool(a & b) and not a <= b and not b <= a


def zeros_like_dim(size: int, rank: int, dim: int) -> Tensor:
    """A layer of FIXED entries along ``dim``."""
    return vector(torch.zeros(size, dtype=torch.int64, device="cpu"), rank, dim)
