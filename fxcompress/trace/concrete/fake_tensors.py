"""Tensors with a shape, a dtype and a device, and no values."""

import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses import FakeTensorMode

from fxcompress.errors import TraceError
from fxcompress.trace.concrete.recorder import Recorder
from fxcompress.trace.concrete.writer import hidden

_OF_AUTOGRAD = frozenset({torch.ops.prim.device.default, torch.ops.aten.detach.default})
"""What autograd itself calls around a function of the user: on what goes in, and for what is saved for the way back."""


class Fakes(FakeTensorMode):
    """Fake tensors of a recorded run; an op that reaches them unrecorded is an error.

    Each tensor knows this mode, and its history in autograd knows other tensors, where Python's garbage collector does
    not look: with a strong reference to the recorder, which knows them all, none would ever be freed.

    Args:
        recorder: of the run.
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self._recorder = weakref.ref(recorder)
        recorder.faked = self.from_tensor

    def create_symbolic_nested_int(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as torch has it
        """What stands for the lengths of the parts of a nested tensor.

        Raises:
            TraceError: they are a matter of values.
        """
        raise TraceError("it computes with a nested tensor, the lengths of which a graph does not know")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        recorder = self._recorder()
        if recorder is None or recorder.paused:
            return super().__torch_dispatch__(func, types, args, kwargs)
        with recorder.pause():
            result: Any = super().__torch_dispatch__(func, types, args, kwargs)
        if func in _OF_AUTOGRAD:
            return result
        if func is torch.ops.aten.alias.default and recorder.writer.knows(args[0]):
            recorder.bind_alias(result, args[0])
            return result
        if func is not torch.ops.aten.lift_fresh.default:
            recorder.refusal = recorder.refusal or hidden(f"{func}")
            raise recorder.refusal
        recorder.writer.keep(result, *args)  # torch.from_numpy and the like: a constant
        return result


@contextmanager
def quiet() -> Iterator[None]:
    """Keep torch from logging ops that fail on fake tensors: an error of ours says so, or there is another way."""
    with patch.object(logging.getLogger("torch._subclasses.fake_tensor"), "disabled", new=True):
        yield
