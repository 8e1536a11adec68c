"""What ops without a rule cost: where each is called, and how many parameters it keeps from being removed."""

from dataclasses import dataclass

import numpy as np

from fxcompress.channels.analysis import Analysis
from fxcompress.channels.space import FIXED
from fxcompress.trace.graph.described import Place

REMEDY = 'give it a rule: docs/architecture.md, "A rule for an op of one\'s own"'
_SHOWN = 4


@dataclass(frozen=True, slots=True)
class Uncovered:
    """An op without a rule. All fields are plain, so ``json.dumps(dataclasses.asdict(op))`` works.

    Attributes:
        op: its name.
        places: where it is called.
        parameters: elements of parameters with an index in a group of channels that the op keeps.
        alone: those with an index in a group that nothing but the op keeps: what a rule could set free.
        remedy: what to do.
    """

    op: str
    places: tuple[Place, ...]
    parameters: int
    alone: int
    remedy: str = REMEDY

    def __str__(self) -> str:
        kept = "it keeps no parameter"
        if self.parameters:
            kept = f"it keeps {self.parameters:,} parameters, {self.alone:,} of them nothing else keeps"
        lines = [f"no rule for {self.op}: {kept}", *(f"  {place}" for place in self.places[:_SHOWN])]
        if len(self.places) > _SHOWN:
            lines.append(f"  and {len(self.places) - _SHOWN} more places")
        return "\n".join([*lines, f"  {self.remedy}"] if self.parameters else lines)


def uncovered(analysis: Analysis) -> tuple[Uncovered, ...]:
    """The ops without a rule, those first that a rule would free most parameters of."""
    places: dict[str, dict[Place, None]] = {}
    for mode, trail in analysis.trails.items():
        for op, names in trail.unknown.items():
            places.setdefault(op, {}).update(dict.fromkeys(analysis.place(mode, name) for name in names))
    if not places:
        return ()
    pinned, others = _pinned(analysis)
    found = []
    for op, where in places.items():
        own = pinned.get(op, np.zeros(len(others), dtype=bool))
        rest = others | np.any([mask for name, mask in pinned.items() if name != op] or [others], axis=0)
        kept, alone = (_elements(analysis, mask[analysis.units]) for mask in (own, own & ~rest))
        found.append(Uncovered(op, tuple(where), kept, alone))
    return tuple(sorted(found, key=lambda item: (-item.alone, -item.parameters, item.op)))


def _pinned(analysis: Analysis) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The roots of the units that each op without a rule keeps, and of those that anything else does: bool (atoms,)."""
    own: dict[str, np.ndarray] = {}
    others = np.zeros(analysis.space.size, dtype=bool)
    others[analysis.units[FIXED]] = True
    for atoms, reason in analysis.space.pins:
        mask = own.setdefault(reason.op, np.zeros_like(others)) if reason.op else others
        mask[analysis.units[atoms]] = True
    return own, others


def _elements(analysis: Analysis, atoms: np.ndarray) -> int:
    """Elements of parameters with an index among ``atoms``, bool (atoms,)."""
    total = 0
    for name, parameter in analysis.module.named_parameters():
        free = 1
        for dim, size in enumerate(parameter.shape):
            own = analysis.atoms.get(name, {}).get(dim)
            free = free * (size if own is None else size - int(atoms[own.numpy()].sum()))
        total += parameter.numel() - free
    return total
