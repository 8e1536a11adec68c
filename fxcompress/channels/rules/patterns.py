"""Which weights of a layer may be other than zero: all that matters of them."""

import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

_CHUNK = 1 << 17  # entries that are looked at together: they stay in the cache


class Pattern:
    """Which weights may be other than zero, for R outputs and C inputs.

    They are looked at when somebody asks, and only as far as the answer needs it: a row or a column that is in use is
    so at the first entry, as a rule, and a row that is not, is zero as a whole.

    Args:
        weights: (R, C), or (R, C, kernel) with the entries that belong together along the last dim; numbers or bool.

    >>> pattern = Pattern(np.array([[True, False, False], [False, False, True]]))
    >>> pattern.rows_with(np.array([True, True, False])), pattern.columns_of(np.array([False, True]))
    (array([ True, False]), array([False, False,  True]))
    """

    def __init__(self, weights: np.ndarray) -> None:
        self._weights = weights.reshape(*weights.shape[:2], math.prod(weights.shape[2:]))

    @property
    def columns(self) -> int:
        """C."""
        return int(self._weights.shape[1])

    def rows_with(self, columns: np.ndarray) -> np.ndarray:
        """The rows with an entry in one of these columns: from bool (C,) to bool (R,)."""
        if not columns.any() or not self._weights.size:
            return np.zeros(len(self._weights), dtype=bool)
        found: np.ndarray = self._weights[:, columns.argmax(), 0] != 0
        open_ = np.flatnonzero(~found & ~self._empty)
        if len(open_):
            found[open_] = (self._packed[open_] & np.packbits(columns)).any(axis=1)
        return found

    def columns_of(self, rows: np.ndarray, asked: np.ndarray | None = None) -> np.ndarray:
        """The columns with an entry in one of these rows: from bool (R,) to bool (C,).

        Args:
            rows: bool (R,).
            asked: bool (C,), the columns that matter; what is found of the others need not be all.
        """
        used = rows & ~self._empty
        first = used.argmax() if len(used) else 0
        if not len(used) or not used[first]:
            return np.zeros(self.columns, dtype=bool)
        found: np.ndarray = self._weights[first, :, 0] != 0
        if not (found if asked is None else found | ~asked).all():
            packed = np.bitwise_or.reduce(self._packed[used], axis=0)
            found = np.unpackbits(packed, count=self.columns).view(bool)
        return found

    def without(self, columns: np.ndarray) -> "Pattern":
        """The same with zeros in these columns, bool (C,)."""
        return Pattern(self.dense() & ~columns)

    def dense(self) -> np.ndarray:
        """All of it, bool (R, C)."""
        return np.unpackbits(self._packed, axis=1, count=self.columns).view(bool)

    @cached_property
    def _empty(self) -> np.ndarray:
        """The rows that are zero as a whole, bool (R,)."""
        rows = self._weights.reshape(len(self._weights), math.prod(self._weights.shape[1:]))
        bits = np.bitwise_or.reduce(rows.view(f"u{rows.itemsize}"), axis=1)  # as quick as to read them once
        return np.asarray(bits << 1 == 0)  # all but the sign: zero may be negative

    @cached_property
    def _packed(self) -> np.ndarray:
        """A bit for each entry: uint8 (R, ceil(C / 8)), as numpy packs bits."""
        result = np.zeros((len(self._weights), -(-self.columns // 8)), dtype=np.uint8)
        used = np.flatnonzero(~self._empty)
        step = max(1, _CHUNK * len(self._weights) // max(1, self._weights.size))
        for start in range(0, len(used), step):
            some = used[start : start + step]
            result[some] = np.packbits((self._weights.take(some, axis=0) != 0).any(axis=2), axis=1)
        return result


def pattern(weight: Tensor, row: int, column: int, shape: Sequence[int]) -> Pattern:
    """The pattern of a weight along two of its dims: what is other than zero anywhere along the others, may be.

    Args:
        weight: or a map of it, whose dims have size 1 where it does not vary. It must stay as it is.
        row: the dim of the outputs.
        column: the dim of the inputs.
        shape: of the weight.
    """
    if tuple(weight.shape) == tuple(shape) and is_array(weight):
        array = np.moveaxis(weight.detach().numpy(), (row, column), (0, 1))
        if array.flags.c_contiguous:
            return Pattern(array)
    others = [d for d in range(weight.ndim) if d not in {row, column}]
    may = nonzero_anywhere(weight, others).numpy()
    may = may.T if row > column else may
    return Pattern(np.ascontiguousarray(np.broadcast_to(may, (shape[row], shape[column]))))


def nonzero_anywhere(tensor: Tensor, dims: Sequence[int]) -> Tensor:
    """Which entries are other than zero anywhere along ``dims``: bool, without those dims, on the CPU.

    Once for each weight of a network, so it is numpy where it can be: that takes a third of the time of torch's
    reduction over a small inner dim, and one thread, not as many as there are cores.
    """
    if not is_array(tensor):
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


def is_array(tensor: Tensor) -> bool:
    """Whether numpy can look at a tensor as it lies in memory."""
    return tensor.device.type == "cpu" and tensor.dtype in {torch.float16, torch.float32, torch.float64}
