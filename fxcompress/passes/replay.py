"""The check of a rewrite: run the network on the labels that are left, and compare at every node.

Equal shapes prove little: a permutation passes. So what must agree are the labels: what is left of the original result
of a node, and the result of the node on what is left.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from fxcompress.channels.analysis import Analysis
from fxcompress.channels.interpret import Atoms, Interpreter, Trail
from fxcompress.channels.layers import Layers, support
from fxcompress.channels.plan import Plan
from fxcompress.channels.space import FIXED, Reason
from fxcompress.channels.survivors import Survivors
from fxcompress.channels.values import LabelTensor, Step, Value, find, leaves
from fxcompress.errors import ExampleInputError
from fxcompress.passes.literals import Proposal, propose
from fxcompress.passes.positions import pair_up, same_entries
from fxcompress.passes.sizes import as_they_were
from fxcompress.passes.slots import KnownSlots, PackedSpace
from fxcompress.trace.guards import check

_VALUE_OPS = {"pointwise", "pointwise, values unknown", "copy", "multiply", "divide"}


@dataclass(eq=False)
class MismatchError(Exception):
    """A node whose result on what is left is not what is left of its result.

    Attributes:
        atoms: that meet there, and must be kept then; int64 (n,). Perhaps none of them was to go.
        reason: in words.
    """

    atoms: np.ndarray
    reason: Reason


class Replay(Interpreter):
    """Interprets a cut module, patches sizes in its graph, and compares with the original.

    Args:
        module: the cut module.
        analysis: of the original.
        mode: which graph.
        plan: what was cut.
    """

    doing = "check"

    def __init__(self, module: nn.Module, analysis: Analysis, mode: str, plan: Plan) -> None:
        self.slots = KnownSlots(analysis, plan.alive)
        super().__init__(module, packed_atoms(analysis, plan), PackedSpace(self.slots))
        self.analysis = analysis
        self.original: Trail = analysis.trails[mode]
        self.alive = plan.alive
        self.left = Survivors(plan.alive)
        self.lonely = _lonely(analysis, plan)
        self.steps: dict[str, list[Step]] = {}
        for step in self.original.tape:
            self.steps.setdefault(step.node, []).append(step)

    def call(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        """Run a node on what is left; patch its sizes where it does not agree with the original."""
        if node.target is check:
            args = self._decided(node, args)
        marks = len(self.dispatch.tape), len(self.space.edges), len(self.space.slots)
        try:
            result, why = self._run(node, args, kwargs), ""
        except ExampleInputError as caught:
            result, why = None, _last_line(caught)
        why = why or self._disagreement(node, result, marks[0])
        if not why:
            return result
        del self.dispatch.tape[marks[0] :], self.space.edges[marks[1] :], self.space.slots[marks[2] :]
        return self._patch(node, why)

    def made_layers(self, node: fx.Node, meta: Tensor, dims: list[int]) -> Layers:
        """What is left of the labels of a tensor that a node makes, where its sizes agree with that."""
        original = self.original.values[node.name]
        return self.left.layers(original) if tuple(meta.shape) == self.left.shape(original) else ()

    def _run(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        """Run a node. Where one entry is all that is left of a dim, it has no label any more."""
        start = len(self.space.pins)
        result = super().call(node, args, kwargs)
        for atoms, reason in self.space.pins[start:]:
            if reason.code == "single-entry":
                self.lonely[atoms] = True
        return result

    def _decided(self, node: fx.Node, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments of a check. A decision was taken on the sizes before the cut: it stands for those sizes only.

        So where the cut has changed one of them, the check asks for the sizes themselves, as they are now.
        """
        _, _, sizes, place = args
        if sizes == self.original.args[node.name][2]:
            return args
        node.args = (node.args[2], sizes, *node.args[2:])
        return sizes, sizes, sizes, place

    def _patch(self, node: fx.Node, why: str) -> Any:  # noqa: ANN401
        source = self._source(node)
        proposal = propose(node, source, self.original.values[node.name], self.alive) or self._numbers(node)
        if proposal is None:
            raise self._mismatch(node, why)
        old = Proposal(node.target, node.args, dict(node.kwargs))
        _set(node, proposal)
        start = len(self.dispatch.tape)
        try:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.env.__getitem__)
            result = self._run(node, args, kwargs)
        except ExampleInputError as caught:
            _set(node, old)
            raise self._mismatch(node, _last_line(caught)) from caught
        why = self._disagreement(node, result, start)
        if why:
            _set(node, old)
            raise self._mismatch(node, why)
        return result

    def _numbers(self, node: fx.Node) -> Proposal | None:
        """The node with the numbers that it took before the cut."""
        found = as_they_were(node, self.original.values)
        return None if found is None else Proposal(node.target, *found)

    def _source(self, node: fx.Node) -> Value | None:
        first = node.args[0] if node.args else None
        value = self.original.values.get(first.name) if isinstance(first, fx.Node) else None
        return value if isinstance(value, Value) else None

    def _disagreement(self, node: fx.Node, result: object, start: int) -> str:
        """Why the result of the steps from ``start`` on is not what is left of the original result; "" if it is."""
        expected = find(Value, self.original.values[node.name])
        found = [tensor.fxc_value for tensor in find(LabelTensor, result)]
        if len(expected) != len(found) or not all(map(self._same, expected, found)):
            return "its labels would differ"
        pairs = pair_up(self.steps.get(node.name, []), self.dispatch.tape[start:], self.alive)
        if pairs is None:
            return "it takes another path on fewer channels"
        if not all(same_entries(before, after, self.alive) for before, after in pairs):
            return "it would move other entries"
        if any(before.op.name in _VALUE_OPS and _scalars(before) != _scalars(step) for before, step in pairs):
            return "a size flows into its value"
        return ""

    def _same(self, expected: Value, found: Value) -> bool:
        if tuple(found.shape) != self.left.shape(expected):
            return False
        a, b = self.left.layers(expected), self.left.canonical(found.layers)
        if len(a) == len(b):
            return all(x.shape == y.shape and self._same_atoms(x, y) for x, y in zip(a, b, strict=True))
        known = {support(layer) for layer in b}
        missing = [layer for layer in a if support(layer) not in known]
        return len(b) < len(a) and all(bool(self.lonely[layer.numpy()].all()) for layer in missing)

    def _same_atoms(self, expected: Tensor, found: Tensor) -> bool:
        if torch.equal(expected, found):
            return True
        a, b = expected.numpy(), found.numpy()
        same = self.slots.name[a] == self.slots.name[b]
        return bool((same | ((b == 0) & self.lonely[a])).all())

    def _mismatch(self, node: fx.Node, why: str) -> MismatchError:
        layers = self._labels(node, *node.all_input_nodes)
        nodes = node.all_input_nodes
        while nodes and not layers:  # numbers made of sizes: to blame are the tensors that they were read off
            nodes = list(dict.fromkeys(used for n in nodes for used in n.all_input_nodes))
            layers = self._labels(*nodes)
        atoms = np.concatenate(layers) if layers else np.zeros(0, dtype=np.int64)
        return MismatchError(
            atoms, Reason("rewrite", f"{node.name} cannot be rewritten for fewer channels: {why}", node.name)
        )

    def _labels(self, *nodes: fx.Node) -> list[np.ndarray]:
        values = [self.original.values[node.name] for node in nodes]
        return [layer.reshape(-1).numpy() for value in find(Value, values) for layer in value.layers]

    def check_couplings(self) -> None:
        """Labels that meet in the cut network must belong together in the original one."""
        same = self.slots.same
        strangers = [self.slots.strangers(slots) for slots in self.space.slots]
        for a, b in self.space.edges:
            wrong = (same[a] != same[b]) & (a != FIXED) & (b != FIXED)
            strangers.append(np.concatenate([a[wrong], b[wrong]]))
        atoms = np.concatenate(strangers) if strangers else np.zeros(0, dtype=np.int64)
        if len(atoms):
            raise MismatchError(atoms, Reason("rewrite", "channels would meet that do not belong together", ""))


def packed_atoms(analysis: Analysis, plan: Plan) -> Atoms:
    """The labels that are left of each parameter and buffer."""
    packed: Atoms = {}
    for name, dims in analysis.atoms.items():
        packed[name] = {}
        for dim, atoms in dims.items():
            index = plan.indices(atoms)
            rest = atoms if index is None else atoms[index]
            if rest.numel() > 1:
                packed[name][dim] = rest
    return packed


def _lonely(analysis: Analysis, plan: Plan) -> np.ndarray:
    """Atoms that are the last of their dim, with all that they belong to: a dim of size 1 carries no label.

    FIXED is one of them: next to it alone, a layer does not vary.
    """
    roots = np.zeros(len(plan.alive), dtype=bool)
    roots[FIXED] = True
    for block in analysis.space.blocks:
        left = plan.alive[block.start : block.start + block.size]
        if left.sum() == 1:
            roots[analysis.component[block.start + int(left.argmax())]] = True
    lonely: np.ndarray = roots[analysis.component]
    return lonely


def _last_line(error: Exception) -> str:
    return str(error).splitlines()[-1].strip()


def _scalars(step: Step) -> list[Any]:
    """The numbers among the arguments of a call, tensors without labels included."""
    return [_number(leaf) for leaf in leaves((step.call.args, step.call.kwargs))]


def _number(leaf: object) -> object:
    if isinstance(leaf, torch.Tensor):
        return tuple(leaf.flatten().tolist()) if leaf.numel() <= 16 else leaf.numel()
    return leaf if isinstance(leaf, int | float | complex | bool | str) else None


def _set(node: fx.Node, proposal: Proposal) -> None:
    node.op = "call_method" if isinstance(proposal.target, str) else "call_function"
    node.target, node.args, node.kwargs = proposal.target, proposal.args, proposal.kwargs
