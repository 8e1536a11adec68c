"""Atoms, what couples them, and what pins them.

An **atom** is the identity of one entry along one dim of one parameter or buffer. Atoms that must go together are
coupled; the connected components are the groups of the network. Atom 0 is FIXED: it stands for everything that
cannot be removed. A **slot** is an atom for a whole slice of labels, such as a head of an attention: it goes when the
last of its members does.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, fx

from fxcompress.trace.graph.described import NOWHERE, Place, place_of_node

FIXED = 0
PART = -1


@dataclass(frozen=True, slots=True)
class Reason:
    """Why atoms must stay.

    Attributes:
        code: one of a few words that tests and tables can compare: ``output``, ``norm``, ``unknown-op``...
        text: the same in words.
        place: where it was found.
        op: the op without a rule that is to blame; "" for other reasons.
    """

    code: str
    text: str
    place: Place = NOWHERE
    op: str = ""

    @property
    def node(self) -> str:
        """The graph node where it was found; "" for none."""
        return self.place.node

    def within(self, path: str) -> "Reason":
        """The same, named from outside of the module at ``path``."""
        if not self.node:
            return self
        place = self.place.within(path)
        return replace(self, text=self.text.replace(str(self.place), str(place)), place=place)

    def __str__(self) -> str:
        where = "" if self.code == "output" else str(self.place)
        return f"{self.text} ({where})" if where and where not in self.text else self.text


@dataclass(frozen=True, slots=True)
class Block:
    """The atoms ``start .. start + size`` are the entries of dim ``dim`` of the tensor ``name``; no name for slots.

    ``dim`` is :data:`PART` where they are some of the entries of a dim, which are not alone there.
    """

    name: str
    dim: int
    start: int
    size: int
    is_parameter: bool


@dataclass(frozen=True, slots=True, eq=False)
class Slots:
    """Atoms that stand for slices: ``atoms[i]`` is there as long as any of ``members[i]`` is.

    Attributes:
        atoms: int64 (n,).
        members: int64 (n, m); entries in one column lie at the same place in each slice.
    """

    atoms: np.ndarray
    members: np.ndarray


class Space:
    """Collects atoms, couplings, slots and pins while a network is interpreted.

    Attributes:
        at: the node that is being interpreted.
    """

    def __init__(self) -> None:
        self.size = 1
        self.blocks: list[Block] = []
        self.pins: list[tuple[np.ndarray, Reason]] = []
        self.edges: list[tuple[Tensor, Tensor]] = []
        self.slots: list[Slots] = []
        self.at: fx.Node | None = None
        self._slot_of: dict[bytes, int] = {}

    @property
    def node(self) -> str:
        """The name of the node that is being interpreted; "" for none."""
        return "" if self.at is None else self.at.name

    @property
    def place(self) -> Place:
        """Where that node is."""
        return NOWHERE if self.at is None else place_of_node(self.at)

    def fresh(self, name: str, dim: int, size: int, *, is_parameter: bool) -> Tensor:
        """New atoms for one dim of a tensor, shape (size,)."""
        return self.fresh_all([(name, dim, size, is_parameter)])[0]

    def fresh_all(self, dims: Sequence[tuple[str, int, int, bool]]) -> Sequence[Tensor]:
        """The same for many dims: name, dim, size, and whether it is one of a parameter."""
        first = self.size
        for name, dim, size, is_parameter in dims:
            self.blocks.append(Block(name, dim, self.size, size, is_parameter))
            self.size += size
        fresh: Sequence[Tensor] = torch.arange(first, self.size, device="cpu").split([size for _, _, size, _ in dims])
        return fresh

    def couple(self, a: Tensor, b: Tensor) -> None:
        """The atoms of ``a`` and ``b`` (broadcast against each other) go together or not at all."""
        if a is not b:
            self.edges.append((a, b) if a.shape == b.shape else torch.broadcast_tensors(a, b))

    def nest(self, atoms: Tensor, members: Tensor) -> None:
        """Each of the ``atoms`` (n,) goes when the last of its ``members`` (n, m) does, and not before."""
        a, rows = atoms.numpy(), members.numpy()
        first = list({(atom, row.tobytes()): i for i, (atom, row) in enumerate(zip(a, rows, strict=True))}.values())
        self.slots.append(Slots(a[first], rows[first]))

    def slot(self, members: Tensor) -> Tensor:
        """An atom for each slice of ``members`` (n, m), the same one for the same slice; FIXED if a member is."""
        rows, seen = members.numpy(), dict[bytes, int]()
        for row in rows:
            if row.tobytes() not in seen:
                seen[row.tobytes()] = FIXED if (row == FIXED).any() else self._slot(row)
        atoms = np.array([seen[row.tobytes()] for row in rows], dtype=np.int64)
        result = torch.from_numpy(atoms)
        self.nest(result, members)
        return result

    def _slot(self, row: np.ndarray) -> int:
        key = np.unique(row).tobytes()
        if key not in self._slot_of:
            self._slot_of[key] = self.size
            self.blocks.append(Block("", 0, self.size, 1, is_parameter=True))
            self.size += 1
        return self._slot_of[key]

    def pin(self, atoms: Tensor, code: str, text: str, op: str = "") -> None:
        """The ``atoms`` must stay; see :class:`Reason`."""
        self.pins.append((atoms.numpy().reshape(-1), Reason(code, text, self.place, op)))

    def hold(self, layer: Tensor, dims: Collection[int], code: str, text: str) -> Tensor | None:
        """The size along ``dims`` must not change.

        What varies along other dims as well can still go, a whole slice at a time; then the result is one label for
        each slice, of size 1 along ``dims``. Otherwise the labels are pinned and the result is None.
        """
        first = layer
        for dim in dims:
            first = first.narrow(dim, 0, 1)
        if first.numel() == 1:
            self.pin(layer, code, text)
            return None
        self.couple(first, layer)
        return first

    def components(self) -> np.ndarray:
        """The smallest atom that each atom is coupled with, shape (size,)."""
        return components(self.size, [self.couplings()])

    def couplings(self) -> tuple[np.ndarray, np.ndarray]:
        """The pairs of atoms that were coupled, one by one: int64 (n,) each."""
        none = torch.zeros(0, dtype=torch.int64, device="cpu")
        sides = ([edge[i] for edge in self.edges] for i in (0, 1))
        a, b = (torch.cat([none, *(x if x.ndim == 1 else x.reshape(-1) for x in side)]).numpy() for side in sides)
        return a, b

    def where(self, atom: int) -> tuple[str, int, int]:
        """The tensor, dim and index of an atom; ``("", 0, 0)`` for FIXED."""
        starts = [block.start for block in self.blocks]
        i = int(np.searchsorted(starts, atom, side="right")) - 1
        if i < 0:
            return "", 0, 0
        return self.blocks[i].name, self.blocks[i].dim, atom - self.blocks[i].start


def distinct(numbers: np.ndarray) -> np.ndarray:
    """Each of some numbers once, sorted: int64 (n,). For a few of them quicker than ``np.unique``."""
    ordered = np.sort(numbers, axis=None)
    first = np.ones(len(ordered), dtype=bool)
    np.not_equal(ordered[1:], ordered[:-1], out=first[1:])
    result: np.ndarray = ordered[first]
    return result


def components(size: int, edges: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Connected components by minimum hooking and pointer jumping: a few array passes, no loop over edges.

    Returns:
        int64 (size,): the smallest member of each node's component.
    """
    parent = np.arange(size)
    if not edges:
        return parent
    a = np.concatenate([e[0] for e in edges])
    b = np.concatenate([e[1] for e in edges])
    ra, rb = a, b
    while True:
        open_ = ra != rb
        if not open_.any():
            return parent
        if not open_.all():
            a, b, ra, rb = a[open_], b[open_], ra[open_], rb[open_]
        np.minimum.at(parent, np.maximum(ra, rb), np.minimum(ra, rb))
        while True:
            jumped = parent[parent]
            if np.array_equal(jumped, parent):
                break
            parent = jumped
        ra, rb = parent[a], parent[b]
