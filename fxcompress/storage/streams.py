"""Streams of numbers: all tensors of a dtype, flat, one after the other, in a safetensors file."""

import math
import zipfile
import zlib
from collections import defaultdict
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from fxcompress.errors import StorageError
from fxcompress.storage.atomic import write_atomically

FORMAT = 2
"""Version of the format that this release writes and reads. Format 1 was of the time before the first release."""

_KEY = "fxcompress"
"""The one key of the header's metadata: safetensors writes several in an order that changes from run to run."""

_PARTS = {"complex32": "float16", "complex64": "float32", "complex128": "float64"}
"""What complex numbers are stored as pairs of."""

Streams = dict[str, Tensor]
"""By the name of their dtype."""


def library() -> ModuleType:
    """The safetensors package, which an extra brings.

    Raises:
        StorageError: it is not installed.
    """
    try:
        import safetensors.torch
    except ImportError as error:
        raise StorageError('files need the safetensors package: pip install "fxcompress[file]"') from error
    found: ModuleType = safetensors
    return found


class Writer:
    """Collects tensors, and joins those of each dtype."""

    def __init__(self) -> None:
        self._parts: defaultdict[torch.dtype, list[Tensor]] = defaultdict(list)

    def put(self, tensor: Tensor) -> None:
        """Add a tensor, on any device, of any shape."""
        self._parts[tensor.dtype].append(tensor.cpu().resolve_conj().resolve_neg().reshape(-1))

    def finish(self, index: str, packed: Tensor) -> tuple[Streams, int]:
        """The streams by the names of their dtypes, and the length of the index.

        The index is at the start of the uint8 stream, and after it ``packed``, uint8 (bytes,).
        """
        text = zlib.compress(index.encode(), 9)
        self._parts[torch.uint8][:0] = [torch.frombuffer(bytearray(text), dtype=torch.uint8), packed]
        joined = {dtype: _joined(parts, dtype) for dtype, parts in self._parts.items()}
        # Complex numbers as pairs of real ones: safetensors does not know all kinds.
        streams = {dtype: torch.view_as_real(s).reshape(-1) if s.is_complex() else s for dtype, s in joined.items()}
        return {dtype_name(dtype): stream for dtype, stream in streams.items()}, len(text)


class Reader:
    """Takes tensors off streams in the order in which they were written."""

    def __init__(self, streams: Streams) -> None:
        for name, stream in streams.items():  # the checksum is that of bytes, whatever the header says that they are
            if dtype_name(stream.dtype) != _PARTS.get(name, name):
                raise StorageError(f"the {name} stream holds {dtype_name(stream.dtype)}")
        self._rest = dict(streams)

    def take(self, dtype: str, shape: tuple[int, ...]) -> Tensor:
        """The next tensor of a stream, with memory of its own."""
        stream, count = self._rest[dtype], math.prod(shape) * (2 if dtype in _PARTS else 1)
        if count > len(stream):
            raise StorageError(f"the {dtype} stream ends early")
        self._rest[dtype] = stream[count:]
        # Pairs are copied as such: in the file they lie where real numbers may, and torch moves complex ones by kernels
        # that take them to lie where memory of its own does.
        own = stream[:count].clone()
        return (own.view(getattr(torch, dtype)) if dtype in _PARTS else own).reshape(shape)

    def check_finished(self) -> None:
        """Raise StorageError where something has not been taken."""
        left = sum(len(stream) for stream in self._rest.values())
        if left:
            raise StorageError(f"{left} values are left over")


def _joined(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    # By way of bytes, because not every dtype can be concatenated.
    return torch.cat([part.view(torch.uint8) for part in parts]).view(dtype)


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype, as of the attribute of torch."""
    return str(dtype).removeprefix("torch.")


def checksum(streams: Streams) -> str:
    """CRC-32 of all streams, in hexadecimal digits."""
    crc = 0
    for name in sorted(streams):
        crc = zlib.crc32(streams[name].view(torch.uint8).numpy().data, crc)
    return f"{crc:x}"


def open_streams(path: Path) -> tuple[Streams, list[str]]:
    """The streams of a file of this format, and the words in its header, the format first.

    Raises:
        StorageError: there is no such file, or it is damaged, of something else, or of a newer format.
    """
    found = library()
    if not path.is_file():
        raise StorageError(f"there is no file {path}; check the path")
    if zipfile.is_zipfile(path):
        raise StorageError(
            f"{path} was written by torch.save, as checkpoints are: load_checkpoint reads those of save_checkpoint and "
            "fit; load takes what save(net.finalize(), path) has written"
        )
    try:
        with found.safe_open(path, framework="pt") as file:
            about = (file.metadata() or {}).get(_KEY, "").split(" ")
            _check_format(path, about[0])
            return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118
    except (OSError, found.SafetensorError) as error:
        raise StorageError(f"{path} is damaged, or not a file of fxcompress: {error}; fetch the file again") from error


def _check_format(path: Path, found: str) -> None:
    if not found.isdecimal():
        raise StorageError(f"{path} was not written by fxcompress; read it with what wrote it")
    if int(found) > FORMAT:
        raise StorageError(
            f"{path} has format {found} and this fxcompress reads format {FORMAT}; "
            "upgrade it: pip install --upgrade fxcompress"
        )
    if int(found) < FORMAT:
        raise StorageError(
            f"{path} has format {found}, of an fxcompress before the first release; save the network again"
        )


def write_streams(path: Path, streams: Streams, about: str) -> int:
    """Write streams, with some words in the header, to a file that appears whole or not at all; its size in bytes.

    Raises:
        StorageError: it cannot be written.
    """
    found = library()
    try:
        # Not save_file, whose files only their owner can read.
        content = found.torch.save(streams, {_KEY: about})
        return write_atomically(path, lambda file: file.write(content))
    except KeyError as error:  # what its table of dtypes lacks
        raise StorageError(
            f"cannot write {path}: this release of safetensors has no {error.args[0]}, which the network holds; "
            "upgrade it: pip install --upgrade safetensors"
        ) from error
    except (OSError, found.SafetensorError) as error:
        raise StorageError(f"cannot write {path}: {error}; nothing was changed") from error
