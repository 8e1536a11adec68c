"""Tracing with symbols, by torch.fx: right for inputs of any size, where the model takes no decision on them."""

import inspect
import linecache
import operator
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from functools import partial
from traceback import walk_tb
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import rnn

from fxcompress.errors import TraceError
from fxcompress.trace.autocast_watch import Regions
from fxcompress.trace.calls import IN_PLACE_OPERATORS, autograd_by, autograd_call
from fxcompress.trace.checkpoints import mark
from fxcompress.trace.chosen_forward import chosen_forward
from fxcompress.trace.depth import is_stochastic_depth
from fxcompress.trace.functional_attention import ATTENTION, can_be_opened, multi_head_attention
from fxcompress.trace.gradient_hooks import HOOKS, INSTEAD, KEEPS, WHAT
from fxcompress.trace.guards import check_given, check_left_out
from fxcompress.trace.hidden import NULLABLE, refuse_hidden
from fxcompress.trace.inputs import ExampleInputs
from fxcompress.trace.kinds import Kinds
from fxcompress.trace.lowering import Lowered
from fxcompress.trace.memory import Memory, Unread, refuse_layers_set
from fxcompress.trace.messages import is_message
from fxcompress.trace.mode_switches import switches
from fxcompress.trace.modes import without_gradient
from fxcompress.trace.objects import itself
from fxcompress.trace.places import is_users as runs_user_code
from fxcompress.trace.places import place, short, stack_trace
from fxcompress.trace.questions import answered, dispatches, has, is_users
from fxcompress.trace.state import unset
from fxcompress.trace.traced import TracedModule, copy_graph
from fxcompress.trace.unseen import Flags, Held, Unseen
from fxcompress.trace.walk import modules_in
from fxcompress.trace.weights.opened import is_opened
from fxcompress.trace.writer import with_plain_keys


class _StandIn:
    """Refuses what torch.fx would answer of the stand-in itself: which number, key or text it is."""

    def __int__(self) -> int:
        return self.tracer.refuse("be made numbers of Python")  # type: ignore[attr-defined,no-any-return]

    __float__ = __complex__ = __len__ = __int__

    def __reduce_ex__(self, protocol: object) -> Any:  # noqa: ANN401 - as of object
        return self.tracer.refuse("be copied by copy.copy, or pickled")  # type: ignore[attr-defined]

    def __hash__(self) -> int:
        if is_users(sys._getframe(1)):  # noqa: SLF001
            return self.tracer.refuse("be keys of a set or dict")  # type: ignore[attr-defined,no-any-return]
        return super().__hash__()

    def __repr__(self) -> str:
        frame = sys._getframe(1)  # noqa: SLF001
        if is_users(frame) and not is_message(frame):
            return self.tracer.refuse("be made text")  # type: ignore[attr-defined,no-any-return]
        return super().__repr__()


class _Attribute(_StandIn, fx.proxy.Attribute):
    """What stands for an attribute, and for what that has."""

    def __getattr__(self, k: str) -> fx.proxy.Attribute:
        return _Attribute(self, k)


class _Proxy(_StandIn, fx.Proxy):
    """fx.Proxy that keeps ``x += y`` in place; torch.fx makes ``x = x + y`` of it, which other names of x miss.

    It has the attributes of what it stands for, where that is known, and its class for ``functools.singledispatch``.
    """

    @property  # type: ignore[misc] # read-only
    def __class__(self) -> type:
        if not dispatches(sys._getframe(1)):  # noqa: SLF001
            return type(self)
        return self.tracer.kinds.asked(self.node)  # type: ignore[attr-defined,no-any-return]

    def __getattr__(self, k: str) -> fx.proxy.Attribute:
        kind = self.tracer.kinds.of(self.node)  # type: ignore[attr-defined]
        of_tensor = hasattr(Tensor, k)
        if kind is not None and not of_tensor and not has(kind, k):
            raise AttributeError(f"{kind.__name__!r} object has no attribute {k!r}")
        attribute = _Attribute(self, k)
        if k in NULLABLE or not (of_tensor and (kind is None or issubclass(kind, Tensor))):
            _ = attribute.node  # in the graph even where the code does no more than ask whether it is None
        return attribute

    def __setattr__(self, name: str, value: object) -> None:
        """Set an attribute of what it stands for.

        Raises:
            TraceError: a graph cannot do that.
        """
        if name == "requires_grad":
            self.tracer.create_proxy("call_method", "requires_grad_", (self, value), {})
        elif hasattr(Tensor, name):
            raise TraceError(f"it sets {name} of a tensor{place()}, which a graph cannot do")
        else:
            super().__setattr__(name, value)


def _in_place(function: Callable[..., object]) -> Callable[[fx.Proxy, object], fx.Proxy]:
    def record(self: fx.Proxy, other: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


for _operator in IN_PLACE_OPERATORS - {operator.imatmul}:  # which tensors do not have: x becomes another one
    for _class in (_Proxy, _Attribute):
        setattr(_class, f"__{_operator.__name__}__", _in_place(_operator))


_PLAIN = frozenset({type(None), bool, int, float, str})
"""Classes of arguments that stand for themselves."""
_OPEN = frozenset({nn.Unflatten, nn.Bilinear})
"""Layers of torch that are traced into: sizes of one may count channels that go, the weight of the other gets bits."""
_WHOLE = (rnn.pack_padded_sequence, rnn.pad_packed_sequence)


class Tracer(fx.Tracer):
    """fx.Tracer that leaves quantizers and everything of torch.nn whole, the packing of sequences too."""

    kinds: Kinds
    held: Held

    def __init__(self) -> None:
        super().__init__(autowrap_functions=_WHOLE)
        self.refusal: Exception | None = None
        self._autowrap_search.append(rnn)  # and where they are looked up in their module
        self.regions = Regions(self._function, lambda kind: kind, self._asked)
        self._without: dict[fx.Node, fx.Proxy] = {}  # each node that was read in a region without gradients
        self._names: dict[int, tuple[str, Tensor]] = {}  # of the tensors of the root, by id

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:  # noqa: ANN401
        """What code reads as an attribute of a module: a proxy for a parameter, and for a buffer if those are symbols.

        torch.fx looks through all tensors of the root at each read, which takes the square of the depth. Here they are
        listed once; what is not in the list, or no longer where it was, is left to torch.fx.
        """
        name = self._name_of(attr_val) if isinstance(attr_val, Tensor) else None
        if name is None:
            return super().getattr(attr, attr_val, parameter_proxy_cache)
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def _name_of(self, tensor: Tensor) -> str | None:
        """The name under which the root still holds a tensor that is to be a symbol."""
        if not self._names:
            named = [*self.root.named_parameters(), *self.root.named_buffers()]
            self._names = {id(own): (name, own) for name, own in reversed(named)}
        if id(tensor) not in self._names:
            return None
        path, _, leaf = self._names[id(tensor)][0].rpartition(".")
        owner: nn.Module | None = self.root
        for step in path.split(".") if path else ():
            owner = None if owner is None else owner._modules.get(step)
        parameter = isinstance(tensor, nn.Parameter) and owner is not None and owner._parameters.get(leaf) is tensor
        buffer = self.proxy_buffer_attributes and owner is not None and owner._buffers.get(leaf) is tensor
        return self._names[id(tensor)][0] if parameter or buffer else None

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:  # noqa: ANN401
        """A node of the graph that knows the lines of the user's code that made it."""
        node = super().create_node(*args, **kwargs)
        node.meta["stack_trace"] = stack_trace()
        mark(node)
        return node

    def create_arg(self, a: Any) -> Any:  # noqa: ANN401 - whatever code gives to a call
        """What stands for an argument in the graph; for proxies and numbers, as most are, without torch.fx's search."""
        kind = type(a)
        if kind is _Proxy:
            return a.node
        if kind is tuple:
            return tuple([self.create_arg(item) for item in a])
        if kind in _PLAIN or (kind is dict and not a):
            return a
        if isinstance(a, Unread):
            raise a.refusal
        if isinstance(a, Enum | OrderedDict):
            made = (itself(a), ()) if isinstance(a, Enum) else (OrderedDict, (dict(a),))
            return self.create_proxy("call_function", *made, {}).node
        if isinstance(a, np.generic):  # np.float64 is a float, whose name in code is not that of a number
            return a.item()
        return super().create_arg(with_plain_keys(a))

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *more: Any, **options: Any) -> fx.Proxy:  # noqa: ANN401
        """What stands for the result of a call.

        Where the code has turned gradients off, neither what the call reads nor what it returns has any: a graph knows
        no such region.

        Raises:
            TraceError: autocast has been switched in a way that no graph knows.
        """
        self.regions.refuse_unseen()
        if kind == "call_method" and target in HOOKS:
            raise TraceError(f"it {WHAT}{place()}, which a graph cannot do\n  {INSTEAD}")
        if kind == "call_method" and target == KEEPS:
            return None  # type: ignore[return-value]
        if target is ATTENTION and can_be_opened(args, kwargs):
            both: fx.Proxy = multi_head_attention(*args, **kwargs)  # type: ignore[assignment]
            return both
        if torch.is_grad_enabled() or not kind.startswith("call_"):
            return super().create_proxy(kind, target, args, kwargs, *more, **options)
        args, kwargs = fx.node.map_aggregate((args, kwargs), self._read)
        made = super().create_proxy(kind, target, args, kwargs, *more, **options)
        if kind != "call_module":  # whose parameters have gradients
            self._without[made.node] = made
        result: fx.Proxy = self._read(made)
        return result

    def _function(self, function: Callable[..., Any], args: tuple[Any, ...]) -> fx.Proxy:
        made: fx.Proxy = super().create_proxy("call_function", function, args, {})
        return made

    def _asked(self, *_question: object) -> NoReturn:
        raise TraceError(
            f"it asks whether autocast or inference mode is on{place()}, which may be so now and not in the next call"
        )

    def _read(self, argument: Any) -> Any:  # noqa: ANN401
        if not isinstance(argument, fx.Proxy):
            return argument
        if argument.node not in self._without:
            made = super().create_proxy("call_function", without_gradient, (argument,), {})
            self._without[argument.node] = self._without[made.node] = made
        return self._without[argument.node]

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Whether a stand-in is true, which nobody knows."""
        with self._refusing():
            return super().to_bool(obj)

    def iter(self, obj: fx.Proxy) -> Any:  # noqa: ANN401
        """What a stand-in holds: only where the code that reads it says how much."""
        with self._refusing():
            return super().iter(obj)

    def refuse(self, what: str) -> Any:  # noqa: ANN401
        """Raise an error that says what stand-ins cannot do, as nobody knows what they are for."""
        with self._refusing():
            raise fx.proxy.TraceError(f"symbolically traced variables cannot {what}")

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """Remember an error; it counts even where the model catches it, and goes another way."""
        try:
            yield
        except fx.proxy.TraceError as error:
            self.refusal = self.refusal or error
            raise

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """What stands for the result of ``node`` while tracing."""
        return _Proxy(node, self)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:  # noqa: ANN401
        """What stands for the result of a module, or what its code returns.

        Raises:
            TraceError: the code has put other tensors in the place of its own.
            TypeError: a layer does not take such arguments. The model finds that out as well, and may catch it.
        """
        if self.held.others_in(m):
            raise TraceError(f"a {type(m).__name__} is called with other tensors in the place of its own{place()}")
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            inspect.signature(m.forward).bind(*args, **kwargs)
            switches().called(path, m)
        return super().call_module(m, forward, args, kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module becomes one node; not those that :data:`_OPEN` holds, nor those that compute a weight."""
        if type(m) in _OPEN or is_opened(m):
            return False
        leaf = type(m).__module__.split(".")[0] in {"torch", "fxcompress"}
        leaf &= not isinstance(m, fx.GraphModule | Lowered)
        leaf |= isinstance(m, nn.RNNBase) and type(m).forward.__module__ == nn.RNNBase.__module__
        leaf |= is_stochastic_depth(m)
        return (leaf and not isinstance(m, nn.Sequential)) or super().is_leaf_module(m, module_qualified_name)


def symbolic_graph(
    root: nn.Module,
    readers: set[int],
    *,
    training: bool,
    inputs: ExampleInputs | None,
    symbols: bool,
    kept: set[str],
) -> fx.Graph:
    """The graph of ``root`` in one mode.

    Args:
        root: a skeleton of the model, a GraphModule perhaps.
        readers: filled by whoever watches the mode.
        training: the mode.
        inputs: arguments of ``forward`` that have a default and are not given here keep that default.
        symbols: buffers are symbols, like parameters; otherwise their values are at hand while tracing.
        kept: filled with the attributes that the code sets and may read in the next run.

    Raises:
        TraceError: torch.fx cannot do it.
    """
    constants = _defaults(root, inputs)
    if isinstance(root, fx.GraphModule) and not constants:
        train_graph = root.train_graph if isinstance(root, TracedModule) and training else None
        return copy_graph(train_graph or root.graph)
    root.train(training)
    before = [(module, dict(module._buffers)) for module in modules_in(root)]
    memory = Memory(root)
    go = partial(_go, root, constants or None, inputs, symbols=symbols, training=training)
    graph, changed = go(), memory.changed()
    memory.restore()
    refuse_layers_set(changed, graph)
    counts = {name for name, value in changed.items() if isinstance(value, int | float) and not isinstance(value, bool)}
    if counts:  # is anything computed from them?
        unset(root.train(training), frozenset(counts))
        go()
        memory.restore()
    kept |= changed.keys() - counts
    _refuse_assigned(before)
    _refuse_frozen(root, graph)
    _refuse_written(root, graph)
    _restore_names(graph, constants)
    _say_what_is_left_out(graph, constants)
    if inputs is not None:
        refuse_hidden(graph, inputs)
        _check_what_may_be_none(graph, root, inputs)
    for node in (n for f in _WHOLE for n in graph.find_nodes(op="call_function", target=f)):
        node.meta.pop("is_wrapped", None)  # or the code of the graph would have torch.fx wrap a name with dots
    return graph


def _go(
    root: nn.Module, constants: dict[str, Any] | None, inputs: ExampleInputs | None, *, symbols: bool, training: bool
) -> fx.Graph:
    tracer = Tracer()
    tracer.traced_func_name = chosen_forward(root) or "forward"
    tracer.proxy_buffer_attributes = symbols
    tracer.kinds, tracer.held = Kinds(root, inputs), Held(root)
    whole = autograd_by(_autograd(tracer))
    unseen, flags = Unseen(root, buffers=symbols), Flags()
    try:
        with (
            torch.enable_grad(), answered(tracer.kinds), whole, unseen, flags, switches().run(training=training),
            tracer.regions.watched(lambda: False),
        ):  # fmt: skip
            graph = tracer.trace(root, concrete_args=constants)
    except TraceError:
        raise
    except Exception as error:
        raise unseen.refusal or flags.refusal or TraceError(_trace_message(root, error)) from error
    refusal = unseen.refusal or flags.refusal
    if refusal is not None:  # the model has caught it, and gone another way
        raise refusal
    if tracer.refusal is not None:
        raise TraceError(_trace_message(root, tracer.refusal)) from tracer.refusal
    return graph


def _autograd(tracer: Tracer) -> Callable[..., Any]:
    """``apply`` of an autograd function, which becomes one node: its backward is not what its forward would give."""

    def called(kind: Any, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        if any(isinstance(arg, fx.Proxy) for arg in (*args, *kwargs.values())):
            return tracer.create_proxy("call_function", autograd_call(kind), args, kwargs)
        return own(*args, **kwargs)

    return called


def _refuse_assigned(before: list[tuple[nn.Module, dict[str, Tensor | None]]]) -> None:
    """A buffer that code puts another tensor in the place of: the graph would not do it. Puts the buffers back."""
    changed = [name for module, old in before for name in old if module._buffers.get(name) is not old[name]]
    for module, old in before:
        module._buffers.update(old)
    if changed:
        raise TraceError(
            f"forward puts a new tensor in the place of the buffer {changed[0]!r}, which a graph does not do: write to "
            f"it in place, as in self.{changed[0]}.copy_(...)"
        )


def _refuse_frozen(root: nn.Module, graph: fx.Graph) -> None:
    """What was computed from a parameter, past torch.fx, would stay what it is when the parameter changes."""
    for node in graph.find_nodes(op="get_attr"):
        value = root.__dict__.get(str(node.target))
        if isinstance(value, Tensor) and value.grad_fn is not None:
            raise TraceError(
                f"{type(root).__name__} computes with a parameter in a way that torch.fx does not see (a tensor of "
                f"shape {tuple(value.shape)}); read parameters as attributes of their module"
            )


_SPECIALIZED = " has been specialized to have value "
"""How torch.fx says that an argument has another value than the one that it was traced with."""
_SAME_MEMORY = frozenset(
    {
        "to", "type_as", "float", "double", "contiguous", "detach", "view", "view_as", "reshape", "flatten",
        "unflatten", "expand", "expand_as", "squeeze", "unsqueeze", "t", "transpose", "permute", "select", "narrow",
        "getitem",
    }
)  # fmt: skip


def _refuse_written(root: nn.Module, graph: fx.Graph) -> None:
    """A tensor that forward makes anew in each run is one tensor in the graph: what is written to it would add up."""
    open_ = [n for n in graph.find_nodes(op="get_attr") if str(n.target).startswith("_tensor_constant")]
    open_ = [n for n in open_ if isinstance(root.__dict__.get(str(n.target)), Tensor)]
    for node in open_:
        for user in (u for u in node.users if u.args and u.args[0] is node):
            name = str(user.target) if user.op == "call_method" else getattr(user.target, "__name__", "")
            inplace = user.target in _WRITING or (name.endswith("_") and not name.endswith("__"))
            if inplace:
                raise TraceError(
                    f"{type(root).__name__} makes a tensor and writes to it ({name}), and torch.fx would make it once "
                    "and for all; compute it without writing in place"
                )
            open_ += [user] if name in _SAME_MEMORY else []


_WRITING = IN_PLACE_OPERATORS | {operator.setitem}


def _trace_message(root: nn.Module, error: Exception) -> str:
    kind = type(root).__name__
    if "co_varnames" in str(error):  # how torch.fx fails to call it
        return f"torch.fx cannot trace {kind}: its forward is wrapped by a decorator, which takes any arguments"
    where = ""
    user = [(frame, number) for frame, number in walk_tb(error.__traceback__) if runs_user_code(frame)]
    if user:
        frame, number = user[-1]
        file = frame.f_code.co_filename
        # There is none where torch.fx has patched the code of a function with *args; so inspect would fail.
        number = number or frame.f_code.co_firstlineno
        line = linecache.getline(file, number, frame.f_globals).strip()
        where = f" at {short(file)}:{number}" + (f"\n    {line}" if line else "")
    return (
        f"torch.fx cannot trace {kind}: {error}{where}\n"
        "  control flow that depends on values or shapes cannot become a graph: move it into a function marked with "
        "torch.fx.wrap, or out of the model"
    )


def _defaults(root: nn.Module, inputs: ExampleInputs | None) -> dict[str, Any]:
    """Arguments of forward that keep their default value: those with one that the example inputs leave out."""
    if isinstance(root, fx.GraphModule):
        return {}
    parameters = list(inspect.signature(root.forward).parameters.values())
    given = inputs.names([p.name for p in parameters]) if inputs is not None else frozenset()
    skip = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    return {
        p.name: p.default
        for p in parameters
        if p.kind not in skip and p.default is not inspect.Parameter.empty and p.name not in given
    }


def _restore_names(graph: fx.Graph, constants: dict[str, Any]) -> None:
    """concrete_args renames the placeholders that it fixes (``mask`` to ``mask_1``); calls by keyword need the name."""
    for node in graph.find_nodes(op="placeholder"):
        name = node.target.rpartition("_")[0]
        if name in constants:
            node.target = name


def _check_what_may_be_none(graph: fx.Graph, root: nn.Module, inputs: ExampleInputs) -> None:
    """Let a graph check that what is given now, and may be None by the signature of forward, is given later as well."""
    parameters = inspect.signature(root.forward).parameters
    given = inputs.names(list(parameters))
    nodes = graph.find_nodes(op="placeholder")
    with graph.inserting_after(nodes[-1] if nodes else None):
        for node in reversed(nodes):
            own = parameters.get(str(node.target))
            if own is not None and own.name in given and (own.default is None or "None" in str(own.annotation)):
                graph.call_function(check_given, (node, own.name))


def _say_what_is_left_out(graph: fx.Graph, constants: dict[str, Any]) -> None:
    """Let the checks that torch.fx writes for concrete_args tell the user what to do."""
    for node in graph.nodes:
        told = node.args[1] if node.op == "call_function" and len(node.args) == 2 else None
        name = told.partition(_SPECIALIZED)[0] if isinstance(told, str) and _SPECIALIZED in told else ""
        if name not in constants:
            continue
        if constants[name] is None:
            node.target, node.args = check_left_out, (node.args[0], name)
        else:
            node.update_arg(1, (
                f"forward was traced with {name}={constants[name]!r}, its default, as the example inputs leave it out, "
                "and is called with another value: pass example_inputs that hold it"
            ))  # fmt: skip
