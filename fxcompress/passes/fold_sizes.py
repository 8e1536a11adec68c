"""Which values depend on the size of the inputs: a constant among them is one for images of this size only."""

from torch import fx, nn

from fxcompress.channels.analysis import Analysis
from fxcompress.channels.values import Value, find, leaves

_VALUE_OPS = {"pointwise", "pointwise, values unknown", "multiply", "divide", "choice", "pad"}
_KNOWN_CODE = ("torch.", "_operator", "math", "builtins")


def sized_values(analysis: Analysis, mode: str) -> set[int]:
    """The keys of the values that a size flows into, in one graph.

    Args:
        analysis: of the network.
        mode: which graph.
    """
    trail = analysis.trails[mode]
    nodes = {n.name for n in analysis.module.graphs[mode].nodes if _takes_size(n, analysis.module, trail.values)}
    sized: set[int] = set()
    for step in trail.tape:
        own = step.node in nodes and step.op.name in _VALUE_OPS
        if own or any(value.key in sized for value in find(Value, (step.call.args, step.call.kwargs))):
            sized |= {value.key for value in step.outputs}
    return sized


def _takes_size(node: fx.Node, module: nn.Module, values: dict[str, object]) -> bool:
    """Whether a node is given a number that the network computes, or may compute one from a size itself."""
    if node.op == "call_module" and not type(module.get_submodule(str(node.target))).__module__.startswith("torch."):
        return True
    if node.op == "call_function" and not f"{getattr(node.target, '__module__', '')}.".startswith(_KNOWN_CODE):
        return True
    given = [leaf for used in node.all_input_nodes for leaf in leaves(values[used.name])]
    return any(isinstance(leaf, int | float) and not isinstance(leaf, bool) for leaf in given)
