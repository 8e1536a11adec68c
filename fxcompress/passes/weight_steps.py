"""Weights that a network computes entry by entry from a parameter: turned, masked, scaled.

weight (O, I) -> mul(mask) -> t -> F.linear            a quantizer for ``weight``, whose channels lie along dim 1

The steps run on labels, like any graph. Each entry of the weight must be made from one entry of the parameter, which
must be zero where that is: so a channel without bits is one of zeros, whatever the mask or the scale.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcompress.channels.carried import Held, carried
from fxcompress.channels.dispatch import Dispatch
from fxcompress.channels.layers import support, vector
from fxcompress.channels.rules.pointwise import ON_LABELS
from fxcompress.channels.rules.registry import Known
from fxcompress.channels.space import Space
from fxcompress.channels.values import LabelTensor, Value
from fxcompress.trace.graph.calls import writes_in_place
from fxcompress.trace.traced import TracedModule
from fxcompress.trace.weights.programs import Program, computed, held_in
from fxcompress.trace.weights.reads import weight_of

KINDS = {"dtype", "device", "shape", "ndim", "layout", "is_cuda"}
"""What a quantized weight has in common with its parameter."""


def asks_for_kind(node: fx.Node) -> bool:
    """Whether a node asks for what a quantized weight has in common with its parameter, and for no value of it."""
    return node.op == "call_function" and node.target is getattr and node.args[1] in KINDS


def last_write(node: fx.Node) -> fx.Node | None:
    """The last node that writes to what a node reads; None where that is not ``weight.data``, or is used otherwise.

    As ``self.weight.data *= self.mask``, with which masked convolutions begin.
    """
    users = list(node.users)
    if node.target is not getattr or node.args[1] != "data" or not users:
        return None
    alone = all(writes_in_place(user) and user.args[0] is node and not user.users for user in users)
    return max(users) if alone else None


@dataclass(frozen=True, slots=True)
class Reading:
    """A layer that reads a weight which is computed entry by entry from a parameter.

    Attributes:
        layer: the node.
        weight: a name of the parameter.
        dims: for each dim of the weight the dim of the parameter that lies along it.
    """

    layer: fx.Node
    weight: str
    dims: tuple[int, ...]


class WeightSteps:
    """The nodes of one graph that compute weights.

    Args:
        module: a traced network.
        graph: one of its graphs.
    """

    def __init__(self, module: TracedModule, graph: fx.Graph) -> None:
        self._held = held_in(module, graph)
        self._steps = _steps(graph)
        self._found: dict[fx.Node, tuple[str, tuple[int, ...]] | None] = {}

    def parameters(self, node: fx.Node) -> set[str]:
        """The names of the matrices and kernels whose values a node reads, if it is a step; none if it is not."""
        if node not in self._steps or asks_for_kind(node):
            return set()
        read = {n: self._held.get(n) for n in node.all_input_nodes}
        return {str(n.target) for n, t in read.items() if isinstance(t, nn.Parameter) and t.ndim > 1}

    def layers_behind(self, node: fx.Node) -> list[tuple[fx.Node, fx.Node]] | None:
        """The layers that all which is made of a step ends in, each with its weight; None where it goes elsewhere."""
        found: dict[tuple[fx.Node, fx.Node], None] = {}
        open_, seen = [node], {node}
        while open_:
            made = open_.pop()
            users = [user for user in made.users if not asks_for_kind(user)]
            if not users:
                return None
            for user in users:
                if weight_of(user) is made and sum(a is made for a in _arguments(user)) == 1:
                    found[user, made] = None
                elif user not in self._steps:
                    return None
                elif user not in seen:
                    seen.add(user)
                    open_.append(user)
        return list(found)

    def readings(self, node: fx.Node) -> Iterator[Reading]:
        """What reads the parameters that a step reads, if all of that is layers, and the weights are their entries."""
        names = self.parameters(node)
        for layer, root in (self.layers_behind(node) or []) if names else []:
            if root not in self._found:
                self._found[root] = self._source(root)
            found = self._found[root]
            if found is not None and found[0] in names:
                yield Reading(layer, *found)

    def _source(self, root: fx.Node) -> tuple[str, tuple[int, ...]] | None:
        """The parameter that a weight is made of entry by entry, and where its dims are; None where there is none."""
        one = computed(root, self._held)
        if one is None:
            return None
        names = [str(node.target) for node in one.tensors]
        return entrywise(one.program, dict(zip(names, (self._held[node] for node in one.tensors), strict=True)))


def entrywise(program: Program, tensors: Mapping[str, Tensor]) -> tuple[str, tuple[int, ...]] | None:
    """The parameter that a program makes a weight of, entry by entry, zeros of zeros; None where it does not.

    Args:
        program: that makes the weight.
        tensors: that it is made from, by their names, in order.

    Returns:
        its name, and for each dim of the weight the dim of the parameter that lies along it.
    """
    space = Space()
    dispatch = Dispatch(space)
    start: dict[int, Held] = {}
    atoms: dict[str, dict[int, Tensor]] = {}
    given: list[Tensor] = []
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            given.append(tensor.detach().clone())
            continue
        atoms[name] = {d: space.fresh(name, d, n, is_parameter=True) for d, n in enumerate(tensor.shape) if n > 1}
        layers = tuple(vector(labels, tensor.ndim, d) for d, labels in atoms[name].items())
        value = Value(torch.empty_like(tensor, device="meta"), layers)
        start[value.key] = Held(name, layers, tensor.ndim)
        given.append(LabelTensor(value, dispatch, tensor.device))
    try:
        with torch.no_grad():
            weight = _OnLabels(nn.Module(), graph=program.graph).run(*given)
    except Exception:  # noqa: BLE001 - what the rules cannot tell anything of is left alone
        return None
    if not isinstance(weight, LabelTensor):
        return None
    parameters = {name for name, tensor in tensors.items() if isinstance(tensor, nn.Parameter)}
    held = carried(dispatch.tape, start, parameters).get(weight.fxc_value.key)
    if held is None or held.name not in parameters or tensors[held.name].ndim != weight.ndim:
        return None
    known = Known({key: _zero(weight.ndim) for key, one in start.items() if one.name == held.name}, training=None)
    for step in dispatch.tape:
        known.maps.update(zip((v.key for v in step.outputs), step.op.constants(step, known), strict=True))
    if not bool((known.of(weight.fxc_value) == 0).all()):
        return None
    dims = tuple(held.dims(atoms[held.name], weight.ndim))
    found = {d: layer.reshape(-1) for layer in held.layers for d in support(layer)}
    if not all(torch.equal(atoms[held.name][dims[d]], labels) for d, labels in found.items()):
        return None  # it is rolled, say: its channels are in another order
    return held.name, dims


class _OnLabels(fx.Interpreter):
    """Runs a graph on labels."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        return super().call_function(ON_LABELS.get(target, target), args, kwargs)


def _zero(rank: int) -> Tensor:
    return torch.zeros((1,) * rank, dtype=torch.float64, device="cpu")


def _steps(graph: fx.Graph) -> set[fx.Node]:
    """The calls of functions and methods that no input and no layer takes part in, and that write to nothing."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        fixed = all(used.op == "get_attr" or used in found for used in node.all_input_nodes)
        if node.op in {"call_function", "call_method"} and fixed and not writes_in_place(node):
            found.add(node)
    return found


def _arguments(node: fx.Node) -> list[object]:
    return [*node.args, *node.kwargs.values()]
