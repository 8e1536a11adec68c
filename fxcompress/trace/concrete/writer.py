"""The graph that a concrete trace writes: nodes, attributes of the module, numbers, checks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from fxcompress.errors import TraceError
from fxcompress.trace.basics.trees import fields_of, rebuild
from fxcompress.trace.code.locations import place, stack_trace
from fxcompress.trace.concrete.asserts import only_stops
from fxcompress.trace.concrete.sizes import Number, Recipe, kept_number
from fxcompress.trace.graph.checkpoints import mark
from fxcompress.trace.graph.guards import ONLY_STOPS, check, is_check
from fxcompress.trace.graph.objects import attributes_of, itself, restored
from fxcompress.trace.graph.plain_values import is_plain, with_plain_keys

_CONVERSIONS = (int, float, bool, len, round)


class Writer:
    """Knows the node behind each tensor, number and device of a trace.

    Args:
        constant: gives a name to a tensor that is neither an input nor an attribute of the module, and keeps it there.

    Attributes:
        graph: what is written.
        silent: decisions are not written down.
        closed: the run is over; whoever still asks has kept a number of it for the next one.
        conditions: what code has asked for only to raise an error.
    """

    def __init__(self, constant: Callable[[Tensor], str]) -> None:
        self.graph = fx.Graph()
        self.silent = False
        self.closed = False
        self.conditions: list[fx.Node] = []
        self._constant = constant
        self._nodes: dict[int, fx.Node] = {}
        self._refused: dict[int, TraceError] = {}
        self._names: dict[int, str] = {}
        self._attributes: dict[str, fx.Node] = {}
        self._recipes: dict[tuple[object, ...], Recipe] = {}
        self._made: dict[int, fx.Node] = {}
        self._decided: set[tuple[int, str]] = set()
        self._module: dict[str, tuple[str, type]] = {}
        self._alive: list[object] = []  # an id stands for one object only as long as that object lives

    def node(self, op: str, target: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> fx.Node:  # noqa: ANN401
        """Write a node; tensors, numbers and devices among its arguments become the nodes that they come from."""
        node = self.graph.create_node(op, target, self.written(args), self.written(kwargs or {}))
        node.stack_trace = stack_trace()
        mark(node)
        if self._module:
            node.meta["nn_module_stack"] = self._module
        if is_check(node) or target in _CONVERSIONS:
            node.meta["is_wrapped"] = True  # or unpickling, which traces again, would go into it
        return node

    @contextmanager
    def inside(self, path: str | None, kind: type) -> Iterator[None]:
        """Nodes are written for a module's code; None where the module is none of the model's."""
        outer = self._module
        if path:
            self._module = {path: (path, kind)}  # the last entry of what torch.fx keeps under this name
        try:
            yield
        finally:
            self._module = outer

    def written(self, tree: Any) -> Any:  # noqa: ANN401
        """Arguments or results as they stand in the graph.

        Raises:
            TraceError: one is of a kind that cannot be written into a graph.
        """
        return rebuild(self._written, with_plain_keys(tree), self.named)

    def named(self, kind: type, items: list[Any]) -> fx.Node:
        """A named tuple by a node of its own: in a dict, the code that torch.fx makes would not know its class."""
        return self.node("call_function", kind, tuple(items))

    def _written(self, leaf: Any) -> Any:  # noqa: ANN401
        if isinstance(leaf, Tensor):
            return self.node_of(leaf)
        if isinstance(leaf, Number):
            if leaf.fxc_decider is not self:
                raise kept_number()
            return self.made(leaf.fxc_recipe)
        if isinstance(leaf, fx.Node) or id(leaf) in self._nodes:
            return self._nodes.get(id(leaf), leaf)
        if is_plain(leaf) or isinstance(leaf, np.generic):  # of numpy's the number that it is, as torch takes it
            return leaf.item() if isinstance(leaf, np.generic) else leaf
        if isinstance(leaf, Enum):
            return self.node("call_function", itself(leaf))
        parts = fields_of(leaf)
        if parts is not None:
            return self.node("call_function", *parts)
        raise TraceError(
            f"a {type(leaf).__name__}{place()} goes into a call or into the result; a graph cannot hold it\n"
            "  leave it out where the model has an option for that, such as use_cache=False for the caches of Hugging "
            "Face's models"
        )

    def result_of(self, tree: Any, held: set[int]) -> Any:  # noqa: ANN401
        """The result of the model as it stands in the graph; objects that the model has made are made again.

        Args:
            tree: the result.
            held: ids of the objects that were there before the model ran, and must stay the same ones.

        Raises:
            TraceError: something in it cannot be written into a graph.
        """
        return rebuild(_Results(self, held), with_plain_keys(tree), self.named)

    def has_node(self, thing: object) -> bool:
        """Whether something is a node, or the result of one."""
        return isinstance(thing, fx.Node) or id(thing) in self._nodes

    def bind(self, thing: object, node: fx.Node) -> None:
        """Tell that a tensor or device is the result of ``node``."""
        self._alive.append(thing)
        self._nodes[id(thing)] = node

    def name(self, tensor: Tensor, name: str) -> None:
        """Tell that a tensor is an attribute of the module; of several names the first counts."""
        self._alive.append(tensor)
        self._names.setdefault(id(tensor), name)

    def keep(self, tensor: Tensor, value: Tensor) -> None:
        """Tell that a tensor stands for a constant."""
        self._alive.append(value)
        self.name(tensor, self._constant(value))

    def refuse(self, tensor: Tensor, error: TraceError) -> None:
        """Tell what is raised where a tensor is asked for that no node makes."""
        self._alive.append(tensor)
        self._refused[id(tensor)] = error

    def knows(self, tensor: Tensor) -> bool:
        """Whether the tensor has come from somewhere already."""
        return id(tensor) in self._nodes or id(tensor) in self._names

    def node_of(self, tensor: Tensor) -> fx.Node:
        """The node that makes a tensor, or reads it off the module."""
        if id(tensor) in self._nodes:
            return self._nodes[id(tensor)]
        if id(tensor) in self._refused:
            raise self._refused[id(tensor)]
        if id(tensor) not in self._names:
            if not _is_real(tensor):
                raise hidden("a tensor")
            self.name(tensor, self._constant(tensor))
        name = self._names[id(tensor)]
        if name not in self._attributes:
            self._attributes[name] = self.graph.get_attr(name)
        return self._attributes[name]

    def recipe(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Recipe:
        """The one recipe of this kind."""
        key = (function, *(id(a) if isinstance(a, Recipe | fx.Node) else (type(a), a) for a in args))
        if key not in self._recipes:
            sizes = dict.fromkeys(size for a in args if isinstance(a, Recipe) for size in a.sizes)
            self._recipes[key] = Recipe(function, args, tuple(sizes))
        return self._recipes[key]

    def read(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Recipe:
        """The recipe of a number that is read off a tensor."""
        found = self.recipe(function, args)
        if not found.sizes:
            object.__setattr__(found, "sizes", (found,))
        return found

    def made(self, recipe: Recipe) -> fx.Node:
        """The node that computes a number, written where it is first needed."""
        if id(recipe) not in self._made:
            args = tuple(self.made(a) if isinstance(a, Recipe) else a for a in recipe.args)
            self._made[id(recipe)] = self.node("call_function", recipe.function, args)
        return self._made[id(recipe)]

    def result(self, node: fx.Node) -> Recipe:
        """The recipe of a number that a node returns."""
        recipe = Recipe(getattr, (node,))
        object.__setattr__(recipe, "sizes", (recipe,))
        self._alive.append(recipe)
        self._made[id(recipe)] = node
        return recipe

    def decide(self, recipe: Recipe, outcome: object) -> None:
        """Write a check that ``recipe`` comes out as it does now."""
        key = (id(recipe), repr(outcome))
        if self.silent or key in self._decided:
            return
        if self.closed:
            raise kept_number()
        self._decided.add(key)
        if not is_plain(outcome):
            raise TraceError(f"it reads a {type(outcome).__name__} off a tensor{place()}, which a graph cannot check")
        sizes = tuple(self.made(size) for size in recipe.sizes)
        node = self.node("call_function", check, (self.made(recipe), outcome, sizes, place()))
        if only_stops(outcome):
            node.meta[ONLY_STOPS] = True


class _Results:
    """Writes what is in a result."""

    def __init__(self, writer: Writer, held: set[int]) -> None:
        self.writer = writer
        self.held = held
        self.made: dict[int, fx.Node] = {}
        self.begun: set[int] = set()

    def __call__(self, leaf: Any) -> Any:  # noqa: ANN401
        parts = fields_of(leaf)
        if parts is not None:
            kind, args, kwargs = parts
            return self.writer.node(
                "call_function", kind, *(rebuild(self, part, self.writer.named) for part in (args, kwargs))
            )
        if (
            isinstance(leaf, Tensor | Number | Enum)
            or is_plain(leaf)
            or id(leaf) in self.held
            or self.writer.has_node(leaf)
        ):
            return self.writer.written(leaf)
        if isinstance(leaf, type):
            return self.writer.node("call_function", itself(leaf))
        attributes = attributes_of(leaf)
        if attributes is None or id(leaf) in self.begun - self.made.keys():  # a container of its own, or in itself
            return self.writer.written(leaf)
        if id(leaf) not in self.made:
            self.begun.add(id(leaf))
            state = rebuild(self, attributes, self.writer.named)
            self.made[id(leaf)] = self.writer.node("call_function", restored, (self(type(leaf)), state))
        return self.made[id(leaf)]


def _is_real(tensor: Tensor) -> bool:
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)  # noqa: SLF001
    return type(tensor) in {Tensor, torch.nn.Parameter} and not tensor.is_meta and not wrapped


def hidden(what: str) -> TraceError:
    """The error for what comes from where a trace does not see."""
    return TraceError(
        f"{what} comes from a call that torch does not show{place()}: a ScriptModule, vmap, another language\n"
        "  put that call into a function marked with torch.fx.wrap"
    )
