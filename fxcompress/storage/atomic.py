"""Files that appear whole or not at all, whenever the writer is killed."""

import contextlib
import glob
import os
import platform
import secrets
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

_OLD = 3600.0
"""Seconds after which a temporary file belongs to nobody who is still writing."""
_QUIET = 60.0
"""The same where its writer no longer runs, by its number: containers may share the name of a host."""


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> int:
    """Write a file in place of what was there, and return its size in bytes.

    The content goes to a temporary file in the same folder, to the disk, and only then under its name. A writer that is
    killed leaves the old file as it was, and perhaps its temporary file, which later writers clear away.

    Args:
        path: in an existing folder.
        write: called once with the open file.

    Raises:
        OSError: the file cannot be written; the old one is still there.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     size = write_atomically(Path(folder, "a"), lambda file: file.write(b"abc"))
    ...     found = Path(folder, "a").read_bytes(), len(list(Path(folder).iterdir()))
    >>> size, found
    (3, (b'abc', 1))
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent}; make it first")
    temporary = path.with_name(f".{path.name}.{_host()}-{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        size = temporary.stat().st_size
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)
    _sweep(path)
    return size


def _sync_folder(folder: Path) -> None:
    """Bring the new name to the disk, where the system can open folders and sync them."""
    if os.name == "posix":
        with contextlib.suppress(OSError):
            handle = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _host() -> str:
    """This machine, in letters that any file name may have."""
    return f"{zlib.crc32(platform.node().encode()):08x}"


def _sweep(path: Path) -> None:
    """Clear away what killed writers of the same file have left."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError):
            if left.stat().st_mtime < time.time() - (_QUIET if _is_of_the_dead(left) else _OLD):
                left.unlink()


def _is_of_the_dead(temporary: Path) -> bool:
    """Whether the writer of a temporary file ran on this machine, and does so no longer."""
    host, _, rest = temporary.suffixes[-2].removeprefix(".").partition("-")
    pid = rest.partition("-")[0]
    if os.name != "posix" or host != _host() or not pid.isdecimal():  # elsewhere a signal of 0 is none
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except OSError:  # it is another user's
        return False
    return False
