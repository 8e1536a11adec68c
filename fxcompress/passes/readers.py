"""Which nodes read a parameter, which of them are layers, and how a layer gets a bias."""

from collections import Counter, defaultdict
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd

from fxcompress.passes.weight_uses import MODULES
from fxcompress.trace.traced import TracedModule
from fxcompress.trace.weights.reads import FUNCTIONS

Place = tuple[str, fx.Node]
"""The mode of a graph, and a node of it."""


@dataclass(frozen=True, slots=True)
class Reader:
    """A node that is a convolution or linear layer with parameters of its own.

    Attributes:
        node: a call of a module, or of a function on parameters.
        weight: name of its weight.
        bias: name of its bias; "" for none.
    """

    node: fx.Node
    weight: str
    bias: str


def reader_of(module: nn.Module, node: fx.Node) -> Reader | None:
    """The node as a layer; None where it is something else, or takes as weight or bias what is no parameter."""
    if node.op == "call_module":
        layer = module.get_submodule(str(node.target))
        own = f"{node.target}.bias" if layer._parameters.get("bias") is not None else ""
        return Reader(node, f"{node.target}.weight", own) if type(layer) in MODULES else None
    if node.op != "call_function" or node.target not in FUNCTIONS:
        return None
    weight, bias = _argument(node, 1, "weight"), _argument(node, 2, "bias")
    once = sum(argument is weight for argument in (*node.args, *node.kwargs.values())) == 1
    if not isinstance(weight, fx.Node) or weight.op != "get_attr" or not once:
        return None
    if bias is None:
        return Reader(node, str(weight.target), "")
    if not isinstance(bias, fx.Node) or bias.op != "get_attr":
        return None
    return Reader(node, str(weight.target), str(bias.target))


def reads(module: TracedModule) -> dict[int, list[Place]]:
    """The nodes of all graphs that read each parameter, by the parameter's id."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    found: dict[int, list[Place]] = defaultdict(list)
    for mode, graph in module.graphs.items():
        for node in graph.nodes:
            if node.op == "get_attr" and str(node.target) in parameters:
                found[id(parameters[str(node.target)])] += [(mode, user) for user in node.users]
            elif node.op == "call_module":
                for parameter in module.get_submodule(str(node.target)).parameters():
                    found[id(parameter)].append((mode, node))
    return found


def readers(module: TracedModule, weight: str) -> list[Reader]:
    """The layers that read a weight, under whatever name."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    found = [reader_of(module, node) for graph in module.graphs.values() for node in graph.nodes]
    return [r for r in found if r is not None and parameters.get(r.weight) is parameters[weight]]


def new_bias(reader: Reader) -> str:
    """The name that the bias of a layer without one would have."""
    return f"{reader.node.target}.bias" if reader.node.op == "call_module" else f"{reader.weight}_bias"


def add_biases(module: TracedModule, weight: str) -> None:
    """Give each layer that reads ``weight`` and has no bias one of zeros, in place."""
    parameter = module.get_parameter(weight)
    found = [reader for reader in readers(module, weight) if not reader.bias]
    for reader in found:
        owner, _, leaf = new_bias(reader).rpartition(".")
        holder = module.get_submodule(owner)
        if holder._parameters.get(leaf) is None:
            zeros = torch.zeros(_rows(module, reader), dtype=parameter.dtype, device=parameter.device)
            holder.register_parameter(leaf, nn.Parameter(zeros, requires_grad=parameter.requires_grad))
        if reader.node.op != "call_module":
            _set_bias(reader)
    module.recompile()


def means_of(module: TracedModule, layers: list[fx.Node]) -> tuple[str, ...]:
    """The running means of the batch norms that alone read ``layers``, and nothing else; () if some layer has none."""
    found: dict[str, None] = {}
    for layer in layers:
        norm = next(iter(layer.users), None)
        if norm is None or len(layer.users) > 1 or norm.op != "call_module" or norm.args != (layer,) or norm.kwargs:
            return ()
        found[str(norm.target)] = None
    norms = {path: module.get_submodule(path) for path in found}
    own = {user for layer in layers for user in layer.users}
    readers = {n for m in norms.values() for n in _calls(module, m)}
    plain = all(isinstance(m, _BatchNorm) and type(m).__module__.startswith("torch.") for m in norms.values())
    buffers = Counter(id(b) for _, b in module.named_buffers(remove_duplicate=False))
    if not plain or readers != own or any(buffers[id(m.running_mean)] != 1 for m in norms.values()):
        return ()
    return tuple(f"{path}.running_mean" for path in found)


def _calls(module: TracedModule, child: nn.Module) -> list[fx.Node]:
    """The nodes that call a module, or read some tensor of it."""
    nodes = [node for graph in module.graphs.values() for node in graph.nodes]
    found = [n for n in nodes if n.op == "call_module" and module.get_submodule(str(n.target)) is child]
    attributes = [n for n in nodes if n.op == "get_attr"]
    return found + [n for n in attributes if module.get_submodule(str(n.target).rpartition(".")[0]) is child]


def _rows(module: nn.Module, reader: Reader) -> int:
    """O; without groups, which layers whose constants are folded do not have."""
    weight, node = module.get_parameter(reader.weight), reader.node
    if node.op == "call_module":
        transposed = isinstance(module.get_submodule(str(node.target)), _ConvTransposeNd)
    else:
        transposed = "transpose" in str(getattr(node.target, "__name__", ""))
    return weight.shape[int(transposed)]


def _set_bias(reader: Reader) -> None:
    node = reader.node
    with node.graph.inserting_before(node):
        bias = node.graph.create_node("get_attr", new_bias(reader))
    if len(node.args) > 2:
        node.args = (*node.args[:2], bias, *node.args[3:])
    else:
        node.kwargs = {**node.kwargs, "bias": bias}


def _argument(node: fx.Node, position: int, name: str) -> object:
    return node.args[position] if position < len(node.args) else node.kwargs.get(name)
