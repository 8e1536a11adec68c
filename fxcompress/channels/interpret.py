"""Takes labels through a traced graph, node by node."""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from dataclasses import replace as replace_fields
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pack_padded_sequence

from fxcompress.channels.composed import in_pieces
from fxcompress.channels.computed_numbers import Numbers, is_known
from fxcompress.channels.direct import aten_call
from fxcompress.channels.dispatch import Dispatch
from fxcompress.channels.factories import (
    FILL,
    SPREAD,
    bordered,
    copied_layers,
    filled_with,
    kind_of,
    made_sizes,
    padded_dims,
    sizes_of,
    spread_dims,
    spread_layers,
    written_dims,
)
from fxcompress.channels.given_sizes import flattened, given_sizes, repeated_dims
from fxcompress.channels.layers import Layers, along, support, vector, zeros_like_dim
from fxcompress.channels.layouts import Elsewhere, elsewhere
from fxcompress.channels.masks import masks_of
from fxcompress.channels.packed import with_lengths
from fxcompress.channels.ranks import is_misplaced
from fxcompress.channels.recurrent import as_given, is_recurrent, whole
from fxcompress.channels.rules import extremes, pointwise, variances
from fxcompress.channels.rules.einsum import EINSUM, einsum_of
from fxcompress.channels.rules.movement import PAD
from fxcompress.channels.rules.noise import NOISE, noise_of
from fxcompress.channels.rules.places import dims_of_node, picked_by, put_beside, written_sizes
from fxcompress.channels.rules.quantize import QUANTIZE
from fxcompress.channels.shapes import has_strides, like
from fxcompress.channels.space import PART, Space
from fxcompress.channels.tables import follow, pin_rows, reads_a_size
from fxcompress.channels.values import Call, LabelTensor, Step, Value, find, moment, replace
from fxcompress.errors import ExampleInputError, FxCompressError
from fxcompress.progress import stage
from fxcompress.quantizer import Quantizer
from fxcompress.trace.basics.generators import generators_kept
from fxcompress.trace.basics.modules import named_modules_in
from fxcompress.trace.graph.autocast import switches_autocast
from fxcompress.trace.graph.calls import ends_as_in_place, function_name
from fxcompress.trace.graph.described import place_of_node
from fxcompress.trace.graph.guards import asks_for_mode, asserts_values
from fxcompress.trace.graph.names import fetch_attr
from fxcompress.trace.graph.objects import restored
from fxcompress.trace.inputs import ExampleInputs
from fxcompress.trace.model.flat_weights import renew_weights
from fxcompress.trace.model.skeleton import shallow
from fxcompress.trace.traced import TracedModule

Atoms = Mapping[str, dict[int, Tensor]]
"""The labels along each dim of a parameter or buffer, by its name."""
_PERHAPS_COPIES = frozenset({"contiguous", "reshape", "reshape_as", "flatten", "ravel", "to", "Flatten"})
"""What copies where memory is not in order, and gives the same memory where it is."""
_MOVED = frozenset({"to", "type_as", "double", "float", "clone", "detach", "view", "reshape", "unsqueeze", "expand"})
"""Methods that leave a tensor of one number what it is."""
_ON_LABELS = variances.ON_LABELS | extremes.ON_LABELS | pointwise.ON_LABELS


@dataclass(slots=True)
class Trail:
    """What an interpretation of one graph leaves behind.

    Attributes:
        tape: the ATen calls.
        values: the result of each node, a Value in place of each labelled tensor.
        args: the positional arguments of each call, as they are when it is made, in the same form.
        parameters: the Value of each parameter, floating buffer and mask that was read, by name.
        written: the key of the last Value of those that were written to, by name.
        counters: the names of tensors without labels that were written to: integers, plain attributes.
        storages: which memory the result of each node lies in: nodes that share a number share memory.
        unknown: ops without a rule, with the nodes that call them.
        fixed: the nodes that are the same for all inputs, or whose numbers are.
    """

    tape: list[Step] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    args: dict[str, Any] = field(default_factory=dict)
    parameters: dict[str, Value] = field(default_factory=dict)
    written: dict[str, int] = field(default_factory=dict)
    counters: frozenset[str] = frozenset()
    storages: dict[str, frozenset[int]] = field(default_factory=dict)
    unknown: dict[str, list[str]] = field(default_factory=dict)
    fixed: frozenset[str] = frozenset()

    @property
    def names(self) -> dict[int, str]:
        """The names of :attr:`parameters`, by the keys of their Values."""
        return {value.key: name for name, value in self.parameters.items()}


def fresh_atoms(module: TracedModule, space: Space) -> Atoms:
    """Atoms for each dim of size > 1 of each floating parameter, buffer and mask, by name; once for a shared tensor.

    None for sparse ones, as the adjacency of a graph: their sizes stay.
    """
    masks = masks_of(module)
    atoms: dict[str, dict[int, Tensor]] = {}
    seen: dict[int, dict[int, Tensor]] = {}
    dims: list[tuple[str, int, int, bool]] = []
    named: list[tuple[str, Tensor, bool]]
    named = [(n, p, True) for n, p in module.named_parameters(remove_duplicate=False)]
    named += [(n, b, False) for n, b in module.named_buffers(remove_duplicate=False)]
    for name, tensor, is_parameter in named:
        if not (tensor.is_floating_point() or name in masks) or tensor.layout != torch.strided:
            continue
        if id(tensor) not in seen:
            seen[id(tensor)] = {}
            dims += [(name, d, n, is_parameter) for d, n in enumerate(tensor.shape) if n > 1]
        atoms[name] = seen[id(tensor)]
    for (name, dim, _, _), fresh in zip(dims, space.fresh_all(dims), strict=True):
        atoms[name][dim] = fresh
    return atoms


class Interpreter:
    """Interprets one graph of a module on labels, in evaluation mode.

    Args:
        module: holds the parameters and the leaf modules.
        atoms: the labels of each parameter and buffer.
        space: where couplings and pins go.
        counters: names of tensors without labels that the network changes: nothing is known of what they hold.
    """

    doing = "analysis"

    def __init__(self, module: nn.Module, atoms: Atoms, space: Space, counters: frozenset[str] = frozenset()) -> None:
        self.module = module
        self.atoms = atoms
        self.dispatch = Dispatch(space)
        self.space = space
        self.counters = counters
        self.env: dict[fx.Node, Any] = {}
        self.trail = Trail(self.dispatch.tape, unknown=self.dispatch.unknown)
        self._tensors: dict[int, LabelTensor] = {}
        self._first: dict[int, Value] = {}
        self._copies: dict[int, Tensor] = {}
        self._plain: dict[str, int] = {}
        self._shadows: dict[str, nn.Module] = {}
        self._modules = named_modules_in(module)
        self._tables = self.dispatch.made
        self._constant: set[fx.Node] = set()  # made of parameters and numbers alone
        self._numbers = Numbers(self._constant, self.trail.values, self.dispatch.decided)
        self._elsewhere: Elsewhere = lambda _: []

    def run(self, graph: fx.Graph, inputs: ExampleInputs) -> Trail:
        """Interpret ``graph`` on ``inputs``.

        Raises:
            ExampleInputError: the graph does not run on them.
        """
        bound = inputs.bind(graph)
        self._elsewhere = elsewhere(self.module, graph, inputs)
        last_use = _last_use(graph)
        env = self.env
        self.dispatch.held = (env, self._tensors)
        # Attention as the products that it is made of: the fused kernels are many, and mean the same.
        # Noise that the graph draws must be the same in every run, see passes/replay.py.
        with torch.no_grad(), generators_kept(seed=0), sdpa_kernel(SDPBackend.MATH):
            for done, node in enumerate(graph.nodes):
                stage(self.doing, done, len(graph.nodes))
                self.space.at = node
                result = self._run_node(node, bound)
                self.trail.values[node.name] = _values(result)
                self.trail.storages[node.name] = _storages(result)
                env[node] = result
                del result
                for dead in last_use.get(node, ()):
                    del env[dead]
        self.space.at = self.dispatch.held = None
        self._note_writes()
        self.trail.fixed = self._numbers.fixed
        return self.trail

    def _note_writes(self) -> None:
        now = {value.key: self._now(key).key for key, value in self._first.items()}
        for name, value in self.trail.parameters.items():
            if now[value.key] != value.key:
                self.trail.written[name] = now[value.key]
        plain = {name: self._copies[key] for name, key in self._plain.items()}
        self.trail.counters = frozenset(name for name, copy in plain.items() if copy._version)  # noqa: SLF001

    def _run_node(self, node: fx.Node, bound: dict[str, Any]) -> Any:  # noqa: ANN401
        if node.op == "placeholder":
            return replace(self._input, torch.Tensor, bound.get(str(node.target)))
        if node.op == "get_attr":
            self._constant.add(node)
            held = self._attribute(str(node.target))
            self._note_number(node, held)
            return held
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), partial(self._read, node))
        if node.op == "output":
            self._pin_output(args[0])
            return args[0]
        self.trail.args[node.name] = _values(args)
        self.dispatch.began = moment()
        start = len(self.dispatch.tape)
        result = self._loosened(node, args, self.call(node, args, kwargs))
        self._numbers.follow(node)
        if len(self.dispatch.tape) == start and self.dispatch.moves:  # it may call an op in the next run
            self._note_widths(result)
        self._follow_tables(node, start)
        return result

    def _loosened(self, node: fx.Node, args: tuple[Any, ...], result: Any) -> Any:  # noqa: ANN401 - what a node returns
        """The result of a node that copies where it must, and may share memory with its source for all we know.

        Whether it does depends on sizes: of the inputs, where one sample or token is contiguous in any order, and of
        what is left, where a slice may become the whole.
        """
        name = function_name(node) if node.op != "call_module" else type(self._modules.get(str(node.target))).__name__
        source = args[0] if args else None
        if name not in _PERHAPS_COPIES or not isinstance(result, LabelTensor) or not isinstance(source, LabelTensor):
            return result
        shared = result.fxc_storage is source.fxc_storage
        source.fxc_storage.loose |= not shared or not source.fxc_storage.is_base(source)
        if shared and result is not source:
            return result
        return LabelTensor(result.fxc_value, self.dispatch, result.device, source.fxc_storage)

    def _read(self, node: fx.Node, used: fx.Node) -> Any:  # noqa: ANN401 - whatever the node has returned
        """What a node reads; without labels where these may be along other dims in the next run."""
        result = self.env[used]
        if not is_misplaced(node, used, result, self._modules.get(str(node.target))):
            return result
        for layer in result.fxc_value.layers:
            self.space.pin(layer, "input-size", "how many dims there are before it depends on the size of the input")
        return self._input(result)

    def _follow_tables(self, node: fx.Node, start: int) -> None:
        steps = self.dispatch.tape[start:]
        if all(used in self._constant for used in node.all_input_nodes):
            self._constant.add(node)
        elif reads_a_size(node, self.env, self._numbers.is_fixed):
            pin_rows(steps, self._tables, self.space)
        follow(steps, self._tables)

    def call(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        """Run a call node on its evaluated arguments."""
        if asks_for_mode(node) or switches_autocast(node) or asserts_values(node, args):
            return None  # labels have no such things: this is the path that was traced
        layer = self._modules.get(str(node.target)) if node.op == "call_module" else None
        callee = node.target if node.op != "call_module" else layer
        self._tell(node, callee, args)
        try:
            if node.op == "call_module":
                return self._call_layer(str(node.target), args, kwargs)
            return self._call_function(node, callee, args, kwargs)
        except FxCompressError:
            raise
        except Exception as error:
            raise ExampleInputError(_run_message(node, layer, args, kwargs, error)) from error

    def _tell(self, node: fx.Node, callee: object, args: tuple[Any, ...]) -> None:
        """Tell the dispatcher what a node is given that follows the sizes of the inputs, and what its sizes are."""
        self.dispatch.numbers = self._numbers.met(node, self.env, callee)
        self.dispatch.sized = any(map(self._is_sized, node.all_input_nodes))
        self.dispatch.placed, self.dispatch.picked = False, frozenset()
        beside = put_beside(node)
        self.dispatch.beside = None if beside is None or math.isnan(beside) else beside
        places, sizes = (
            self.dispatch.places,
            (node, self.trail.values, self._numbers.is_fixed, self.dispatch.places.free),
        )
        places.written, places.given, places.repeated = written_sizes(node), given_sizes(*sizes), repeated_dims(*sizes)
        places.elsewhere = partial(self._elsewhere, node)
        places.lists = bool(node.args) and isinstance(node.args[0], tuple | list)
        source = args[0] if args else None
        places.flattens = flattened(node, callee, source.ndim if isinstance(source, LabelTensor) else 0)

    def _call_layer(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        module = self._submodule(path)
        if isinstance(module, Quantizer):
            return self._quantize(path, module, args[0])
        known = aten_call(module, args, kwargs, partial(self._own, path, module))
        if known is not None:
            func, given = known
            return self._noisy(module, args[0] if func is None else self.dispatch.first(func, args[0], *given))
        args, kwargs = self._given(module, args, kwargs)
        with whole(module), in_pieces(module):
            return self._noisy(module, self._shadow(path, module)(*args, **kwargs))

    def _call_function(self, node: fx.Node, callee: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        if isinstance(callee, type) or callee is restored:  # in which nothing finds its tensors again
            self._pin_output([args, kwargs])
        args = self._adopted(node, args, kwargs)
        if function_name(node) == "scaled_dot_product_attention" and kwargs.get("scale") is None:
            query = args[0] if args else kwargs["query"]
            for value in find(Value, _values([query])):
                self.dispatch.hold_counted(value, (value.rank - 1,))
        if args and isinstance(args[0], LabelTensor):
            self.dispatch.picked = picked_by(node, args[0].ndim)
        args = self._placed(node, args, callee)
        if node.op == "call_method":
            return self._filled(node, getattr(args[0], str(callee))(*args[1:], **kwargs))
        args, kwargs = self._given(callee, args, kwargs)
        with whole(callee), in_pieces(callee):
            return self._filled(node, self._function(node)(*args, **kwargs))

    def _is_sized(self, node: fx.Node) -> bool:
        """Whether a node is an index without labels that other inputs make another one."""
        value = self.env[node]
        plain = isinstance(value, Tensor) and not isinstance(value, LabelTensor) and not value.is_floating_point()
        return plain and not self._numbers.is_fixed(node)

    def _placed(self, node: fx.Node, args: tuple[Any, ...], callee: object) -> tuple[Any, ...]:
        """The arguments of a call; a tensor is told where ``x[n:]`` reads or writes it at places that move."""
        if not args or (self.dispatch.numbers is None and not self.dispatch.sized):
            return args
        if node.target in {operator.mul, operator.imul}:  # [h] * n
            args = tuple(self._any_of(arg) if isinstance(arg, list) and find(LabelTensor, arg) else arg for arg in args)
        if isinstance(args[0], tuple | list) and find(LabelTensor, args[0]) and node.target is operator.getitem:
            return (self._any_of(args[0]), *args[1:]) if self._moves(node.args[1]) else args
        if not isinstance(args[0], LabelTensor) or not is_known(callee):
            return args
        dims = dims_of_node(node, args[0].ndim, self._moves)
        self.dispatch.placed = dims is not None
        return (self.dispatch.anywhere(args[0], dims, put_beside(node)), *args[1:]) if dims else args

    def _moves(self, used: object) -> bool:
        """Whether an argument is a number or an index that other inputs make another one."""
        return isinstance(used, fx.Node) and (self._is_sized(used) or self._numbers.moves(used, self.env))

    def _any_of(self, tensors: Sequence[Any]) -> list[Any]:
        """Tensors of a list any of which may be read, any number of times: all stay, and nothing is known of them."""
        for layer in (layer for tensor in find(LabelTensor, tensors) for layer in tensor.fxc_value.layers):
            self.space.pin(layer, "input-size", "which tensors of a list are read depends on the size of the input")
        return [self._input(tensor) if isinstance(tensor, LabelTensor) else tensor for tensor in tensors]

    def _function(self, node: fx.Node) -> Callable[..., Any]:
        """What a node calls, on labels; a number that it computes is no constant."""
        if node.target in EINSUM:
            return partial(einsum_of, node.meta)
        found = _ON_LABELS.get(node.target)
        computed = any(not isinstance(self.env[used], Tensor) for used in node.all_input_nodes)
        function: Callable[..., Any] = node.target if found is None or computed else found  # type: ignore[assignment]
        return function

    def _filled(self, node: fx.Node, result: Any) -> Any:  # noqa: ANN401 - whatever the node returns
        """The result of a node; with labels where it makes a tensor whose size is written in the graph."""
        if isinstance(result, LabelTensor):
            return self._bordered(node, self._spread(node, result, self._spread_layers(node, result)))
        spread = self._spread_layers(node, result) if isinstance(result, Tensor) else None
        if spread:
            return self._spread(node, self._followed(node, result), spread)
        self._note_number(node, result)
        sizes = made_sizes(node, result)
        dims, copied = written_dims(sizes), copied_layers(sizes, self.trail.values)
        if not dims and not copied and not (sizes and self.is_followed(node)):
            return result
        meta = torch.empty_like(result, device="meta")
        value = Value(meta, (*self.made_layers(node, meta, dims), *copied))
        self.dispatch.filled.add(value.key)
        call = Call(FILL, (value.layers, filled_with(node)), {}, (meta,))
        self.dispatch.tape.append(Step(FILL, call, (value,), node.name))
        made = LabelTensor(value, self.dispatch, result.device)
        if self.dispatch.moves:
            self._note_widths(made)
        return made

    def _note_widths(self, result: Any) -> None:  # noqa: ANN401 - whatever a node returns
        """Note that all dims of what a node returns may be wider or narrower in the next run."""
        for value in (tensor.fxc_value for tensor in find(LabelTensor, [result])):
            self.dispatch.widths.note(value, frozenset(range(value.rank)))

    def _note_number(self, node: fx.Node, result: Any) -> None:  # noqa: ANN401 - whatever a node returns
        """Note a tensor of one entry that is the same in each run: what it is filled with stands in the graph."""
        plain = isinstance(result, Tensor) and not isinstance(result, LabelTensor) and not result.is_meta
        if plain and result.numel() == 1 and result.is_floating_point() and self._is_one_number(node):
            self.dispatch.known_numbers[id(result)] = result, result._version  # noqa: SLF001 - torch's

    def _is_one_number(self, node: fx.Node) -> bool:
        """Whether what a node returns is no tensor that another run fills with another number."""
        if node.op == "get_attr":
            return True  # a tensor that is no buffer; what the network writes to is no plain tensor here
        if kind_of(node):
            sizes = None if "empty" in kind_of(node) or "out" in node.kwargs else sizes_of(node)
            return filled_with(node) is not None and sizes is not None and all(type(n) is int for n in sizes)
        if function_name(node) in {"tensor", "new_tensor"}:
            return bool(node.args) and not find(fx.Node, [node.args[-1]])  # the number, not a type or device
        source = self.env.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
        return function_name(node) in _MOVED and id(source) in self.dispatch.known_numbers

    def is_followed(self, node: fx.Node) -> bool:
        """Whether what a node makes is followed though no dim of it has more than one entry."""
        return False

    def _followed(self, node: fx.Node, result: Tensor) -> LabelTensor:
        """A tensor that no labels led to, as one that has them along no dim, and of which nothing is known."""
        meta = torch.empty_like(result, device="meta")
        value = Value(meta)
        self.dispatch.tape.append(Step(FILL, Call(FILL, ((), None), {}, (meta,)), (value,), node.name))
        return LabelTensor(value, self.dispatch, result.device)

    def _spread_layers(self, node: fx.Node, result: Tensor) -> Layers | None:
        """The labels that a tensor has now along dims of size 1 that a node repeats; None for another node.

        An index that is repeated has labels of its own there where the graph says how often: all of its entries read
        the same place, of as many channels as there are.
        """
        layers = spread_layers(node, self.trail.values, result.ndim)
        if layers is None or not self.is_spread_by_number(node, result):
            return layers
        known = {d for layer in layers for d in support(layer)}
        dims = [d for d in spread_dims(node, self.trail.values, result.ndim) if d not in known]
        return (*layers, *self.made_layers(node, result, dims))

    def is_spread_by_number(self, node: fx.Node, result: Tensor) -> bool:
        """Whether what a node repeats has labels where a number of the graph's says how often."""
        return not result.is_floating_point()

    def _spread(self, node: fx.Node, result: LabelTensor, layers: Layers | None) -> LabelTensor:
        """The result of a node; with labels where it was expanded to the size of a tensor that has some."""
        if layers is None:
            return result
        meta = result.fxc_value.meta
        call = Call(SPREAD, (result.fxc_value, layers), {}, (meta,))
        value = Value(meta, SPREAD.labels(call, self.space)[0])
        self.dispatch.put(Step(SPREAD, call, (value,), node.name))
        return LabelTensor(value, self.dispatch, result.device, result.fxc_storage)

    def _bordered(self, node: fx.Node, result: LabelTensor) -> LabelTensor:
        """The result of a node; with labels where it was padded, along a dim whose entries have some."""
        before, tape = result.fxc_value, self.dispatch.tape
        dims = padded_dims(node, self.labelled(node, before))
        if not dims or tape[-1].op is not PAD or tape[-1].outputs[0] is not before:
            return result
        layers = [layer for layer in before.layers if support(layer).isdisjoint(dims)]
        for dim, amounts in dims.items():
            own = along(before.layers, dim)
            own = zeros_like_dim(before.shape[dim], before.rank, dim) if own is None else own
            layers.append(bordered(own, self.border_labels(node, own, amounts), amounts[0]) if any(amounts) else own)
        value = Value(before.meta, tuple(layers))
        tape[-1] = replace_fields(tape[-1], outputs=(value,))
        self.dispatch.places.follow(PAD, tape[-1].call, (value,), moving=False)
        return LabelTensor(value, self.dispatch, result.device, result.fxc_storage)

    def labelled(self, node: fx.Node, value: Value) -> Value:
        """The value that says along which dims the result of a node has labels; its own."""
        return value

    def border_labels(self, node: fx.Node, layer: Tensor, amounts: tuple[int, int]) -> Tensor:
        """Labels for what a node puts at both ends of a dim, int64 (sum(amounts),)."""
        return self.space.fresh("", PART, sum(amounts), is_parameter=False)

    def _adopted(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """The arguments of a call that writes to a tensor: that tensor with labels, if what is written has some.

        Whoever reads the tensor later on then reads what was written to it.
        """
        writes = node.target is operator.setitem or ends_as_in_place(function_name(node))
        if not writes or not args or not isinstance(node.args[0], fx.Node) or not find(LabelTensor, [args[1:], kwargs]):
            return args
        if not isinstance(args[0], Tensor) or isinstance(args[0], LabelTensor) or not args[0].is_floating_point():
            return args
        meta, maker = torch.empty_like(args[0], device="meta"), node.args[0]
        value, untouched = Value(meta), bool(kind_of(maker)) and next(iter(maker.users)) is node
        call = Call(FILL, ((), filled_with(maker) if untouched else None), {}, (meta,))
        self.dispatch.tape.append(Step(FILL, call, (value,), node.name))
        self.env[maker] = LabelTensor(value, self.dispatch, args[0].device)
        return (self.env[maker], *args[1:])

    def made_layers(self, node: fx.Node, meta: Tensor, dims: list[int]) -> Layers:
        """Labels for a tensor that a node makes out of nothing."""
        fresh = [(d, self.space.fresh("", d, meta.shape[d], is_parameter=False)) for d in dims]
        return tuple(vector(atoms, meta.ndim, d) for d, atoms in fresh)

    def _given(self, callee: object, args: Any, kwargs: Any) -> Any:  # noqa: ANN401 - arguments of a call
        """The arguments of a call; an initial state of a recurrent layer has a size that the graph fixes."""
        if callee is pack_padded_sequence:
            return with_lengths(args, kwargs)
        return as_given(self._input, (args, kwargs)) if is_recurrent(callee) else (args, kwargs)

    def _input(self, tensor: Tensor) -> LabelTensor:
        return LabelTensor(Value(like(tensor)), self.dispatch, tensor.device)

    def _attribute(self, target: str) -> Any:  # noqa: ANN401
        owner, _, name = target.rpartition(".")
        value = fetch_attr(self._submodule(owner), name)
        return self._labelled(target, value) if isinstance(value, torch.Tensor) else value

    def _submodule(self, path: str) -> nn.Module:
        found = self._modules.get(path)
        return self.module.get_submodule(path) if found is None else found  # one that is set past nn.Module

    def _labelled(self, name: str, tensor: Tensor) -> Tensor:
        """The LabelTensor of a parameter or floating buffer; a copy of others, which the network may write to."""
        key = id(tensor)
        if name not in self.atoms:
            if (name in self.counters or not has_strides(tensor)) and key not in self._tensors:
                self._tensors[key] = self._input(tensor)
            if key in self._tensors:
                return self._tensors[key]
            self._plain[name] = key
            return self._copies.setdefault(key, tensor.detach().clone())
        value = self._held(name, tensor)
        if key not in self._tensors:
            self._tensors[key] = LabelTensor(value, self.dispatch, tensor.device)
        return self._tensors[key]

    def _held(self, name: str, tensor: Tensor) -> Value:
        """What a parameter or floating buffer holds."""
        key = id(tensor)
        if key not in self._first:
            layers = tuple(vector(a, tensor.ndim, d) for d, a in self.atoms[name].items())
            self._first[key] = value = Value(like(tensor), layers)
            self._tables.add(value.key)
        self.trail.parameters.setdefault(name, self._first[key])
        return self._now(key)

    def _now(self, key: int) -> Value:
        held = self._tensors.get(key)
        return self._first[key] if held is None else held.fxc_value

    def _own(self, path: str, module: nn.Module, name: str) -> Value | None:
        """What a parameter or buffer of a leaf module holds."""
        own = module._parameters.get(name)
        tensor = module._buffers.get(name) if own is None else own
        if tensor is None:
            return None
        full = f"{path}.{name}"
        return self._held(full, tensor) if full in self.atoms else Value(like(tensor))

    def _shadow(self, path: str, module: nn.Module) -> nn.Module:
        """A stand-in for a leaf module, with labels for parameters, in evaluation mode."""
        if path not in self._shadows:
            shadow = shallow(module)
            for table in ("_parameters", "_buffers"):
                own = module.__dict__[table]
                shadow.__dict__[table] = {
                    n: t if t is None else self._labelled(f"{path}.{n}", t) for n, t in own.items()
                }
            children = module.__dict__["_modules"]
            shadow.__dict__["_modules"] = {
                n: c if c is None else self._shadow(f"{path}.{n}", c) for n, c in children.items()
            }
            shadow.__dict__["training"] = False
            renew_weights(shadow)
            self._shadows[path] = shadow
        return self._shadows[path]

    def _noisy(self, module: nn.Module, result: Any) -> Any:  # noqa: ANN401 - whatever the module returns
        """The result of a module, with what it adds in training on the tape."""
        call = noise_of(module, result.fxc_value) if isinstance(result, LabelTensor) else None
        if call is None:
            return result
        (layers,) = NOISE.labels(call, self.space)
        value = Value(result.fxc_value.meta, layers)
        self.dispatch.put(Step(NOISE, call, (value,), self.space.node))
        return LabelTensor(value, self.dispatch, result.device, result.fxc_storage)

    def _quantize(self, path: str, quantizer: Quantizer, weight: LabelTensor) -> LabelTensor:
        bits, exponent = (self._labelled(f"{path}.{n}", getattr(quantizer, n)) for n in ("bits", "exponent"))
        layout = (quantizer.channel_dim, quantizer.groups, quantizer.batch_dims)
        args = (weight.fxc_value, bits.fxc_value, exponent.fxc_value, *layout)  # type: ignore[attr-defined]
        call = Call(Quantizer, args, {}, (weight.fxc_value.meta,))
        (layers,) = QUANTIZE.labels(call, self.space)
        value = Value(weight.fxc_value.meta, layers)
        self.dispatch.tape.append(Step(QUANTIZE, call, (value,), self.space.node))
        return LabelTensor(value, self.dispatch, weight.device)

    def _pin_output(self, result: object) -> None:
        for tensor in find(LabelTensor, result):
            for layer in tensor.fxc_value.layers:
                self.space.pin(layer, "output", "it is an output of the network")


def _values(tree: Any) -> Any:  # noqa: ANN401 - a tree of anything
    if type(tree) is LabelTensor:
        return tree.fxc_value
    return replace(lambda t: t.fxc_value, LabelTensor, tree)


def _storages(tree: Any) -> frozenset[int]:  # noqa: ANN401 - a tree of anything
    if type(tree) is LabelTensor:
        return frozenset((tree.fxc_storage.key,))
    return frozenset(tensor.fxc_storage.key for tensor in find(LabelTensor, tree))


def _last_use(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """The nodes whose result is needed for the last time at each node."""
    seen: set[fx.Node] = set()
    result: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(graph.nodes):
        for used in (node, *node.all_input_nodes):
            if used not in seen:
                seen.add(used)
                result.setdefault(node, []).append(used)
    return result


def _run_message(node: fx.Node, layer: nn.Module | None, args: object, kwargs: object, error: Exception) -> str:
    shapes = ", ".join(str(tuple(t.shape)) for t in find(torch.Tensor, [args, kwargs]))
    what = place_of_node(node).in_full
    if any(True for _ in find(np.ndarray, [args, kwargs])):
        return (
            f"the example inputs hold numpy arrays, which {what} does not take\n  pass tensors: torch.from_numpy(array)"
        )
    own = "" if layer is None or layer._modules else f"; it is {layer}"
    failed = f"{what} failed on tensors of shape {shapes or 'none'}{own}\n  {type(error).__name__}: {error}"
    return f"the model does not run on the example inputs: {failed}"
