"""Running statistics that something besides their norm reads.

A norm in training moves them, and no call of its graph says so. The norm itself may go by what they hold, as its rule
knows both modes; of what another op reads there, the next step of a training makes another number::

    t = bn.weight / (bn.running_var + bn.eps).sqrt()      # a convolution and its norm, fused by hand
    bias = bn.bias - bn.running_mean * t                  # running_mean is 0, but only in a new network
"""

from collections.abc import Iterator

from torch import fx

from fxcompress.channels.analysis import Analysis
from fxcompress.channels.interpret import Trail
from fxcompress.channels.rules.norms import BATCH_NORM
from fxcompress.channels.values import Step, Value, find

_STATISTICS = slice(3, 5)
"""The mean and the variance, among the arguments of a batch norm."""


def read_by_others(analysis: Analysis) -> list[str]:
    """The names of the running statistics that something besides a norm reads, in any graph."""
    if not any(_reads_buffers(analysis, graph) for graph in analysis.module.graphs.values()):
        return []
    trails = analysis.trails.values()
    moved, own = set[int](), set[int]()  # labels of tensors, steps
    for trail in trails:
        for name, steps in _moved(trail):
            moved.add(id(analysis.atoms[name]))
            own |= steps
    names = {key: name for trail in trails for key, name in trail.names.items()}
    read = {
        id(analysis.atoms[names[value.key]])
        for trail in trails
        for step in trail.tape
        if id(step) not in own
        for value in find(Value, (step.call.args, step.call.kwargs))
        if value.key in names
    }
    return [name for name, dims in analysis.atoms.items() if id(dims) in moved & read]


def _reads_buffers(analysis: Analysis, graph: fx.Graph) -> bool:
    buffers = {name for name, _ in analysis.module.named_buffers(remove_duplicate=False)}
    return any(node.op == "get_attr" and str(node.target) in buffers for node in graph.nodes)


def _moved(trail: Trail) -> Iterator[tuple[str, set[int]]]:
    """The tensors that norms move, each with the steps by which a norm gets at it, itself among them."""
    makers = {value.key: step for step in trail.tape for value in step.outputs}
    names, readers = trail.names, dict[int, list[Step]]()
    for step in trail.tape:
        for value in find(Value, (step.call.args, step.call.kwargs)):
            readers.setdefault(value.key, []).append(step)
    for norm in (step for step in trail.tape if step.op is BATCH_NORM):
        for held in find(Value, norm.call.args[_STATISTICS]):
            value, steps = held, {id(norm)}
            while value.key in makers:  # a view of it, or a repeated one
                step = makers[value.key]
                if all(id(reader) in steps for reader in readers[value.key]):
                    steps.add(id(step))
                value = next(iter(find(Value, step.call.args)), Value(value.meta))
            if value.key in names:
                yield names[value.key], steps
