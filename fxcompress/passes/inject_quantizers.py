"""Puts a quantizer between each weight and the convolution, linear layer or lookup that reads it.

x -> conv1 (call_module)                  conv1.weight (O, I, 3, 3) -> conv1.weight_quantizer
->                                          |
x ------------------------------> F.conv2d
"""

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from fxcompress.passes.base import Pass, PassResult, traced
from fxcompress.passes.weight_uses import MODULES, TABLES, Layout, Use, quantizable, uses_of
from fxcompress.quantizer import Quantizer
from fxcompress.quantizer.given import PLAIN, QUANTIZED, SIZED, weight_names
from fxcompress.trace.graph.described import LAYER_KEY
from fxcompress.trace.traced import TracedModule, lint
from fxcompress.trace.weights.reads import PRODUCTS

POSITIONAL_KEY = "fxcompress_positional"
"""In a node's meta, for a table: how many of :data:`BAG_ARGUMENTS` the module is called with by position."""
BAG_ARGUMENTS = ("input", "offsets", "per_sample_weights")
"""What embedding bags are called with; embeddings with the first alone."""
BORDER_KEY = "fxcompress_border"
"""In a node's meta: the module that pads its input as this node does; no padding of the user's carries it."""


@dataclass(frozen=True, slots=True)
class InjectQuantizers(Pass):
    """Give each output channel of each weight a quantizer with trained bits and exponent.

    Weights of conv 1d, 2d, 3d, their transposed forms and linear, as modules or as functional calls on a parameter,
    matrices that inputs are multiplied with (``x @ self.weight``, or ``addmm`` as in the layers of GPT-2), and tables
    (embeddings), whose channels are their columns, also where a linear layer is tied to one. Where a weight is computed
    from a parameter entry by entry (turned, masked, scaled), the parameter gets the quantizer; where layers read one
    both ways, its channels are the outputs of the first of them. A weight that is frozen, or that something else reads
    as well, gets none; neither does one that is complex or empty, or a table with sparse gradients or a norm that each
    lookup restores. Parameters that no layer multiplies with (positions that are added, experts in a batch) take an
    analysis to find where their channels are; :func:`fxcompress.compress` gives them theirs.

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
    uses = uses_of(module)
    layouts = quantizable(module, uses)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    first = {id(parameters[weight]): weight for weight in layouts}
    names = {name: first[id(p)] for name, p in parameters.items() if id(p) in first}
    made: dict[str, str] = {}
    nodes: dict[tuple[fx.Graph, str], fx.Node] = {}
    for use in uses:
        weight = names.get(use.weight)
        if weight is None:
            continue
        if weight not in made:
            made[weight] = _add(module, weight, layouts[weight], bits)
        key = (use.graph, weight)
        if key not in nodes:
            nodes[key] = _quantized(use, weight, made[weight])
        _connect(module, use, nodes[key])
    for graph in module.graphs.values():
        for node in reversed(graph.find_nodes(op="get_attr")):
            if not node.users:
                graph.erase_node(node)
        lint(graph)
    module.recompile()
    return made


def inject_at_reads(module: TracedModule, bits: float, layouts: Mapping[str, Layout]) -> dict[str, str]:
    """Put quantizers behind all reads of some parameters, in place; what :func:`inject_quantizers` does to layers.

    Args:
        module: a traced network.
        bits: bit depth to start with.
        layouts: where the channels of these parameters are; see
            :func:`~fxcompress.passes.plain_weights.plain_weights`.

    Returns:
        the name of each new quantizer, by the name of its parameter.
    """
    made = {weight: _add(module, weight, layout, bits) for weight, layout in layouts.items()}
    for weight, quantizer in made.items():
        for graph in module.graphs.values():
            _read_quantized(module, graph, weight, quantizer)
    for graph in module.graphs.values() if made else ():
        lint(graph)
    if made:
        module.recompile()
    return made


def _connect(module: TracedModule, use: Use, weight: fx.Node) -> None:
    """Let whoever reads a weight read the quantized one."""
    if use.given:
        _to_given(module, use.node)
        _give(module, use, weight)
    elif use.computed:
        names = _names(module, use.weight)
        for read in use.node.all_input_nodes:
            if read.op == "get_attr" and str(read.target) in names:
                use.node.replace_input_with(read, weight)
    else:
        if use.node.op == "call_module":
            _to_function(module, use.node)
        _read(use.node, weight)


def _read_quantized(module: TracedModule, graph: fx.Graph, weight: str, quantizer: str) -> None:
    """Let all that reads a parameter in a graph read it quantized."""
    names, quantized = _names(module, weight), None
    for node in graph.find_nodes(op="get_attr"):
        if str(node.target) not in names:
            continue
        users = list(node.users)
        if quantized is None:
            with graph.inserting_after(node):
                quantized = graph.call_module(quantizer, (node,))
        for user in users:
            user.replace_input_with(node, quantized)


def _names(module: TracedModule, weight: str) -> set[str]:
    """All names of a parameter."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return {name for name, parameter in parameters.items() if parameter is parameters[weight]}


def _add(module: TracedModule, weight: str, layout: Layout, bits: float) -> str:
    parameter = module.get_parameter(weight)
    quantizer = Quantizer.for_weight(parameter, bits=bits, **dataclasses.asdict(layout))
    owner, _, leaf = weight.rpartition(".")
    module.get_submodule(owner).add_module(f"{leaf}_quantizer", quantizer)
    return f"{weight}_quantizer"


def _to_function(module: TracedModule, node: fx.Node) -> None:
    """Turn a call of a layer into the function that it calls."""
    path = str(node.target)
    layer = module.get_submodule(path)
    graph, source = node.graph, node.args[0]
    if type(layer) in TABLES:
        _to_lookup(layer, node)
        return
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
    node.op, node.target, node.args = "call_function", MODULES[PLAIN.get(type(layer), type(layer))], args
    node.meta[LAYER_KEY] = path


def _to_lookup(layer: nn.Module, node: fx.Node) -> None:
    """Turn a call of a table into the function that it calls."""
    with node.graph.inserting_before(node):
        weight = node.graph.get_attr(f"{node.target}.weight")
    given = dict(zip(BAG_ARGUMENTS, node.args, strict=False)) | dict(node.kwargs)
    options = {name: getattr(layer, name) for name in ("padding_idx", "scale_grad_by_freq")}
    if isinstance(layer, nn.EmbeddingBag):
        options |= {"mode": layer.mode, "include_last_offset": layer.include_last_offset}
    source = given.pop("input")
    node.meta[LAYER_KEY], node.meta[POSITIONAL_KEY] = str(node.target), len(node.args)
    node.op, node.target, node.args, node.kwargs = (
        "call_function",
        TABLES[type(layer)],
        (source, weight),
        given | options,
    )


def _to_given(module: TracedModule, node: fx.Node) -> None:
    """Let a layer be called with its parameters."""
    if "weights" in node.kwargs:
        return
    layer = module.get_submodule(str(node.target))
    layer.__class__ = (QUANTIZED | SIZED).get(type(layer), type(layer))
    with node.graph.inserting_before(node):
        weights = [node.graph.get_attr(f"{node.target}.{name}") for name in weight_names(layer)]
    node.kwargs = {**node.kwargs, "weights": weights}


def _give(module: TracedModule, use: Use, weight: fx.Node) -> None:
    """Let a layer be called with a quantized weight."""
    names = weight_names(module.get_submodule(str(use.node.target)))
    given = use.node.kwargs["weights"]
    assert isinstance(given, list)
    place = names.index(use.weight.rpartition(".")[2])
    use.node.kwargs = {**use.node.kwargs, "weights": [*given[:place], weight, *given[place + 1 :]]}


def _quantized(use: Use, weight: str, quantizer: str) -> fx.Node:
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
