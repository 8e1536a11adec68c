"""The check of a rewrite: run the network on the labels that are left, and compare at every node.

Equal shapes prove little: a permutation passes. So what must agree are the labels: what is left of the original result
of a node, and the result of the node on what is left.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxcompress.channels.analysis import Analysis
from fxcompress.channels.interpret import Atoms, Interpreter, Trail
from fxcompress.channels.layers import Layers, support
from fxcompress.channels.plan import Plan
from fxcompress.channels.rules.einsum import EINSUM
from fxcompress.channels.rules.movement import CAT
from fxcompress.channels.rules.norms import per_group
from fxcompress.channels.rules.places import ANYWHERE
from fxcompress.channels.size_reads import read_of
from fxcompress.channels.space import FIXED, PART, Reason
from fxcompress.channels.survivors import Survivors, has_own_labels
from fxcompress.channels.values import LabelTensor, Step, Value, find
from fxcompress.errors import ExampleInputError
from fxcompress.passes.attempts import Attempt
from fxcompress.passes.attributes import fit_to_input
from fxcompress.passes.code_changes import CodeChanges
from fxcompress.passes.commuting import Commuting
from fxcompress.passes.cutting import Cut, CutModule
from fxcompress.passes.literals import Proposal, propose
from fxcompress.passes.positions import pair_up, same_entries, same_sums
from fxcompress.passes.size_flow import FLOWS, SizeFlow, UnfreezableError, numbers, same, same_call
from fxcompress.passes.slots import KnownSlots, PackedSpace
from fxcompress.trace.graph.described import LAYER_KEY, place_of_node
from fxcompress.trace.graph.guards import ONLY_STOPS, check
from fxcompress.trace.inputs import ExampleInputs


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
        cut: the cut module.
        analysis: of the original.
        mode: which graph.
        plan: what was cut.
        changes: where to note what would change the model's code; None where that need not stay.
    """

    doing = "check"

    def __init__(
        self, cut: CutModule, analysis: Analysis, mode: str, plan: Plan, changes: CodeChanges | None = None
    ) -> None:
        self.slots = KnownSlots(analysis, plan.alive)
        super().__init__(cut.module, PackedAtoms(analysis, cut.cuts), PackedSpace(self.slots), analysis.counters)
        self.analysis, self.mode = analysis, mode
        self.original: Trail = analysis.trails[mode]
        self._numbers.before = {name: name in self.original.fixed for name in self.original.values}
        self.alive = plan.alive
        self.left = Survivors(plan.alive)
        self.lonely = _lonely(analysis, plan)
        # Layers that a layer of the network hands on are the same objects; beside their ids, which they must outlive.
        self._agreeing: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[Layers, Layers]] = {}
        self.steps: dict[str, list[Step]] = {}
        for step in self.original.tape:
            self.steps.setdefault(step.node, []).append(step)
        self.commuting = Commuting(analysis, mode, self.steps, self.left, self.dispatch)
        self.flow = SizeFlow(self.original.values, self.trail.values, self.env)
        self.changes = changes

    def run(self, graph: fx.Graph, inputs: ExampleInputs) -> Trail:
        """Interpret ``graph``, and patch it.

        Raises:
            MismatchError: it does not agree with the original.
        """
        trail = super().run(graph, inputs)
        if self.changes is None:
            self.flow.tidy()
        return trail

    def _run_node(self, node: fx.Node, bound: dict[str, Any]) -> Any:  # noqa: ANN401 - whatever the node returns
        if node.op == "output" and self.flow.moved(node):  # the network returns a size
            met = self._met(node)
            try:
                node.args, node.kwargs = self.flow.freeze(node)
            except UnfreezableError:
                raise self._mismatch(node, FLOWS) from None
            self._note_change(node, None, met)
        result = super()._run_node(node, bound)
        self.flow.note(node, result)
        return result

    def _follow_tables(self, node: fx.Node, start: int) -> None:
        """What a node reads of a table was pinned by the analysis, for the plan."""

    def call(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        """Run a node on what is left; patch its sizes where it does not agree with the original."""
        if node.target is check:
            args = self._decided(node, args)
        module = self._submodule(str(node.target)) if node.op == "call_module" else None
        if module is not None:
            fit_to_input(module, args)
        known = None if kwargs or node.op == "call_method" else self.commuting.result(node, module, args)
        if known is not None:
            return known
        result, why = self._tried(node, args, kwargs)
        return self._patch(node, why) if why else result

    def made_layers(self, node: fx.Node, meta: Tensor, dims: list[int]) -> Layers:
        """What is left of the labels of a tensor that a node makes, where its sizes agree with that."""
        original = self.original.values[node.name]
        if tuple(meta.shape) != self.left.shape(original):
            return ()
        return tuple(layer for layer in self.left.layers(original) if support(layer) <= set(dims))

    def is_followed(self, node: fx.Node) -> bool:
        """Whether it was before the cut, which has left one entry perhaps."""
        return isinstance(self.original.values.get(node.name), Value)

    def is_spread_by_number(self, node: fx.Node, result: Tensor) -> bool:
        """Whether it had labels before the cut; the number may have been a size that is read then."""
        return isinstance(self.original.values.get(node.name), Value)

    def labelled(self, node: fx.Node, value: Value) -> Value:
        """The value before the cut, where its sizes agree: a dim of one entry has no label any more."""
        original = self.original.values[node.name]
        return original if tuple(value.shape) == self.left.shape(original) else value

    def border_labels(self, node: fx.Node, layer: Tensor, amounts: tuple[int, int]) -> Tensor:
        """What is left of the labels of what a node pads with, where its sizes agree with that."""
        original, (before, behind) = self.original.values[node.name], amounts
        found = [x for x in self.left.layers(original) if x.shape == layer.shape]
        flat = found[0].reshape(-1) if found else torch.zeros(layer.numel(), dtype=torch.int64, device="cpu")
        return torch.cat([flat[:before], flat[flat.numel() - behind :]])

    def _tried(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, str]:
        """What a node returns, and why that is not what is left of its result; nothing has happened then."""
        attempt = Attempt(self.dispatch, (args, kwargs))
        try:
            result = self._run(node, args, kwargs)
            why = self._disagreement(node, result, attempt.start)
        except ExampleInputError as caught:
            result, why = None, self._failure(node, caught)
        if why:
            attempt.undo()
        return result, why

    def _run(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        """Run a node. Where one entry is all that is left of a dim, it has no label any more."""
        start = len(self.space.pins)
        self.dispatch.joined = self._joined(node)
        result = super().call(node, args, kwargs)
        for atoms, reason in self.space.pins[start:]:
            if reason.code == "single-entry":
                component = self.analysis.component
                self.lonely |= np.isin(component, component[atoms])
        return result

    def _joined(self, node: fx.Node) -> Iterator[bool]:
        """For each ``cat`` of a node, whether places in it depend on sizes: the labels that are left do not tell."""
        steps = self.steps.get(node.name, [])
        moves = {id(step.call.args[0]) for step in steps if step.op is ANYWHERE}
        return iter([id(step.outputs[0]) in moves for step in steps if step.op is CAT])

    def _decided(self, node: fx.Node, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments of a check. A decision was taken on the sizes before the cut: it stands for those sizes only.

        So where the cut has changed one of them, it is taken on the sizes as they were. Where these cannot be written,
        the check asks for the sizes themselves, as they are now. The model's own code will take the decision again:
        where it is on sizes of the network alone, it is the same for all inputs. One that only stops the model would
        refuse inputs, where its sizes are also those of inputs: it goes.
        """
        decision, outcome, sizes, place = args
        if sizes == self.original.args[node.name][2]:
            return args
        of_network = all(map(self._is_of_network, find(fx.Node, node.args[2])))
        if self.changes is None and ONLY_STOPS in node.meta and not of_network:
            node.args = (outcome, outcome, (), place)
            return node.args
        if self.changes is not None and decision == outcome and of_network:
            return args
        self._note_change(node, None, self._met(node))
        if self.changes is None and self._is_frozen(node):
            return fx.node.map_arg(node.args, lambda used: self.flow.now[used.name])
        node.args = (node.args[2], sizes, *node.args[2:])
        return sizes, sizes, sizes, place

    def _is_frozen(self, node: fx.Node) -> bool:
        """Give a node what it was given before the cut, if that can be written."""
        try:
            node.args, node.kwargs = self.flow.freeze(node)
        except UnfreezableError:
            return False
        return True

    def _is_of_network(self, size: fx.Node) -> bool:
        """Whether a size is the same for all inputs: that of a dim along which all labels differ."""
        read = read_of(size)
        if read is None or not isinstance(read[2], int):
            return False
        value = self.original.values[read[0].name]
        return isinstance(value, Value) and has_own_labels(value, range(value.rank)[read[2]])

    def _patch(self, node: fx.Node, why: str) -> Any:  # noqa: ANN401
        """Run a node with other arguments: those that it should have now, or those that it had before the cut."""
        old = Proposal(node.target, node.args, dict(node.kwargs))
        met = self._met(node) if self.changes is not None else _NONE
        for proposal in self._proposals(node):
            _set(node, proposal)
            result, why = self._tried(node, *fx.node.map_arg((node.args, node.kwargs), self.env.__getitem__))
            if not why:
                if not _is_of_layer(self.module, node):
                    self._note_change(node, old.args if node.target is old.target else None, met)
                return result
        _set(node, old)
        raise self._mismatch(node, why)

    def _note_change(self, node: fx.Node, old: tuple[Any, ...] | None, met: np.ndarray) -> None:
        """Where the code of the model has to stay: remember what would change it.

        Args:
            node: as it is now.
            old: its arguments before; None where it is not about arguments.
            met: the atoms that met there, int64 (n,).
        """
        if self.changes is not None:
            place = self.analysis.place(self.mode, node.name)
            self.changes.note(node, place, self.original.values[node.name], met, old)

    def _proposals(self, node: fx.Node) -> Iterator[Proposal]:
        source, result = self._source(node), self.original.values[node.name]
        old = Proposal(node.target, node.args, dict(node.kwargs))
        first = propose(node, source, result, self.alive, self._comes_from_inputs)
        if first is not None:
            yield first
        _set(node, old)
        spelled = self.flow.spelled(node)
        if spelled is not None:
            _set(node, Proposal(node.target, spelled, dict(node.kwargs)))
            with_numbers = propose(node, source, result, self.alive, self._comes_from_inputs)
            if with_numbers is not None:
                yield with_numbers
            _set(node, old)
        if not self.flow.moved(node):
            return
        try:
            frozen = Proposal(node.target, *self.flow.freeze(node))
        except UnfreezableError:
            return
        yield frozen
        _set(node, frozen)
        both = propose(node, source, result, self.alive, self._comes_from_inputs)
        if both is not None:
            yield both

    def _comes_from_inputs(self, node: fx.Node) -> bool:
        """Whether a node computes a number of sizes of the inputs."""
        return not self._numbers.is_fixed(node) and not isinstance(self.env.get(node), Tensor)

    def _source(self, node: fx.Node) -> Value | None:
        first = node.args[0] if node.args else None
        value = self.original.values.get(first.name) if isinstance(first, fx.Node) else None
        if isinstance(value, Tensor) and isinstance(self.original.values[node.name], Value):
            return Value(torch.empty_like(value, device="meta"))  # what has got labels by being repeated
        return value if isinstance(value, Value) else None

    def _failure(self, node: fx.Node, error: Exception) -> str:
        """Why a node does not run on what is left."""
        if any(isinstance(caught, IndexError) for caught in (error, error.__cause__)):
            indices = (used for used in node.all_input_nodes if _is_index(self.env[used]))
            for used in indices:
                held = f" {used.target}" if used.op == "get_attr" else ""
                return f"its index{held} holds numbers of channels, and is not renumbered"
        return _last_line(error)

    def _disagreement(self, node: fx.Node, result: object, start: int) -> str:
        """Why the result of the steps from ``start`` on is not what is left of the original result; "" if it is."""
        expected = find(Value, self.original.values[node.name])
        tensors = find(LabelTensor, result)
        for before, tensor in zip(expected, tensors, strict=False):
            self._settle_labels(before, tensor)
        found = [tensor.fxc_value for tensor in tensors]
        if len(expected) != len(found) or not all(map(self._same, expected, found)):
            return "its labels would differ"
        steps = self.steps.get(node.name, []), self.dispatch.tape[start:]
        pairs = self._einsum(node) if node.target in EINSUM else pair_up(*steps, self.left)
        if pairs is None:
            return "it takes another path on fewer channels"
        if not all(same_entries(before, after, self.left) for before, after in pairs):
            return "it would move other entries"
        if not all(per_group(before.call) == per_group(after.call) for before, after in pairs):
            return "it would normalise over groups of another size"
        doubtful = [(before, step) for before, step in pairs if not same_call(before, step)]
        deep = node.op == "call_module" or not _is_torch(node.target)  # it may make tensors of sizes itself
        if not all(_same_numbers(numbers(before), numbers(step), deep=deep) for before, step in doubtful):
            return FLOWS
        return self.flow.misuse(node, result, self.dispatch.tape[start:])

    def _einsum(self, node: fx.Node) -> list[tuple[Step, Step]] | None:
        """Its steps are of no interest, unless it repeats the one entry that is left of an operand."""
        now = fx.node.map_arg(node.args, self.env.__getitem__)
        return [] if same_sums(self.original.args[node.name], now) else None

    def _settle_labels(self, expected: Value, tensor: LabelTensor) -> None:
        """Take labels off a result where none are expected, along dims that have lost nothing, or where none can go.

        With one head left the rows of its attention have labels, where those of several heads cross each other; and so
        have the dims of that head, where they lay behind those of another one. Slots that are found as one get the
        labels of those that they were.
        """
        value, left = tensor.fxc_value, self.left.layers(expected)
        if not value.layers or value.shape != self.left.shape(expected):
            return
        whole = {d for d, (old, new) in enumerate(zip(expected.shape, value.shape, strict=True)) if old == new}
        taken = {d for layer in left for d in support(layer)}
        kept = tuple(layer for layer in value.layers if not self._is_finer(layer, whole, taken))
        kept = self.slots.told_apart(left, kept)
        if tuple(map(id, kept)) != tuple(map(id, value.layers)):
            tensor.fxc_value = Value(value.meta, kept)

    def _is_finer(self, layer: Tensor, whole: set[int], taken: set[int]) -> bool:
        dims = support(layer)
        return dims.isdisjoint(taken) and (dims <= whole or bool(self.analysis.pinned[layer.numpy()].all()))

    def _same(self, expected: Value, found: Value) -> bool:
        if found.shape != self.left.shape(expected):
            return False
        met = (tuple(map(id, expected.layers)), tuple(map(id, found.layers)))
        if met in self._agreeing:
            return True
        agree = self._same_layers(expected, found)
        if agree:
            self._agreeing[met] = expected.layers, found.layers
        return agree

    def _same_layers(self, expected: Value, found: Value) -> bool:
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
        place = self.analysis.place(self.mode, node.name)
        text = f"{place} cannot be rewritten for fewer channels: {why}"
        return MismatchError(self._met(node), Reason("rewrite", text, place))

    def _met(self, node: fx.Node) -> np.ndarray:
        """The atoms of what a node makes, and of what it is given."""
        layers = self._labels(node, *node.all_input_nodes, *self.flow.sources(node))
        nodes = node.all_input_nodes
        while nodes and not layers:  # numbers made of sizes: to blame are the tensors that they were read off
            nodes = list(dict.fromkeys(used for n in nodes for used in n.all_input_nodes))
            layers = self._labels(*nodes)
        return np.concatenate(layers) if layers else np.zeros(0, dtype=np.int64)

    def _labels(self, *nodes: fx.Node) -> list[np.ndarray]:
        values = [self.original.values.get(node.name) for node in nodes]
        return [layer.reshape(-1).numpy() for value in find(Value, values) for layer in value.layers]

    def check_couplings(self) -> None:
        """Labels that meet in the cut network must belong together in the original one."""
        same = self.slots.same
        a, b = self.space.couplings()
        wrong = (same[a] != same[b]) & (a != FIXED) & (b != FIXED)
        strangers = [a[wrong], b[wrong], *(self.slots.strangers(slots) for slots in self.space.slots)]
        atoms = np.concatenate(strangers)
        if len(atoms):
            raise MismatchError(atoms, Reason("rewrite", "channels would meet that do not belong together"))


class PackedAtoms(Atoms):
    """The labels that are left of each parameter and buffer, found when they are asked for: most layers are not run.

    Args:
        analysis: of the network before the cut.
        cuts: what was taken out of each tensor.
    """

    def __init__(self, analysis: Analysis, cuts: Mapping[str, Cut]) -> None:
        self._whole = analysis.atoms
        self._cuts = cuts

    def __getitem__(self, name: str) -> dict[int, Tensor]:
        indices = self._cuts[name].indices if name in self._cuts else {}
        dims = self._whole[name].items()
        left = {dim: atoms.index_select(0, indices[dim]) if dim in indices else atoms for dim, atoms in dims}
        return {dim: atoms for dim, atoms in left.items() if atoms.numel() > 1}

    def __iter__(self) -> Iterator[str]:
        return iter(self._whole)

    def __len__(self) -> int:
        return len(self._whole)


def _lonely(analysis: Analysis, plan: Plan) -> np.ndarray:
    """Atoms that are the last of their dim, with all that they belong to: a dim of size 1 carries no label.

    The last of a dim may be several that go together only, such as the dims of the last head that holds keys: it is the
    dim of heads that has size 1 then. FIXED is lonely too: next to it alone, a layer does not vary.
    """
    roots = np.zeros(len(plan.alive), dtype=bool)
    roots[FIXED] = True
    component, blocks = analysis.component, analysis.space.blocks  # they hold all atoms but FIXED, in order
    sizes = [1, *(block.size for block in blocks)]
    starts = np.cumsum([0, *sizes[:-1]])
    first = np.minimum.reduceat(np.where(plan.alive, component, len(component)), starts)
    last = np.maximum.reduceat(np.where(plan.alive, component, -1), starts)
    alone = (first == last) & np.array([True, *(block.dim != PART for block in blocks)])
    roots[first[alone]] = True
    lonely: np.ndarray = roots[component]
    return lonely


_NONE = np.zeros(0, dtype=np.int64)


def _is_index(value: object) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, LabelTensor) and not value.is_floating_point()


def _last_line(error: Exception) -> str:
    return str(error).splitlines()[-1].strip()


def _same_numbers(before: list[Any], now: list[Any], *, deep: bool) -> bool:
    """Whether a step computes with the same numbers; of large tensors only if ``deep``, as they may be random."""
    return len(before) == len(now) and all(
        same(a, b) or (not deep and _is_large(a) and _is_large(b) and a.shape == b.shape)
        for a, b in zip(before, now, strict=True)
    )


def _is_large(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.numel() > _LARGE


_LARGE = 16


def _is_torch(target: object) -> bool:
    module = getattr(target, "__module__", None) or ""
    return isinstance(target, str) or module.partition(".")[0] in {"", "torch", "_operator", "math", "builtins"}


def _is_of_layer(module: nn.Module, node: fx.Node) -> bool:
    """Whether the numbers of a node are attributes of a layer of torch, which say what its tensors do."""
    if LAYER_KEY in node.meta:
        return True
    owner = place_of_node(node).module
    return node.target is F.group_norm and isinstance(module.get_submodule(owner), nn.GroupNorm)


def _set(node: fx.Node, proposal: Proposal) -> None:
    if proposal.target is not node.target:
        node.op = "call_method" if isinstance(proposal.target, str) else "call_function"
    node.target, node.args, node.kwargs = proposal.target, proposal.args, proposal.kwargs
