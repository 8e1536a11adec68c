"""Buffers that code replaces: ``self.mean = 0.9 * self.mean + 0.1 * h.mean(0).detach()``.

A graph assigns nothing. What is left of the run is the same if the new values go into the memory of the buffer at its
end, as long as nobody else sees that memory, or holds the new tensor. The run itself goes on with a copy of what was
there, as autograd may have kept it for the backward pass.
"""

from collections.abc import Iterator

from torch import Tensor, nn

from fxcompress.trace.basics.op_watch import memory_of
from fxcompress.trace.basics.trees import tensors_in
from fxcompress.trace.concrete.writer import Writer


class ReplacedBuffers:
    """The buffers of a model before it runs.

    Args:
        model: that is going to run, on fake tensors.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._before = [
            (module, key, buffer)
            for module in model.modules()
            for key, buffer in module._buffers.items()
            if buffer is not None
        ]

    def write(self, writer: Writer, seen: object) -> None:
        """Write what the run has put in the place of buffers into these; others stay replaced.

        Args:
            writer: of the run.
            seen: the arguments of the run and what it has returned.
        """
        replaced = [(m, key, old) for m, key, old in self._before if m._buffers.get(key) is not old]
        if not replaced:
            return
        held = {memory for tensor in (*tensors_in(seen), *self._held()) for memory in memory_of(tensor)}
        buffers = {memory for _, _, buffer in self._before for memory in memory_of(buffer)}
        for module, key, old in replaced:
            new = module._buffers.get(key)
            same = new is not None and (new.shape, new.dtype, new.device) == (old.shape, old.dtype, old.device)
            if new is None or not same or new.requires_grad or not writer.knows(new):
                continue
            if not (held | buffers).isdisjoint(memory_of(new)) or not held.isdisjoint(memory_of(old)):
                continue
            _put(writer, old, new)
            module._buffers[key] = old
            held.update(memory_of(new))  # of another buffer with the same tensor nothing is known

    def _held(self) -> Iterator[Tensor]:
        """The tensors that are on modules past their buffers, and the parameters."""
        for module in self._model.modules():
            yield from (p for p in module._parameters.values() if p is not None)
            yield from tensors_in([value for key, value in vars(module).items() if key not in {"_buffers", "_modules"}])


def _put(writer: Writer, old: Tensor, new: Tensor) -> None:
    """Let the graph write the new values into a buffer, and read a copy of the old ones."""
    node = writer.node_of(old)
    readers = list(node.users)
    if readers:
        with writer.graph.inserting_after(node):
            copy = writer.graph.call_method("clone", (node,))
        for reader in readers:
            reader.replace_input_with(node, copy)
    writer.node("call_method", "copy_", (old, new))
