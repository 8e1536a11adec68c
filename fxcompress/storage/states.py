"""A file of plain values: tensors, numbers, strings, and containers of these. Reading it runs no code.

It is what ``torch.save`` writes and ``torch.load(weights_only=True)`` reads, with two checks more: nothing goes in that
would not come out again, and a damaged file is found out by the checksums that are in it.
"""

import os
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fxcompress.errors import CheckpointError
from fxcompress.storage.atomic import write_atomically

__all__ = ["FORMAT", "read_states", "write_states"]

FORMAT = 1
"""Version of the format that this release writes, and the newest that it reads."""

_KEY = "fxcompress"
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.Tensor, torch.nn.Parameter)
_CONSTANTS = (torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format)


def check_place(path: str | os.PathLike[str]) -> None:
    """Check that a file can be written later on, before anything is trained.

    Raises:
        CheckpointError: it is a folder, or its folder is missing.
    """
    place = Path(path)
    if place.is_dir() or not place.parent.is_dir():
        why = "it is a folder" if place.is_dir() else f"there is no folder {place.parent}"
        raise CheckpointError(f"cannot write {path}: {why}; pass the path of a file in a folder that exists")


def write_states(path: str | os.PathLike[str], states: dict[str, Any]) -> int:
    """Write plain values to ``path``, in place of what was there and whole or not at all; return the bytes written.

    Raises:
        CheckpointError: a value is not plain, or the file cannot be written. The old file is then still there.
    """
    content = {_KEY: FORMAT} | {name: _plain(value, name) for name, value in states.items()}
    try:
        return write_atomically(Path(path), lambda file: torch.save(content, file))
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"cannot write {path}: {error}; what was there is still there") from error


def read_states(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What :func:`write_states` wrote, with all tensors on the CPU.

    Raises:
        CheckpointError: there is no such file, or it is damaged, of another kind, or of a newer release.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"there is no file {path}; check the path")
    if _is_safetensors(Path(path)):
        raise CheckpointError(
            f"{path} holds a finalized network, or other safetensors, and no checkpoint: load reads it"
        )
    try:
        _check_sums(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
        version = content.pop(_KEY)
    except Exception as error:  # torch.load raises whatever the damage leads to
        raise CheckpointError(
            f"{path} is damaged, or was not written by save_checkpoint: {_first_line(error)}; use another checkpoint"
        ) from error
    if not isinstance(version, int) or version > FORMAT:
        raise CheckpointError(
            f"{path} has format {version} and this fxcompress reads formats up to {FORMAT}; "
            "upgrade it: pip install --upgrade fxcompress"
        )
    assert isinstance(content, dict)
    return content


def _is_safetensors(path: Path) -> bool:
    """Whether a file begins like safetensors: eight bytes that say how long the JSON behind them is."""
    with path.open("rb") as file:
        return file.read(10)[8:] == b'{"'


def _check_sums(path: str | os.PathLike[str]) -> None:
    """torch.load does not look at the checksums."""
    with zipfile.ZipFile(path) as archive:
        wrong = archive.testzip()
    if wrong is not None:
        raise CheckpointError(f"the checksum of {wrong} is wrong")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _plain(value: Any, path: str) -> Any:  # noqa: ANN401
    """The value as types that come back from a file; the path is for the error."""
    if isinstance(value, np.generic):
        value = value.item()
    if type(value) in _PLAIN or isinstance(value, _CONSTANTS):
        return value
    if isinstance(value, OrderedDict):  # the versions of modules are an attribute of their state_dict
        for key, item in value.items():
            _plain(item, f"{path}[{key!r}]")
        return value
    if isinstance(value, dict):
        return {_plain(key, path): _plain(item, f"{path}[{key!r}]") for key, item in value.items()}
    if type(value) in {list, tuple, set}:
        return type(value)(_plain(item, f"{path}[{i}]") for i, item in enumerate(value))
    raise CheckpointError(
        f"cannot save {path}: a {type(value).__module__}.{type(value).__qualname__} would have to be pickled, and "
        "loading a pickle can run any code; save its state_dict(), or its numbers, strings and tensors"
    )
