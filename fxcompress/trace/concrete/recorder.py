"""Sees what a model does with tensors, while it does it on fake ones."""

import inspect
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)
from torch.overrides import TorchFunctionMode

from fxcompress.errors import TraceError
from fxcompress.trace.basics.trees import rebuild
from fxcompress.trace.code.locations import place
from fxcompress.trace.concrete.asserts import is_only_compared, outcome_that_goes_on, tell_of_left_out
from fxcompress.trace.concrete.masked_assignment import MaskedRead, choose, masked_read
from fxcompress.trace.concrete.sizes import Number, Recipe, number, plain
from fxcompress.trace.concrete.special_calls import FILLED, as_written, holds_values, refuse_call
from fxcompress.trace.concrete.writer import Writer
from fxcompress.trace.effects.autocast_regions import AutocastRegions
from fxcompress.trace.graph.calls import property_of, target_of, writes_by_name
from fxcompress.trace.graph.guards import shape_of
from fxcompress.trace.model.functional_attention import ATTENTION, can_be_opened, multi_head_attention

_ASSERT = torch._assert  # noqa: SLF001
_REQUIRES_GRAD = inspect.getattr_static(Tensor, "requires_grad")
_DATA = inspect.getattr_static(Tensor, "data")
_LENGTH = len
"""That of Python, in whose place there is another one while a model runs, see intercept.py."""
_UNSEEN = {
    torch.device,
    torch.is_tensor,
    torch._C._set_grad_enabled,  # noqa: SLF001
    Tensor.__repr__,
    Tensor.__format__,
    Tensor.__hash__,
}


class _ValuesError(TraceError):
    """A call needs the values of tensors."""


class Recorder(TorchFunctionMode):
    """Runs every call of a torch function on fake tensors, and writes it down.

    Args:
        writer: writes it down.
        keep_sizes: arithmetic on sizes becomes part of the graph; otherwise each size that is read must stay the same.

    Attributes:
        paused: nothing is recorded.
        faked: gives the fake of a tensor that holds values.
        refusal: the first thing that cannot be recorded; it counts even where the model catches the error.
        regions: in which the code has switched autocast.
    """

    def __init__(self, writer: Writer, *, keep_sizes: bool) -> None:
        super().__init__()
        self.writer = writer
        self.keep_sizes = keep_sizes
        self.paused = False
        self.faked: Callable[[Tensor], Tensor] = Tensor.detach
        self.refusal: TraceError | None = None
        self._devices: dict[str, torch.device] = {}
        self.regions = AutocastRegions(self._function, self._device_of, self._asked)
        self._shapes: dict[tuple[int, tuple[int, ...]], Recipe] = {}
        self._picked: MaskedRead | None = None

    def __torch_function__(
        self,
        func: Any,  # noqa: ANN401
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        kwargs = kwargs or {}
        if self.paused or func in _UNSEEN:
            return func(*args, **kwargs)
        try:
            return self._seen(func, args, kwargs)
        except TraceError as error:
            self.refusal = self.refusal or error
            raise

    def _seen(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        answer = self._answer(func, args, kwargs)
        if answer is not None:
            return answer[0]
        refuse_call(func, args)
        if getattr(func, "__name__", "") == "__set__" and func.__self__ is _REQUIRES_GRAD:
            return self._seen(Tensor.requires_grad_, args, {})
        if getattr(func, "__name__", "") == "__set__" and func.__self__ is _DATA and self._set_data(*args):
            return None
        if getattr(func, "__name__", "") in {"__set__", "__delete__"}:
            raise TraceError(f"it sets {func.__self__.__name__} of a tensor{place()}, which a graph cannot do")
        others = self._made_of(func, args, kwargs)
        if others is not None:
            with self:
                return others()
        target = target_of(func, args, kwargs)
        given, named = target.args, target.kwargs
        if not torch.is_grad_enabled() and named.get("out") is not None:
            given, named = rebuild(self._unwatched, given), rebuild(self._unwatched, named)
        elif given and not torch.is_grad_enabled() and writes_by_name(getattr(func, "__name__", "")):
            given = (rebuild(self._unwatched, given[0]), *given[1:])
        try:
            return self.call((target.op, target.target), given, named, func, args, kwargs)
        except _ValuesError as error:
            entries = self._entries(args, error) if func is Tensor.__getitem__ else None
            if entries is None:
                raise
            return entries

    def _made_of(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], Any] | None:  # noqa: ANN401
        """What makes the calls that are written into the graph in the place of one; None for all others."""
        if func in FILLED and any(isinstance(given, Tensor) for given in (*args[1:], kwargs.get("fill_value"))):
            return partial(FILLED[func], *args, **kwargs)
        if func is ATTENTION and can_be_opened(args, kwargs):
            return partial(multi_head_attention, *args, **kwargs)
        if func is Tensor.__setitem__ and self._picked is not None and self._is_choice(self._picked, *args):
            return partial(choose, args[0], args[1], self._picked.old)
        return None

    def _entries(self, args: tuple[Any, ...], error: TraceError) -> Tensor | None:
        """A tensor that stands for ``old[mask]``, of which nothing can be known; None for another index."""
        with self.pause():
            self._picked = masked_read(args[0], args[1], len(self.writer.graph.nodes))
        if self._picked is None:
            return None
        self.writer.refuse(self._picked.entries, error)
        return self._picked.entries

    def _is_choice(self, found: MaskedRead, new: Any, index: Any, value: Any) -> bool:  # noqa: ANN401
        with self.pause():
            return found.is_put(new, index, value, len(self.writer.graph.nodes))

    def _answer(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any] | None:  # noqa: ANN401
        """What a call returns that is no node of the graph; None for one that is."""
        name = property_of(func)
        if name is not None:
            return (self._property(args[0], name),)
        if func in _QUESTIONS:
            return (_QUESTIONS[func](self, *args, **kwargs),)
        if func is _ASSERT and isinstance(args[0], bool):  # also a Number that is one
            if not args[0]:
                raise AssertionError(*args[1:])
            return (None,)
        if func is Tensor.item and not args[0].ndim and is_only_compared():
            return (args[0],)
        if func is _ASSERT or func is Tensor.__bool__:
            outcome = tell_of_left_out(place()) if func is _ASSERT else outcome_that_goes_on()
            if func is _ASSERT or outcome is not None:
                self.writer.conditions.append(self.writer.node_of(args[0]))
                return (outcome,)
        return None

    def call(
        self,
        target: tuple[str, Any],
        node_args: tuple[Any, ...],
        node_kwargs: dict[str, Any],
        func: Callable[..., Any],
        args: Any = None,  # noqa: ANN401
        kwargs: Any = None,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Run ``func`` unseen and record it as a node."""
        args = node_args if args is None else args
        kwargs = node_kwargs if kwargs is None else kwargs
        try:
            node = self.writer.node(*target, node_args, node_kwargs)
        except TraceError as error:
            self.refusal = self.refusal or error
            raise
        try:
            result = self.run(func, args, kwargs)
        except Exception as error:
            node.graph.erase_node(node)
            if not isinstance(error, TraceError):
                self._fix_sizes(node_args, node_kwargs)  # the model may catch that, and go on
            raise
        if result is NotImplemented:  # h == "auto": Python asks the other side, and then compares by identity
            node.graph.erase_node(node)
            return result
        return self._returned(result, node)

    def _fix_sizes(self, *trees: Any) -> None:  # noqa: ANN401
        """Check that all sizes in the arguments of a call are as they are now: it fails on these, not on others."""

        def fix(leaf: Any) -> Any:  # noqa: ANN401
            if isinstance(leaf, Tensor):
                rebuild(fix, tuple(self.shape(leaf)))
            elif isinstance(leaf, Number):
                leaf.fxc_read(type(leaf.fxc_value))
            return leaf

        for tree in trees:
            rebuild(fix, tree)

    def run(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:  # noqa: ANN401
        """Run ``func`` on fake tensors, unseen.

        Raises:
            TraceError: it needs the values of tensors, or autocast has been switched in a way that no graph knows.
        """
        self.regions.refuse_unseen()
        try:
            with self.pause():
                given = rebuild(plain, tuple(args))
                if given and writes_by_name(getattr(func, "__name__", "")) and holds_values(given[0]):
                    given = (self.faked(given[0]), *given[1:])  # the tensor itself must stay as it is
                return func(*given, **rebuild(plain, kwargs))
        except UnsupportedOperatorException as error:
            raise TraceError(f"it calls an op that has no fake{place()}: {error}") from error
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise _ValuesError(
                f"it reads values out of a tensor{place()} ({as_written(func)}), "
                "and what it does next may depend on them\n"
                "  keep them in tensors (torch.where in place of if), or take this out of the model"
            ) from error

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Record nothing."""
        before = self.paused, self.writer.silent
        self.paused = self.writer.silent = True
        try:
            yield
        finally:
            self.paused, self.writer.silent = before

    def shape(self, tensor: Tensor) -> torch.Size:
        """The shape of a tensor, of numbers whose use is seen."""
        source = self.writer.node_of(tensor)
        with self.pause():
            sizes = tuple(tensor.shape)
        fixed = source.op in {"placeholder", "get_attr"}
        if (id(source), sizes) not in self._shapes:
            how = (getattr, (source, "shape")) if fixed else (shape_of, (source, len(sizes), place()))
            self._shapes[id(source), sizes] = self.writer.recipe(*how)
        base = self._shapes[id(source), sizes]
        self.writer.made(base)
        numbers = [self.number(n, self.writer.read(operator.getitem, (base, i))) for i, n in enumerate(sizes)]
        return torch.Size(numbers)

    def number(self, value: Any, recipe: Recipe) -> Any:  # noqa: ANN401
        """A number that is read off a tensor."""
        found = number(value, recipe, self.writer)
        if isinstance(found, Number) and not self.keep_sizes:
            self.writer.decide(recipe, value)
            return value
        return found

    def _property(self, tensor: Tensor, name: str) -> Any:  # noqa: ANN401
        if name in {"shape", "ndim"}:
            return self.shape(tensor) if name == "shape" else len(self.shape(tensor))
        with self.pause():
            value = getattr(tensor, name)
        if value is None or isinstance(value, Tensor):
            return value if value is None else self.call(("call_function", getattr), (tensor, name), {}, getattr)
        return self.number(value, self.writer.read(getattr, (self.writer.node_of(tensor), name)))

    def device(self, tensor: Tensor) -> torch.device:
        """The device of a tensor: an object of its own, by which it is known again where it is used."""
        with self.pause():
            device = tensor.device
            own = torch.device(str(device))
        recipe = self.writer.recipe(getattr, (self.writer.node_of(tensor), "device"))
        self.writer.bind(own, self.writer.made(recipe))
        self._devices[own.type] = own
        return own

    def _function(self, function: Callable[..., Any], args: tuple[Any, ...]) -> fx.Node:
        return self.writer.node("call_function", function, args)

    def _device_of(self, kind: str) -> Any:  # noqa: ANN401
        """A type of devices: that of the device which the code has read off a tensor last, if it is of that type."""
        known = self._devices.get(kind)
        return kind if known is None else self.writer.written(known)

    def _asked(self, question: Callable[..., Any], args: tuple[Any, ...], answer: object) -> None:
        self.writer.decide(self.writer.recipe(question, args), answer)

    def _returned(self, value: Any, node: fx.Node) -> Any:  # noqa: ANN401
        """What a node returned, each part bound to the node that makes it."""
        if isinstance(value, Tensor):
            return self.bind(value, node)
        if isinstance(value, tuple | list):
            if node.op != "call_module" and type(value) in {tuple, list}:  # as many as a size says, perhaps
                self.writer.decide(self.writer.read(_LENGTH, (node,)), len(value))
            parts = [self._returned(v, self._item(node, i)) for i, v in enumerate(value)]
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        if isinstance(value, dict):
            return {key: self._returned(v, self._item(node, key)) for key, v in value.items()}
        return value if value is None else self.number(value, self.writer.result(node))

    def _item(self, node: fx.Node, key: object) -> fx.Node:
        return self.writer.node("call_function", operator.getitem, (node, key))

    def bind(self, tensor: Tensor, node: fx.Node) -> Tensor:
        """The tensor as the result of ``node``: another object, where it has come from somewhere else before.

        A call may return its argument (dropout in evaluation does). The argument must go on standing for what it was:
        in training the same call returns something else.
        """
        if self.writer.knows(tensor):
            with self.pause():
                tensor = torch.ops.aten.alias.default(tensor)
        self.writer.bind(tensor, node)
        if torch.is_grad_enabled() or not tensor.is_floating_point():
            return tensor
        return self._detached(tensor)

    def bind_alias(self, tensor: Tensor, source: Tensor) -> None:
        """Tell that a tensor is another one of the same memory: ``torch.Tensor(x)``, which torch does not show."""
        node = self.writer.node("call_method", "view_as", (source, source))
        if not torch.is_grad_enabled():
            node = self.writer.node("call_method", "detach", (node,))
        self.writer.bind(tensor, node)

    def _set_data(self, tensor: Tensor, value: Tensor) -> bool:
        """Write what ``tensor.data = value`` does to an attribute, as in ``weight.data *= mask``; False if unable.

        The memory of the tensor stays the same one, which nobody can tell as long as the shape does.
        """
        with self.pause():
            if self.writer.node_of(tensor).op != "get_attr" or (tensor.shape, tensor.dtype) != (
                value.shape,
                value.dtype,
            ):
                return False
            same = [t.untyped_storage()._cdata for t in (tensor, value)]  # noqa: SLF001 - a name of memory without data
        if same[0] != same[1]:
            own = self.writer.node("call_method", "detach", (tensor,))
            self.writer.node("call_method", "copy_", (own, value))
        return True

    def _unwatched(self, leaf: Any) -> Any:  # noqa: ANN401
        """What an op writes to in a region without gradients: the same memory, of which autograd does not know."""
        with self.pause():
            if not isinstance(leaf, Tensor) or not leaf.requires_grad:
                return leaf
        return self.writer.node("call_method", "detach", (leaf,))

    def _detached(self, tensor: Tensor) -> Tensor:
        """In a region without gradients: the same without gradients, for a graph knows no such region."""
        with self.pause():
            result = tensor.detach()
        self.writer.bind(result, self.writer.node("call_method", "detach", (tensor,)))
        return result


def _size(recorder: Recorder, tensor: Tensor, dim: int | None = None) -> Any:  # noqa: ANN401
    shape = recorder.shape(tensor)
    return shape if dim is None else shape[dim]


_QUESTIONS: dict[Any, Callable[..., Any]] = {
    Tensor.size: _size,
    Tensor.dim: lambda recorder, tensor: len(recorder.shape(tensor)),
    Tensor.ndimension: lambda recorder, tensor: len(recorder.shape(tensor)),
    Tensor.__len__: lambda recorder, tensor: int(recorder.shape(tensor)[0]),
    Tensor.__iter__: lambda recorder, tensor: iter(tensor.unbind(0)),
    Tensor.retain_grad: lambda recorder, tensor: None,
}
"""Methods that ask for sizes, which the recorder answers from the shape, and those that change nothing."""
