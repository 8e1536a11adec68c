"""Where in the user's code a trace has got to: the file and the line, for messages and for the nodes of a graph."""

import functools
import os
import sys
import sysconfig

from fxcompress.trace.code.frames import LIBRARIES, is_users, users_frames

_PYTHONS = sysconfig.get_path("stdlib") + os.sep
_INSTALLED = tuple(os.path.join(_PYTHONS, name, "") for name in ("site-packages", "dist-packages"))  # noqa: PTH118


def stack_trace() -> str:
    """The lines of the user's code that are being run, in the form that torch.fx keeps on nodes."""
    frames = [f for f in users_frames() if not f.f_code.co_filename.startswith("<")]
    return "\n".join(f'  File "{f.f_code.co_filename}", line {f.f_lineno}, in {f.f_code.co_name}' for f in frames[::-1])


def place() -> str:
    """`` at file:line`` of the user's code that runs, or nothing; who calls it where that is a library of Python."""
    first = next(users_frames(), None)
    frame = first
    if first is not None and _is_pythons(first.f_code.co_filename):
        frame = next((f for f in users_frames() if not _is_pythons(f.f_code.co_filename)), first)
    return f" at {short(frame.f_code.co_filename)}:{frame.f_lineno}" if frame is not None else ""


def place_of(error: BaseException) -> str:
    """`` at file:line`` of the user's code that an error comes from, or nothing; as :func:`place`."""
    found, traceback = "", error.__traceback__
    while traceback is not None:
        code = traceback.tb_frame.f_code
        if is_users(traceback.tb_frame) and not (found and _is_pythons(code.co_filename)):
            found = f" at {short(traceback.tb_frame.f_code.co_filename)}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return found


def line_of(stack_trace: str) -> tuple[str, int]:
    """The innermost line of the user's code in a stack trace, as torch.fx keeps them: file and line, or ("", 0)."""
    for line in reversed(stack_trace.splitlines()):
        name, found, rest = line.strip().removeprefix('File "').partition('", line ')
        if found and not name.startswith(LIBRARIES):
            return name, int(rest.partition(",")[0])
    return "", 0


@functools.cache
def short(file: str) -> str:
    """A file from where Python would find it: ``torchvision/models/resnet.py``."""
    roots = [os.path.join(os.path.abspath(root), "") for root in (*sys.path, os.getcwd())]  # noqa: PTH100, PTH109, PTH118
    return file[max((len(root) for root in roots if file.startswith(root)), default=0) :]


@functools.cache
def _is_pythons(name: str) -> bool:
    """Whether a file is of Python's own libraries."""
    return name.startswith(_PYTHONS) and not name.startswith(_INSTALLED)
