"""Which branches end with all that makes them zero.

A branch that is zero may go only if the parameters that make it so go with it. Here they do not: ``scale`` is zero, as
couplings of flows begin, and would be read on in one place and not in the other, where training soon makes it another
number::

    scale, shift = net(a).chunk(2, 1)            y = b * scale.exp() + shift
    y = b * scale.exp() + shift                  return y, logdet                      # and not this
    return y, logdet + scale.sum(1)        ->
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import fx

from fxcompress.channels.analysis import Analysis
from fxcompress.channels.constants import propagate
from fxcompress.channels.rules.registry import Known
from fxcompress.channels.size_reads import read_of
from fxcompress.channels.values import Value, find


@dataclass(frozen=True, slots=True)
class Dropped:
    """An operand that a sum may do without.

    Attributes:
        mode, node: the sum.
        kept, dropped: the positions of its operands.
        ignored: bool (atoms,), entries of it that may be anything; None for none.
    """

    mode: str
    node: fx.Node
    kept: int
    dropped: int
    ignored: np.ndarray | None = None

    @property
    def operand(self) -> fx.Node:
        """What takes the place of the sum."""
        kept = self.node.args[self.kept]
        assert isinstance(kept, fx.Node)
        return kept

    def is_zero(self, analysis: Analysis, knowns: Iterable[Known]) -> bool:
        """Whether it is zero, but for what is ignored, in every mode."""
        value = analysis.trails[self.mode].args[self.node.name][self.dropped]
        return isinstance(value, Value) and not any(self._matters(value, known) for known in knowns)

    def _matters(self, value: Value, known: Known) -> bool:
        """Whether some entry that is not ignored may be other than zero."""
        may = (known.of(value) != 0).numpy()
        if self.ignored is not None and may.any():
            for layer in value.layers:
                may = np.logical_and(may, ~self.ignored[layer.numpy()])
        return bool(may.any())


def that_end(analysis: Analysis, knowns: dict[str, list[Known]], found: Sequence[Dropped]) -> list[Dropped]:
    """The branches that are zero by parameters which nothing reads once all of them are gone.

    Args:
        analysis: of the network.
        knowns: what is known in each graph.
        found: branches that are zero.
    """
    ending = list(found)
    while ending:
        gone = {mode: _gone_with(ending, mode) for mode in analysis.module.graphs}
        read_on = _read_on(analysis, ending, gone)
        known_then = {
            mode: [_without(analysis, mode, gone[mode], read_on, known) for known in here]
            for mode, here in knowns.items()
        }
        left = [branch for branch in ending if branch.is_zero(analysis, known_then[branch.mode])]
        if len(left) == len(ending):
            break
        ending = left
    return ending


def _gone_with(branches: Sequence[Dropped], mode: str) -> set[str]:
    """The nodes that nothing reads once branches are gone, or only the sizes of, by name."""
    gone = set[fx.Node]()
    dropped = {(b.node, b.node.args[b.dropped]) for b in branches if b.mode == mode}
    waiting = [operand for _, operand in dropped if isinstance(operand, fx.Node)]
    while waiting:
        node = waiting.pop()
        values = (user for user in node.users if read_of(user) is None)
        if node.op != "placeholder" and all(user in gone or (user, node) in dropped for user in values):
            gone.add(node)
            waiting += node.all_input_nodes
    return {node.name for node in gone}


def _read_on(analysis: Analysis, branches: Sequence[Dropped], gone: dict[str, set[str]]) -> set[int]:
    """The labels of the parameters that something reads which stays, in any graph."""
    trained = {name for name, _ in analysis.module.named_parameters(remove_duplicate=False)}
    sums = {(branch.mode, branch.node.name) for branch in branches}
    found = set[int]()
    for mode, trail in analysis.trails.items():
        names = {key: name for key, name in trail.names.items() if name in trained}
        read = [trail.args[b.node.name][b.kept] for b in branches if b.mode == mode]
        read += [
            (step.call.args, step.call.kwargs)
            for step in trail.tape
            if step.node not in gone[mode] and (mode, step.node) not in sums
        ]
        found |= {id(analysis.atoms[names[value.key]]) for value in find(Value, read) if value.key in names}
    return found


def _without(analysis: Analysis, mode: str, gone: set[str], read_on: set[int], known: Known) -> Known:
    """What is known of the nodes that go, by the parameters that go with them, and by buffers."""
    trail = analysis.trails[mode]
    start = {
        value.key: known.maps[value.key]
        for name, value in trail.parameters.items()
        if id(analysis.atoms[name]) not in read_on and value.key in known.maps
    }
    tape = [step for step in trail.tape if step.node in gone]
    return propagate(replace(trail, tape=tape), start, training=known.training)
