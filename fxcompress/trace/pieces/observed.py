"""What one run of a model shows: with what its modules are called, and inside of which modules each tensor is read."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fxcompress.errors import ExampleInputError
from fxcompress.trace.basics.trees import fields_of, replace
from fxcompress.trace.code.locations import place_of
from fxcompress.trace.effects.global_state import restored_around
from fxcompress.trace.effects.randomness import same_randomness
from fxcompress.trace.forward_hooks import hooks_of
from fxcompress.trace.graph.calls import property_of
from fxcompress.trace.inputs import ExampleInputs
from fxcompress.trace.model.skeleton import own_buffers
from fxcompress.trace.model.uncompiled import uncompiled

_HARMLESS = {"device", "dtype", "requires_grad", "is_cuda", "is_leaf", "grad_fn", "layout"}
"""Properties of a parameter that say nothing of its values or sizes."""


@dataclass(slots=True)
class Observed:
    """What runs have shown. Modules and tensors go by their first name in the model.

    Attributes:
        calls: the arguments of each module, once for each form that they came in; the largest first.
        inside: the modules that were running whenever a tensor was read.
        hooked: the modules that had forward hooks after a run.
    """

    calls: dict[str, dict[object, ExampleInputs]] = field(default_factory=dict)
    inside: dict[str, frozenset[str]] = field(default_factory=dict)
    hooked: set[str] = field(default_factory=set)

    def inputs(self, path: str) -> list[ExampleInputs]:
        """What a module was called with, the call with the most elements first."""
        return sorted(self.calls.get(path, {}).values(), key=lambda call: -_elements((call.args, call.kwargs)))


def observe(model: nn.Module, inputs: ExampleInputs) -> Observed:
    """Run copies of ``model`` in evaluation and, where the inputs allow it, in training.

    The copies share the parameters and have buffers of their own, so nothing of the caller's changes.

    Raises:
        ExampleInputError: the model does not run on the inputs in evaluation.
    """
    seen = Observed()
    try:
        try:
            _run(own_buffers(model).eval(), inputs, seen)
        except RuntimeError:  # it may run with gradients only, as where it hooks into them
            _run(own_buffers(model).eval(), inputs, seen, gradients=True)
    except Exception as error:
        raise ExampleInputError(
            f"the model does not run on the example inputs {inputs}: {type(error).__name__}: {error}{place_of(error)}"
        ) from error
    try:
        _run(own_buffers(model).train(), inputs, seen)
    except Exception:  # noqa: BLE001 - training often needs targets, which nobody gave
        return seen
    return seen


def structure_of(value: Any) -> object:  # noqa: ANN401 - a tree of anything
    """All of a value but what is in its tensors; comparable and hashable."""
    if isinstance(value, Tensor):
        return "tensor", tuple(value.shape), value.dtype
    if isinstance(value, tuple | list):
        return type(value), tuple(map(structure_of, value))
    if isinstance(value, dict):
        return type(value), tuple((key, structure_of(item)) for key, item in value.items())
    fields = fields_of(value)
    if fields is not None:
        return type(value), structure_of(fields[2])
    plain = isinstance(value, bool | int | float | str | None)
    return (type(value), value) if plain else (type(value), id(value))


def _elements(tree: object) -> int:
    found: list[int] = []
    replace(lambda t: found.append(t.numel()), tree)
    return sum(found)


@uncompiled()
def _run(model: nn.Module, inputs: ExampleInputs, seen: Observed, *, gradients: bool = False) -> None:
    args, kwargs = replace(lambda t: t.detach().clone(), (inputs.args, inputs.kwargs))
    with (
        same_randomness(allowed=True),
        torch.set_grad_enabled(gradients),
        restored_around(model),
        _watched(model, seen),
    ):
        model(*args, **kwargs)
    seen.hooked |= {path for path, module in model.named_modules(remove_duplicate=False) if hooks_of(module)}


@contextmanager
def _watched(model: nn.Module, seen: Observed) -> Iterator[None]:
    """Note the calls of all modules of ``model``, and the reads of its tensors."""
    paths = {id(module): path for path, module in reversed(list(model.named_modules(remove_duplicate=False)))}
    stack: list[str] = []
    call = nn.Module.__call__

    def called(module: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        path = paths.get(id(module))
        if path is None:
            return call(module, *args, **kwargs)
        calls = seen.calls.setdefault(path, {})
        how = structure_of((args, kwargs))
        if how not in calls:
            calls[how] = ExampleInputs(*replace(_blank, (args, kwargs)))
        stack.append(path)
        try:
            return call(module, *args, **kwargs)
        finally:
            stack.pop()

    with patch.object(nn.Module, "__call__", called), _Reads(tensor_names(model), stack, seen):
        yield


def tensor_names(model: nn.Module) -> dict[int, str]:
    """The first name of each parameter and buffer, by its id."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {id(tensor): name for name, tensor in named}


def _blank(tensor: Tensor) -> Tensor:
    """A tensor like another one; the values count where they may be indices. On the CPU, zeros cost next to nothing."""
    return torch.zeros_like(tensor) if tensor.is_floating_point() else tensor.detach().clone()


class _Reads(TorchFunctionMode):
    """Notes which modules are running when a tensor of the model goes into a torch function."""

    def __init__(self, names: dict[int, str], stack: list[str], seen: Observed) -> None:
        super().__init__()
        self.names = names
        self.stack = stack
        self.seen = seen

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        kwargs = kwargs or {}
        if property_of(func) not in _HARMLESS:
            replace(self._read, (args, kwargs))
        return func(*args, **kwargs)

    def _read(self, tensor: Tensor) -> None:
        name = self.names.get(id(tensor))
        if name is not None:
            here = frozenset(self.stack)
            self.seen.inside[name] = self.seen.inside.get(name, here) & here
