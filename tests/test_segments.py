"""Where segments meet: columns of their numbers, found by one number each where that is possible."""

import numpy as np
import pytest

from fxcompress.channels.segments import _columns

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("rows", [2, 3, 4])
def test_columns_are_those_that_numpy_finds(rows: int) -> None:
    flat = np.random.default_rng(rows).integers(0, 5, (rows, 200))
    expected, places = np.unique(flat, axis=1, return_inverse=True)
    for count in (5, 1 << 40):  # the second is too large for one number
        columns, inverse = _columns(flat, count)
        assert np.array_equal(columns, expected)
        assert np.array_equal(inverse, places.reshape(-1))
