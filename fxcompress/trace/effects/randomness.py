"""The random numbers of the process, which a run that only looks must leave as they were."""

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from fxcompress.errors import TraceError
from fxcompress.trace.basics.generators import generators_kept
from fxcompress.trace.code.locations import place
from fxcompress.trace.effects.undo import UndoWrites


@contextmanager
def same_randomness(*, allowed: bool = False) -> Iterator[None]:
    """Leave the generators of torch, numpy and Python as they were.

    Args:
        allowed: whether the code may draw from those of numpy and Python, which torch does not see, as it runs to be
            looked at; what it writes to tensors that are there before is undone then.

    Raises:
        TraceError: it has, and may not: a trace would repeat the same draw for ever.
    """
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the one that models use
    seeded: list[str] = []
    try:
        with generators_kept(), _seeds(seeded), UndoWrites() if allowed else nullcontext():
            yield
        drawn = random.getstate() != python or not all(map(np.array_equal, np.random.get_state(), numpy))  # noqa: NPY002
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
    if seeded and not allowed:
        raise TraceError(f"it sets the state of torch's random numbers{seeded[0]}, which a graph does not do")
    if drawn and not allowed:
        raise TraceError(
            "it draws random numbers from Python or numpy while it runs, and a trace would repeat the same ones for "
            "ever\n  draw them with torch, and keep them in tensors"
        )


@contextmanager
def _seeds(found: list[str]) -> Iterator[None]:
    """Within it, the places go into ``found`` where code sets or keeps the state of torch's random numbers."""

    def noted(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            found.append(place())
            return function(*args, **kwargs)

        return called

    with ExitStack() as stack:
        for name, function in _SEEDING.items():
            stack.enter_context(patch.object(torch.random, name, noted(function)))
            stack.enter_context(patch.object(torch, name, getattr(torch.random, name)))
        yield


_SEEDING = {name: getattr(torch.random, name) for name in ("manual_seed", "seed", "set_rng_state")}
