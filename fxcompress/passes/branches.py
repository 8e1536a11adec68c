"""Takes whole branches out of the graph.

Where a sum has an operand that is zero everywhere, in every mode, the sum is its other operand::

    branch = conv2(relu(conv1(x)))   all zero
    y = x + branch                                  ->      y = x
"""

import operator
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from fxcompress.channels.analysis import Analysis
from fxcompress.channels.constants import propagate
from fxcompress.channels.interpret import Trail
from fxcompress.channels.plan import make_plan
from fxcompress.channels.rules.registry import Known
from fxcompress.passes.branch_ends import Dropped, that_end
from fxcompress.passes.broadcasts import DIFFERENCES, IN_PLACE, SUMS, has_shape_of_sum
from fxcompress.passes.join import Join, join_at
from fxcompress.quantizer import Quantizer
from fxcompress.trace.graph.autocast import switches_autocast
from fxcompress.trace.graph.calls import function_name, writes_in_place
from fxcompress.trace.graph.guards import is_check
from fxcompress.trace.traced import TracedModule

Branch = tuple[str, str]
"""``("mode:node", operand)``: a node of the graph of that mode, and the operand that takes its place.

The operand is called by the name of its node or, where it is a parameter or buffer, ``"attr:path"``: with a quantizer
behind it another node stands for it.
"""

_FRESH = {operator.add, operator.sub, operator.mul, torch.add, torch.sub, torch.mul, torch.cat, "add", "sub", "mul"}


def dead_branches(analysis: Analysis, knowns: dict[str, list[Known]], *, held: bool = False) -> list[Branch]:
    """Sums with an operand that is known to be zero in every mode that can run them.

    Args:
        analysis: of the network.
        knowns: what is known in each graph.
        held: what is zero stays zero, whatever else is trained.
    """
    return _branches(analysis, knowns, None, held=held)


def _branches(
    analysis: Analysis, knowns: dict[str, list[Known]], ignored: np.ndarray | None, *, held: bool = False
) -> list[Branch]:
    """:func:`dead_branches`, where entries may be anything: ``ignored``, bool (atoms,)."""
    found = []
    for mode, graph in analysis.module.graphs.items():
        for node in graph.nodes:
            for kept, dropped in operands_of(analysis.module, node):
                branch = Dropped(mode, node, kept, dropped, ignored)
                if (
                    branch.is_zero(analysis, knowns[mode])
                    and has_shape_of_sum(analysis, mode, node, kept)
                    and not (dropped == 0 and written_operand_is_read(node, analysis.trails[mode]))
                ):
                    found.append(branch)
                    break
    ending = found if held else that_end(analysis, knowns, found)
    return [(f"{b.mode}:{b.node.name}", _called(analysis.module, b.operand)) for b in ending]


def remove_branches(module: TracedModule, branches: list[Branch]) -> list[str]:
    """Replace each node by the operand that is left, in place, and drop all that nothing reads any more.

    Returns:
        names of the parameters and buffers that are gone.

    Raises:
        KeyError: a branch names a node that the graph does not have, or an operand that the node does not have.
    """
    before = set(module.state_dict(keep_vars=True))
    used = _used_modules(module)
    for place, operand in branches:
        mode, _, name = place.partition(":")
        graph = module.graphs[mode]
        nodes = {node.name: node for node in graph.nodes}
        _replace(module, graph, nodes[name], _operand(module, nodes[name], operand))
    for graph in module.graphs.values():
        _drop_unused(module, graph)
    left = _used_modules(module)
    _delete_modules(module, used - left, left)
    module.recompile()
    return sorted(before - set(module.state_dict(keep_vars=True)))


def _called(module: nn.Module, operand: fx.Node) -> str:
    """What the operand of a sum is called in a :data:`Branch`."""
    source = operand
    if operand.op == "call_module" and isinstance(module.get_submodule(str(operand.target)), Quantizer):
        source = operand.all_input_nodes[0]
    return f"attr:{source.target}" if source.op == "get_attr" else operand.name


def _operand(module: nn.Module, node: fx.Node, called: str) -> fx.Node:
    """The operand of a sum that is called so."""
    for operand in node.all_input_nodes:
        if called in {operand.name, _called(module, operand)}:
            return operand
    raise KeyError(called)


def operands_of(module: nn.Module, node: fx.Node) -> Iterator[tuple[int, int]]:
    """(kept, dropped) positions of the operands of a sum; the second operand is dropped first."""
    if node.kwargs or len(node.args) != 2:
        return
    join = join_at(module, node)
    sums, differences = node.target in SUMS, node.target in DIFFERENCES
    if join is None and (node.op == "call_module" or not (sums or differences)):
        return
    first, second = node.args
    if isinstance(first, fx.Node) and isinstance(second, fx.Node) and first is not second:
        yield 0, 1
        if sums and join is None:
            yield 1, 0


def unread_branches(analysis: Analysis, knowns: dict[str, list[Known]], alive: np.ndarray) -> list[Branch]:
    """Sums with an operand that is zero but for entries which nobody reads, whatever their value.

    Args:
        analysis: of the network.
        knowns: what is known in each graph.
        alive: bool (atoms,), what a plan made with ``knowns`` keeps.
    """
    if not _branches(analysis, knowns, ~alive):
        return []
    # What may go with nothing known of any sum may be anything there, and so be missing from an operand.
    other = {mode: [_without_sums(analysis, mode, known) for known in here] for mode, here in knowns.items()}
    return _branches(analysis, knowns, ~make_plan(analysis, other).alive)


def _without_sums(analysis: Analysis, mode: str, known: Known) -> Known:
    """What is known whatever the sums are: which weights are zero, and what they multiply."""
    trail = analysis.trails[mode]
    sums = {node.name for node in analysis.module.graphs[mode].nodes if any(operands_of(analysis.module, node))}
    start = {value.key: known.maps[value.key] for value in trail.parameters.values() if value.key in known.maps}
    tape = [step for step in trail.tape if step.node not in sums]
    return propagate(replace(trail, tape=tape), start, training=known.training)


def written_operand_is_read(node: fx.Node, trail: Trail) -> bool:
    """Whether an in-place sum writes its result to memory that is read later by other names."""
    if node.target not in IN_PLACE:
        return False
    nodes = list(node.graph.nodes)
    position = {other: i for i, other in enumerate(nodes)}
    memory = trail.storages[node.all_input_nodes[0].name]
    sharing = (m for m in nodes[: position[node]] if trail.storages[m.name] & memory)
    return any(position[user] > position[node] for m in sharing for user in m.users)


def _replace(module: nn.Module, graph: fx.Graph, node: fx.Node, operand: fx.Node) -> None:
    """Let ``operand`` take the place of ``node``; a copy of it where something may write to what others read."""
    stand_in = operand
    in_its_memory = node.target in IN_PLACE and node.args[0] is operand
    safe = in_its_memory or (len(operand.users) == 1 and _is_fresh(module, operand))
    if not safe and any(_in_place(module, other) for other in graph.nodes):
        with graph.inserting_before(node):
            stand_in = graph.call_method("clone", (operand,))
    node.replace_all_uses_with(stand_in)
    graph.erase_node(node)


def _drop_unused(module: nn.Module, graph: fx.Graph) -> None:
    """Erase nodes without users. In-place ops on values that may still be read are left alone."""
    for node in reversed(graph.nodes):
        if node.users or node.op in {"placeholder", "output"} or is_check(node) or switches_autocast(node):
            continue
        if not _in_place(module, node) or all(_is_private(module, used) for used in node.all_input_nodes):
            graph.erase_node(node)


def _is_private(module: nn.Module, node: fx.Node) -> bool:
    """Whether the memory of a result has one reader only, the user of ``node``."""
    if len(node.users) > 1 or node.op in {"placeholder", "get_attr"}:
        return False
    return _is_fresh(module, node) or all(_is_private(module, used) for used in node.all_input_nodes)


def _is_fresh(module: nn.Module, node: fx.Node) -> bool:
    """Whether a result lies in memory of its own, for certain."""
    if node.op == "call_module":
        return isinstance(module.get_submodule(str(node.target)), _ConvNd | _NormBase | nn.Linear | Join)
    return node.target in _FRESH


def _in_place(module: nn.Module, node: fx.Node) -> bool:
    """Whether a node may write to its arguments, or checks something."""
    if node.op == "call_module":
        return bool(getattr(module.get_submodule(str(node.target)), "inplace", False))
    by_keyword = bool(node.kwargs.get("inplace") or node.kwargs.get("out") is not None)
    return by_keyword or writes_in_place(node) or function_name(node) == "_assert"


def _used_modules(module: TracedModule) -> set[str]:
    """Modules that some graph reads, by call or for a parameter."""
    used: set[str] = set()
    for graph in module.graphs.values():
        used |= {str(node.target) for node in graph.nodes if node.op == "call_module"}
        used |= {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    return used - {""}


def _delete_modules(module: nn.Module, gone: set[str], used: set[str]) -> None:
    """Delete modules that nothing uses any more, and the parents that are left with neither children nor tensors."""
    for leaf in sorted(gone, key=lambda p: -p.count(".")):
        path = leaf
        while path and not any(other.startswith(f"{path}.") for other in used):
            parent, _, name = path.rpartition(".")
            owner = module.get_submodule(parent)
            del owner._modules[name]
            if owner._modules or owner._parameters or owner._buffers:
                break
            path = parent
