"""Tensors that carry labels instead of numbers, and the tape of what was done with them."""

import weakref
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from fxcompress.channels.layers import Layers
from fxcompress.channels.space import Space

if TYPE_CHECKING:
    from fxcompress.channels.rules.registry import OpClass

_COUNT = [0]
_KINDS = (int, float, complex)


def moment() -> int:
    """A number that is larger than that of any value, tensor and storage made so far."""
    return _next()


def _next() -> int:
    _COUNT[0] += 1
    return _COUNT[0]


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """What is known of one tensor at one moment; an in-place op makes a new one.

    Attributes:
        meta: a tensor on the meta device with the shape, strides and dtype.
        layers: the labels.
        key: unique, for tables.
    """

    meta: Tensor
    layers: Layers = ()
    key: int = field(default_factory=_next)

    @property
    def shape(self) -> torch.Size:
        """Of the tensor."""
        return self.meta.shape

    @property
    def rank(self) -> int:
        """Number of dims."""
        return self.meta.ndim


@dataclass(frozen=True, slots=True)
class Call:
    """One ATen call: the op, and its arguments with a Value in place of each labelled tensor.

    Where a rule asks for Values alone, ``plain`` holds the tensors without labels that they stand for.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    metas: tuple[Tensor, ...]
    plain: tuple[Tensor, ...] = ()

    @property
    def name(self) -> str:
        """The op's name for people: ``softmax`` for ``aten._softmax.default``."""
        return str(self.func.__name__).partition(".")[0].lstrip("_")

    def arg(self, position: int, name: str, default: Any = None) -> Any:  # noqa: ANN401
        """An argument by position or name."""
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)


@dataclass(frozen=True, slots=True)
class Met:
    """The numbers that a node meets.

    Attributes:
        given: those that come from sizes of the inputs.
        written: those that stand in the graph, and are none of these.
    """

    given: frozenset[complex]
    written: frozenset[complex]

    def may_change(self, tree: object, trivial: Collection[object] = ()) -> bool:
        """Whether a number among the arguments of an op may be another one in the next run."""
        return any(self._may(leaf, trivial) for leaf in leaves(tree))

    def _may(self, leaf: object, trivial: Collection[object]) -> bool:
        if type(leaf) is not bool and type(leaf) not in _KINDS:
            return False
        return leaf in self.given or (leaf not in self.written and leaf not in trivial)


@dataclass(frozen=True, slots=True)
class Step:
    """One line of the tape.

    Attributes:
        op: the class of the op.
        call: what was called.
        outputs: what it made.
        node: the node of the graph that made the call.
        numbers: those that the node meets, where some come from sizes of the inputs; None where all stand in the graph.
        anywhere: the dims of the first argument along which it may read other entries in the next run.
    """

    op: "OpClass"
    call: Call
    outputs: tuple[Value, ...]
    node: str
    numbers: Met | None = None
    anywhere: frozenset[int] = frozenset()


class Dispatcher(Protocol):
    """Whoever runs ATen calls on labels."""

    space: Space

    def dispatch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        """Run one ATen call."""
        ...

    def emit(
        self, op: "OpClass", func: object, args: tuple[Any, ...], shape: tuple[int, ...], like: Tensor
    ) -> "LabelTensor":
        """Put a step with one output on the tape that is no ATen call, and return the output."""
        ...

    def hold_counted(self, value: "Value", dims: Iterable[int]) -> None:
        """Let stay what lies along dims whose number of entries something is divided by, if that follows the inputs."""
        ...


class Storage:
    """The tensors that share memory: an in-place op on one of them changes what the others hold.

    It is loose where some are copies, or views that would be, depending on sizes: of the inputs, or of what is left.
    """

    __slots__ = ("key", "loose", "members")

    def __init__(self) -> None:
        self.key = _next()
        self.loose = False
        self.members: list[weakref.ref[LabelTensor]] = []

    def is_base(self, tensor: "LabelTensor") -> bool:
        """Whether a tensor is the first one of this storage, of which others are views."""
        return self.members[0]() is tensor

    def others(self, tensor: "LabelTensor") -> "list[LabelTensor]":
        """The live tensors of this storage beside ``tensor``."""
        alive = [ref() for ref in self.members]
        return [t for t in alive if t is not None and t is not tensor]


class LabelTensor(torch.Tensor):
    """A wrapper without data: it has a shape, a dtype and a device, and a :class:`Value`.

    Tensors that share a storage share memory; those that share ``fxc_extent`` share all of it, entry by entry. Of two
    tensors, the one that was made later has the larger ``fxc_number``.
    """

    fxc_number: int
    fxc_value: Value
    fxc_run: Dispatcher
    fxc_storage: Storage
    fxc_extent: object

    @staticmethod
    def __new__(  # noqa: D102, PYI034 - the class docstring says it; a static method, as torch wants it
        cls: "type[LabelTensor]",
        value: Value,
        run: Dispatcher,
        device: torch.device,
        storage: Storage | None = None,
        extent: object = None,
    ) -> "LabelTensor":
        meta = value.meta
        self = torch.Tensor._make_wrapper_subclass(
            cls, meta.shape, strides=meta.stride(), dtype=meta.dtype, device=device
        )
        self.fxc_number = _next()
        self.fxc_value = value
        self.fxc_run = run
        self.fxc_storage = storage if storage is not None else Storage()
        self.fxc_extent = object() if extent is None else extent
        self.fxc_storage.members.append(weakref.ref(self))
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,  # noqa: ANN401 - an OpOverload
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        kwargs = kwargs or {}
        return first_labelled(args, kwargs).fxc_run.dispatch(func, args, kwargs)

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        return f"LabelTensor{tuple(self.shape)}"


def first_labelled(args: tuple[Any, ...], kwargs: dict[str, Any]) -> LabelTensor:
    """The first tensor with labels among the arguments of a call; that is the first argument, as a rule."""
    first = args[0] if args else None
    return first if type(first) is LabelTensor else find(LabelTensor, (args, kwargs))[0]


_SEQUENCES = (tuple, list)  # a tuple: isinstance() would make ``tuple | list`` anew at each of very many calls
_LEAVES = frozenset({type(None), bool, int, float, str, torch.dtype})  # most arguments: nothing to look into


def find(kind: type, tree: object) -> list[Any]:
    """All instances of ``kind``, no plain number or string, in nested tuples, lists and dicts, in order."""
    found: list[Any] = []
    _collect(kind, tree, found)
    return found


def _collect(kind: type, tree: object, found: list[Any]) -> None:
    if type(tree) in _LEAVES:
        return
    if isinstance(tree, kind):
        found.append(tree)
        return
    for item in tree if isinstance(tree, _SEQUENCES) else tree.values() if isinstance(tree, dict) else ():
        if type(item) not in _LEAVES:
            _collect(kind, item, found)


def leaves(tree: object) -> list[Any]:
    """All items of nested tuples, lists and dicts, in order."""
    if isinstance(tree, _SEQUENCES):
        return [leaf for item in tree for leaf in leaves(item)]
    if isinstance(tree, dict):
        return [leaf for item in tree.values() for leaf in leaves(item)]
    return [tree]


def replace(function: Callable[[Any], Any], kind: Any, tree: Any) -> Any:  # noqa: ANN401
    """The tree with ``function`` applied to each instance of ``kind`` (a type, or some): no plain number or string."""
    if type(tree) in _LEAVES:
        return tree
    if isinstance(tree, kind):
        return function(tree)
    if isinstance(tree, _SEQUENCES):
        items = [item if type(item) in _LEAVES else replace(function, kind, item) for item in tree]
        own = type(tree)
        return items if own is list else own(*items) if own is not tuple and hasattr(tree, "_fields") else own(items)
    if isinstance(tree, dict):
        return {key: replace(function, kind, item) for key, item in tree.items()}
    return tree
