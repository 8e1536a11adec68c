"""The state of Adafactor, whose second moment is an outer product of two means.

The estimate for entry (i, j) of a matrix is ``r[i] * c[j] / mean(r)``, with r the means of the rows and c those of the
columns (N. Shazeer and M. Stern, "Adafactor", 2018). A mean over what is left is another one than a mean over all, so
it does not do to leave out entries of r and c: with the rows, those of c change, and with the columns, those of r.
They are scaled such that the estimates of all entries that stay are what they were, and r and c are their means::

    r (8, 1), c (1, 4), rows 0 and 3 stay   ->   r (2, 1), c * mean(r[[0, 3]]) / mean(r)
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

_ROWS, _COLUMNS = "row_var", "col_var"


def rescale_factors(old: Mapping[str, Any], new: Mapping[str, Any], indices: Mapping[int, Tensor]) -> None:
    """Set the factors of a cut state right, in place; nothing where a state holds none.

    Args:
        old: the state of a parameter (..., I, J), with ``row_var`` (..., I, 1) and ``col_var`` (..., 1, J).
        new: the same with entries left out, in tensors of its own.
        indices: for each cut dim of the parameter, the indices that stay.
    """
    rows, columns = old.get(_ROWS), old.get(_COLUMNS)
    if not isinstance(rows, Tensor) or not isinstance(columns, Tensor):
        return
    taller, wider = _ratio(rows, -2, indices), _ratio(columns, -1, indices)
    new[_COLUMNS].mul_(taller)
    new[_ROWS].mul_(wider)


def _ratio(means: Tensor, dim: int, indices: Mapping[int, Tensor]) -> Tensor:
    """The mean of what is left along ``dim`` over the mean of all, for each matrix that is left; (..., 1, 1)."""
    dim += means.ndim
    for other in range(means.ndim - 2):  # matrices that go are no part of any mean
        if other in indices:
            means = means.index_select(other, indices[other].to(means.device))
    left = means.index_select(dim, indices[dim].to(means.device)) if dim in indices else means
    whole = means.mean(dim, keepdim=True)
    return (left.mean(dim, keepdim=True) / whole).where(whole > 0, 1.0)
