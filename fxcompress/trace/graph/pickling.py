"""Graphs in a form that pickle can take, node by node.

torch.fx pickles a GraphModule by its code, which is traced again when it is read: that knows neither a second graph
for training, nor what the nodes have been told (the layer that a function came from), nor a class of its own.
"""

import importlib
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import _get_qualified_name

_STACK = "nn_module_stack"


@dataclass(frozen=True, slots=True)
class _Node:
    """Stands for a node of the graph."""

    number: int


@dataclass(frozen=True, slots=True)
class _Named:
    """Stands for a function, a class or a memory format, which are found by their name."""

    name: str


@dataclass(frozen=True, slots=True)
class PackedGraph:
    """A graph as plain values.

    Attributes:
        nodes: op, name, target, args, kwargs, type and metadata of each.
        codegen: that writes the code of the graph.
    """

    nodes: tuple[tuple[Any, ...], ...]
    codegen: Any


def pack(graph: fx.Graph) -> PackedGraph:
    """What a graph is made of; metadata that is more than numbers and strings is left out.

    Raises:
        PicklingError: it calls something that cannot be found by its name.
    """
    numbers = {node: _Node(number) for number, node in enumerate(graph.nodes)}

    def packed(leaf: Any) -> Any:  # noqa: ANN401 - an argument of a node
        if isinstance(leaf, torch.memory_format):  # which torch.save cannot take
            return _Named(str(leaf))
        return numbers[leaf] if isinstance(leaf, fx.Node) else _named(leaf) if callable(leaf) else leaf

    rows = [
        (n.op, n.name, packed(n.target), *fx.node.map_aggregate((n.args, n.kwargs), packed), n.type, _plain(n.meta))
        for n in graph.nodes
    ]
    return PackedGraph(tuple(rows), graph._codegen)


def unpack(packed: PackedGraph) -> fx.Graph:
    """The graph that :func:`pack` has taken apart."""
    graph = fx.Graph()
    nodes: list[fx.Node] = []

    def leaf(value: Any) -> Any:  # noqa: ANN401
        return (
            nodes[value.number] if isinstance(value, _Node) else _found(value) if isinstance(value, _Named) else value
        )

    for op, name, target, args, kwargs, kind, meta in packed.nodes:
        given = fx.node.map_aggregate((args, kwargs), leaf)
        node = graph.create_node(op, leaf(target), *given, name=name, type_expr=kind)
        node.meta.update(meta)
        nodes.append(node)
    graph._codegen = packed.codegen
    return graph


def _plain(meta: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {
        key: value for key, value in meta.items() if isinstance(value, str | int | float | bool | None)
    }
    if _STACK in meta:
        found[_STACK] = {key: (path, str(kind)) for key, (path, kind) in meta[_STACK].items()}
    return found


def _named(target: Callable[..., Any]) -> Any:  # noqa: ANN401 - a name, or what pickle can take by itself
    name = _name_of(target)
    if name is not None and _found(_Named(name)) is target:
        return _Named(name)
    try:
        pickle.dumps(target)
    except Exception as error:
        raise pickle.PicklingError(
            f"the graph calls {target!r}, which cannot be found by its name: {error}; keep the network by "
            "save_checkpoint() in training, or by save() when it is finalized"
        ) from error
    return target


def _name_of(target: Any) -> str | None:  # noqa: ANN401 - a function, a class or an object that can be called
    own = f"{getattr(target, '__module__', None)}.{getattr(target, '__qualname__', None)}"
    if _found(_Named(own)) is target:
        return own
    try:
        return _get_qualified_name(target)
    except (AttributeError, RuntimeError):
        return None


def _found(named: _Named) -> Any:  # noqa: ANN401
    """What has this name; None where there is nothing."""
    parts = named.name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        for part in parts[length:]:
            found = getattr(found, part, None)
        return found
    return None
