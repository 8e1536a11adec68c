"""Which weights may be other than zero, however they are asked for."""

import numpy as np
import pytest
import torch

from fxcompress.channels.rules.patterns import Pattern, pattern

_SHAPES = [(1, 1), (3, 0), (0, 4), (3, 4, 0), (5, 9), (6, 4, 3, 3), (8, 17, 2)]


@pytest.mark.parametrize("kind", ["rows", "columns", "bfloat16", "strided", "double"])
@pytest.mark.parametrize("shape", _SHAPES, ids=str)
def test_answers_are_those_of_looking_at_everything(shape: tuple[int, ...], kind: str) -> None:
    draw = np.random.default_rng(0)
    for _ in range(20):
        numbers = draw.standard_normal(shape) * (draw.random(shape) < draw.random())
        numbers *= draw.random((shape[0], *[1] * (len(shape) - 1))) < 0.6  # some rows are zero as a whole
        numbers *= draw.random((1, shape[1], *[1] * (len(shape) - 2))) < 0.7
        weight = torch.from_numpy(numbers).float()
        may = (weight != 0).reshape(*shape[:2], int(np.prod(shape[2:]))).any(dim=2).numpy()
        row, column = (1, 0) if kind == "columns" else (0, 1)
        weight = weight.transpose(0, 1).contiguous() if kind == "columns" else weight
        weight = {"bfloat16": weight.bfloat16, "double": weight.double}.get(kind, lambda given=weight: given)()
        weight = weight.transpose(0, 1).contiguous().transpose(0, 1) if kind == "strided" else weight
        rows, columns, asked = (draw.random(n) < draw.random() for n in (shape[0], shape[1], shape[1]))
        found = pattern(weight, row, column, weight.shape)
        assert found.rows_with(columns).tolist() == may[:, columns].any(axis=1).tolist()
        assert found.columns_of(rows).tolist() == may[rows].any(axis=0).tolist()
        assert (found.columns_of(rows, asked) & asked).tolist() == (may[rows].any(axis=0) & asked).tolist()
        assert found.dense().tolist() == may.tolist()
        assert found.without(columns).dense().tolist() == (may & ~columns).tolist()


def test_zero_may_be_negative_and_the_smallest_number_is_not_zero() -> None:
    weights = np.array([[-0.0, 0.0], [0.0, 1e-45], [np.nan, 0.0]], dtype=np.float32)
    assert Pattern(weights).rows_with(np.array([True, True])).tolist() == [False, True, True]
