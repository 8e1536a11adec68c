"""Weights and tables as integers: exact, on every layout of weights, and None for what is none."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxcompress.provenance import Grid
from fxcompress.quantizer import Quantizer, from_rows
from fxcompress.storage.codes import Coded, decode, encode, encode_whole

pytestmark = pytest.mark.cpu


Layout = tuple[int, int, tuple[int, ...]]
LAYOUTS: list[tuple[tuple[int, ...], Layout]] = [
    ((6, 5), (0, 1, ())), ((6, 4, 3, 3), (0, 1, ())), ((4, 6, 3), (1, 1, ())), ((4, 3, 3, 3), (1, 2, ())),
    ((6,), (0, 1, ())), ((2, 4, 3), (2, 1, (0,))), ((4, 3, 2), (1, 1, (2,))),
]  # fmt: skip


def on_grid(shape: tuple[int, ...], layout: Layout, dtype: torch.dtype) -> tuple[Tensor, Grid]:
    weight = torch.randn(shape).to(dtype)
    channel_dim, groups, batch_dims = layout
    quantizer = Quantizer.for_weight(weight, bits=6.0, channel_dim=channel_dim, groups=groups, batch_dims=batch_dims)
    with torch.no_grad():
        quantizer.bits.copy_(torch.tensor([0.0, 0.7, 2.0, 3.3, 5.0, 8.0]))
        quantizer.exponent.add_(torch.rand(6))
        result: Tensor = quantizer(weight)
    return result, Grid(tuple(quantizer.bits.tolist()), tuple(quantizer.exponent.tolist()), *layout)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("shape", "layout"), LAYOUTS)
def test_weights_come_back_bit_for_bit(shape: tuple[int, ...], layout: Layout, dtype: torch.dtype) -> None:
    weight, grid = on_grid(shape, layout, dtype)
    coded = encode(weight, grid)
    assert coded is not None
    back = decode(coded, shape, dtype, grid)
    assert back.dtype == dtype
    assert back.shape == shape
    assert back.numpy(force=True).tobytes() == weight.numpy(force=True).tobytes() if dtype != torch.bfloat16 else True
    assert torch.equal(back, weight)
    assert not back.signbit().logical_and(back == 0).any()


@pytest.mark.parametrize("ulps", [-2, -1, 1, 2])
def test_scales_of_another_device_are_found(ulps: int) -> None:
    """A GPU's exp2 may differ from the CPU's in the last bits; each channel finds its own."""
    exponent = torch.tensor([-3.3, -7.7, 2.1])
    scale = exponent.exp2()
    limit = torch.tensor(math.copysign(math.inf, ulps))
    for _ in range(abs(ulps)):
        scale[:2] = torch.nextafter(scale[:2], limit)
    weight = torch.randint(-100, 100, (3, 50)) * scale[:, None]
    coded = encode(weight, Grid((8.0,) * 3, tuple(exponent.tolist())))
    assert coded is not None
    assert torch.equal(coded.scale, scale)


def test_weights_off_their_grid_are_told_apart() -> None:
    weight, grid = on_grid((6, 5), (0, 1, ()), torch.float32)
    edited = weight.clone()
    edited[5, 0] *= 1.001
    shorter = Grid(grid.bits[1:], grid.exponent[1:])
    not_a_number = torch.where(torch.eye(6, 5) > 0, torch.nan, weight)
    infinite = torch.where(torch.eye(6, 5) > 0, torch.inf, weight)
    for changed in (edited, not_a_number, infinite, weight.long(), weight[:, :0]):
        assert encode(changed, grid) is None
    assert encode(weight, shorter) is None
    assert encode(weight, grid) is not None


def test_negative_zero_counts_as_zero() -> None:
    coded = encode(torch.tensor([[-0.0, 1.0]]), Grid((2.0,), (0.0,)))
    assert coded is not None
    assert coded.codes.tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("codes", "minimum", "width", "bits"),
    [
        ([0, 0], 0, 0, 0),
        ([-1, -1], -1, 0, 1),
        ([-1, 0], -1, 1, 1),
        ([0, 1], 0, 1, 2),
        ([-2, 1], -2, 2, 2),
        ([-3, 0], -3, 2, 3),
        ([-128, 127], -128, 8, 8),
        ([128, 130], 128, 2, 9),
        ([-(2**30), 2**30], -(2**30), 32, 32),
    ],
)
def test_widths_and_bit_depths(codes: list[int], minimum: int, width: int, bits: int) -> None:
    coded = Coded(torch.tensor([codes]), torch.ones(1))
    assert [coded.minimum.tolist(), coded.widths.tolist(), coded.bits.tolist()] == [[minimum], [width], [bits]]


@pytest.mark.parametrize(("low", "dtype"), [(-128, torch.int8), (-129, torch.int16), (40_000, torch.int32)])
def test_minimum_takes_the_smallest_type(low: int, dtype: torch.dtype) -> None:
    assert Coded(torch.tensor([[low], [0]]), torch.ones(2)).minimum.dtype == dtype


def test_rows_of_a_grouped_transposed_weight() -> None:
    matrix = torch.arange(60).reshape(6, 10)
    weight = from_rows(matrix, (4, 3, 5), 1, 2)
    assert weight[2:, 1].reshape(-1).tolist() == matrix[4].tolist()


def test_bits_are_those_of_the_code_that_needs_most() -> None:
    codes = torch.tensor([[0, 0], [0, 1], [-1, 0], [-2, 1], [3, 4], [-8, -5], [-(2**30), 2**30]], dtype=torch.int32)
    expected = [0, 2, 1, 2, 4, 4, 32]
    assert Coded(codes, torch.ones(7)).bits.tolist() == expected
    assert Coded(codes.long(), torch.ones(7)).bits.tolist() == expected
    assert Coded(codes, torch.ones(7)).widths.tolist() == [0, 1, 1, 2, 1, 2, 32]


DTYPES = [torch.bool, torch.int16, torch.int64, torch.bfloat16, torch.float16, torch.float32, torch.float64]


@given(st.sampled_from(DTYPES), st.lists(st.integers(-(2**31), 2**31), min_size=1, max_size=70), st.integers(0, 33))
def test_whole_numbers_come_back_bit_for_bit(dtype: torch.dtype, numbers: list[int], shift: int) -> None:
    values = (torch.tensor(numbers) >> shift).to(dtype)
    coded = encode_whole(values)
    if coded is None:
        assert max(abs(float(v)) for v in values) > 2**29, "they fit"
        return
    assert coded.smallest == min(coded.numbers.tolist())
    assert coded.width == int(values.to(torch.int64).max() - values.to(torch.int64).min()).bit_length()
    assert torch.equal(coded.numbers.to(dtype), values)


@pytest.mark.parametrize("odd", [0.5, -0.0, math.nan, math.inf, -math.inf, 2.0**31, 1e-30])
@pytest.mark.parametrize("place", [0, 99])
def test_other_numbers_are_no_whole_ones(odd: float, place: int) -> None:
    values = torch.ones(100)
    values[place] = odd
    assert encode_whole(values) is None
    assert encode_whole(torch.ones(100)) is not None


def test_tensors_of_another_kind_are_no_whole_numbers() -> None:
    for dtype in (torch.complex64, torch.float8_e4m3fn):
        assert encode_whole(torch.ones(4).to(dtype)) is None
    assert encode_whole(torch.ones(0)) is None
