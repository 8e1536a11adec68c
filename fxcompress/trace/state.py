"""What a run must not change: the state of the model, and the random numbers of the process."""

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import nn

from fxcompress.errors import TraceError
from fxcompress.trace.generators import generators_kept
from fxcompress.trace.memory import Unread, carried_over
from fxcompress.trace.op_watch import OpWatch, memory_of, written_to
from fxcompress.trace.places import place


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
        with generators_kept(), _seeds(seeded), Undone() if allowed else nullcontext():
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


@contextmanager
def unchanged_buffers(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Undo what the code does to the buffers of ``model``; afterwards the list holds those that were changed."""
    written: list[torch.Tensor] = []
    plain = (b for b in model.buffers() if not b.is_inference() and not b.is_meta and b.layout == torch.strided)
    before = [(buffer, buffer.detach(), buffer.detach().clone()) for buffer in plain]
    try:
        yield written
    finally:
        for buffer, memory, value in before:
            if buffer.data_ptr() != memory.data_ptr():  # it was given other memory: buffer.data = ...
                written.append(buffer)
                buffer.data = memory
            if not torch.equal(memory.nan_to_num(), value.nan_to_num()):
                written.append(buffer)
                with torch.no_grad():
                    memory.copy_(value)


class Undone(OpWatch):
    """Undoes, at its end, what code writes to tensors that were there before: a global one, one in a closure."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def as_it_was(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor that was there before, with the values that it had: itself where nothing was written to it."""
        saved = next((self._before[memory][1] for memory in memory_of(tensor) if memory in self._before), None)
        if saved is None:
            return tensor
        place = tensor.storage_offset(), tensor.shape, tensor.stride()
        return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(saved, *place)

    def before(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ANN401 - an op
        """Keep what is in the memory that an op is about to write to."""
        for tensor in written_to(func, args, kwargs):
            for memory in memory_of(tensor):
                if memory not in self.made and memory not in self._before:
                    storage = tensor.untyped_storage()
                    self._before[memory] = storage, storage.clone()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for storage, before in self._before.values():
            storage.copy_(before)
