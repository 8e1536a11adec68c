"""Undoing what code writes to tensors while it runs to be looked at: to buffers of its model, and to any others."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fxcompress.trace.basics.equality import same_values
from fxcompress.trace.basics.op_watch import OpWatch, memory_of, written_to


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
            if not same_values(memory, value):
                written.append(buffer)
                with torch.no_grad():
                    memory.copy_(value)


class UndoWrites(OpWatch):
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
