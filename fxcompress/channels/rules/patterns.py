"""Which weights of a layer may be other than zero: all that matters of them, in a bit for each."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_CHUNK = 1 << 17  # entries that are looked at together: they stay in the cache


class Pattern:
    """Which weights may be other than zero, for R outputs and C inputs.

    Args:
        packed: uint8 (R, ceil(C / 8)), as numpy packs bits.
        columns: C.

    >>> pattern = Pattern.of(np.array([[True, False, False], [False, False, True]]))
    >>> pattern.rows_with(np.array([True, True, False])), pattern.columns_of(np.array([False, True]))
    (array([ True, False]), array([False, False,  True]))
    """

    __slots__ = ("columns", "packed")

    def __init__(self, packed: np.ndarray, columns: int) -> None:
        self.packed = packed
        self.columns = columns

    @classmethod
    def of(cls, may: np.ndarray) -> "Pattern":
        """Of a bool (R, C)."""
        return cls(np.packbits(may, axis=1), may.shape[1])

    def rows_with(self, columns: np.ndarray) -> np.ndarray:
        """The rows with an entry in one of these columns: from bool (C,) to bool (R,)."""
        return np.asarray((self.packed & np.packbits(columns)).any(axis=1))

    def columns_of(self, rows: np.ndarray) -> np.ndarray:
        """The columns with an entry in one of these rows: from bool (R,) to bool (C,)."""
        found = np.bitwise_or.reduce(self.packed[rows], axis=0)
        return np.unpackbits(found, count=self.columns).view(bool)

    def without(self, columns: np.ndarray) -> "Pattern":
        """The same with zeros in these columns, bool (C,)."""
        return Pattern(self.packed & np.packbits(~columns), self.columns)

    def dense(self) -> np.ndarray:
        """All of it, bool (R, C)."""
        return np.unpackbits(self.packed, axis=1, count=self.columns).view(bool)


def pattern(weight: Tensor, row: int, column: int, shape: Sequence[int]) -> Pattern:
    """The pattern of a weight along two of its dims: what is other than zero anywhere along the others, may be.

    Args:
        weight: or a map of it, whose dims have size 1 where it does not vary.
        row: the dim of the outputs.
        column: the dim of the inputs.
        shape: of the weight.
    """
    others = [d for d in range(weight.ndim) if d not in {row, column}]
    may = nonzero_anywhere(weight, others).numpy()
    may = may.T if row > column else may
    return Pattern.of(np.broadcast_to(may, (shape[row], shape[column])))


def nonzero_anywhere(tensor: Tensor, dims: Sequence[int]) -> Tensor:
    """Which entries are other than zero anywhere along ``dims``: bool, without those dims, on the CPU.

    Once for each weight of a network, so it is numpy where it can be: that takes a third of the time of torch's
    reduction over a small inner dim, and one thread, not as many as there are cores.
    """
    if tensor.device.type != "cpu" or tensor.dtype not in {torch.float16, torch.float32, torch.float64}:
        may = tensor != 0
        return (may.any(dim=list(dims)) if dims else may).cpu()
    array = tensor.detach().numpy()
    kept = [n for d, n in enumerate(array.shape) if d not in dims]
    if array.size == math.prod(kept):  # a linear layer, a kernel of one entry
        return torch.from_numpy(array.reshape(kept) != 0)
    array = np.moveaxis(array, tuple(dims), range(-len(dims), 0))
    result = np.zeros(kept, dtype=bool)
    rows = max(1, _CHUNK * len(array) // max(1, array.size))
    for start in range(0, len(array), rows):
        _mark_nonzero(array[start : start + rows], result[start : start + rows])
    return torch.from_numpy(result)


def _mark_nonzero(array: np.ndarray, result: np.ndarray) -> None:
    """Set ``result`` where ``array``, which may have more dims, is other than zero anywhere along the further ones.

    In a row that is in use the first entry of each kernel is, as a rule; a row that is not, is zero as a whole.
    """
    may = (array != 0).reshape(*result.shape, -1)
    result[...] = may[..., 0]
    open_ = np.flatnonzero(~result.reshape(len(result), -1).all(axis=1))
    rest = may[open_]
    if rest.any():
        found = result[open_]
        for part in np.moveaxis(rest, -1, 0):
            found |= part
        result[open_] = found
