"""Turns a network with quantizers into an ordinary one.

conv1.weight -> conv1.weight_quantizer
|                   ->      x -> conv1 (call_module; its weight lies on the grid)
x -----------------> F.conv2d
"""

import copy
from dataclasses import dataclass

import torch
from torch import fx, nn

from fxcompress.passes.base import Pass, PassResult, traced
from fxcompress.passes.inject_quantizers import BAG_ARGUMENTS, BORDER_KEY, POSITIONAL_KEY
from fxcompress.provenance import Grid
from fxcompress.quantizer import Quantizer
from fxcompress.quantizer.given import PLAIN
from fxcompress.trace.graph.described import LAYER_KEY
from fxcompress.trace.traced import TracedModule, lint


@dataclass(frozen=True, slots=True)
class Finalize(Pass):
    """Take the quantizers out; see the picture above."""

    def __call__(self, module: fx.GraphModule) -> PassResult:
        """A copy without quantizers, which has parameters of its own."""
        result = copy.deepcopy(traced(module))
        return PassResult(result, bool(finalize_quantizers(result)))


def finalize_quantizers(module: TracedModule) -> dict[str, Grid]:
    """Put each quantized weight in the place of its parameter, and take the quantizers out; in place.

    Returns:
        the number format of each weight, by its name.
    """
    grids: dict[str, Grid] = {}
    for path, quantizer in list(module.named_modules()):
        if isinstance(quantizer, Quantizer):
            weight = path.removesuffix("_quantizer")
            _replace_weight(module, weight, quantizer)
            grids[weight] = Grid(
                tuple(quantizer.bits.detach().tolist()), tuple(quantizer.exponent.detach().tolist()),
                quantizer.channel_dim, quantizer.groups, quantizer.batch_dims,
            )  # fmt: skip
    for graph in module.graphs.values():
        _drop_quantizers(module, graph)
        _restore_modules(graph)
        _restore_given(module, graph)
    for layer in module.modules():
        layer.__class__ = PLAIN.get(type(layer), type(layer))
    for graph in module.graphs.values():
        lint(graph)
    for weight in grids:
        owner, _, leaf = weight.rpartition(".")
        delattr(module.get_submodule(owner), f"{leaf}_quantizer")
    module.recompile()
    return grids


def _replace_weight(module: nn.Module, name: str, quantizer: Quantizer) -> None:
    """Every name that shares the parameter gets the same new one."""
    old = module.get_parameter(name)
    with torch.no_grad():
        new = nn.Parameter(quantizer(old).detach().clone(), requires_grad=old.requires_grad)
    for owner in module.modules():
        for leaf, parameter in owner._parameters.items():
            if parameter is old:
                owner._parameters[leaf] = new


def _drop_quantizers(module: TracedModule, graph: fx.Graph) -> None:
    for node in list(graph.find_nodes(op="call_module")):
        if isinstance(module.get_submodule(str(node.target)), Quantizer):
            weight = node.args[0]
            assert isinstance(weight, fx.Node)
            node.replace_all_uses_with(weight)
            graph.erase_node(node)


def _restore_given(module: TracedModule, graph: fx.Graph) -> None:
    """Call layers without their weights again."""
    for node in graph.find_nodes(op="call_module"):
        if type(module.get_submodule(str(node.target))) in PLAIN:
            weights = node.all_input_nodes
            node.kwargs = {key: value for key, value in node.kwargs.items() if key != "weights"}
            for weight in weights:
                if not weight.users and weight.op == "get_attr":
                    graph.erase_node(weight)


def _restore_modules(graph: fx.Graph) -> None:
    """Turn functions that came from a layer back into calls of that layer."""
    for node in list(graph.nodes):
        path = node.meta.pop(LAYER_KEY, None)
        if path is None:
            continue
        source, operands = node.args[0], node.all_input_nodes
        given = {key: node.kwargs[key] for key in BAG_ARGUMENTS[1:] if key in node.kwargs}
        more = [given.pop(key) for key in BAG_ARGUMENTS[1 : node.meta.pop(POSITIONAL_KEY, 1)]]
        if isinstance(source, fx.Node) and source.meta.get(BORDER_KEY) == path:
            operands.append(source.all_input_nodes[0])
            source = source.args[0]
        node.op, node.target, node.args, node.kwargs = "call_module", path, (source, *more), given
        for operand in operands:
            if not operand.users and operand.op != "placeholder":
                graph.erase_node(operand)
