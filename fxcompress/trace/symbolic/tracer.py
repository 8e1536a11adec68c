"""torch.fx's tracer as this project wants it: which modules are leaves, and what becomes of calls without gradients."""

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import rnn

from fxcompress.errors import TraceError
from fxcompress.trace.basics.precision import without_gradient
from fxcompress.trace.code.locations import place, stack_trace
from fxcompress.trace.effects.attributes import Unread
from fxcompress.trace.effects.autocast_regions import AutocastRegions
from fxcompress.trace.effects.gradient_hooks import HOOKS, INSTEAD, KEEPS, WHAT
from fxcompress.trace.effects.held_tensors import HeldTensors
from fxcompress.trace.graph.checkpoints import mark
from fxcompress.trace.graph.objects import itself
from fxcompress.trace.graph.plain_values import with_plain_keys
from fxcompress.trace.model.functional_attention import ATTENTION, can_be_opened, multi_head_attention
from fxcompress.trace.model.lowering import Lowered
from fxcompress.trace.model.mode_switches import switches
from fxcompress.trace.model.stochastic_depth import is_stochastic_depth
from fxcompress.trace.symbolic.node_types import NodeTypes
from fxcompress.trace.symbolic.proxies import Proxy
from fxcompress.trace.weights.opened import is_opened

_PLAIN = frozenset({type(None), bool, int, float, str})
"""Classes of arguments that stand for themselves."""
_OPEN = frozenset({nn.Unflatten, nn.Bilinear})
"""Layers of torch that are traced into: sizes of one may count channels that go, the weight of the other gets bits."""
WHOLE = (rnn.pack_padded_sequence, rnn.pad_packed_sequence)


class Tracer(fx.Tracer):
    """fx.Tracer that leaves quantizers and everything of torch.nn whole, the packing of sequences too."""

    kinds: NodeTypes
    held: HeldTensors

    def __init__(self) -> None:
        super().__init__(autowrap_functions=WHOLE)
        self.refusal: Exception | None = None
        self._autowrap_search.append(rnn)  # and where they are looked up in their module
        self.regions = AutocastRegions(self._function, lambda kind: kind, self._asked)
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
        if kind is Proxy:
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
        return Proxy(node, self)

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
