"""Weights that a network computes from its parameters by mixing their channels, as plain parameters.

A weight that is standardised, or divided by its length, depends on all inputs of its layer: without an input that is
dead, and whose kernels are not zero, the others would be scaled in another way. What the network computes depends on
the weight alone. So in the graph the weight itself becomes the parameter, from which channels can be taken out exactly,
and which a quantizer can round::

    conv.weight, conv.gain -> mean, var, sqrt, ... -> F.conv2d     ->     conv.weight_plain -> F.conv2d

No op has a rule here. A weight is replaced where its value follows from parameters that nothing else uses, is the same
in each run and in both modes, and where channels could not be cut out of what it is made from: one that is scaled,
masked, turned or a product stays what it is. The function is the same; training goes on in the weight. A state_dict of
the original loads all the same.
"""

import itertools
import operator
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcompress.trace.graph.guards import is_check
from fxcompress.trace.model.state_dict_hooks import StateDictHook, plain_weights
from fxcompress.trace.traced import TracedModule, lint
from fxcompress.trace.weights.programs import Computed, Program, computed, fixed_value, held_in, may_matter, mixes
from fxcompress.trace.weights.reads import weight_of

_OF_NUMBERS = frozenset(
    {
        getattr, len, int, bool, operator.getitem, operator.eq, operator.ne, operator.lt, operator.le, operator.gt,
        operator.ge, operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv, operator.mod,
        operator.neg, operator.not_, operator.and_, operator.or_,
    }
)  # fmt: skip
"""What computes a decision from sizes, and writes to nothing."""
SUFFIX = "_plain"
"""What is added to the name of the parameter that a weight was computed from; of the largest one of several."""


@dataclass(frozen=True)
class ComputedWeight(StateDictHook):
    """Before a state_dict is loaded into a module: compute the weight from the tensors of the original.

    Attributes:
        name: of the weight in the module.
        program: that computes it.
        inputs: of the program: names in the module, and tensors that are no part of a state_dict.
        sources: those of the names that are parameters of the original, and are gone here.
    """

    name: str
    program: Program
    inputs: tuple[str | Tensor, ...]
    sources: tuple[str, ...]

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
        """As torch calls it; changes ``state`` in place. A state_dict that has the weight already is left as it is."""
        if f"{prefix}{self.name}" in state or not all(f"{prefix}{name}" in state for name in self.sources):
            return
        device = state[f"{prefix}{self.sources[0]}"].device
        values = [self._value(one, module, state, prefix).to(device) for one in self.inputs]
        with torch.no_grad():
            try:
                weight = self.program(values)
            except Exception:  # noqa: BLE001 - shapes of another network: loading says which weight is missing
                return
        for name in self.sources:
            del state[f"{prefix}{name}"]
        state[f"{prefix}{self.name}"] = weight

    def sources_of(self, whole: str) -> tuple[str, ...]:
        """The names of the sources where the weight is called ``whole``."""
        prefix = whole.removesuffix(self.name)
        return tuple(f"{prefix}{name}" for name in self.sources)

    @staticmethod
    def _value(one: str | Tensor, module: nn.Module, state: dict[str, Any], prefix: str) -> Tensor:
        if isinstance(one, Tensor):
            return one
        found = state.get(f"{prefix}{one}")
        return found if isinstance(found, Tensor) else module.get_buffer(one)


def computed_weights(module: nn.Module, model: nn.Module | None = None) -> dict[str, tuple[str, ...]]:
    """The names of the parameters of ``module`` that its original computes, each with those that it is computed from.

    Args:
        module: a traced network.
        model: leave out what was a parameter of this one already.
    """
    known = {} if model is None else plain_weights(model)
    found = {name: hook for name, hook in plain_weights(module).items() if name not in known}
    return {name: hook.sources_of(name) for name, hook in found.items() if isinstance(hook, ComputedWeight)}


def sources(module: nn.Module) -> tuple[str, ...]:
    """The parameters of its original that ``module`` has others in the place of."""
    return tuple(name for names in computed_weights(module).values() for name in names)


def make_computed_plain(module: TracedModule) -> None:
    """Replace each such weight of a traced network that shares the tensors of its original, in place."""
    held = {node: tensor for graph in module.graphs.values() for node, tensor in held_in(module, graph).items()}
    found: dict[str, list[Computed]] = defaultdict(list)
    for root in _roots(module, held):
        one = computed(root, held)
        if one is not None:
            found[one.key].append(one)
    if not found:
        return
    reads = _Reads(module, held)
    alone = [group for group in found.values() if reads.are_alone(group)]
    weights = [(group, weight) for group in alone if (weight := _weight(group[0], held)) is not None]
    inside = {node for group, _ in weights for one in group for node in one.nodes}
    constant = reads.constants(inside)
    for group, weight in weights:
        if constant.issuperset(id(held[node]) for node in group[0].tensors if not isinstance(held[node], nn.Parameter)):
            _replace(module, group, weight, held, reads)
    for graph in module.graphs.values():
        lint(graph)
    if module.is_compiled:
        module.recompile()


def _roots(module: TracedModule, held: dict[fx.Node, Tensor]) -> list[fx.Node]:
    """The nodes that a layer takes as its weight, and that are computed."""
    nodes = (weight_of(node) for graph in module.graphs.values() for node in graph.nodes)
    return list(dict.fromkeys(n for n in nodes if n is not None and n not in held and n.op.startswith("call_")))


class _Reads:
    """Who reads the tensors of a network.

    Args:
        module: the network.
        held: the tensor of each get_attr node.
    """

    def __init__(self, module: TracedModule, held: dict[fx.Node, Tensor]) -> None:
        self.held = held
        self._holders = Counter(id(p) for owner in module.modules() for p in owner._parameters.values())
        self._names = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
        calls = [n for graph in module.graphs.values() for n in graph.find_nodes(op="call_module")]
        self._called: dict[int, set[fx.Node]] = defaultdict(set)
        for node in calls:
            child = module.get_submodule(str(node.target))
            for tensor in (*child.parameters(), *child.buffers()):
                self._called[id(tensor)].add(node)
        self._nodes: dict[int, list[fx.Node]] = defaultdict(list)
        for node, tensor in held.items():
            self._nodes[id(tensor)].append(node)

    def are_alone(self, group: list[Computed]) -> bool:
        """Whether the parameters behind a weight, and what is made of them, make nothing but this weight."""
        inside = {node for one in group for node in one.nodes}
        known = inside | _idle(inside)
        roots = {one.root for one in group}
        for node in inside:
            tensor = self.held.get(node)
            if isinstance(tensor, nn.Parameter):
                fine = self._holders[id(tensor)] == 1 and self._readers(tensor) <= known
            else:
                others = () if tensor is not None else set(node.users) - known
                fine = all(node in roots and _reads_once(user, node) for user in others)
            if not fine:
                return False
        return True

    def constants(self, inside: set[fx.Node]) -> set[int]:
        """The ids of tensors that are no parameters, and small, and that nothing reads but nodes that write nothing.

        A large one may be a mask, which its owner may change while the network trains.
        """
        known = inside | _idle(inside)
        tensors = {id(t): t for node, t in self.held.items() if node in inside and not isinstance(t, nn.Parameter)}
        small = {key: t for key, t in tensors.items() if sum(size > 1 for size in t.shape) <= 1}
        return {key for key, tensor in small.items() if self._readers(tensor) <= known}

    def _readers(self, tensor: Tensor) -> set[fx.Node]:
        """The nodes that read a tensor, or call a module which holds it."""
        return {user for node in self._nodes[id(tensor)] for user in node.users} | self._called.get(id(tensor), set())

    def has_one_name(self, tensor: Tensor) -> bool:
        """Whether the module that holds a parameter has one place in the network."""
        return self._names[id(tensor)] == 1


def _idle(inside: set[fx.Node]) -> set[fx.Node]:
    """The nodes that lead from those inside to nothing but checks of sizes, which the trace has passed for good."""
    found: set[fx.Node] = set()
    open_ = list(inside)
    while open_:
        fresh = {u for u in open_.pop().users if u not in inside and u not in found}
        fresh = {u for u in fresh if is_check(u) or u.target in _OF_NUMBERS}
        found |= fresh
        open_ += fresh
    while True:
        known = found | inside
        left = {n for n in found if known.issuperset(n.all_input_nodes) and found.issuperset(n.users)}
        if left == found:
            return found
        found = left


def _reads_once(user: fx.Node, weight: fx.Node) -> bool:
    arguments = [a for a in (*user.args, *user.kwargs.values()) if a is weight]
    return weight_of(user) is weight and len(arguments) == 1


def _weight(one: Computed, held: dict[fx.Node, Tensor]) -> nn.Parameter | None:
    """The weight as a parameter; None where it can stay as it is, or must."""
    tensors = [held[node] for node in one.tensors]
    parameters = [isinstance(tensor, nn.Parameter) for tensor in tensors]
    total = sum(t.numel() for t, known in zip(tensors, parameters, strict=True) if known)
    if not may_matter(one.program, tensors, total):
        return None
    weight = fixed_value(one.program, tensors)
    if weight is None or weight.numel() > total or not mixes(one.program, tensors, parameters):
        return None
    return weight


def _replace(
    module: TracedModule, group: list[Computed], weight: nn.Parameter, held: dict[fx.Node, Tensor], reads: _Reads
) -> None:
    """Put ``weight`` in the place of the largest parameter that it is computed from; the others go."""
    tensors = {str(node.target): held[node] for node in group[0].tensors}
    parameters = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, nn.Parameter)}
    main = max(parameters, key=lambda name: parameters[name].numel())
    path, _, leaf = main.rpartition(".")
    owner = module.get_submodule(path)
    buffers = dict(module.named_buffers(remove_duplicate=False))
    above = _common([name.rpartition(".")[0] for name in tensors if name in parameters or name in buffers])
    if above != path and not all(map(reads.has_one_name, parameters.values())):
        return  # the names of what it is made from do not follow from the one place that is left
    own = leaf + SUFFIX
    while hasattr(owner, own):
        own += "_"
    owner._parameters = {own if k == leaf else k: weight if k == leaf else p for k, p in owner._parameters.items()}
    for name in parameters.keys() - {main}:
        holder, _, other = name.rpartition(".")
        del module.get_submodule(holder)._parameters[other]
    new, start = f"{path}.{own}".lstrip("."), len(above) + 1 if above else 0
    inputs = tuple(n[start:] if n in parameters or n in buffers else t.detach() for n, t in tensors.items())
    hook = ComputedWeight(new[start:], group[0].program, inputs, tuple(name[start:] for name in parameters))
    module.get_submodule(above).register_load_state_dict_pre_hook(hook)
    for one in group:
        _read(one, new)


def _common(paths: list[str]) -> str:
    """The path of the module that holds all of these."""
    steps = [path.split(".") if path else [] for path in paths]
    return ".".join(own[0] for own in itertools.takewhile(lambda own: len(set(own)) == 1, zip(*steps, strict=False)))


def _read(one: Computed, name: str) -> None:
    """Let a graph read the parameter in place of what computes it."""
    graph, inside = one.root.graph, set(one.nodes)
    idle = _idle(inside)
    with graph.inserting_before(one.root):
        node = graph.create_node("get_attr", name)
    node.meta = dict(one.root.meta)
    one.root.replace_all_uses_with(node)
    for old in reversed(graph.nodes):
        if (old in inside or old in idle) and not old.users:
            graph.erase_node(old)
