"""The smallest sets of atoms that can go on their own.

Of a joint layer what can go is a slice: a head, or one dim of each head. Which of the two a unit is, is chosen so that
there are many units; the planner is free to do better, and does where a head loses other dims than the next one.
"""

import numpy as np

from fxcompress.channels.space import Slots, components


def find_units(component: np.ndarray, joints: list[np.ndarray], slots: list[Slots]) -> np.ndarray:
    """The units of a network.

    Args:
        component: int64 (atoms,), the smallest atom that each one is coupled with.
        joints: layers with two or more labelled dims.
        slots: of the network.

    Returns:
        int64 (atoms,): the smallest atom of each one's unit.
    """
    forest = _Forest(component)
    for joint in joints:
        forest.merge(joint)
    edges = [(np.arange(len(component)), forest.parent)]
    while True:
        units = components(len(component), edges)
        whole = [_whole(s, units) for s in slots]
        if all((units[a] == units[b]).all() for a, b in whole):
            return units
        edges += whole


class _Forest:
    """Sets of atoms that grow together."""

    def __init__(self, component: np.ndarray) -> None:
        self.component = component
        self.parent = component.copy()

    def merge(self, joint: np.ndarray) -> None:
        """Put together what lies in one slice, along the dim that leaves the most sets.

        What was put together before counts, so all joints of the same labels choose the same dim. Two sets are no more
        than one: halves that a channel shuffle has mixed for long cannot go.
        """
        options = [self._merged(np.moveaxis(joint, dim, -1).reshape(-1, size)) for dim, size in enumerate(joint.shape)]
        sets, group = max(options, key=lambda option: (max(len(np.unique(option[1])), 2), option[2]))[:2]
        self.parent[sets] = sets[group]

    def _merged(self, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray, tuple[int, int, list[int]]]:
        """The sets in all columns, which first one each is put together with, and what breaks a tie."""
        sets, place = np.unique(self._roots(columns), return_inverse=True)
        place = place.reshape(columns.shape)
        group = components(
            len(sets), [(place[1:].reshape(-1), np.broadcast_to(place[:1], place[1:].shape).reshape(-1))]
        )
        first = np.argwhere(columns == columns.min())[0, 1]
        different = len(np.unique(np.sort(self.component[columns].T, axis=1), axis=0))
        return sets, group, (different, columns.shape[1], sorted(columns[:, first].tolist()))

    def _roots(self, atoms: np.ndarray) -> np.ndarray:
        roots: np.ndarray = self.parent[atoms]
        while not np.array_equal(above := self.parent[roots], roots):
            roots = above
        return roots


def _whole(slots: Slots, units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slots all of whose members are one unit, each with a member."""
    whole = (units[slots.members] == units[slots.members[:, :1]]).all(axis=1)
    return slots.atoms[whole], slots.members[whole, 0]
