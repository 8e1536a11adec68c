"""Takes whole branches out of the graph.

Where a sum has an operand that is zero everywhere, in every mode, the sum is its other operand::

    branch = conv2(relu(conv1(x)))   all zero
    y = x + branch                                  ->      y = x
"""

import operator
from collections.abc import Iterator

import torch
from torch import fx, nn

from fxcompress.channels.analysis import Analysis
from fxcompress.channels.rules.registry import Known
from fxcompress.channels.values import Value
from fxcompress.trace.traced import TracedModule

Branch = tuple[str, str]
"""``("mode:node", operand)``: a node of the graph of that mode, and the operand that takes its place."""

_SUMS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_WRITING = {"setitem", "iadd", "isub", "imul", "itruediv", "_assert", "dropout_", "relu_", "leaky_relu_", "elu_"}
_DIFFERENCES = {operator.sub, operator.isub, torch.sub, "sub", "sub_"}


def dead_branches(analysis: Analysis, knowns: dict[str, list[Known]]) -> list[Branch]:
    """Sums with an operand that is known to be zero in every mode that can run them."""
    found = []
    for mode, graph in analysis.module.graphs.items():
        values = analysis.trails[mode].values
        for node in graph.nodes:
            for kept, dropped in _operands(node):
                if _replaces(values, node, kept) and _zero(values[dropped.name], knowns[mode]):
                    found.append((f"{mode}:{node.name}", kept.name))
                    break
    return found


def remove_branches(module: TracedModule, branches: list[Branch]) -> list[str]:
    """Replace each node by the operand that is left, in place, and drop all that nothing reads any more.

    Returns:
        names of the parameters and buffers that are gone.

    Raises:
        KeyError: a branch names a node that the graph does not have.
    """
    before = set(module.state_dict(keep_vars=True))
    used = _used_modules(module)
    for place, operand in branches:
        mode, _, name = place.partition(":")
        graph = module.graphs[mode]
        nodes = {node.name: node for node in graph.nodes}
        _replace(graph, nodes[name], nodes[operand])
    for graph in module.graphs.values():
        _drop_unused(graph)
    _delete_modules(module, used - _used_modules(module))
    module.recompile()
    return sorted(before - set(module.state_dict(keep_vars=True)))


def _operands(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """(kept, dropped) pairs of the operands of a sum; the second operand is dropped first."""
    sums, differences = node.target in _SUMS, node.target in _DIFFERENCES
    if not (sums or differences) or node.kwargs or len(node.args) != 2:
        return
    first, second = node.args
    if isinstance(first, fx.Node) and isinstance(second, fx.Node) and first is not second:
        yield first, second
        if sums:
            yield second, first


def _replaces(values: dict[str, object], node: fx.Node, kept: fx.Node) -> bool:
    """Whether the operand has the shape and type of the sum."""
    whole, part = values[node.name], values[kept.name]
    if not isinstance(whole, Value) or not isinstance(part, Value):
        return False
    return whole.shape == part.shape and whole.meta.dtype == part.meta.dtype


def _zero(value: object, knowns: list[Known]) -> bool:
    return isinstance(value, Value) and all(bool((known.of(value) == 0).all()) for known in knowns)


def _replace(graph: fx.Graph, node: fx.Node, operand: fx.Node) -> None:
    """Let ``operand`` take the place of ``node``; a copy of it when it is read elsewhere and may be written to."""
    stand_in = operand
    if len(operand.users) > 1 and any(_in_place(other) for other in graph.nodes):
        with graph.inserting_before(node):
            stand_in = graph.call_method("clone", (operand,))
    node.replace_all_uses_with(stand_in)
    graph.erase_node(node)


def _drop_unused(graph: fx.Graph) -> None:
    """Erase nodes without users. In-place ops on values that are still read are left alone."""
    for node in reversed(graph.nodes):
        if not node.users and node.op not in {"placeholder", "output"} and not _writes(node):
            graph.erase_node(node)


def _writes(node: fx.Node) -> bool:
    """Whether a node without users changes a tensor that others read."""
    return _in_place(node) and any(len(used.users) > 1 for used in node.all_input_nodes)


def _in_place(node: fx.Node) -> bool:
    """Whether a node may write to its arguments, or checks something."""
    if node.op == "call_module":
        root = node.graph.owning_module
        module = root.get_submodule(str(node.target)) if root is not None else None
        return bool(getattr(module, "inplace", False))
    name = str(node.target if isinstance(node.target, str) else getattr(node.target, "__name__", ""))
    method = node.op == "call_method" and name.endswith("_") and not name.endswith("__")
    return method or name in _WRITING or bool(node.kwargs.get("inplace") or node.kwargs.get("out") is not None)


def _used_modules(module: TracedModule) -> set[str]:
    """Modules that some graph reads, by call or for a parameter."""
    used: set[str] = set()
    for graph in module.graphs.values():
        used |= {str(node.target) for node in graph.nodes if node.op == "call_module"}
        used |= {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    return used - {""}


def _delete_modules(module: nn.Module, gone: set[str]) -> None:
    """Delete modules, and the parents that are left with neither children nor tensors."""
    for leaf in sorted(gone, key=lambda p: -p.count(".")):
        path = leaf
        while path:
            parent, _, name = path.rpartition(".")
            owner = module.get_submodule(parent)
            del owner._modules[name]
            if owner._modules or owner._parameters or owner._buffers:
                break
            path = parent
