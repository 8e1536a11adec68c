"""Whose code a frame runs: the user's, or that of torch or of this package."""

import functools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType

import torch

OF_TORCH = f"{Path(torch.__file__).parent}{os.sep}"
"""How the names of torch's files begin."""
LIBRARIES = (OF_TORCH, f"{Path(__file__).parents[2]}{os.sep}")
"""The same for all files that are not the user's."""
_STARTS = {"run_model", "symbolic_graph"}
"""The functions of ours that call the user's model."""


def users_frames() -> Iterator[FrameType]:
    """The user's frames that lie above the tracer, innermost first."""
    frame: FrameType | None = sys._getframe()  # noqa: SLF001
    inside = False
    while frame is not None:
        users = is_users(frame)
        if users:
            yield frame
        elif inside and frame.f_code.co_name in _STARTS:
            return
        inside = True
        frame = frame.f_back


def is_users(frame: FrameType) -> bool:
    """Whether a frame runs code of the user."""
    return _is_users_file(frame.f_code.co_filename)


def asks_for_user(frame: FrameType) -> bool:
    """Whether a question that a frame asks is the user's: it runs code that somebody wrote, or ``torch.is_tensor``."""
    code = frame.f_code
    return code.co_name == "is_tensor" or is_users_code(code)


def is_users_code(code: CodeType) -> bool:
    """Whether code is the user's, and stands in a file; a dataclass writes methods of its own, in no file."""
    file = code.co_filename
    return (
        _is_users_file(file)
        and not file.startswith("<frozen")
        and not (file == "<string>" and code.co_name[:2] == "__")
    )


@functools.cache
def _is_users_file(name: str) -> bool:
    return not name.startswith(LIBRARIES)
