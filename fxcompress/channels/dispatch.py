"""Runs ATen calls on labels and writes the tape."""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch.utils._mode_utils import no_dispatch

from fxcompress.channels.composed import COMPOSED, by_places
from fxcompress.channels.computed_numbers import Written
from fxcompress.channels.factories import FILL
from fxcompress.channels.joined import Joined, labels_along
from fxcompress.channels.layers import Layers, same_layers, support
from fxcompress.channels.packed import PACKED
from fxcompress.channels.recurrent import RECURRENT
from fxcompress.channels.rules import rule_of
from fxcompress.channels.rules.contraction import CONTRACTIONS
from fxcompress.channels.rules.extremes import in_extremes
from fxcompress.channels.rules.indexing import INDEX
from fxcompress.channels.rules.movement import CAT, RETYPED
from fxcompress.channels.rules.norms import BATCH_NORM
from fxcompress.channels.rules.overwritten import OVERWRITTEN, single_places
from fxcompress.channels.rules.places import ANYWHERE, floats, moving_dims
from fxcompress.channels.rules.pointwise import CHOICE, OPAQUE_VALUES, POINTWISE
from fxcompress.channels.rules.products import BATCHED
from fxcompress.channels.rules.puts import INDEX_PUT
from fxcompress.channels.rules.registry import OpClass
from fxcompress.channels.rules.scatter import INDEX_ADD
from fxcompress.channels.rules.sums import in_sums
from fxcompress.channels.shapes import shapes
from fxcompress.channels.space import Space
from fxcompress.channels.survivors import has_own_labels
from fxcompress.channels.values import (
    Call,
    LabelTensor,
    Met,
    Step,
    Storage,
    Value,
    find,
    first_labelled,
    leaves,
    replace,
)
from fxcompress.channels.widths import Widths
from fxcompress.errors import ValueReadError

_PICKS = frozenset({INDEX, INDEX_ADD, INDEX_PUT})
_ARITHMETIC = CONTRACTIONS | {BATCH_NORM, BATCHED}
"""Classes whose rules read every tensor operand as a Value; a tensor from outside is one of which nothing is known."""
_MEETS_NUMBERS = frozenset({POINTWISE, CHOICE})
"""Classes that may make zeros of zeros and a number that a tensor without labels holds."""


def _unknown_index(tensor: Tensor) -> Value:
    return Value(tensor.to("meta"))


def _pin_everything(call: Call, space: Space) -> tuple[Layers, ...]:
    layers = [layer for value in find(Value, (call.args, call.kwargs)) for layer in value.layers]
    for layer in layers:
        space.pin(layer, "unknown-op", f"{call.func} has no rule", str(call.func))
    return tuple(_of_same_size(layers, meta) for meta in call.metas)


def _of_same_size(layers: list[Tensor], meta: Tensor) -> Layers:
    """For each dim of a result, labels of an operand along it: they stay, so what meets them does, for this reason."""
    found: dict[int, Tensor] = {}
    for layer in layers if meta.is_floating_point() else []:
        dims = support(layer)
        if layer.ndim == meta.ndim and len(dims) == 1 and all(layer.shape[d] == meta.shape[d] for d in dims):
            found.setdefault(min(dims), layer)
    return tuple(found.values())


UNKNOWN = OpClass("unknown", _pin_everything)


_JOINED = "it lies in one dim with what the inputs decide the size of, and entries of that are picked by their places"
_COUNTED = (
    "it lies in one dim with what the inputs decide the size of, and something is divided by how many entries that has"
)
_SPREAD = "it meets one entry of a dim of the inputs, which may have as many as it for others"
_ALIASES = frozenset({torch.ops.aten.alias.default, torch.ops.aten.detach.default})

_TAKEN_APART = RECURRENT | PACKED | COMPOSED
"""Ops that we decompose ourselves."""


class Dispatch:
    """The dispatcher behind the LabelTensors of one interpretation.

    Attributes:
        space: where couplings and pins go.
        tape: every ATen call, in order.
        unknown: ops without a rule, with the nodes that call them.
        numbers: of the node that is being interpreted, as in :class:`Step`.
        sized: that node is given an index without labels that other inputs make another one.
        placed: what says which entries that node reads has been looked at.
        joined: for each ``cat`` of that node, whether places in it depend on sizes; None for those that are not known.
        beside: what that node says that it pads with; None where it does not.
        picked: the dims along which that node picks entries of its first argument, by a subscript.
        made: keys of the values that are made of parameters alone.
        places: where in tensors the inputs decide what stands.
        widths: which dims with labels may have another width for other inputs.
        filled: keys of those that are made out of nothing.
        held: what that node and later ones may read, as trees; None where that is not known.
        began: the moment when that node began.
    """

    def __init__(self, space: Space) -> None:
        self.space = space
        self.tape: list[Step] = []
        self.unknown: dict[str, list[str]] = {}
        self.numbers: Met | None = None
        self.sized = False
        self.placed = False
        self.joined: Iterator[bool] | None = None
        self.beside: float | None = None
        self.picked = frozenset[int]()
        self.made: set[int] = set()
        self.places = Joined(self.made)
        self.widths = Widths()
        self.filled: set[int] = set()
        self.held: tuple[dict[Any, Any], ...] | None = None
        self.began = 0
        self.known_numbers: dict[int, tuple[Tensor, int]] = {}

    def dispatch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        """Run one ATen call on labels."""
        facts = _facts(func)
        if facts.reads_number:
            raise ValueReadError(
                f"{self.space.place} reads a number out of a tensor (item(), float(), bool()): what the network "
                "does next may depend on it, and cannot be analysed; keep the number in a tensor"
            )
        taken_apart = self._taken_apart(func, args, kwargs)
        if taken_apart is not None:
            return taken_apart(*args, **kwargs)
        target = facts.functional
        op = None if target is None else _rule(target)
        if op is None:
            result = self._decompose(func, args, kwargs)
            if result is not NotImplemented:
                return result
            op, target = UNKNOWN, func
            self.unknown.setdefault(str(func), []).append(self.space.node)
        given = kwargs if target is func else _with_defaults(func, args, kwargs)
        outputs, template = self._apply(op, target, args, given)
        if facts.turns_argument and op is not UNKNOWN:
            return _turned(func, args, kwargs, outputs[0])
        if facts.writes:
            written = self._write_all(facts, args, kwargs, outputs[0] if op is not UNKNOWN and outputs else None)
            if written and facts.is_view:
                return written[0]
        storage = _shared(args) if facts.is_view else None
        extent = args[0].fxc_extent if func in _ALIASES and not self._is_part(args[0]) else None
        device = first_labelled(args, kwargs).device
        tensors = [LabelTensor(value, self, device, storage, extent) for value in outputs]
        if isinstance(template, Tensor):
            return tensors[0]
        made = iter(tensors)
        return replace(lambda _: next(made), torch.Tensor, template)

    def _taken_apart(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any] | None:  # noqa: ANN401
        """What runs a call as other calls, where we do that ourselves."""
        if func is torch.ops.aten.bmm.default and self._is_one_matrix(args[1]):
            return _unbatched
        if func in _TAKEN_APART:
            return functools.partial(_TAKEN_APART[func], self)
        return by_places(func, args) or in_sums(func, args, kwargs) or in_extremes(func, args, kwargs)

    def _is_one_matrix(self, right: Any) -> bool:  # noqa: ANN401 - an argument of bmm
        """Whether the right operand of a batched product is one matrix, expanded: so torch runs some linear layers.

        In a batch of one sample strides do not tell; where the matrix has come from does.
        """
        if not isinstance(right, LabelTensor) or right.shape[0] != 1:
            return isinstance(right, LabelTensor) and right.stride(0) == 0
        value = right.fxc_value
        for step in reversed(self.tape):
            if step.outputs and step.outputs[0] is value:
                if step.call.func not in _GIVE_A_BATCH:
                    return False
                value = step.call.args[0]
                if value.rank == 2:
                    return True
        return False

    def _write_all(self, facts: "_Facts", args: Any, kwargs: Any, value: Value | None) -> list[LabelTensor]:  # noqa: ANN401
        """Let the arguments that an op writes to hold a new value, None for an unknown one; those with labels."""
        written = facts.written(args, kwargs)
        for tensor in written:
            if isinstance(tensor, LabelTensor):
                self._write(tensor, value)
            else:  # memory that is not followed, as yet without numbers: the same in every run
                tensor.fill_(torch.nan if tensor.is_floating_point() else 0)
        return find(LabelTensor, written)

    def first(self, func: Any, x: LabelTensor, *more: Any) -> LabelTensor:  # noqa: ANN401 - an op, what it is given
        """The first output of an ATen call that has a rule, and writes to its first argument if to any.

        Args:
            func: the op.
            x: its first argument.
            more: the others, Values in place of tensors.
        """
        target = _facts(func).functional
        op = _rule(target)
        assert op is not None
        outputs, _ = self._record(op, target, (x.fxc_value, *more), {})
        return self.returned(func, x, outputs[0])

    def returned(self, func: Any, x: LabelTensor, value: Value) -> LabelTensor:  # noqa: ANN401 - an op
        """The tensor that a call returns, from what it holds: its first argument where it writes to that."""
        if not _facts(func).writes:
            return LabelTensor(value, self, x.device)
        self._write(x, value)
        return x

    def shape_of(self, func: Any, args: tuple[Any, ...]) -> tuple[Any, Tensor]:  # noqa: ANN401 - an op, what it is given
        """The op that a call is on the tape, and the shape of its first output, on the meta device."""
        target = _facts(func).functional
        op = _rule(target)
        assert op is not None
        made = shapes(op, target, args, {})
        return target, made if isinstance(made, Tensor) else made[0]

    def emit(
        self, op: OpClass, func: object, args: tuple[Any, ...], shape: tuple[int, ...], like: Tensor
    ) -> LabelTensor:
        """Put a step that is no ATen call on the tape.

        Args:
            op: its rule.
            func: for tables of ops.
            args: Values in place of tensors.
            shape: of the only output.
            like: gives its dtype and its device.
        """
        meta = torch.empty(shape, dtype=like.dtype, device="meta")
        call = Call(func, args, {}, (meta,))
        (layers,) = op.labels(call, self.space)
        value = Value(meta, layers)
        self.put(Step(op, call, (value,), self.space.node))
        return LabelTensor(value, self, like.device)

    def hold_counted(self, value: Value, dims: Iterable[int]) -> None:
        """Let stay what lies along dims whose number of entries something is divided by, if that follows the inputs.

        A mean over ``h.flatten(1)`` divides by as many entries as there were, which no number in the graph can say; so
        does an attention whose scale is left to torch.
        """
        for layer in labels_along(value, self.places.dims(value) & frozenset(dims)):
            self.space.pin(layer, "input-size", _COUNTED)

    def put(self, step: Step) -> None:
        """Put a step on the tape."""
        self.tape.append(step)
        self._follow(step.op, step.call, step.outputs, moving=step.numbers is not None)

    def _follow(self, op: OpClass, call: Call, outputs: tuple[Value, ...], *, moving: bool) -> frozenset[int]:
        """Note what a step does to dims that the inputs decide; see :meth:`Joined.follow`."""
        self.widths.follow(op, call, outputs, moving=moving and self.moves)
        return self.places.follow(op, call, outputs, moving=moving)

    @property
    def moves(self) -> bool:
        """Whether numbers that come from sizes may decide how wide is what the node returns."""
        return self.numbers is not None and not self.placed

    def decided(self, value: Value) -> frozenset[int]:
        """The dims of a value whose sizes the inputs decide though their entries have labels."""
        return self.places.dims(value) | self.widths.of(value)

    def _is_part(self, tensor: LabelTensor) -> bool:
        """Whether a subscript has picked all entries of a tensor, of which there may be more in the next run."""
        value = tensor.fxc_value
        return any(not has_own_labels(value, dim) or dim in self.places.dims(value) for dim in self.picked)

    def _apply(self, op: OpClass, func: Any, args: Any, kwargs: Any) -> tuple[tuple[Value, ...], Any]:  # noqa: ANN401
        call_args, call_kwargs = replace(lambda t: t.fxc_value, LabelTensor, (args, kwargs))
        plain: tuple[Tensor, ...] = ()
        if self.known_numbers and op in _MEETS_NUMBERS:
            call_args = replace(self._known_number, torch.Tensor, call_args)
        if self.sized and op in _PICKS:
            call_args = (call_args[0], *replace(_unknown_index, torch.Tensor, tuple(call_args[1:])))
        if op in _ARITHMETIC and (found := find(torch.Tensor, call_args)):
            plain = tuple(found)
            call_args = replace(lambda t: Value(t.to("meta")), torch.Tensor, call_args)
        return self._record(op, func, tuple(call_args), call_kwargs, plain)

    def _known_number(self, tensor: Tensor) -> Tensor | Value:
        """A tensor that holds one number in each run, as a value of which that is known; any other as it is."""
        held, version = self.known_numbers.get(id(tensor), (None, 0))
        if held is not tensor or tensor._version != version:  # noqa: SLF001 - torch's
            return tensor
        value = Value(tensor.to("meta"))
        call = Call(FILL, ((), float(tensor)), {}, (value.meta,))
        self.tape.append(Step(FILL, call, (value,), self.space.node))
        return value

    def _record(
        self,
        op: OpClass,
        func: Any,  # noqa: ANN401 - an op
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        plain: tuple[Tensor, ...] = (),
    ) -> tuple[tuple[Value, ...], Any]:
        """Put a call on the tape; what it makes, and a tree of tensors on the meta device that shows its form."""
        args, kwargs = self._with_computed(func, args, kwargs)
        template = shapes(op, func, args, kwargs)
        metas = (template,) if isinstance(template, Tensor) else tuple(find(torch.Tensor, template))
        call = Call(func, args, kwargs, metas, plain)
        layers = op.labels(call, self.space)
        outputs = tuple(Value(meta, own) for meta, own in zip(metas, layers, strict=True))
        read = self.places.picked(op, call)
        if self.picked and func in _ALIASES:
            read |= self.places.dims(args[0]) & self.picked
        read |= self._follow(op, call, outputs, moving=self.numbers is not None)
        for layer in labels_along(args[0], read) if read else ():
            self.space.pin(layer, "input-size", _JOINED)
        for layer in self.places.spread_over(op, call):
            self.space.pin(layer, "input-size", _SPREAD)
        self.tape.append(Step(op, call, outputs, self.space.node, self.numbers, read))
        if op is CAT and self._floats(call):
            dim = call.arg(1, "dim", 0) % outputs[0].rank
            outputs = (self._anywhere(outputs[0], frozenset({dim})),)
        return outputs, template

    def _with_computed(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401 - an op
        """What an op is given, where numbers that come from sizes are among it.

        Torch leaves out what is as its default, which it need not be in the next run. Entries that are read at places
        that such a number says may be any of those along the dim.
        """
        if self.numbers is None:
            return args, kwargs
        given = self.numbers.given
        rest = func._schema.arguments[len(args) :]
        left_out = {a.name: a.default_value for a in rest if a.has_default_value() and a.name not in kwargs}
        kwargs = kwargs | {name: n for name, n in left_out.items() if type(n) in {int, float} and n in given}
        if self.beside is not None and func is torch.ops.aten.constant_pad_nd.default:
            args, kwargs = args[:2], kwargs | {"value": Written(self.beside)}
        dims = frozenset[int]() if self.placed else moving_dims(Call(func, args, kwargs, ()), self.numbers)
        return ((self._anywhere(args[0], dims), *args[1:]) if dims else args), kwargs

    def _anywhere(self, value: Value, dims: frozenset[int], beside: float | None = None) -> Value:
        """The same, where the next op may read other entries along some dims than it does on the example inputs."""
        call = Call("anywhere", (value, dims, beside), {}, (value.meta,))
        moved = Value(value.meta, ANYWHERE.labels(call, self.space)[0])
        self.widths.note(moved, dims)
        self.put(Step(ANYWHERE, call, (moved,), self.space.node))
        return moved

    def anywhere(self, tensor: LabelTensor, dims: frozenset[int], beside: float | None = None) -> LabelTensor:
        """A tensor that shares its memory, where the next op may read other entries than on the example inputs.

        Args:
            tensor: of any shape.
            dims: along which.
            beside: what the op may put there; None for nothing.
        """
        value = self._anywhere(tensor.fxc_value, dims, beside)
        return LabelTensor(value, self, tensor.device, tensor.fxc_storage)

    def _floats(self, call: Call) -> bool:
        if self.joined is not None:
            return next(self.joined, False)
        return floats(call, self.made, self.filled, self._stacked())

    def _stacked(self) -> set[int]:
        """Keys of what the steps right before have given another dim, as ``stack`` does."""
        found = set[int]()
        for step in reversed(self.tape[:-1]):
            if step.call.func is not torch.ops.aten.unsqueeze.default:
                break
            found.add(step.outputs[0].key)
        return found

    def _write(self, tensor: LabelTensor, value: Value | None) -> None:
        """An in-place op: the tensor holds a new value; others that share its memory are no longer understood."""
        if value is None or value.shape != tensor.fxc_value.shape:
            value = Value(tensor.fxc_value.meta)
        sharing = self._still_read(tensor.fxc_storage.others(tensor))
        same = [tensor, *(other for other in sharing if other.fxc_extent is tensor.fxc_extent)]
        others = [other for other in sharing if other.fxc_extent is not tensor.fxc_extent]
        if others and (tensor.fxc_storage.loose or not same_layers(value.layers, tensor.fxc_value.layers)):
            for stale in (tensor, *others):
                for layer in (*stale.fxc_value.layers, *value.layers):
                    self.space.pin(layer, "aliased-write", "an in-place op writes to memory that another tensor shares")
            value = Value(tensor.fxc_value.meta)
            for stale in others:
                stale.fxc_value = Value(stale.fxc_value.meta)
        else:
            for stale in others:  # other numbers, the same labels
                stale.fxc_value = self._overwritten(stale.fxc_value, value, tensor.fxc_value)
        for each in same:
            each.fxc_value = value

    def _still_read(self, tensors: list[LabelTensor]) -> list[LabelTensor]:
        """Those of some tensors that a node may read from now on, this one included.

        Views keep what they are views of alive, for torch, also where no node reads it any more.
        """
        if not tensors or self.held is None or any(map(_is_opaque, leaves(self.held))):
            return tensors
        read = set(map(id, find(LabelTensor, self.held)))
        return [tensor for tensor in tensors if id(tensor) in read or tensor.fxc_number > self.began]

    def _overwritten(self, before: Value, written: Value, part: Value) -> Value:
        """What a tensor holds after ``written`` has been put in the place of ``part``, which another one held."""
        places = single_places(before, part, self.tape, self.decided(before))
        call = Call("overwritten", (before, written, places), {}, (before.meta,))
        after = Value(before.meta, before.layers)
        self.put(Step(OVERWRITTEN, call, (after,), self.space.node))
        return after

    def _decompose(self, func: Any, args: Any, kwargs: Any) -> Any:  # noqa: ANN401
        if func._schema.is_mutable:
            plain = _without_out(func)
            return NotImplemented if plain is None else self._into_out(plain, args, kwargs)
        if func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
            return func.decompose(*args, **kwargs)
        if func in decomposition_table and torch.Tag.nondeterministic_seeded not in func.tags:
            with self._trial() as trial:
                result = decomposition_table[func](*args, **kwargs)
                trial.append(result)
            return trial[0] if trial else NotImplemented
        return NotImplemented

    def _into_out(self, plain: Any, args: Any, kwargs: Any) -> Any:  # noqa: ANN401
        """An op with ``out=`` as ``plain``, the one without, and a copy; not where ``out`` would get another size."""
        given = dict(kwargs)
        out = given.pop("out")
        with self._trial() as trial:
            result = plain(*args, **given)
            if result.shape == out.shape:
                trial.append(out.copy_(result))
        return trial[0] if trial else NotImplemented

    @contextmanager
    def _trial(self) -> Iterator[list[Any]]:
        """Forget what a decomposition did when it fails half-way."""
        space = self.space
        logs: tuple[list[Any], ...] = (self.tape, space.edges, space.pins, space.slots)
        marks = [len(log) for log in logs]
        try:
            yield []
        except Exception:  # noqa: BLE001 - any failure means the same: the op stays unknown
            for log, mark in zip(logs, marks, strict=True):
                del log[mark:]


@dataclass(frozen=True, slots=True)
class _Facts:
    """What the schema of an op says, which takes torch some time to tell.

    Attributes:
        functional: the op that computes the same without writing to its argument; None for none.
        writes: position and name of the arguments that are written to.
        is_view: whether an output shares the memory of an argument.
        turns_argument: whether it makes its first argument another view of its memory (``transpose_``), and writes to
            no memory.
        reads_number: whether it returns a number.
    """

    functional: Any
    writes: tuple[tuple[int, str], ...]
    is_view: bool
    turns_argument: bool
    reads_number: bool

    def written(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The arguments that are written to."""
        values = [args[i] if i < len(args) else kwargs.get(name) for i, name in self.writes]
        return find(torch.Tensor, values)


@functools.cache
def _facts(func: Any) -> _Facts:  # noqa: ANN401
    schema = func._schema
    written = [a.alias_info is not None and a.alias_info.is_write for a in schema.arguments]
    writes = [(i, a.name) for i, a in enumerate(schema.arguments) if written[i]] if schema.is_mutable else []
    is_view = any(r.alias_info is not None for r in schema.returns)
    turns = torch.Tag.inplace_view in func.tags
    return _Facts(_without_writing(func), tuple(writes), is_view, turns, func.name() == "aten::_local_scalar_dense")


def _without_writing(func: Any) -> Any:  # noqa: ANN401
    if not func._schema.is_mutable:
        return func
    packet = getattr(torch.ops.aten, func.overloadpacket.__name__.rstrip("_"), None)
    return _same_arguments(func, packet) if func._schema.name.endswith("_") else None


@functools.cache
def _without_out(func: Any) -> Any:  # noqa: ANN401 - an overload
    """The overload that returns what ``func`` writes to its argument ``out``; None where there is none."""
    outs = [argument.name for argument in func._schema.arguments if argument.is_out]
    return _same_arguments(func, func.overloadpacket) if outs == ["out"] else None


def _same_arguments(func: Any, packet: Any) -> Any:  # noqa: ANN401 - an overload and a packet of overloads
    """The overload that takes what ``func`` takes, but for ``out``, and writes to none of it, or None.

    Names do not tell: ``pow.Scalar`` takes a number and a tensor, ``pow_.Scalar`` a tensor and a number.
    """
    wanted = _parameters(func)
    names = [] if packet is None else sorted(packet.overloads(), key=lambda name: name != func._overloadname)
    for name in names:
        overload = getattr(packet, name)
        if not overload._schema.is_mutable and _parameters(overload) == wanted:
            return overload
    return None


def _parameters(func: Any) -> list[tuple[str, str]]:  # noqa: ANN401 - an overload
    """Name and type of what an op takes, but for what it writes its result to."""
    return [(argument.name, str(argument.type)) for argument in func._schema.arguments if not argument.is_out]


def _with_defaults(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:  # noqa: ANN401
    """The keyword arguments with the defaults of ``func``, which another overload may not have (``bernoulli_``)."""
    rest = [argument for argument in func._schema.arguments[len(args) :] if argument.has_default_value()]
    return {argument.name: argument.default_value for argument in rest} | kwargs


def _rule(func: Any) -> OpClass | None:  # noqa: ANN401
    rule = RETYPED if func is torch.ops.aten.view.dtype else rule_of(func)
    if rule is None and torch.Tag.pointwise in func.tags:
        return OPAQUE_VALUES if torch.Tag.nondeterministic_seeded in func.tags else POINTWISE
    return rule


_GIVE_A_BATCH = frozenset(
    getattr(torch.ops.aten, name).default for name in ("expand", "unsqueeze", "view", "_unsafe_view", "_reshape_alias")
)


def _unbatched(left: Tensor, right: Tensor) -> Tensor:
    """The same as a plain product: (N, L, K) times the (K, R) that all of the batch shares."""
    flat = left.reshape(-1, left.shape[2]).mm(right.select(0, 0))
    return flat.view(left.shape[0], left.shape[1], -1)


def _turned(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], value: Value) -> LabelTensor:  # noqa: ANN401 - an op
    """The first argument, with the shape that an op like ``transpose_`` gives it, and what it holds then.

    The memory holds what it held: other tensors that share it stay as they are.
    """
    tensor: LabelTensor = args[0]
    with no_dispatch():  # the kernel, which changes the shape of the wrapper and looks at no memory
        func(*args, **kwargs)
    tensor.fxc_value = value
    tensor.fxc_extent = object()
    return tensor


_PLAIN = (torch.Tensor, bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, slice, range)


def _is_opaque(leaf: object) -> bool:
    """Whether something may hold tensors that nobody sees."""
    return not isinstance(leaf, (*_PLAIN, torch.memory_format, torch.layout, type, type(Ellipsis)))


def _shared(args: tuple[Any, ...]) -> Storage | None:
    """The storage that the outputs of a view share with the first argument; None when they are new."""
    return args[0].fxc_storage if args and isinstance(args[0], LabelTensor) else None
