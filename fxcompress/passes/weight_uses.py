"""Which weights of a graph can take a quantizer, and where they are read."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from fxcompress.passes.weight_steps import WeightSteps, asks_for_kind, last_write
from fxcompress.quantizer.given import QUANTIZED, SIZED, weight_names
from fxcompress.trace.graph.names import fetch_attr
from fxcompress.trace.traced import TracedModule
from fxcompress.trace.weights.reads import FUNCTIONS, LOOKUPS, PRODUCTS

MODULES: dict[type[nn.Module], Callable[..., Any]] = {
    nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d, nn.Linear: F.linear,
    nn.ConvTranspose1d: F.conv_transpose1d, nn.ConvTranspose2d: F.conv_transpose2d,
    nn.ConvTranspose3d: F.conv_transpose3d,
}  # fmt: skip
"""Layers with a weight and a bias, and the function that each of them calls."""
TABLES: dict[type[nn.Module], Callable[..., Any]] = {nn.Embedding: F.embedding, nn.EmbeddingBag: F.embedding_bag}
"""Layers that look up rows of a table, and the function that each of them calls."""
_TRANSPOSED = {F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}


@dataclass(frozen=True, slots=True)
class Use:
    """One place where a weight is read by an op that can take a quantized one.

    Attributes:
        graph, node: the place.
        weight: a name of the parameter.
        transposed: whether its outputs lie along dim 1.
        groups: of a convolution.
        given: whether the node calls a layer that is given its weights, of which it is one; see
            :mod:`fxcompress.quantizer.given`.
        computed: whether the node is the first of some steps that compute what a layer reads (turned, masked, scaled).
        looked_up: whether it is a table.
    """

    graph: fx.Graph
    node: fx.Node
    weight: str
    transposed: bool
    groups: int
    given: bool = False
    computed: bool = False
    looked_up: bool = False


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a weight holds its channels; see :class:`~fxcompress.quantizer.Quantizer`."""

    channel_dim: int
    groups: int = 1
    batch_dims: tuple[int, ...] = ()


def uses_of(module: TracedModule) -> list[Use]:
    """Every place in every graph where a parameter is read as a weight or as a table."""
    found: list[Use] = []
    for graph in module.graphs.values():
        steps = WeightSteps(module, graph)
        for node in graph.nodes:
            found += _uses(module, graph, node) or _computed_uses(graph, node, steps)
    return found


def is_quantizable(module: TracedModule) -> bool:
    """Whether :func:`inject_quantizers` would find a weight."""
    return bool(quantizable(module, uses_of(module)))


def quantizable(module: TracedModule, uses: list[Use]) -> dict[str, Layout]:
    """The weights that may be quantized, by their first names."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    first: dict[int, str] = {}
    for name, parameter in parameters.items():
        first.setdefault(id(parameter), name)
    readers: dict[int, list[Use]] = {}
    for use in uses:
        if use.weight in parameters:
            readers.setdefault(id(parameters[use.weight]), []).append(use)
    reads = _reads(module, parameters, readers)
    found: dict[str, Layout] = {}
    for key, own in readers.items():
        name, layout = first[key], _layout(own)
        parameter = parameters[name]
        trained = parameter.requires_grad and parameter.is_floating_point()
        alone = _readers(own) == reads.get(key)
        if trained and parameter.numel() and parameter.ndim >= 2 and alone and layout is not None:
            found[name] = layout
    return found


def _readers(uses: list[Use]) -> int:
    """How many nodes read a weight with these uses; of one that computes a weight, several layers may be behind."""
    return sum(not use.computed for use in uses) + len({use.node for use in uses if use.computed})


def _layout(uses: list[Use]) -> Layout | None:
    """Where a weight with these uses has its channels; None where groups do not let them agree.

    The channels of a table are its columns. A linear layer that is tied to one reads them: its bits are those of its
    inputs. Its outputs could not go anyway, as the rows of the table are looked up. Where layers read a weight both
    ways, as encoder and decoder of a tied autoencoder do, its channels are those of the first one.
    """
    tied = any(use.looked_up for use in uses)
    layouts = [Layout(int(tied or use.transposed), use.groups if use.transposed else 1) for use in uses]
    if len(set(layouts)) > 1 and any(layout.groups > 1 for layout in layouts):
        return None
    return layouts[0]


def _reads(module: TracedModule, parameters: dict[str, nn.Parameter], uses: dict[int, list[Use]]) -> dict[int, int]:
    """How many nodes read the values of each parameter, in all graphs, by its id; not those that write before all uses.

    Args:
        module: a traced network.
        parameters: by all of their names.
        uses: of each parameter, by its id.
    """
    reads: dict[int, int] = {}
    for graph in module.graphs.values():
        for node in graph.nodes:
            if node.op == "get_attr" and str(node.target) in parameters:
                key = id(parameters[str(node.target)])
                own = [use.node for use in uses.get(key, []) if use.graph is graph]
                users = [user for user in node.users if not asks_for_kind(user) and not _is_written_before(user, own)]
                reads[key] = reads.get(key, 0) + len(users)
            elif node.op == "call_module":
                for parameter in module.get_submodule(str(node.target)).parameters():
                    reads[id(parameter)] = reads.get(id(parameter), 0) + 1
    return reads


def _is_written_before(node: fx.Node, uses: list[fx.Node]) -> bool:
    """Whether a node only writes to a parameter, and before all of these: they read what is there then."""
    written = last_write(node)
    return written is not None and all(written < use for use in uses)


def _uses(module: TracedModule, graph: fx.Graph, node: fx.Node) -> list[Use]:
    layer = module.get_submodule(str(node.target)) if node.op == "call_module" else None
    if layer is not None and type(layer) in QUANTIZED:
        names = [name for name in weight_names(layer) if layer.get_parameter(name).ndim > 1]
        return [Use(graph, node, f"{node.target}.{name}", False, 1, given=True) for name in names]
    use = _use(module, graph, node) if layer is None else _use_by_module(graph, node, layer)
    return [] if use is None else [use]


def _use(module: TracedModule, graph: fx.Graph, node: fx.Node) -> Use | None:
    if node.op == "call_function" and node.target in FUNCTIONS:
        weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
        groups = node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)
        if _is_read(weight) and isinstance(groups, int):
            return Use(graph, node, str(weight.target), node.target in _TRANSPOSED, groups)
    elif node.op == "call_function" and node.target in LOOKUPS:
        given = _arguments(node)
        weight = given["weight"]
        if _is_read(weight) and _is_dense(given["sparse"], given["max_norm"]):
            return Use(graph, node, str(weight.target), transposed=True, groups=1, looked_up=True)
    elif node.op in {"call_function", "call_method"} and len(node.args) > PRODUCTS.get(node.target, len(node.args)):
        weight = node.args[PRODUCTS[node.target]]
        if _is_read(weight) and _rank(module, str(weight.target)) == 2:
            return Use(graph, node, str(weight.target), transposed=True, groups=1)
    return None


def _computed_uses(graph: fx.Graph, node: fx.Node, steps: WeightSteps) -> list[Use]:
    """The layers behind a node that reads a parameter and computes their weights, if their channels are dims of it."""
    found = []
    for reading in steps.readings(node):
        layer = reading.layer
        product = layer.target in PRODUCTS
        groups = 1 if product else layer.args[6] if len(layer.args) > 6 else layer.kwargs.get("groups", 1)
        transposed = layer.target in _TRANSPOSED
        dim = reading.dims[int(product or transposed)]
        if dim > 1 or (product and len(reading.dims) != 2) or not isinstance(groups, int):
            return []
        if transposed and groups > 1 and dim != 1:
            return []
        found.append(Use(graph, node, reading.weight, dim == 1, groups, computed=True))
    return found


def _use_by_module(graph: fx.Graph, node: fx.Node, layer: nn.Module) -> Use | None:
    weight = f"{node.target}.weight"
    if type(layer) in TABLES and node.args and _is_dense(layer.sparse, layer.max_norm):
        return Use(graph, node, weight, transposed=True, groups=1, looked_up=True)
    if type(layer) in MODULES and len(node.args) == 1 and not node.kwargs:
        groups = layer.groups if isinstance(layer, _ConvNd) else 1
        return Use(graph, node, weight, isinstance(layer, _ConvTransposeNd), groups)
    if isinstance(layer, _ConvTransposeNd) and type(layer) in SIZED:
        return Use(graph, node, weight, transposed=True, groups=layer.groups, given=True)
    return None


def _is_read(weight: object) -> TypeGuard[fx.Node]:
    return isinstance(weight, fx.Node) and weight.op == "get_attr"


def _is_dense(sparse: object, max_norm: object) -> bool:
    """Whether lookups leave the table as it is, and its gradient is an ordinary tensor."""
    return sparse is False and max_norm is None


def _arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a lookup by name."""
    assert callable(node.target)
    bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    return bound.arguments


def _rank(module: TracedModule, name: str) -> int:
    found = fetch_attr(module, name)
    return found.ndim if isinstance(found, nn.Parameter) else 0
