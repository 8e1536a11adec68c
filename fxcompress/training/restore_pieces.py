"""Before a state_dict is loaded into a network in pieces: how each piece must be cut, and whether all of it fits."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxcompress.errors import CheckpointError
from fxcompress.trace.model.state_dict_hooks import plain_state
from fxcompress.training.compressed import CompressedModule
from fxcompress.training.restore import Recut, check_names, check_state, listed


@dataclass(frozen=True, slots=True, eq=False)
class Recuts:
    """Cuts of some pieces that have been worked out in full, and not yet made.

    Attributes:
        net: the network.
        pieces: all of its pieces, by their paths.
        cuts: of those that are to be cut.
    """

    net: nn.Module
    pieces: Mapping[str, CompressedModule]
    cuts: Mapping[str, Recut]

    def names(self) -> dict[int, str]:
        """The names that the parameters of the present network will have, by their ids; those that go have none."""
        cut = {id(p) for path in self.cuts for p in self.pieces[path].parameters()}
        names = {id(p): name for name, p in self.net.named_parameters() if id(p) not in cut}
        for path, recut in self.cuts.items():
            names |= {key: f"{path}.{name}" for key, name in recut.names().items()}
        return names

    def commit(self) -> None:
        """Cut the pieces; their parameters stay the same objects."""
        for recut in self.cuts.values():
            recut.commit()


def plan_load_pieces(
    net: nn.Module, pieces: Mapping[str, CompressedModule], state: Mapping[str, Any], *, strict: bool
) -> Recuts | None:
    """How to cut the pieces of ``net`` before ``state`` is loaded; None where nothing is to be cut.

    Raises:
        CheckpointError: it is of another network, lacks what the network has, or holds what it has lost.
    """
    cuts: dict[str, Recut] = {}
    check_state(state)
    rest = plain_state(net, state)
    for path, piece in pieces.items():
        own = {key: rest.pop(key) for key in list(rest) if key.startswith(f"{path}.")}
        own = {key.removeprefix(f"{path}."): value for key, value in own.items()}
        try:
            recut = piece.plan_load(own, strict=strict)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
        if recut is not None:
            cuts[path] = recut
    _check_rest(net, tuple(pieces), rest, strict=strict)
    return Recuts(net, pieces, cuts) if cuts else None


def _check_rest(net: nn.Module, paths: tuple[str, ...], rest: Mapping[str, Any], *, strict: bool) -> None:
    """Whether what lies in no piece fits."""
    inside = tuple(f"{path}." for path in paths)
    expected = {name: value for name, value in net.state_dict(keep_vars=True).items() if not name.startswith(inside)}
    kind = type(net).__name__
    if strict:
        check_names(expected, rest, kind)
    wrong = [
        f"{name} is {tuple(rest[name].shape)}, not {tuple(value.shape)}"
        for name, value in expected.items()
        if torch.is_tensor(rest.get(name)) and torch.is_tensor(value) and rest[name].shape != value.shape
    ]
    if wrong:
        raise CheckpointError(f"the state_dict does not fit {kind}: {listed(wrong)}")
