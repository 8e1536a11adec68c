"""One file for a finalized network: weights as packed integers, everything else as it is. No pickle anywhere.

The file is a safetensors file of one stream for each dtype: all tensors of that dtype, flat, one after the other. What
lies where follows from an index, JSON packed by zlib, at the start of the uint8 stream. Few entries and a packed index
keep the header from dominating a small network's file. After the index come all small whole numbers, those of the same
width deflated together (``packing``). They and the streams hold, in this order:

    packed              a bit mask of the indices that stayed, once for each different cut
    for each tensor     as it is: its values, in the stream of its dtype
                        on its grid: widths, minima and codes of the channels (packed), scales (float32)
                        whole numbers: packed, where that takes less
"""

import dataclasses
import json
import math
import os
import zlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxcompress.errors import StorageError
from fxcompress.progress import progress, stage
from fxcompress.provenance import Cuts, Grid, Inputs, Narrowing, PieceRecord, Provenance, provenance_of
from fxcompress.quantizer import Quantizer, channels_of
from fxcompress.storage.arguments import check_arguments
from fxcompress.storage.codes import Coded, decode, encode, encode_whole
from fxcompress.storage.packing import Packer, Unpacker
from fxcompress.storage.streams import (
    FORMAT,
    Reader,
    Writer,
    checksum,
    dtype_name,
    library,
    open_streams,
    write_streams,
)

__all__ = ["FORMAT", "SavedNetwork", "read", "save"]

_Json = dict[str, Any]
_USUAL = ["int8", "float32"]
"""Types of a weight's minimum and scales, where the index names no others."""
_LARGEST = 2**63 - 1
"""Of torch's sizes."""
_ONE_BIT = torch.ones(1, dtype=torch.uint8, device="cpu")
"""The width of a mask."""
_WORTH_IT = 64
"""Bytes that whole numbers must save: their row of the index is longer."""
_DAMAGE = (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, StorageError, TypeError, ValueError)
"""What reading a damaged index can end in."""


@dataclass(frozen=True, slots=True, eq=False)
class SavedNetwork:
    """What a file holds.

    Attributes:
        tensors: the values of the network's state_dict, on the CPU, dtypes and order included. Names that shared one
            tensor share one again.
        provenance: as it was on the saved module, with two differences. ``grids`` lists only the weights that were
            stored as integers, that is, not those that were edited after ``finalize()``. And bit depths are whole
            numbers, for each channel the smallest whose range holds the codes that are present: the trained fractions
            are not stored.
    """

    tensors: dict[str, Tensor]
    provenance: Provenance


def save(module: nn.Module, path: str | os.PathLike[str]) -> int:
    """Write the state of a finalized network to ``path``, in place of what was there, and return the bytes written.

    Each weight whose number format is known (``provenance.grids``) is stored as integers, each channel at the bits that
    its own codes need, and comes back bit for bit (-0.0 as 0.0). One that is no longer on its grid is stored as floats.
    A file appears at ``path`` whole or not at all.

    Args:
        module: network that ``finalize()`` or ``prune()`` returned, on any device.
        path: file in an existing folder.

    Raises:
        TypeError: the arguments are swapped, or of another kind.
        StorageError: safetensors is missing, the module comes from elsewhere, its state holds something other than
            dense tensors with values, or the file cannot be written.

    >>> import tempfile, fxcompress as fxc
    >>> final = fxc.compress(torch.nn.Linear(64, 64), torch.zeros(1, 64)).finalize()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     size = fxc.save(final, f"{folder}/net.fxc")
    ...     saved = read(f"{folder}/net.fxc")
    >>> torch.equal(saved.tensors["weight"], final.weight), size < 4 * final.weight.numel() / 2
    (True, True)
    """
    library()
    file = check_arguments("save(module, path)", path, module)
    provenance = provenance_of(module)
    if provenance is None:
        raise StorageError(
            f"cannot save this {type(module).__name__}: nothing is known of the network that it was made from\n"
            "  save what finalize() returned, or prune() of a model with one graph, not a copy that was traced again; "
            "of a model that was pruned in pieces, torch.save(module.state_dict(), path) keeps the tensors"
        )
    if any(isinstance(child, Quantizer) for child in module.modules()):
        raise StorageError(
            f"cannot save this {type(module).__name__}, which has quantizers: save net.finalize(); for a "
            "network in training there is fxcompress.save_checkpoint"
        )
    writer = Writer()
    with progress(f"saving {type(module).__name__}"):
        state = {name: _storable(name, value) for name, value in module.state_dict().items()}
        packer = Packer()
        index = _describe(state, provenance, writer, packer)
        packed, index["q"] = packer.finish()
        streams, length = writer.finish(json.dumps(index, separators=(",", ":")), packed)
        stage("write")
        return write_streams(file, streams, f"{FORMAT} {length} {checksum(streams)}")


def read(path: str | os.PathLike[str]) -> SavedNetwork:
    """Read a file that :func:`save` wrote.

    Raises:
        StorageError: safetensors is missing, or ``path`` is no file, damaged, not written by fxcompress, or written by
            a newer one.
    """
    streams, about = open_streams(Path(path))
    try:
        _, length, expected = about
        if expected != checksum(streams):
            raise StorageError("the checksum is wrong")
        return _rebuild(Reader(streams), int(length))
    except (*_DAMAGE, zlib.error) as error:
        raise StorageError(f"{path} is damaged: {error}; fetch the file again, or save the network again") from error


def _storable(name: str, value: object) -> Tensor:
    if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta and not value.is_quantized:
        return value.detach()
    kind = f"{value.layout} tensor on {value.device}" if isinstance(value, Tensor) else type(value).__name__
    raise StorageError(
        f"cannot save {name!r}, a {kind}: only dense tensors with values go into a file; "
        "what the model makes anew can be a buffer with persistent=False"
    )


def _owners(state: dict[str, Tensor], grids: dict[str, Grid]) -> dict[str, str]:
    """For each name that shares its memory with another: the one it is stored under, one on a grid if there is."""
    sharing: defaultdict[object, list[str]] = defaultdict(list)
    for name, tensor in state.items():
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        sharing[place if tensor.numel() else name].append(name)
    return {name: min(names, key=lambda n: n not in grids) for names in sharing.values() for name in names}


def _cut_shape(shape: tuple[int, ...], kept: dict[int, tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(len(kept.get(dim, range(size))) for dim, size in enumerate(shape))


def _describe(state: dict[str, Tensor], provenance: Provenance, writer: Writer, packer: Packer) -> _Json:
    """Hand all tensors to writer and packer, and return the index, from which :func:`_rebuild` finds them again."""
    masks: dict[tuple[int, tuple[int, ...]], int] = {}
    rows = [_origin(name, provenance, masks) for name in {**state, **provenance.shapes}]
    for size, indices in masks:
        mask = torch.zeros(1, size, dtype=torch.uint8, device="cpu")
        mask[0, list(indices)] = 1
        packer.put(mask, _ONE_BIT, repeat=True)
    owner = _owners(state, provenance.grids)
    for done, row in enumerate(rows):
        stage("pack", done, len(rows))
        name = row["n"]
        if name not in state:
            continue
        if owner[name] == name:
            row.update(_content(name, state[name], provenance, writer, packer))
        else:
            row.update(a=owner[name], g=int(name in provenance.grids))
    masked = [size for size, _ in masks]
    index = {"t": rows, "m": masked, "c": provenance.cuts, "w": provenance.weights, "i": provenance.inputs}
    more = {
        "b": provenance.biases,
        "j": _rows(provenance.joins),
        "h": provenance.graph,
        "o": provenance.own_code,
        "p": {path: [p.cuts, p.weights, p.inputs, _rows(p.joins), p.graph] for path, p in provenance.pieces.items()},
    }
    return index | {key: value for key, value in more.items() if value}


def _rows(joins: Iterable[Narrowing]) -> list[tuple[Any, ...]]:
    return [dataclasses.astuple(join) for join in joins]


def _origin(name: str, provenance: Provenance, masks: dict[tuple[int, tuple[int, ...]], int]) -> _Json:
    """The row of a tensor: n its name, s its original shape, k pairs of a cut dim and the number of its mask."""
    row: _Json = {"n": name}
    if name not in provenance.shapes:
        return row
    row["s"] = provenance.shapes[name]
    for dim, indices in provenance.kept.get(name, {}).items():
        size = row["s"][dim]
        if sorted({i for i in indices if 0 <= i < size}) != list(indices):
            raise StorageError(
                f"cannot save: the indices that {name!r} of shape {row['s']} keeps along dim {dim} are not in order"
            )
        row.setdefault("k", []).append((dim, masks.setdefault((size, indices), len(masks))))
    return row


def _content(name: str, tensor: Tensor, provenance: Provenance, writer: Writer, packer: Packer) -> _Json:
    """Write or pack a tensor. In its row: d its dtype, f its shape if that does not follow, g and x how codes are laid.

    And z the smallest and the width of whole numbers.
    """
    row: _Json = {"d": dtype_name(tensor.dtype)}
    original = provenance.shapes.get(name)
    shape = tuple(tensor.shape)
    if original is None or shape != _cut_shape(original, provenance.kept.get(name, {})):
        row["f"] = shape
    grid = provenance.grids.get(name)
    coded = encode(tensor, grid) if grid else None
    if grid is None or coded is None:
        whole = encode_whole(tensor) if tensor.nbytes > _WORTH_IT else None
        if whole is None or tensor.nbytes - whole.width * tensor.numel() / 8 < _WORTH_IT:
            writer.put(tensor)
            return row
        packer.put(whole.numbers[None], torch.tensor([whole.width], device="cpu"), repeat=True)
        return row | {"z": [whole.smallest, whole.width]}
    minimum, widths = coded.minimum, coded.widths
    for table in (widths, minimum):
        packer.put(table[None], torch.tensor([8 * table.itemsize], device="cpu"), repeat=True)
    packer.put(coded.codes, widths)
    writer.put(coded.scale)
    types = [dtype_name(minimum.dtype), dtype_name(coded.scale.dtype)]
    layout = [grid.channel_dim, grid.groups, *grid.batch_dims]
    return row | {"g": layout} | ({} if types == _USUAL else {"x": types})


def _rebuild(reader: Reader, length: int) -> SavedNetwork:
    index = json.loads(zlib.decompress(reader.take("uint8", (length,)).numpy().tobytes()))
    table = [_sizes(row) for row in index["q"]]
    packed = Unpacker(reader.take("uint8", (sum(size for _, _, *lengths in table for size in lengths),)), table)
    masks = [_mask(packed, size) for size in index["m"]]
    rows: dict[str, _Json] = {row["n"]: row for row in index["t"]}
    shapes = {_text(name): _sizes(row["s"]) for name, row in rows.items() if "s" in row}
    kept = {name: {dim: masks[number] for dim, number in row["k"]} for name, row in rows.items() if "k" in row}
    tensors: dict[str, Tensor] = {}
    grids: dict[str, Grid] = {}
    for name, row in rows.items():
        if "d" not in row:
            continue
        shape = _sizes(row["f"]) if "f" in row else _cut_shape(shapes[name], kept.get(name, {}))
        if "z" in row:
            tensors[name] = _read_whole(packed, row, shape)
        elif "g" in row:
            tensors[name], grids[name] = _read_coded(reader, packed, row, shape)
        else:
            tensors[name] = reader.take(row["d"], shape)
    reader.check_finished()
    packed.check_finished()
    tensors |= {name: tensors[row["a"]] for name, row in rows.items() if "a" in row}
    grids |= {name: grids[row["a"]] for name, row in rows.items() if row.get("a") in grids and row["g"]}
    pieces = {
        path: PieceRecord(_pairs(cuts), _count(weights), _inputs(inputs), _joins(joins), *map(_text, graph))
        for path, (cuts, weights, inputs, joins, *graph) in index.get("p", {}).items()
    }
    provenance = Provenance(
        shapes, kept, _pairs(index["c"]), grids, _count(index["w"]), _inputs(index.get("i", ())),
        tuple(map(_text, index.get("b", ()))), _joins(index.get("j", ())), pieces, _text(index.get("h", "")),
        bool(index.get("o", False)),
    )  # fmt: skip
    return SavedNetwork({name: tensors[name] for name in rows if name in tensors}, provenance)


def _pairs(cuts: Iterable[list[str]]) -> Cuts:
    return tuple((_text(node), _text(operand)) for node, operand in cuts)


def _inputs(rows: Iterable[list[Any]]) -> Inputs:
    return tuple((_text(name), _sizes(shape), _type(dtype)) for name, shape, dtype in rows)


def _joins(rows: Iterable[list[Any]]) -> tuple[Narrowing, ...]:
    return tuple(Narrowing(_text(place), _count(operand), _count(dim)) for place, operand, dim in rows)


def _text(value: object) -> str:
    """What an index holds where it has a name."""
    if not isinstance(value, str):
        raise StorageError(f"{value!r} is no name")
    return value


def _count(value: object) -> int:
    """What an index holds where it has a number."""
    if type(value) is not int or not 0 <= value <= _LARGEST:
        raise StorageError(f"{value!r} is no size and no position")
    return value


def _type(name: object) -> str:
    """What an index holds where it has the name of a dtype."""
    if not isinstance(getattr(torch, _text(name), None), torch.dtype):
        raise StorageError(f"{name!r} is no dtype")
    return _text(name)


def _sizes(shape: Iterable[object]) -> tuple[int, ...]:
    return tuple(map(_count, shape))


def _mask(packed: Unpacker, size: int) -> tuple[int, ...]:
    mask = packed.take(torch.zeros(1, device="cpu"), _ONE_BIT, size, repeat=True)
    return tuple(mask[0].nonzero()[:, 0].tolist())


def _read_whole(packed: Unpacker, row: _Json, shape: tuple[int, ...]) -> Tensor:
    smallest, width = torch.tensor(row["z"], device="cpu")[:, None]
    numbers = packed.take(smallest, width, math.prod(shape), repeat=True)
    return numbers.reshape(shape).to(getattr(torch, _type(row["d"])))


def _read_table(packed: Unpacker, dtype: torch.dtype, channels: int) -> Tensor:
    about = torch.iinfo(dtype)
    smallest, width = torch.tensor([[about.min], [about.bits]], device="cpu")
    return packed.take(smallest, width, channels, repeat=True)[0]


def _read_coded(reader: Reader, packed: Unpacker, row: _Json, shape: tuple[int, ...]) -> tuple[Tensor, Grid]:
    (channel_dim, groups, *batch), (minimum_type, scale_type) = row["g"], row.get("x", _USUAL)
    layout = channel_dim, groups, tuple(batch)
    channels = channels_of(shape, *layout)
    columns = math.prod(shape) // channels
    widths = _read_table(packed, torch.uint8, channels)
    minimum = _read_table(packed, getattr(torch, _type(minimum_type)), channels)
    codes = packed.take(minimum, widths, columns)
    coded = Coded(codes, reader.take(scale_type, (channels,)))
    bits, exponent = coded.bits.double().tolist(), coded.scale.double().log2().tolist()
    grid = Grid(tuple(bits), tuple(exponent), *layout)
    return decode(coded, shape, getattr(torch, _type(row["d"])), grid), grid
