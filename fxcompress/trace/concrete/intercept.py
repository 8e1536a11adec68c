"""What torch does not show to a function mode, and a trace must see all the same."""

import builtins
import inspect
import sys
from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._functorch import eager_transforms, vmap
from torch._subclasses import FakeTensor
from torch.fx import _symbolic_trace

from fxcompress.errors import TraceError
from fxcompress.trace.basics.patching import patched
from fxcompress.trace.code.frames import asks_for_user
from fxcompress.trace.code.locations import place
from fxcompress.trace.concrete.cached_calls import without_caches
from fxcompress.trace.concrete.recorder import Recorder
from fxcompress.trace.concrete.size_conversions import kept_conversions
from fxcompress.trace.concrete.sizes import Truth
from fxcompress.trace.effects.held_tensors import HeldTensors, tensors_of
from fxcompress.trace.graph.calls import autograd_by, autograd_call
from fxcompress.trace.model import lowering
from fxcompress.trace.model.mode_switches import switches

IsLeaf = Callable[[nn.Module, str], bool]
"""Whether a module becomes one node."""


@contextmanager
def watch(
    recorder: Recorder,
    model: nn.Module,
    is_leaf: IsLeaf,
    readers: set[int],
    *,
    open_wrapped: bool,
    originals: Container[int] = (),
) -> Iterator[None]:
    """Record torch functions, leaf modules, functions marked by torch.fx.wrap, and autograd functions.

    Args:
        recorder: told of each call.
        model: that is going to run.
        is_leaf: see :data:`IsLeaf`.
        open_wrapped: record what wrapped functions call, and not the functions themselves.
        readers: what leaf modules add to it while they run is taken out again: they read their mode at run time too.
        originals: ids of the tensors that the model has copies of; a module that holds one is not of the copy.
    """
    names = {id(module): path for path, module in model.named_modules()}
    paths = {id(module): path for path, module in model.named_modules() if path and is_leaf(module, path)}
    held = HeldTensors(model)
    call, device = nn.Module.__call__, inspect.getattr_static(FakeTensor, "device")

    def called(module: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        if not recorder.paused and id(module) not in names and any(id(t) in originals for t in tensors_of(module)):
            recorder.refusal = recorder.refusal or _past_the_copy(module)
            raise recorder.refusal
        if recorder.paused or id(module) not in paths or held.others_in(module):
            with recorder.writer.inside(names.get(id(module)), type(module)):
                return call(module, *args, **kwargs)
        before = set(readers)
        switches().called(paths[id(module)], module)
        result = recorder.call(("call_module", paths[id(module)]), args, kwargs, lambda *a, **k: call(module, *a, **k))
        readers.intersection_update(before)
        return result

    def device_of(tensor: FakeTensor) -> torch.device:
        found: torch.device = device.fget(tensor) if recorder.paused else recorder.device(tensor)
        return found

    with ExitStack() as stack:
        stack.enter_context(patch.object(nn.Module, "__call__", called))
        stack.enter_context(patch.object(FakeTensor, "device", property(device_of)))
        stack.enter_context(autograd_by(_autograd(recorder)))
        stack.enter_context(patch.object(builtins, "len", _length(recorder)))
        stack.enter_context(patch.object(F, _ATTENTION.__name__, _attention))
        stack.enter_context(without_caches())
        stack.enter_context(kept_conversions(model))
        for torchs, name in _TRANSFORMS:
            stack.enter_context(patch.object(torchs, name, _refused(recorder, getattr(torchs, name))))
        averages = [(vars(lowering), lowering.average_heads.__name__)]  # which go where nobody reads them
        for scope, name in averages if open_wrapped else [*averages, *wrapped_functions()]:
            stack.enter_context(patched(scope, {name: _opaque(recorder, scope[name])}))
        stack.enter_context(recorder.regions.watched(lambda: recorder.paused))
        stack.enter_context(recorder)
        yield


def _past_the_copy(module: nn.Module) -> TraceError:
    return TraceError(
        f"it calls a {type(module).__name__} of the model itself{place()}, where a copy of the model runs: it finds it "
        "through a global, or through an object that copy.deepcopy does not copy along with the model\n"
        "  hold it as an attribute of the module that calls it"
    )


def wrapped_functions() -> Iterator[tuple[dict[str, Any], str]]:
    """The functions that somebody has marked by torch.fx.wrap: where their names live."""
    for (_, name), scope in _symbolic_trace._wrapped_fns_to_patch.copy().items():  # noqa: SLF001 - see graph/wrap_registry.py
        if name in scope and not str(scope.get("__name__")).startswith("fxcompress."):
            yield scope, name


def _length(recorder: Recorder) -> Callable[..., Any]:
    """``len`` of a tensor as the size that it is: Python makes a plain number of whatever ``__len__`` returns."""
    length = builtins.len

    def called(value: Any) -> Any:  # noqa: ANN401 - as of builtins
        if not isinstance(value, Tensor) or recorder.paused or not asks_for_user(sys._getframe(1)):  # noqa: SLF001
            return length(value)
        with recorder.pause():
            rank = value.dim()
        return value.size(0) if rank else length(value)

    return called


_ATTENTION = F.scaled_dot_product_attention


def _attention(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as of torch
    """Attention whose flags may be decisions on sizes: torch takes plain ones, before any mode is asked."""
    args = tuple(bool(value) if isinstance(value, Truth) else value for value in args)
    flags = {name: bool(value) for name, value in kwargs.items() if isinstance(value, Truth)}
    return _ATTENTION(*args, **kwargs | flags)


_TRANSFORMS = (
    (vmap, "vmap_increment_nesting"),
    (eager_transforms, "grad_increment_nesting"),
    (eager_transforms, "jvp_increment_nesting"),
)
"""What torch calls where it begins to transform a function: ``torch.vmap``, ``torch.func.grad`` and the like."""


def _refused(recorder: Recorder, function: Callable[..., Any]) -> Callable[..., Any]:
    def called(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        if not recorder.paused:
            recorder.refusal = recorder.refusal or TraceError(
                f"it transforms a function by torch.vmap or torch.func{place()}, which a graph cannot do\n"
                "  write what it does for all of the batch, without the transform"
            )
            raise recorder.refusal
        return function(*args, **kwargs)

    return called


def _opaque(recorder: Recorder, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that becomes one node, whatever it does inside."""

    def called(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        if recorder.paused:
            return function(*args, **kwargs)
        return recorder.call(("call_function", function), args, kwargs, function)

    return called


def _autograd(recorder: Recorder) -> Callable[..., Any]:
    """``apply`` of an autograd function, which becomes one node: its backward is not what its forward would give."""

    def called(kind: Any, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        if recorder.paused:
            return own(*args, **kwargs)
        return recorder.call(("call_function", autograd_call(kind)), args, kwargs, own)

    return called
