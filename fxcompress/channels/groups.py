"""Which channels of a network go together, and what keeps them: the groups of an analysis, as records."""

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from fxcompress.channels.analysis import Analysis
from fxcompress.channels.coverage import Uncovered, uncovered
from fxcompress.channels.sites import COLUMNS
from fxcompress.channels.space import FIXED, Reason
from fxcompress.trace.weights.computed import SUFFIX

Channel = tuple[str, int, int]
"""A tensor's name, a dim of it, and an index along that dim."""

NO_MAKER = "no parameter makes it"
"""Why a group stays that nothing pins."""


@dataclass(frozen=True, slots=True)
class Group:
    """Channels that go together or not at all.

    Attributes:
        index: position in :attr:`ChannelGraph.groups`.
        members: every entry that goes with the group: (tensor, dim, index).
        producers: the weights that make it: (tensor, output channel).
        consumers: the weights that read it: (tensor, input channel).
        parameters: elements of parameters with an index in the group.
        removable: whether it may go at all, once it is zero.
        reasons: what keeps it, where it may not.
    """

    index: int
    members: tuple[Channel, ...]
    producers: tuple[tuple[str, int], ...]
    consumers: tuple[tuple[str, int], ...]
    parameters: int
    removable: bool
    reasons: tuple[Reason, ...] = ()

    @property
    def kept_by(self) -> tuple[str, ...]:
        """What keeps it, in words; () where it may go."""
        return () if self.removable else _texts(self.reasons) or (NO_MAKER,)


@dataclass(slots=True)
class Bundle:
    """Groups that hang on the same tensors in the same way: usually the channels of one layer.

    Attributes:
        groups: indices of the groups.
        producers, consumers: names of the weights that make and read them.
        parameters: elements of parameters in all of the groups.
        removable: whether the groups may go.
        reasons: what keeps them.
        tensors: the parameters that hold them, where none makes and none reads them, as those of experts in a product.
    """

    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    removable: bool
    reasons: tuple[str, ...]
    tensors: tuple[str, ...] = ()
    groups: list[int] = field(default_factory=list)
    parameters: int = 0

    @property
    def kept_by(self) -> tuple[str, ...]:
        """What keeps the groups, in words; () where they may go."""
        return () if self.removable else self.reasons or (NO_MAKER,)


class Groups:
    """The groups of a network.

    Args:
        analysis: of the network.
    """

    def __init__(self, analysis: Analysis) -> None:
        self.analysis = analysis

    @property
    def unknown_ops(self) -> dict[str, tuple[str, ...]]:
        """Ops without a rule, with the nodes that call them: all channels that touch them stay."""
        found: dict[str, tuple[str, ...]] = {}
        for trail in self.analysis.trails.values():
            for op, nodes in trail.unknown.items():
                found[op] = tuple(dict.fromkeys((*found.get(op, ()), *nodes)))
        return found

    @cached_property
    def uncovered(self) -> tuple[Uncovered, ...]:
        """The same ops, with what each of them costs and where it is called; can be printed, and written as JSON."""
        return uncovered(self.analysis)

    @cached_property
    def share(self) -> float:
        """The share of the parameters (elements) that have an index in a removable group."""
        pinned, removable, total = self.analysis.unit_pinned, 0, 0
        for name, parameter in self.analysis.module.named_parameters():
            stays = np.ones(tuple(parameter.shape), dtype=bool)
            for dim, atoms in self.analysis.atoms.get(name, {}).items():
                shape = [-1 if d == dim else 1 for d in range(parameter.ndim)]
                stays &= pinned[atoms.numpy()].reshape(shape)
            total += parameter.numel()
            removable += parameter.numel() - int(stays.sum())
        return removable / max(total, 1)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """All groups, in the order in which the network's tensors are defined."""
        units = self.analysis.units
        order = np.argsort(units, kind="stable")
        starts = np.flatnonzero(np.r_[True, np.diff(units[order]) != 0])
        named = np.logical_or.reduceat(self._is_named[order], starts) & (units[order[starts]] != FIXED)
        parts = zip(named.tolist(), np.split(order, starts[1:]), strict=True)
        members = {int(units[part[0]]): part for has_name, part in parts if has_name}
        rows, columns = self._roles()
        reasons = self._reasons
        return tuple(
            self._group(i, atoms, rows, columns, reasons.get(root, ()))
            for i, (root, atoms) in enumerate(sorted(members.items()))
        )

    def _group(
        self, index: int, atoms: np.ndarray, rows: set[int], columns: set[int], reasons: tuple[Reason, ...]
    ) -> Group:
        places = zip(atoms.tolist(), self._block_of[atoms].tolist(), strict=True)
        blocks = self.analysis.space.blocks
        channels = [(atom, atom - block.start, block) for atom, i in places if (block := blocks[i]).name]
        parameters = sum(self._elements[block.name] // max(block.size, 1) for _, _, block in channels)
        return Group(
            index,
            tuple((block.name, block.dim, i) for _, i, block in channels),
            tuple((block.name, i) for atom, i, block in channels if atom in rows),
            tuple((block.name, i) for atom, i, block in channels if atom in columns),
            parameters,
            not bool(self.analysis.unit_pinned[atoms[0]]),
            reasons,
        )

    @cached_property
    def _block_of(self) -> np.ndarray:
        """The position of each atom's block, int64 (atoms,)."""
        starts = [block.start for block in self.analysis.space.blocks]
        found: np.ndarray = np.searchsorted(starts, np.arange(self.analysis.space.size), side="right") - 1
        return found

    @cached_property
    def _is_named(self) -> np.ndarray:
        """Which atoms are of a tensor of the network, and not of what an op has made, bool (atoms,)."""
        names = [*(bool(block.name) for block in self.analysis.space.blocks), False]  # the last is that of FIXED
        found: np.ndarray = np.array(names)[self._block_of]
        return found

    @cached_property
    def _elements(self) -> dict[str, int]:
        module = self.analysis.module
        sizes = dict.fromkeys((name for name, _ in module.named_buffers(remove_duplicate=False)), 0)
        return sizes | {name: p.numel() for name, p in module.named_parameters(remove_duplicate=False)}

    def _roles(self) -> tuple[set[int], set[int]]:
        """The atoms that are rows, and those that are columns, of some contraction's weight."""
        rows: set[int] = set()
        columns: set[int] = set()
        for sites in self.analysis.sites:
            atoms = self.analysis.atoms.get(sites.weight_name, {})
            row, column = sites.dims(atoms)
            rows |= set(atoms[row].tolist()) if row in atoms else set()
            columns |= set(atoms[column].tolist()) if column in atoms else set()
        for table in self.analysis.tables:
            atoms = self.analysis.atoms[table.weight_name]
            rows |= set(atoms[COLUMNS].tolist()) if COLUMNS in atoms else set()
        for plain in self.analysis.plain:
            atoms = self.analysis.atoms[plain.weight_name]
            rows |= set(atoms[plain.dim].tolist()) if plain.dim in atoms else set()
        return rows, columns

    @cached_property
    def _reasons(self) -> dict[int, tuple[Reason, ...]]:
        """What pins each unit, by its root."""
        found: dict[int, dict[Reason, None]] = {}
        for atoms, reason in self.analysis.space.pins:
            for root in np.unique(self.analysis.units[atoms]).tolist():
                found.setdefault(root, {})[reason] = None
        return {root: tuple(reasons) for root, reasons in found.items()}

    @cached_property
    def bundles(self) -> tuple[Bundle, ...]:
        """The groups, put together where they hang on the same tensors."""
        found: dict[Any, Bundle] = {}
        for group in self.groups:
            producers = tuple(dict.fromkeys(name for name, _ in group.producers))
            consumers = tuple(dict.fromkeys(name for name, _ in group.consumers))
            reasons = _texts(group.reasons)
            held = () if producers or consumers else tuple(dict.fromkeys(name for name, _, _ in group.members))
            key = (producers, consumers, group.removable, reasons, held)
            bundle = found.setdefault(key, Bundle(*key))
            bundle.groups.append(group.index)
            bundle.parameters += group.parameters
        return tuple(found.values())

    def find(self, name: str, channel: int) -> Group:
        """The group of one output channel.

        Args:
            name: of a module (``"layer1.0.conv2"``) or of a parameter.
            channel: its output channel, or the index along the first dim of the parameter.

        Raises:
            KeyError: there is no such module or parameter.
            IndexError: it has no such channel, or only this one, which stays.
            TypeError: ``channel`` is no whole number.
        """
        try:
            channel = operator.index(channel)
        except TypeError:
            raise TypeError(f"channel={channel!r} is a {type(channel).__name__}; it must be a whole number") from None
        atoms = self.analysis.atoms
        tensor = next(
            (n for n in (name, f"{name}.weight", f"{name}.weight{SUFFIX}", f"{name}.bias") if n in atoms), None
        )
        if tensor is None:
            raise KeyError(self._without_channels(name))
        dim = self._row_dim(tensor)
        group = self._by_channel.get((tensor, dim, channel))
        if group is None:
            raise IndexError(self._without_group(tensor, dim, channel))
        return self.groups[group]

    def _without_group(self, tensor: str, dim: int, channel: int) -> str:
        """Why a channel is in no group, in words."""
        shape = self._shape(tensor)
        if len(shape) <= dim or not 0 <= channel < shape[dim]:
            return f"{tensor} has no channel {channel}: its shape is {shape}"
        if shape[dim] == 1:
            return f"channel {channel} of {tensor} is the only one, so it stays: the shape is {shape}"
        return f"channel {channel} of {tensor} stays: it hangs on what cannot change, such as an input of the network"

    def _without_channels(self, name: str) -> str:
        """Why a name stands for no channels, in words."""
        below = [tensor for tensor in self.analysis.atoms if not name or tensor.startswith(f"{name}.")]
        if below:
            return f"{name!r} has no weight or bias of its own: name a parameter in it, such as {below[0]!r}"
        module = dict(self.analysis.module.named_modules(remove_duplicate=False)).get(name)
        if module is None:
            return f"no module or parameter {name!r}; see model.named_modules()"
        kind = type(module).__name__
        return f"{name!r} is a {kind} without parameters, so it has no channels of its own: name the layer before it"

    @cached_property
    def _by_channel(self) -> dict[Channel, int]:
        return {member: group.index for group in self.groups for member in group.members}

    def _row_dim(self, tensor: str) -> int:
        atoms = self.analysis.atoms[tensor]
        names = {name for name, own in self.analysis.atoms.items() if own is atoms}
        if any(table.weight_name in names for table in self.analysis.tables):
            return COLUMNS
        plain = next((p for p in self.analysis.plain if p.weight_name in names), None)
        if plain is not None:
            return plain.dim
        return next((s.dims(atoms)[0] for s in self.analysis.sites if s.weight_name in names), 0)

    def _shape(self, tensor: str) -> tuple[int, ...]:
        parameters = dict(self.analysis.module.named_parameters(remove_duplicate=False))
        buffers = dict(self.analysis.module.named_buffers(remove_duplicate=False))
        return tuple((parameters | buffers)[tensor].shape)


def _texts(reasons: Iterable[Reason]) -> tuple[str, ...]:
    """Each reason in words, once: a layer that is called twice may have the same reason twice."""
    return tuple(dict.fromkeys(map(str, reasons)))
