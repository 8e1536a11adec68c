"""Which weights have no quantizer, and why: no size counts them, and no pressure reaches them."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import fx, nn

from fxcompress.passes.weight_steps import WeightSteps
from fxcompress.passes.weight_uses import MODULES, Use, uses_of
from fxcompress.quantizer import Quantizer
from fxcompress.trace.graph.described import place_of_node
from fxcompress.trace.traced import TracedModule

_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Unquantized:
    """A weight without a quantizer. All fields are plain, so ``json.dumps(dataclasses.asdict(weight))`` works.

    Attributes:
        name: of the parameter.
        elements: that it has.
        reason: why it has none.
    """

    name: str
    elements: int
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.elements:,}): {self.reason}"

    def within(self, path: str) -> "Unquantized":
        """The same, named from outside of the module at ``path``."""
        return replace(self, name=f"{path}.{self.name}") if path else self


def unquantized(module: TracedModule) -> tuple[Unquantized, ...]:
    """The parameters of ``module`` with two or more dims of size > 1 that have no quantizer, largest first.

    Vectors (biases, norms, a scale for each channel) are no weights here.
    """
    weights = left_out(module)
    uses = uses_of(module) if weights else []
    found = [Unquantized(name, weight.numel(), _reason(module, weight, uses)) for name, weight in weights.items()]
    return tuple(sorted(found, key=lambda item: -item.elements))


def left_out(module: TracedModule) -> dict[str, nn.Parameter]:
    """The parameters of ``module`` with two or more dims of size > 1 that have no quantizer, by their names."""
    quantized = {
        id(module.get_parameter(name.removesuffix("_quantizer")))
        for name, child in module.named_modules()
        if isinstance(child, Quantizer)
    }
    return {name: p for name, p in module.named_parameters() if id(p) not in quantized and is_weight(p)}


def is_weight(parameter: nn.Parameter) -> bool:
    """Whether a parameter varies along two dims at least."""
    return sum(size > 1 for size in parameter.shape) > 1


def coverage(found: Iterable[Unquantized], quantized: int) -> str:
    """What to tell a user whose network is quantized in part.

    Args:
        found: the weights without a quantizer.
        quantized: elements of those that have one.
    """
    items = list(found)
    total = quantized + sum(item.elements for item in items)
    more = f"; and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return (
        f"{quantized:,} of its {total:,} weights ({quantized / max(total, 1):.1%}) get quantizers. Sizes and targets "
        f"count these alone; the others stay in floats: {'; '.join(map(str, items[:_SHOWN]))}{more} "
        "(net.unquantized() lists them all)"
    )


def _reason(module: TracedModule, weight: nn.Parameter, uses: list[Use]) -> str:
    if not weight.requires_grad:
        return "it is frozen; set requires_grad=True before compress() to train its bits"
    if weight.is_complex():
        return "it is complex; hold its parts as real numbers, (..., 2), and take torch.view_as_complex() in forward"
    nodes = [node for graph in module.graphs.values() for node in _readers(module, graph, weight)]
    if not nodes:
        return "nothing in the graph reads it"
    names = {name for name, p in module.named_parameters(remove_duplicate=False) if p is weight}
    layers = {use.node for use in uses if use.weight in names}
    others = [node for node in nodes if node not in layers]
    if not others:
        return "the layers that share it take its outputs in different groups"
    steps = WeightSteps(module, others[0].graph)
    if steps.parameters(others[0]) and steps.layers_behind(others[0]):
        return (
            f"{_described(module, others[0])} computes a weight from it, the entries of which are not those of this "
            "parameter alone, zero wherever it is zero"
        )
    tied = " beside a layer" if len(others) < len(nodes) else ""
    return f"{_described(module, others[0])} reads it{tied}"


def _readers(module: TracedModule, graph: fx.Graph, weight: nn.Parameter) -> Iterable[fx.Node]:
    """The nodes that read a parameter, or call a module which holds it."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for node in graph.nodes:
        if node.op == "get_attr" and parameters.get(str(node.target)) is weight:
            yield from node.users
        elif node.op == "call_module" and any(p is weight for p in module.get_submodule(str(node.target)).parameters()):
            yield node


def _described(module: TracedModule, node: fx.Node) -> str:
    place = place_of_node(node)
    if node.op == "call_module":
        layer = module.get_submodule(str(node.target))
        if type(layer) in MODULES:
            return f"{place}, called with more than its input,"
        if isinstance(layer, nn.Embedding | nn.EmbeddingBag):
            how = "a table with sparse gradients" if layer.sparse else "a table"
            how = "a table whose lookups restore a norm" if layer.max_norm is not None else how
            return f"{place}, {how},"
        return f"{place}, which is no convolution or linear layer,"
    return str(place)
