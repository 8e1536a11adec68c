"""Building large structures without Python looking for garbage in them over and over.

A graph, its tape and its labels are some hundred objects for each node, and all of them stay until the pass is done.
Python starts to look for unreachable cycles whenever so many objects have been made, and now and then it looks at all
objects of the process: those of torch and of the caller's program too, in which nothing has become garbage. So the time
of a pass would grow with what else the process holds, and faster than the network.
"""

import functools
import gc
from collections.abc import Callable
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_R = TypeVar("_R")


def without_collections(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """``function``, during which no cycle collection starts; what has no reader left is freed at once as ever.

    On return or error the collector is as it was before: on, or off where the caller has turned it off. Meant for one
    phase at a time, whose own cycles are few; they are collected after it.

    >>> without_collections(gc.isenabled)(), gc.isenabled()
    (False, True)
    """

    @functools.wraps(function)
    def paused(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if not gc.isenabled():
            return function(*args, **kwargs)
        gc.disable()
        try:
            return function(*args, **kwargs)
        finally:
            gc.enable()

    return paused
