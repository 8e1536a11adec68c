"""What a network computes, but for its weights, in a few characters."""

import zlib
from typing import Any

import torch
from torch import fx

from fxcompress.trace.graph.guards import check, shape_of
from fxcompress.trace.traced import TracedModule

_PLAIN = (bool, int, float, complex, str, type(None), torch.dtype)


def fingerprint(module: fx.GraphModule, graph: fx.Graph | None = None) -> str:
    """Eight hexadecimal digits of the operations of a graph, with their arguments and the layers' settings.

    The order does not count in which operations run that do not need each other, nor where the code stands. Two
    networks of the same shapes that compute something else (another activation, another stride) differ in it, but for a
    chance of one in four billion.

    Args:
        module: has the layers that the graph calls.
        graph: of it; that of evaluation where it is left out.

    >>> from torch import nn
    >>> build = lambda act: fx.symbolic_trace(nn.Sequential(nn.Linear(3, 3), act))
    >>> fingerprint(build(nn.ReLU())) == fingerprint(build(nn.ReLU())) != fingerprint(build(nn.GELU()))
    True
    """
    digests: dict[fx.Node, int] = {}
    for node in (graph or module.graph).nodes:
        line = (node.op, _target(module, node), _described((_arguments(node), node.kwargs), digests))
        digests[node] = zlib.crc32(repr(line).encode())
    return f"{zlib.crc32(repr(sorted(digests.values())).encode()):08x}"


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    """Without the line of code that a check names: the same code may stand in another file, or further down."""
    return node.args[:-1] if node.target in {check, shape_of} else node.args


def _target(module: fx.GraphModule, node: fx.Node) -> str:
    if node.op == "call_module":
        layer = module.get_submodule(str(node.target))
        return f"{node.target} {type(layer).__qualname__} {layer.extra_repr()}"
    if isinstance(node.target, str):
        return node.target
    home, name = (str(getattr(node.target, key, None) or "") for key in ("__module__", "__qualname__"))
    return f"{home}.{name}" if home.partition(".")[0] == "torch" else name  # the user's may be called __main__


def _described(value: Any, digests: dict[fx.Node, int]) -> object:  # noqa: ANN401
    """Arguments in a form that does not depend on where things lie in memory."""
    if isinstance(value, fx.Node):
        return f"%{digests[value]}"
    if isinstance(value, tuple | list):
        return tuple(_described(part, digests) for part in value)
    if isinstance(value, dict):
        return tuple((str(key), _described(part, digests)) for key, part in value.items())
    if isinstance(value, slice):
        return ("slice", *(_described(part, digests) for part in (value.start, value.stop, value.step)))
    return value if isinstance(value, _PLAIN) else type(value).__qualname__


def same_graphs(a: TracedModule, b: TracedModule) -> bool:
    """Whether two networks have the same graph, in each mode."""
    pairs = [[(net, net.graphs.get(mode, net.graph)) for net in (a, b)] for mode in ("eval", "train")]
    return all(fingerprint(*one) == fingerprint(*other) for one, other in pairs)
