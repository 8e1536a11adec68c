"""Example inputs in other sizes: which dims can have another size, and inputs that have it."""

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor

from fxcompress.trace.basics.trees import tensors_in
from fxcompress.trace.inputs import ExampleInputs

_LARGEST = 1 << 24
"""Inputs have no more entries than this."""


def resized(inputs: ExampleInputs) -> Iterator[ExampleInputs]:
    """Inputs that differ from these in one size, wherever it stands: one entry, one more, and twice as many.

    One entry becomes as many as there are anywhere as well: it may be one that meets them all. And many become one
    where one becomes many, as they may meet each other.
    """
    every = {size for shape in shapes_of(inputs) for size in shape if size}
    dims = dims_of(inputs)
    for chosen, size in dims:
        for other in sorted(({1, size + 1, 2 * size} | (every if size == 1 else set())) - {size}):
            if (found := with_size(inputs, chosen, other)) is not None:
                yield found
    for one, many in product((d for d, n in dims if n == 1), (d for d, n in dims if n > 1)):
        wide = with_size(inputs, one, max(every) + 1)
        if wide is not None and (found := with_size(wide, many, 1)) is not None:
            yield found


def few_sizes(size: int) -> tuple[int, ...]:
    """Sizes that decisions are about when nothing is known of them."""
    return tuple(dict.fromkeys((1, size + 1, 2 * size, 3, 2, 5)))


def sizes_around(numbers: set[int]) -> list[int]:
    """Sizes on both sides of numbers, and on them."""
    return sorted({size for n in numbers for size in (n - 1, n, n + 1) if size > 0})


ChosenDims = Callable[[int, int, int], bool]
"""Whether a dim is to have another size: which tensor of the inputs, which dim, and its size."""


def dims_of(inputs: ExampleInputs) -> list[tuple[ChosenDims, int]]:
    """What inputs can have another size of, and what it is: of a dim in all tensors, wherever it is, or of one dim."""
    shapes = shapes_of(inputs)
    every = [(i, d, size) for i, shape in enumerate(shapes) for d, size in enumerate(shape) if size]
    by_dim = dict.fromkeys((d, size) for _, d, size in every)
    by_size = [size for size in dict.fromkeys(size for _, _, size in every) if sum(s == size for _, s in by_dim) > 1]
    of_dim = Counter((d, size) for _, d, size in every)
    alone = [(i, d, size) for i, d, size in every if of_dim[d, size] > 1]
    found: list[tuple[ChosenDims, int]] = [(partial(_is_dim, key), key[1]) for key in by_dim]
    found += [(partial(_is_size, size), size) for size in by_size]
    return found + [(partial(_is_place, (i, d)), size) for i, d, size in alone]


def _is_dim(key: tuple[int, int], _: int, dim: int, size: int) -> bool:
    return key == (dim, size)


def _is_size(key: int, _: int, __: int, size: int) -> bool:
    return key == size


def _is_place(key: tuple[int, int], tensor: int, dim: int, _: int) -> bool:
    return key == (tensor, dim)


def shapes_of(inputs: ExampleInputs) -> tuple[tuple[int, ...], ...]:
    """The shapes of all tensors in the inputs, in order."""
    return tuple(tuple(tensor.shape) for tensor in tensors_in([inputs.args, inputs.kwargs]))


def _places(inputs: ExampleInputs, chosen: ChosenDims) -> Iterator[tuple[Tensor, list[int]]]:
    """Each tensor with the dims of it that are chosen."""
    for i, tensor in enumerate(tensors_in([inputs.args, inputs.kwargs])):
        yield tensor, [d for d, size in enumerate(tensor.shape) if chosen(i, d, size)]


def with_size(inputs: ExampleInputs, chosen: ChosenDims, size: int) -> ExampleInputs | None:
    """Inputs that have another size, with the same values over again; None where they would be too large."""
    tensors = list(_places(inputs, chosen))
    if any(t.layout != torch.strided or _entries(t, dims, size) > _LARGEST for t, dims in tensors):
        return None
    left = iter(tensors)

    def resized(tensor: Tensor) -> Tensor:
        new = tensor.detach()
        for dim in next(left)[1]:
            index = torch.arange(size, device=tensor.device) % tensor.shape[dim]
            new = new.index_select(dim, index)
        return new.clone().requires_grad_(tensor.requires_grad)

    return inputs.converted(resized)


def _entries(tensor: Tensor, dims: list[int], size: int) -> int:
    entries = 1
    for dim, own in enumerate(tensor.shape):
        entries *= size if dim in dims else own
    return entries
