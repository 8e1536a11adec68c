"""What a run must not change: the state of the model, and the random numbers of the process."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fxcompress.errors import TraceError
from fxcompress.trace.effects.attributes import Unread, carried_over


class State:
    """The attributes of a model before a run."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._held = [table[key] for _, table, key in _attributes(model)]  # or another object may get the same id
        self._before = self._read()

    def _read(self) -> dict[str, object]:
        return {name: _stamp(table[key]) for name, table, key in _attributes(self._model)}

    def changed(self) -> frozenset[str]:
        """Names of the attributes that are others now."""
        after = self._read()
        found = {
            name
            for name in {**self._before, **after}
            if name not in after or name not in self._before or self._before[name] != after[name]
        }
        inside = tuple(f"{name}." for name in found)  # of another module in the place of one, all is different
        return frozenset(name for name in found if not name.startswith(inside))


class _Unset:
    """Stands for an attribute that must not be read before it is set; any use of it fails."""

    def __bool__(self) -> bool:
        raise TraceError("an attribute is read before it is set")

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        raise TraceError("an attribute is read before it is set")


def unset(model: nn.Module, names: frozenset[str]) -> None:
    """Make every use of the named attributes fail, until something is assigned to them."""
    for name in names:
        path, _, key = name.rpartition(".")
        module = model.get_submodule(path)
        tables = (module._parameters, module._buffers, module.__dict__)
        table: dict[str, Any] = next((t for t in tables if key in t), module.__dict__)
        number = isinstance(table.get(key), int | float) and not isinstance(table[key], bool)
        table[key] = Unread(name) if number else _Unset()


def _attributes(model: nn.Module) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Name, table and key in the table of each attribute of each module, a module among them."""
    for path, module in model.named_modules():
        for table in (module._parameters, module._buffers, module._modules, module.__dict__):
            for key in table.keys() - _TABLES:
                yield f"{path}.{key}" if path else key, table, key


_TABLES = {"_parameters", "_buffers", "_modules"}


def carries_over(names: frozenset[str]) -> TraceError:
    """The error for attributes that take something from one run to the next."""
    return carried_over(min(names))


def _stamp(value: object) -> object:
    """What stands for a value of an attribute: it differs when the value does."""
    if isinstance(value, bool | int | float | str | None):
        return type(value), value
    if isinstance(value, list | tuple | dict | set):
        return id(value), len(value)
    if isinstance(value, torch.Tensor) and value.layout == torch.strided:
        # ``self.count += 1`` writes to the tensor, and then puts it in its own place under another name for the memory.
        memory = value.untyped_storage()._cdata  # noqa: SLF001 - the only name of memory that holds no data
        return memory, value.dtype, value.shape, value.stride(), value.storage_offset(), value.requires_grad
    return id(value)
