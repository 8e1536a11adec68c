"""Puts a quantizer between each weight and the convolution or linear layer that reads it.

x -> conv1 (call_module)                  conv1.weight (O, I, 3, 3) -> conv1.weight_quantizer
->                                          |
x ------------------------------> F.conv2d
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from fxcompress.passes.base import Pass, PassResult, traced
from fxcompress.quantizer import Quantizer
from fxcompress.trace.traced import TracedModule
from fxcompress.trace.weights.reads import FUNCTIONS, PRODUCTS

MODULE_KEY = "fxcompress_module"
"""In a node's meta: the module that the node computes, with the quantized weight in the place of its own."""
BORDER_KEY = "fxcompress_border"
"""In a node's meta: the module that pads its input as this node does; no padding of the user's carries it."""

MODULES: dict[type[nn.Module], Callable[..., Any]] = {
    nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d, nn.Linear: F.linear,
    nn.ConvTranspose1d: F.conv_transpose1d, nn.ConvTranspose2d: F.conv_transpose2d,
    nn.ConvTranspose3d: F.conv_transpose3d,
}  # fmt: skip
"""Layers with a weight and a bias, and the function that each of them calls."""
_TRANSPOSED = {F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}


@dataclass(frozen=True, slots=True)
class _Use:
    """One place where a weight is read by an op that can take a quantized one; ``transposed``: outputs along dim 1."""

    graph: fx.Graph
    node: fx.Node
    weight: str
    transposed: bool
    groups: int


@dataclass(frozen=True, slots=True)
class InjectQuantizers(Pass):
    """Give each output channel of each weight a quantizer with trained bits and exponent.

    Weights of conv 1d, 2d, 3d, their transposed forms and linear, as modules or as functional calls on a parameter, and
    matrices that inputs are multiplied with (``x @ self.weight``, or ``addmm`` as in the layers of GPT-2). A
    weight that is frozen, or that something else reads as well (a tied embedding), gets none;
    neither does one that is complex or empty.

    Attributes:
        bits: bit depth to start with.
    """

    bits: float = 8.0

    def __call__(self, module: fx.GraphModule) -> PassResult:
        """A copy with quantizers, which has parameters of its own."""
        result = copy.deepcopy(traced(module))
        return PassResult(result, bool(inject_quantizers(result, self.bits)))


def inject_quantizers(module: TracedModule, bits: float) -> dict[str, str]:
    """Put quantizers into ``module``, in place.

    Returns:
        the name of each new quantizer, by the name of its weight.
    """
    uses = [use for graph in module.graphs.values() for use in _uses(module, graph)]
    names = _quantizable(module, uses)
    made: dict[str, str] = {}
    nodes: dict[tuple[fx.Graph, str], fx.Node] = {}
    for use in uses:
        weight = names.get(use.weight)
        if weight is None:
            continue
        if weight not in made:
            made[weight] = _add(module, weight, use, bits)
        if use.node.op == "call_module":
            _to_function(module, use.node)
        key = (use.graph, weight)
        if key not in nodes:
            nodes[key] = _quantized(use, weight, made[weight])
        _read(use.node, nodes[key])
    for graph in module.graphs.values():
        for node in reversed(graph.find_nodes(op="get_attr")):
            if not node.users:
                graph.erase_node(node)
        graph.lint()
    module.recompile()
    return made


def is_quantizable(module: TracedModule) -> bool:
    """Whether :func:`inject_quantizers` would find a weight."""
    return bool(_quantizable(module, [use for graph in module.graphs.values() for use in _uses(module, graph)]))


def layer_reads(module: TracedModule, weight: nn.Parameter) -> list[fx.Node]:
    """The nodes that read ``weight`` as the weight of a convolution, a linear layer or a product."""
    names = {name for name, p in module.named_parameters(remove_duplicate=False) if p is weight}
    return [use.node for graph in module.graphs.values() for use in _uses(module, graph) if use.weight in names]


def _add(module: TracedModule, weight: str, use: _Use, bits: float) -> str:
    groups = use.groups if use.transposed else 1
    parameter = module.get_parameter(weight)
    quantizer = Quantizer.for_weight(parameter, bits=bits, channel_dim=int(use.transposed), groups=groups)
    owner, _, leaf = weight.rpartition(".")
    module.get_submodule(owner).add_module(f"{leaf}_quantizer", quantizer)
    return f"{weight}_quantizer"


def _uses(module: TracedModule, graph: fx.Graph) -> Iterator[_Use]:
    for node in graph.nodes:
        if node.op == "call_module":
            layer = module.get_submodule(str(node.target))
            plain = len(node.args) == 1 and not node.kwargs
            if type(layer) in MODULES and plain:
                groups = layer.groups if isinstance(layer, _ConvNd) else 1
                yield _Use(graph, node, f"{node.target}.weight", isinstance(layer, _ConvTransposeNd), int(groups))
        elif node.op == "call_function" and node.target in FUNCTIONS:
            weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
            if isinstance(weight, fx.Node) and weight.op == "get_attr":
                groups = node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)
                if isinstance(groups, int):
                    yield _Use(graph, node, str(weight.target), node.target in _TRANSPOSED, groups)
        elif node.op in {"call_function", "call_method"} and len(node.args) > PRODUCTS.get(node.target, len(node.args)):
            weight = node.args[PRODUCTS[node.target]]
            if isinstance(weight, fx.Node) and weight.op == "get_attr" and _rank(module, str(weight.target)) == 2:
                yield _Use(graph, node, str(weight.target), transposed=True, groups=1)


def _rank(module: TracedModule, name: str) -> int:
    owner, _, leaf = name.rpartition(".")
    found = getattr(module.get_submodule(owner), leaf)
    return found.ndim if isinstance(found, nn.Parameter) else 0


def _quantizable(module: TracedModule, uses: list[_Use]) -> dict[str, str]:
    """The canonical name of each weight that may be quantized, by each of its names."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    first: dict[int, str] = {}
    for name, parameter in parameters.items():
        first.setdefault(id(parameter), name)
    readers: dict[int, int] = {}
    for use in uses:
        if use.weight in parameters:
            readers[id(parameters[use.weight])] = readers.get(id(parameters[use.weight]), 0) + 1
    layouts: dict[int, set[tuple[bool, int]]] = {}
    for use in uses:
        if use.weight in parameters:
            layout = (use.transposed, use.groups if use.transposed else 1)
            layouts.setdefault(id(parameters[use.weight]), set()).add(layout)
    reads = _reads(module, parameters)
    return {
        name: first[id(parameter)]
        for name, parameter in parameters.items()
        if parameter.requires_grad
        and parameter.is_floating_point()
        and parameter.numel()
        and parameter.ndim >= 2
        and id(parameter) in readers
        and readers[id(parameter)] == reads.get(id(parameter))
        and len(layouts[id(parameter)]) == 1
    }


def _reads(module: TracedModule, parameters: dict[str, nn.Parameter]) -> dict[int, int]:
    """How many nodes read each parameter, in all graphs, by its id."""
    reads: dict[int, int] = {}
    for graph in module.graphs.values():
        for node in graph.nodes:
            if node.op == "get_attr" and str(node.target) in parameters:
                key = id(parameters[str(node.target)])
                reads[key] = reads.get(key, 0) + len(node.users)
            elif node.op == "call_module":
                for parameter in module.get_submodule(str(node.target)).parameters():
                    reads[id(parameter)] = reads.get(id(parameter), 0) + 1
    return reads


def _to_function(module: TracedModule, node: fx.Node) -> None:
    """Turn a call of a layer into the function that it calls."""
    path = str(node.target)
    layer = module.get_submodule(path)
    graph, source = node.graph, node.args[0]
    with graph.inserting_before(node):
        bias = graph.get_attr(f"{path}.bias") if layer._parameters.get("bias") is not None else None
        weight = graph.get_attr(f"{path}.weight")
        if isinstance(layer, nn.Linear):
            args: tuple[Any, ...] = (source, weight, bias)
        elif isinstance(layer, _ConvTransposeNd):
            strides = (layer.stride, layer.padding, layer.output_padding)
            args = (source, weight, bias, *strides, layer.groups, layer.dilation)
        else:
            assert isinstance(layer, _ConvNd)
            padding: Any = layer.padding
            if layer.padding_mode != "zeros":
                border = tuple(layer._reversed_padding_repeated_twice)
                source, padding = graph.call_function(F.pad, (source, border), {"mode": layer.padding_mode}), 0
                source.meta[BORDER_KEY] = path
            args = (source, weight, bias, layer.stride, padding, layer.dilation, layer.groups)
    node.op, node.target, node.args = "call_function", MODULES[type(layer)], args
    node.meta[MODULE_KEY] = path


def _quantized(use: _Use, weight: str, quantizer: str) -> fx.Node:
    """The weight and its quantizer, just before their first use."""
    with use.graph.inserting_before(use.node):
        return use.graph.call_module(quantizer, (use.graph.get_attr(weight),))


def _read(node: fx.Node, weight: fx.Node) -> None:
    """Let a functional layer read ``weight``."""
    position = PRODUCTS.get(node.target, 1)
    if len(node.args) > position:
        node.args = (*node.args[:position], weight, *node.args[position + 1 :])
    else:
        node.kwargs = {**node.kwargs, "weight": weight}
