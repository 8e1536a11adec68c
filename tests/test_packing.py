"""Packing of whole numbers: exact for all widths, in any number of calls, and small where few of them are frequent."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxcompress.errors import StorageError
from fxcompress.storage import packing
from fxcompress.storage.packing import Packer, Unpacker

pytestmark = pytest.mark.cpu

Channels = list[tuple[int, int]]
"""The width and the smallest number of each channel."""
channels = st.lists(st.tuples(st.integers(0, 32), st.integers(-(2**31), 2**31)), min_size=1, max_size=9)


def numbers_of(about: Channels, columns: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers (K, M) that take all of their bits, with their widths and their smallest."""
    generator = torch.Generator().manual_seed(seed)
    widths, smallest = torch.tensor(about).T
    return (
        torch.stack([torch.randint(2**w, (columns,), generator=generator) + low for w, low in about]),
        widths,
        smallest,
    )


@given(st.lists(st.tuples(channels, st.integers(0, 20), st.booleans()), max_size=4), st.integers(0, 2**31))
def test_round_trip(tensors: list[tuple[Channels, int, bool]], seed: int) -> None:
    """Several tensors, whose numbers share bytes with each other's, come back in the order in which they were put."""
    packer = Packer()
    given_ = [(*numbers_of(about, columns, seed), repeat) for about, columns, repeat in tensors]
    for numbers, widths, _, repeat in given_:
        packer.put(numbers, widths, repeat=repeat)
    packed, table = packer.finish()
    unpacker = Unpacker(packed, table)
    for numbers, widths, smallest, repeat in given_:
        assert torch.equal(unpacker.take(smallest, widths, numbers.shape[1], repeat=repeat), numbers)
    unpacker.check_finished()


@pytest.mark.parametrize("width", range(1, 33))
def test_random_numbers_take_little_more_than_their_bits(width: int) -> None:
    numbers, widths, _ = numbers_of([(width, -7)], 40_000, width)
    packer = Packer()
    packer.put(numbers, widths)
    assert len(packer.finish()[0]) <= 1.06 * width * 40_000 / 8 + 200


@pytest.mark.parametrize(("width", "deviation"), [(2, 0.5), (3, 0.8), (4, 1.7), (6, 8.0), (8, 20.0)])
def test_numbers_near_zero_take_about_their_entropy(width: int, deviation: float) -> None:
    """As the codes of weights do: (K, M) normal ones, rounded, of different smallest numbers."""
    generator = torch.Generator().manual_seed(0)
    values = (
        (torch.randn(64, 900, generator=generator) * deviation).round().clamp(-(2 ** (width - 1)), 2 ** (width - 1) - 1)
    )
    packer = Packer()
    packer.put(values.long(), torch.full((64,), width))
    _, counts = values.unique(return_counts=True)
    share = counts / values.numel()
    entropy = float(-(share * share.log2()).sum()) * values.numel() / 8
    assert entropy <= len(packer.finish()[0]) <= 1.05 * entropy + 100
    assert entropy < 0.9 * width * values.numel() / 8


def test_what_repeats_takes_next_to_nothing() -> None:
    table = torch.arange(50).repeat(400)[None]
    sizes = []
    for repeat in (True, False):
        packer = Packer()
        packer.put(table, torch.tensor([6]), repeat=repeat)
        sizes.append(len(packer.finish()[0]))
    assert sizes[0] < 300 < sizes[1]


def test_channels_without_bits_take_no_bytes() -> None:
    widths, smallest = torch.zeros(3, dtype=torch.uint8), torch.tensor([0, -1, 4], dtype=torch.int8)
    packer = Packer()
    packer.put(smallest[:, None].expand(3, 5), widths)
    packed, table = packer.finish()
    assert (packed.tolist(), table) == ([], [])
    assert Unpacker(packed, table).take(smallest, widths, 5).tolist() == [[0] * 5, [-1] * 5, [4] * 5]


def test_smallest_may_be_less_than_the_smallest_number() -> None:
    packer = Packer()
    packer.put(torch.tensor([[3, 9]]), torch.tensor([8]))
    assert Unpacker(*packer.finish()).take(torch.tensor([-128]), torch.tensor([8]), 2).tolist() == [[3, 9]]


@pytest.mark.parametrize("code", [-3, 2])
def test_numbers_beyond_their_width_are_refused(code: int) -> None:
    with pytest.raises(StorageError, match="2 bits do not hold a channel's numbers"):
        Packer().put(torch.tensor([[1 if code < 0 else -2, code]]), torch.tensor([2]))
    with pytest.raises(StorageError, match="numbers of 40 bits, where 32 are the most"):
        Packer().put(torch.tensor([[0, 1]]), torch.tensor([40]))


def test_damage_is_told() -> None:
    numbers, widths, smallest = numbers_of([(3, 0), (12, 0)], 10, 0)
    packer = Packer()
    packer.put(numbers, widths)
    packed, table = packer.finish()
    (first, *_), (second, *_) = table
    assert (first, second) == (3, 12)
    for rows, message in [
        (table[:1], f"{len(packed)} bytes of packed numbers, where {table[0][2]} are expected"),
        ([(9, *table[0][1:]), table[1]], "numbers of 9 bits cannot lie in"),
        ([(40, *table[0][1:]), table[1]], "numbers of 40 bits cannot lie in"),
    ]:
        with pytest.raises(StorageError, match=message):
            Unpacker(packed, rows)
    with pytest.raises(StorageError, match="the numbers of 3 bits end early"):
        Unpacker(packed, table).take(smallest[:1], widths[:1], 13)
    with pytest.raises(StorageError, match="the numbers of 5 bits end early"):
        Unpacker(packed, table).take(smallest[:1], torch.tensor([5]), 1)
    left = Unpacker(packed, table)
    left.take(smallest[:1], widths[:1], 10)
    with pytest.raises(StorageError, match="numbers of 12 bits are left over"):
        left.check_finished()


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few channels are packed at a time, also where those before them end within a byte."""
    widths = torch.tensor([3, 7, 3, 0, 12, 3, 7, 32, 3, 1])
    numbers, _, smallest = numbers_of([(w, 0) for w in widths.tolist()], 5, 0)
    whole = Packer()
    whole.put(numbers, widths)
    packed, table = whole.finish()
    for block in (1, 5, 10, 17):
        monkeypatch.setattr(packing, "_BLOCK", block)
        packer = Packer()
        packer.put(numbers, widths)
        again, rows = packer.finish()
        assert (again.tolist(), rows) == (packed.tolist(), table)
        assert torch.equal(Unpacker(packed, table).take(smallest, widths, 5), numbers)
