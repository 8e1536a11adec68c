"""What a run must not change: the state of the model, and the random numbers of the process."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxcompress.errors import TraceError


class State:
    """The attributes of a model before a run."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._before = self._read()

    def _read(self) -> dict[str, Any]:
        found = {}
        for path, module in self._model.named_modules():
            for table in (module._parameters, module._buffers, module.__dict__):
                found.update({f"{path}.{name}".lstrip("."): _stamp(value) for name, value in table.items()})
        return found

    def check(self) -> None:
        """Raise when an attribute is another now.

        Raises:
            TraceError: naming it.
        """
        after = self._read()
        changed = [n for n in {**self._before, **after} if n not in after or self._before.get(n, self) != after[n]]
        if changed:
            raise TraceError(
                f"it sets its attribute {changed[0]} while it runs: the next run may go another way, which a graph cannot "
                "do\n  write into a buffer in place (copy_), or compute the value anew in each run"
            )


def _stamp(value: object) -> object:
    """What stands for a value of an attribute: it differs when the value does."""
    if isinstance(value, bool | int | float | str | None):
        return type(value), value
    if isinstance(value, list | tuple | dict | set) and not isinstance(value, Tensor):
        return id(value), len(value)
    return id(value)


@contextmanager
def unchanged_randomness() -> Iterator[None]:
    """Leave the generators of torch, numpy and Python as they were.

    Raises:
        TraceError: the code has drawn from one that torch does not see: the draw would be the same for ever.
    """
    python, numpy = random.getstate(), np.random.get_state(legacy=True)  # noqa: NPY002
    with torch.random.fork_rng(devices=()):
        yield
    drawn = random.getstate() != python or not _equal(np.random.get_state(legacy=True), numpy)  # noqa: NPY002
    random.setstate(python)
    np.random.set_state(numpy)  # noqa: NPY002
    if drawn:
        raise TraceError(
            "it draws random numbers from Python or numpy while it runs, and the trace would repeat the same ones for "
            "ever\n  draw them with torch (torch.rand(()).item() does not help: keep the number in a tensor)"
        )


def _equal(a: Any, b: Any) -> bool:  # noqa: ANN401 - the state of numpy's generator
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
