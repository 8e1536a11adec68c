"""Where bits and biases are, which biases belong to which channels, and what follows from some being zero.

A census belongs to one shape of a network: it is taken anew after each removal.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fxcompress.channels.analysis import Analysis, analyse
from fxcompress.channels.constants import Propagation, propagate
from fxcompress.channels.interpret import Trail
from fxcompress.channels.plan import Plan, make_plan
from fxcompress.channels.rules.recurrent import STATE, kind_of_cell
from fxcompress.channels.rules.registry import Known
from fxcompress.channels.sites import Maker
from fxcompress.channels.values import Value, find
from fxcompress.passes.branches import dead_branches, remove_branches
from fxcompress.provenance import keeps_code
from fxcompress.quantizer import Quantizer
from fxcompress.trace.graph.names import fetch_attr
from fxcompress.trace.inputs import ExampleInputs
from fxcompress.trace.model.skeleton import skeleton
from fxcompress.trace.traced import TracedModule
from fxcompress.training.vectors import fed, uses_of, zero_before

_NONE = np.zeros(1, dtype=bool)

Zeros = dict[str, np.ndarray]
"""For bits and biases by name, which of their entries are zero (for good, or just now); bool (K,)."""


@dataclass(frozen=True, slots=True, eq=False)
class Span:
    """Where the entries of one parameter stand in the concatenation of all of its kind."""

    start: int
    stop: int


class Census:
    """What training needs to know of a network with quantizers.

    Args:
        module: the network.
        inputs: that it runs on.
        free: for bits and biases, which entries may die; bool (K,).
        settable: names of the running statistics that may be set.

    Attributes:
        view: the network without its dead branches; shares all tensors with the network.
        analysis: of the view.
        bits: names of all bits parameters, with their place in the concatenation.
        weights: the same by the name of the weight.
        biases: names of all biases, and weights of norms, that may be shrunk, with their place.
        free: for bits and biases, which entries may die; bool (K,).
        free_rows: bool (R,), the same for all bits.
        pairs: (row, bias) positions: the biases that belong to one row alone.
    """

    def __init__(self, module: TracedModule, inputs: ExampleInputs, free: Zeros, settable: set[str]) -> None:
        self.inputs = inputs
        self.view = module
        self.free = free
        self.settable = settable
        self._take()

    def _take(self) -> None:
        self.analysis = analyse(self.view, self.inputs)
        self._runs = {
            (mode, training): Propagation(trail, training=training)
            for mode, trail in self.analysis.trails.items()
            for training in (True, False)
        }
        quantizers = {n: m for n, m in self.view.named_modules() if isinstance(m, Quantizer)}
        read = {name for trail in self.analysis.trails.values() for name in trail.parameters}
        names = [f"{name}.bits" for name in quantizers if f"{name}.bits" in read]
        self.bits = _spans(names, self.view)
        self.weights = {name.removesuffix("_quantizer.bits"): span for name, span in self.bits.items()}
        uses = [use for mode, trail in self.analysis.trails.items() for use in uses_of(mode, trail)]
        self.biases = _spans(
            list(dict.fromkeys(u.vector for u in uses if self.free.get(u.vector, _NONE).any())), self.view
        )
        self.uses = [use for use in uses if use.vector in self.biases]
        self.norms = [use for use in uses if use.runs]
        parts = [self.free[name] for name in names]
        self.free_rows = np.concatenate(parts) if parts else np.zeros(0, dtype=bool)
        self.pairs = self._pairs()

    def _pairs(self) -> tuple[np.ndarray, np.ndarray]:
        rows: list[int] = []
        biases: list[int] = []
        for mode, (makers, segments) in self.analysis.segments.items():
            for use in (u for u in self.uses if u.mode == mode):
                for entry, segment in enumerate(fed(use, segments)):
                    sources = segments.sources[segment]
                    span = self.span_of(makers[sources[0][0]]) if len(sources) == 1 else None
                    if span is not None:
                        rows.append(span.start + sources[0][1])
                        biases.append(self.biases[use.vector].start + entry)
        return np.array(rows, dtype=np.int64), np.array(biases, dtype=np.int64)

    def span_of(self, maker: Maker) -> Span | None:
        """Where the bits of what is made stand; None where it has none of its own."""
        return self.weights.get(maker.weight_name) if maker.has_bits else None

    def rows_alive(self, plan: Plan) -> np.ndarray:
        """Of all bits one after the other, which belong to channels that a plan keeps; bool (R,)."""
        return self._rows_of(lambda atoms: plan.alive[atoms] | (atoms == 0))

    def rows_spare(self, plan: Plan) -> np.ndarray:
        """Those that belong to channels which nothing needs, and which only fill up what is to be rectangular."""
        return self._rows_of(lambda atoms: np.isin(self.analysis.component[atoms], plan.spare) & (atoms != 0))

    def _rows_of(self, holds: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Of all bits one after the other, for which atoms something holds; bool (R,)."""
        found = np.zeros(max((s.stop for s in self.weights.values()), default=0), dtype=bool)
        for maker in self.analysis.makers:
            span = self.span_of(maker)
            if span is not None:
                found[span.start : span.stop] = holds(maker.rows)
        return found

    def known(self, zeros: Zeros) -> dict[str, list[Known]]:
        """What follows in each graph from some bits and biases being zero, with batch norm as in training."""
        return {mode: [self._known(mode, zeros, training=True)] for mode in self.analysis.trails}

    def _known(self, mode: str, zeros: Zeros, *, training: bool) -> Known:
        """The same in one graph; most of it is as it was a few steps ago."""
        return self._runs[mode, training].run(seeds(self.analysis.trails[mode], zeros))

    def before_biases(self, knowns: dict[str, list[Known]]) -> Zeros:
        """For each bias, where all that it is added to is zero: only there may it shrink."""
        result: Zeros = {}
        for use in self.uses:
            zero = zero_before(use, knowns[use.mode][0])
            result[use.vector] = zero & result.get(use.vector, np.ones_like(zero))
        return result

    def statistics(self, knowns: dict[str, list[Known]]) -> dict[tuple[str, str], np.ndarray]:
        """Where batch norm reads nothing but zeros, by the names of its running mean and variance that may be set."""
        result: dict[tuple[str, str], np.ndarray] = {}
        for use in self.norms:
            if use.statistics is not None and self.settable.issuperset(use.statistics):
                zero = zero_before(use, knowns[use.mode][0])
                result[use.statistics] = zero & result.get(use.statistics, np.ones_like(zero))
        return result

    def modes(self, knowns: dict[str, list[Known]], reset: Zeros) -> tuple[bool, ...]:
        """In which modes of batch norm a proof is needed: training is enough where evaluation makes the same of zeros.

        It does where the running mean is zero too. It is not where the statistics are computed, as those of an
        instance norm are, or where another layer that is alive shares them.

        Args:
            knowns: what is zero in training.
            reset: for each running mean, which entries are zero as long as what batch norm reads is.
        """
        for use in self.norms:
            assert use.statistics is not None
            zero = zero_before(use, knowns[use.mode][0])
            if (zero & ~reset.get(use.statistics[0], np.zeros_like(zero))).any():
                return (True, False)
        return (True,)

    def is_cut(self, dead: set[str]) -> bool:
        """Whether some output would no longer depend on the input with all channels of these weights at zero bits.

        The biases that can be shrunk are taken for zero, and the other vectors for the constants that they are.
        """
        zeros = {f"{n}_quantizer.bits": np.ones(self.weights[n].stop - self.weights[n].start, bool) for n in dead}
        scales = {use.vector for use in self.uses if use.scales}  # which leave nothing of any channel
        zeros |= {name: self.free[name] for name in self.biases if name not in scales}
        for mode, graph in self.view.graphs.items():
            trail = self.analysis.trails[mode]
            vectors = {
                v.key: self._tensor(n)
                for n, v in trail.parameters.items()
                if (v.rank == 1 or n in self.free) and n not in self.bits
            }
            shrunk = {
                key: torch.where(zero == 0, zero, vectors[key])
                for key, zero in seeds(trail, zeros).items()
                if key in vectors
            }
            known = propagate(trail, vectors | seeds(trail, zeros) | shrunk, training=True)
            output = next(node for node in reversed(graph.nodes) if node.op == "output")
            if any(not bool(known.of(value).isnan().any()) for value in find(Value, trail.values[output.name])):
                return True
        return False

    def _tensor(self, name: str) -> Tensor:
        tensor: Tensor = fetch_attr(self.view, name)
        return tensor.detach().cpu().double()

    def drop_dead_branches(self, zeros: Zeros, reset: Zeros) -> dict[str, list[Known]]:
        """Take branches out of the view that are zero for good; what is known in the view that is left, in all modes.

        None go where the model's code is to stay.

        Args:
            zeros: what is zero for good.
            reset: see :meth:`modes`.
        """
        while True:
            knowns = self.known(zeros)
            if False in self.modes(knowns, reset):
                for mode, found in knowns.items():
                    found.append(self._known(mode, zeros | reset, training=False))
            branches = [] if keeps_code(self.view) else dead_branches(self.analysis, knowns, held=True)
            if not branches:
                return knowns
            self.view = skeleton(self.view)
            remove_branches(self.view, branches[:1])
            self._take()

    def would_go(self, rows: np.ndarray) -> np.ndarray:
        """Which channels could be removed once they had no bits and their biases had gone as far as these can.

        Not those in front of a layer norm or group norm, say, whose weights stay.

        Args:
            rows: bool (R,), those without bits; the others have some.

        Returns:
            bool (R,), some of ``rows``.
        """
        bits = {name: rows[span.start : span.stop] for name, span in self.bits.items()}
        biases = {name: np.zeros(span.stop - span.start, bool) for name, span in self.biases.items()}
        while True:
            knowns = self.known(bits | biases)
            before = self.before_biases(knowns)
            more = {name: zero | (before[name] & self.free[name]) for name, zero in biases.items()}
            if all(np.array_equal(zero, biases[name]) for name, zero in more.items()):
                break
            biases = more
        reset = {mean: zero for (mean, _), zero in self.statistics(knowns).items()}
        if False in self.modes(knowns, reset):
            for mode, found in knowns.items():
                found.append(self._known(mode, bits | biases | reset, training=False))
        going: np.ndarray = rows & ~self.rows_alive(self.plan(knowns))
        return going

    def plan(self, knowns: dict[str, list[Known]], held: Iterable[int] = ()) -> Plan:
        """What could be removed at once.

        Args:
            knowns: what is known.
            held: components that must stay, by their root atoms.
        """
        roots = np.fromiter(held, dtype=np.int64)
        return make_plan(self.analysis, knowns, ~np.isin(self.analysis.component, roots) if len(roots) else None)


def free_entries(analysis: Analysis) -> Zeros:
    """Which entries of bits and trained biases may die: those that nothing pins.

    A bias is a vector, which may be laid out along a dim, as (1, C, 1, 1) is. Of the biases of a recurrent layer those
    of the candidates alone: a unit dies by its candidate, whatever its gates do, and a gate without weights may do well
    with a bias.
    """
    result: Zeros = {}
    for name, parameter in analysis.module.named_parameters():
        owner = analysis.module.get_submodule(name.rpartition(".")[0])
        dims = [dim for dim, size in enumerate(parameter.shape) if size > 1] or [0]
        if (
            parameter.ndim == 0
            or parameter.numel() != parameter.shape[dims[0]]
            or f"{name}_quantizer.bits" in analysis.atoms
            or not parameter.requires_grad
            or name not in analysis.atoms  # complex ones have no labels
            or (isinstance(owner, Quantizer) and not name.endswith(".bits"))
        ):
            continue
        atoms = analysis.atoms[name].get(dims[0])
        result[name] = np.zeros(parameter.numel(), bool) if atoms is None else ~analysis.pinned[atoms.numpy()]
        if isinstance(owner, nn.RNNCellBase):
            result[name] &= kind_of_cell(owner).is_candidate(parameter.numel())
    for trail in analysis.trails.values():
        names = trail.names
        for step in (step for step in trail.tape if step.op is STATE):
            kind, *_, weights = step.call.args
            for bias in {names.get(bias.key, "") for bias in weights.biases} & set(result):
                result[bias] &= kind.is_candidate(len(result[bias]))
    return result


def seeds(trail: Trail, zeros: Zeros) -> dict[int, Tensor]:
    """Maps of the values that hold bits, biases and the like: zero where told so, and nothing known elsewhere."""
    maps: dict[int, Tensor] = {}
    for name, value in trail.parameters.items():
        if name in zeros:
            zero = torch.from_numpy(zeros[name]).reshape(value.shape)
            maps[value.key] = torch.where(zero, 0.0, torch.nan).to(torch.float64)
    return maps


def _spans(names: list[str], module: nn.Module) -> dict[str, Span]:
    spans: dict[str, Span] = {}
    start = 0
    for name in names:
        stop = start + module.get_parameter(name).numel()
        spans[name] = Span(start, stop)
        start = stop
    return spans
