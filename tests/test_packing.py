"""Packing of integer codes: exact, at exactly the bits that are needed, and on every layout of weights."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxcompress.errors import StorageError
from fxcompress.provenance import Grid
from fxcompress.quantizer import Quantizer, from_rows
from fxcompress.storage import packing
from fxcompress.storage.packing import Coded, decode, encode, encode_whole, pack, packed_size, unpack

pytestmark = pytest.mark.cpu


@given(
    st.lists(st.tuples(st.integers(0, 32), st.integers(-(2**31), 2**31)), min_size=1, max_size=9),
    st.integers(0, 20),
    st.integers(0, 2**31),
)
def test_round_trip(channels: list[tuple[int, int]], columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    widths, lo = torch.tensor(channels).T
    codes = torch.stack([torch.randint(2**w, (columns,), generator=generator) + low for w, low in channels])
    packed = pack(codes, lo, widths)
    assert packed.dtype == torch.uint8
    assert len(packed) == packed_size(widths, columns) == math.ceil(sum(w for w, _ in channels) * columns / 8)
    assert torch.equal(unpack(packed, lo, widths, columns), codes)


def test_layout_is_what_the_docstring_says() -> None:
    """Narrow channels first, the lowest bit of a code first, nothing between channels, zeros at the end."""
    codes = torch.tensor([[5, 1], [7, 7], [0, 1]])
    packed = pack(codes, torch.tensor([0, 7, 0]), torch.tensor([3, 0, 1]))
    bits = "01" + "101" + "100"
    assert packed.tolist() == [int(bits[::-1], 2)]


def test_channels_without_bits_take_no_bytes() -> None:
    widths, lo = torch.zeros(3, dtype=torch.uint8), torch.tensor([0, -1, 4], dtype=torch.int8)
    packed = pack(lo[:, None].expand(3, 5), lo, widths)
    assert packed.shape == (0,)
    assert unpack(packed, lo, widths, 5).tolist() == [[0] * 5, [-1] * 5, [4] * 5]


def test_sums_of_narrow_types_do_not_overflow() -> None:
    widths = torch.full((300,), 8, dtype=torch.uint8)
    assert packed_size(widths, 1_000) == 300_000


@pytest.mark.parametrize("code", [-3, 2])
def test_codes_beyond_their_width_are_refused(code: int) -> None:
    with pytest.raises(StorageError, match="does not fit its channel's width"):
        pack(torch.tensor([[0, code]]), torch.tensor([-2]), torch.tensor([2]))


@pytest.mark.parametrize(("size", "width"), [(0, 2), (2, 2), (5, 40)])
def test_unpack_refuses_what_does_not_fit(size: int, width: int) -> None:
    with pytest.raises(StorageError, match=f"{size} bytes of codes, where {width // 8 or 1} are expected"):
        unpack(torch.zeros(size, dtype=torch.uint8), torch.tensor([0]), torch.tensor([width]), 1)


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
    assert torch.equal(
        unpack(pack(coded.codes, coded.minimum, coded.widths), coded.minimum, coded.widths, 2), coded.codes
    )


@pytest.mark.parametrize(("low", "dtype"), [(-128, torch.int8), (-129, torch.int16), (40_000, torch.int32)])
def test_minimum_takes_the_smallest_type(low: int, dtype: torch.dtype) -> None:
    assert Coded(torch.tensor([[low], [0]]), torch.ones(2)).minimum.dtype == dtype


def test_rows_of_a_grouped_transposed_weight() -> None:
    matrix = torch.arange(60).reshape(6, 10)
    weight = from_rows(matrix, (4, 3, 5), 1, 2)
    assert weight[2:, 1].reshape(-1).tolist() == matrix[4].tolist()


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few channels are packed at a time, also where those before them end within a byte."""
    widths = torch.tensor([3, 7, 3, 0, 12, 3, 7, 32, 3])
    codes = torch.stack([torch.randint(2 ** int(w), (5,), generator=torch.Generator().manual_seed(0)) for w in widths])
    lo = torch.zeros(len(widths), dtype=torch.int64)
    whole = pack(codes, lo, widths)
    for block in (1, 5, 10, 17):
        monkeypatch.setattr(packing, "_BLOCK", block)
        assert torch.equal(pack(codes, lo, widths), whole)
        assert torch.equal(unpack(whole, lo, widths, 5), codes)


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
        assert max(abs(float(v)) for v in values) > 2**29, "it can be packed"
        return
    assert len(coded.packed) == packed_size(torch.tensor([coded.width]), len(values))
    assert coded.width == int(values.to(torch.int64).max() - values.to(torch.int64).min()).bit_length()
    assert torch.equal(coded.decode(tuple(values.shape), dtype), values)


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
