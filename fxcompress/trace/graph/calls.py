"""How a call that torch shows to a function mode is written in torch.fx, and what a node calls."""

import functools
import inspect
import operator
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import fx
from torch.fx.operator_schemas import get_signature_for_torch_op
from torch.overrides import TorchFunctionMode

_OPERATORS: dict[str, Callable[..., Any]] = {"__getitem__": operator.getitem, "__setitem__": operator.setitem}
IN_PLACE_OPERATORS = frozenset(
    {
        operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod,
        operator.ipow, operator.imatmul, operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift,
    }
)  # fmt: skip
"""``x += y`` and the like: they write to a tensor, and make another number or tuple."""
_WRITING = frozenset({"setitem", "delitem", "idiv", *(function.__name__ for function in IN_PLACE_OPERATORS)})
_RENAMED = {"__iand__": "bitwise_and_", "__ior__": "bitwise_or_", "__ixor__": "bitwise_xor_"}


@dataclass(frozen=True, slots=True)
class Target:
    """The kind and target of a node, and what becomes of its arguments."""

    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def function_name(node: fx.Node) -> str:
    """The name of the function or method that a node calls; of a layer, or what is no call, the path."""
    return node.target if isinstance(node.target, str) else str(getattr(node.target, "__name__", ""))


def ends_as_in_place(name: str) -> bool:
    """Whether a function or method of this name writes to what it is given: ``add_``, and not ``__add__``."""
    return name.endswith("_") and not name.endswith("__")


def writes_by_name(name: str) -> bool:
    """Whether what has this name writes to its first argument: ``add_``, ``__iadd__``, ``setitem``; not ``__add__``."""
    return ends_as_in_place(name) or name.strip("_") in _WRITING


def writes_in_place(node: fx.Node) -> bool:
    """Whether a node calls a function or a method that writes to its first argument."""
    return node.op in {"call_function", "call_method"} and writes_by_name(function_name(node))


def put_first(graph: fx.Graph) -> None:
    """Let functions of torch take their first argument by its place: rules look for it there, not under its name."""
    for node in graph.nodes:
        if node.op == "call_function" and not node.args and node.kwargs:
            first = _first_parameter(node.target)
            if first in node.kwargs:
                node.args = (node.kwargs[first],)
                node.kwargs = {name: value for name, value in node.kwargs.items() if name != first}


def _first_parameter(function: Callable[..., Any]) -> str:
    """What the first parameter of a function of torch is called; empty where that is not known, or not always so."""
    try:
        known = get_signature_for_torch_op(function) or [inspect.signature(function)]
    except (TypeError, ValueError):
        known = [inspect.signature(function)] if inspect.isfunction(function) else []
    of_torch = str(getattr(function, "__module__", "")).partition(".")[0] == "torch"
    names = {next(iter(signature.parameters), "") for signature in known}
    return names.pop() if of_torch and len(names) == 1 else ""


def target_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Target:  # noqa: ANN401
    """The node that calls ``func`` in the form that symbolic tracing would have given it."""
    name = str(getattr(func, "__name__", ""))
    attribute = property_of(func)
    if attribute is not None:
        return Target("call_function", getattr, (args[0], attribute), {})
    if getattr(torch.Tensor, name, None) is not func and not _is_operator(func, name):
        return Target("call_function", func, args, kwargs)
    if name in _OPERATORS:
        return Target("call_function", _OPERATORS[name], args, kwargs)
    return Target("call_method", _RENAMED.get(name, name), args, kwargs)


def _is_operator(func: Any, name: str) -> bool:  # noqa: ANN401
    """Whether ``func`` is what an operator of tensors runs, such as ``x ** 2``: the method of the same name."""
    return getattr(func, "__module__", None) == "torch._tensor" and hasattr(torch.Tensor, name)


def property_of(func: Any) -> str | None:  # noqa: ANN401
    """The name of the property of Tensor that ``func`` reads, if it does."""
    if getattr(func, "__name__", "") != "__get__":
        return None
    return str(getattr(func.__self__, "__name__", "")) or _name_of_property(func.__self__)


def _name_of_property(found: object) -> str:
    return next(name for name in dir(torch.Tensor) if getattr(torch.Tensor, name, None) is found)


class AutogradCall:
    """``kind.apply`` as a function that can stand in a graph: one that has a module and a name, and can be pickled."""

    def __init__(self, kind: type[torch.autograd.Function]) -> None:
        self.kind = kind
        self.__module__, self.__name__, self.__qualname__ = kind.__module__, kind.__name__, kind.__qualname__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """What the function returns."""
        return self.kind.apply(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return autograd_call, (self.kind,)


@contextmanager
def autograd_by(called: Callable[..., Any]) -> Iterator[None]:
    """Within it, ``called(kind, own, args, kwargs)`` stands for ``own``, the ``apply`` of an autograd function.

    A model may have got hold of that before, as in ``my_function = MyFunction.apply``, and nothing can be put in the
    place of what it has then. But this calls ``forward``, which is replaced as well.
    """
    apply = inspect.getattr_static(torch.autograd.Function, "apply")

    def stand_in(kind: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        return called(kind, apply.__get__(None, kind), args, kwargs)

    with ExitStack() as stack:
        mode = stack.enter_context(_GradMode())
        stack.enter_context(patch.object(torch.autograd.Function, "apply", classmethod(stand_in)))
        for kind in _kinds_of(torch.autograd.Function):
            stack.enter_context(patch.object(kind, "forward", staticmethod(_forward_by(called, kind, mode))))
        yield


def _kinds_of(base: type) -> set[type]:
    """All subclasses that are not torch's own, which calls ``apply`` by its name."""
    below: list[type] = base.__subclasses__()
    every = {each for kind in below for each in (kind, *_kinds_of(kind))}
    return {kind for kind in every if kind.__module__.partition(".")[0] != "torch"}


class _GradMode(TorchFunctionMode):
    """Knows whether code wants gradients; torch says that it does not within ``forward`` of an autograd function."""

    def __init__(self) -> None:
        super().__init__()
        self.wanted = torch.is_grad_enabled()

    def __torch_function__(
        self,
        func: Any,  # noqa: ANN401
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        if func is torch._C._set_grad_enabled:  # noqa: SLF001 - which all ways to switch it call
            self.wanted = args[0]
        return func(*args, **kwargs or {})


def _forward_by(called: Callable[..., Any], kind: Any, mode: _GradMode) -> Callable[..., Any]:  # noqa: ANN401
    forward = kind.forward
    apart = kind.setup_context is not torch.autograd.Function.setup_context  # and gets no context

    @functools.wraps(forward)
    def stand_in(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        context = [arg for arg in args[:1] if isinstance(arg, torch.autograd.function.FunctionCtx)]
        if torch.is_grad_enabled() or not (context or apart):
            return forward(*args, **kwargs)  # called by its own name, as any function is: its backward plays no part
        wanted = mode.wanted

        def own(*given: Any, **named: Any) -> Any:  # noqa: ANN401
            with torch.no_grad():
                return forward(*context, *given, **named)

        try:
            with torch.set_grad_enabled(wanted):
                return called(kind, own, args[len(context) :], kwargs)
        finally:
            mode.wanted = wanted

    return stand_in


@functools.cache
def autograd_call(kind: type[torch.autograd.Function]) -> AutogradCall:
    """The one call of an autograd function that all graphs hold."""
    return AutogradCall(kind)
