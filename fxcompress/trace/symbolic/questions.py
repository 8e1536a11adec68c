"""Questions of Python about a value, asked while torch.fx traces with stand-ins: is it a tensor, what can it do?

A stand-in is no tensor, so ``isinstance(x, Tensor)`` would be False in the trace and True in the model, and the graph
would take the wrong path without a word. While tracing, such questions are answered for the value that is stood in for;
where its class is not known, tracing fails, and the model is traced by running it, where tensors are tensors.

``type(x)`` cannot be answered, nor can ``x is y``, or whether ``x`` matches a pattern, or what torch's ``tree_map``
makes of ``x``, which goes by types. Where the code of a model asks that, the graph is compared with the model, see
trace/verify.py. What ``x is None`` makes of arguments is in plain_arguments.py.
"""

import builtins
import dis
import functools
import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import CodeType, FrameType, FunctionType
from typing import Any
from unittest.mock import patch

from torch import fx, nn

from fxcompress.trace.basics.modules import modules_in
from fxcompress.trace.code.frames import OF_TORCH, is_users_code
from fxcompress.trace.code.functions import code_around
from fxcompress.trace.model.stochastic_depth import is_stochastic_depth
from fxcompress.trace.symbolic.node_types import NodeTypes

_NOT_OF_RUNS = {
    "__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__hash__", "__repr__", "__str__", "__format__",
    "__new__", "__copy__", "__deepcopy__", "__replace__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__",
}  # fmt: skip
"""Methods that ask for types by nature, such as those that a dataclass gets, and that no forward calls on tensors."""
_TRACER = tuple(
    f"{OF_TORCH}{part}" for part in (f"fx{os.sep}", f"_dynamo{os.sep}", f"_functorch{os.sep}", "overrides.py")
)
_OF_TREES = frozenset(
    f"tree_{end}" for end in (
        "all", "all_only", "any", "any_only", "flatten", "flatten_with_path", "is_leaf", "iter", "leaves",
        "leaves_with_path", "map", "map_", "map_only", "map_only_", "map_with_path", "structure",
    )
)  # fmt: skip
"""Functions of torch.utils._pytree: a stand-in is a leaf, and what it stands for may be a tuple."""
_OF_TRACING = frozenset({"is_fx_tracing", "is_fx_symbolic_tracing", "is_torch_fx_proxy", "Proxy", "is_grad_enabled"})
"""How code asks whether it is traced, or whether gradients are on: it may do something else then."""
_isinstance, _hasattr, _callable = builtins.isinstance, builtins.hasattr, builtins.callable
_Proxy = fx.Proxy  # torch.fx itself asks some thousand times in a trace


@contextmanager
def answered(kinds: NodeTypes) -> Iterator[None]:
    """Answer questions of the user's code about stand-ins by the class of what they stand for.

    Args:
        kinds: of the nodes that they have.

    Raises:
        TraceError: (from within) the class is not known.
    """
    importlib.import_module("torch._dynamo")  # which torch imports when it needs it, and which keeps what it finds here

    def is_instance(value: Any, classes: Any) -> bool:  # noqa: ANN401 - as of builtins
        result = _isinstance(value, classes)
        if result or not _isinstance(value, _Proxy) or not is_asked(sys._getframe(1)):  # noqa: SLF001
            return result
        return issubclass(kinds.asked(value.node), classes)

    def has_attribute(value: Any, name: str) -> bool:  # noqa: ANN401 - as of builtins
        if not _isinstance(value, fx.Proxy) or not is_asked(sys._getframe(1)):  # noqa: SLF001
            return _hasattr(value, name)
        return has(kinds.asked(value.node), name)

    def is_callable(value: Any) -> bool:  # noqa: ANN401 - as of builtins
        if not _isinstance(value, fx.Proxy) or not is_asked(sys._getframe(1)):  # noqa: SLF001
            return _callable(value)
        return has(kinds.asked(value.node), "__call__")

    with ExitStack() as stack:
        for function, new in ((isinstance, is_instance), (hasattr, has_attribute), (callable, is_callable)):
            stack.enter_context(patch.object(builtins, function.__name__, new))
        yield


def dispatches(frame: FrameType) -> bool:
    """Whether a frame is of ``functools.singledispatch``, which reads ``__class__`` of its argument."""
    return frame.f_code.co_filename == functools.__file__


def has(kind: type, name: str) -> bool:
    """Whether objects of a class have an attribute."""
    return any(name in vars(base) for base in kind.__mro__)


def is_asked(frame: FrameType) -> bool:
    """Whether a frame asks about values, not about stand-ins, as only torch.fx and this package do.

    Code of torch that a model calls asks for the model: ``torch.jit.isinstance``, ``tree_map_only``, distributions. But
    what a class of torch asks to answer ``isinstance`` is the question of someone else.
    """
    code = frame.f_code
    return is_users_code(code) or _asks_in_torch(code.co_filename, code.co_name)


@functools.cache
def _asks_in_torch(file: str, function: str) -> bool:
    return function != "__instancecheck__" and file.startswith(OF_TORCH) and not file.startswith(_TRACER)


def asking_type(model: nn.Module) -> FunctionType | None:
    """A function in the code of a model that asks what nobody can answer, or None; it need not be called."""
    # A layer of stochastic depth is one node of a graph, whatever its code does.
    traced = [module for module in modules_in(model) if not is_stochastic_depth(module)]
    of_user = (f for f in code_around(traced, wrappers=True) if is_users_code(f.__code__) and not _is_of_python(f))
    return next((f for f in of_user if f.__name__ not in _NOT_OF_RUNS and _asks(f.__code__)), None)


def _is_of_python(function: FunctionType) -> bool:
    """Whether a function comes with Python: a method of ``random.Random``, say, which knows no tensors."""
    return str(function.__module__).partition(".")[0] in sys.stdlib_module_names


@functools.cache
def _asks(code: CodeType) -> bool:
    """Whether a function asks for a type or an identity.

    That is, it calls ``type(...)`` on something else than ``self``, reads ``__class__``, compares by ``is`` with
    something else than None, matches a value with a pattern, takes trees of values apart, or asks how it runs.
    """
    if any(_asks(constant) for constant in code.co_consts if isinstance(constant, CodeType)):
        return True
    if "__class__" in code.co_names or not (_OF_TREES | _OF_TRACING).isdisjoint(code.co_names):
        return True
    steps = [step for step in dis.get_instructions(code) if step.opname not in {"CACHE", "PUSH_NULL", "PRECALL"}]
    if any(step.opname.startswith("MATCH_") for step in steps):
        return True
    compared = [steps[i - 1] for i, step in enumerate(steps) if step.opname == "IS_OP"]
    if any(step.opname != "LOAD_CONST" or step.argval is not None for step in compared):
        return True
    loads = [i for i, step in enumerate(steps) if step.argval == "type" and step.opname in {"LOAD_GLOBAL", "LOAD_NAME"}]
    return any(steps[i + 1].argval not in {"self", "cls"} for i in loads if i + 1 < len(steps))
