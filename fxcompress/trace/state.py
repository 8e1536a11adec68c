"""What a run must not change: the state of the model, and the random numbers of the process."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from fxcompress.errors import TraceError


class State:
    """The attributes of a model before a run."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._before = self._read()

    def _read(self) -> dict[str, object]:
        return {name: _stamp(table[key]) for name, table, key in _attributes(self._model)}

    def changed(self) -> frozenset[str]:
        """Names of the attributes that are others now."""
        after = self._read()
        return frozenset(
            name
            for name in {**self._before, **after}
            if name not in after or name not in self._before or self._before[name] != after[name]
        )


class _Unset:
    """Stands for an attribute that must not be read before it is set; any use of it fails."""

    def __bool__(self) -> bool:
        raise TraceError("an attribute is read before it is set")

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        raise TraceError("an attribute is read before it is set")


def unset(model: nn.Module, names: frozenset[str]) -> None:
    """Make every use of the named attributes fail, until something is assigned to them."""
    for name, table, key in list(_attributes(model)):
        if name in names:
            table[key] = _Unset()


def _attributes(model: nn.Module) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Name, table and key in the table of each attribute of each module."""
    for path, module in model.named_modules():
        for table in (module._parameters, module._buffers, module.__dict__):
            for key in table:
                yield f"{path}.{key}" if path else key, table, key  # type: ignore[misc]


def carries_over(names: frozenset[str]) -> TraceError:
    """The error for attributes that take something from one run to the next."""
    return TraceError(
        f"it sets its attribute {min(names)} while it runs, and the next run may read it; a graph cannot do that\n"
        "  write into a buffer in place (copy_), or compute the value anew in each run"
    )


def _stamp(value: object) -> object:
    """What stands for a value of an attribute: it differs when the value does."""
    if isinstance(value, bool | int | float | str | None):
        return type(value), value
    if isinstance(value, list | tuple | dict | set):
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
