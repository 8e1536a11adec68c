"""A network that has no graph as a whole, and compresses itself in pieces."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import nn
from torch.optim import Optimizer

from fxcompress.errors import UnsupportedModelError
from fxcompress.passes.pieces import joined_report
from fxcompress.passes.prune_report import PruneReport
from fxcompress.passes.shrink import Narrow
from fxcompress.passes.unquantized import Unquantized, is_weight
from fxcompress.trace.basics.modules import elements_in
from fxcompress.trace.basics.precision import ordinary
from fxcompress.training.altered import unhooked
from fxcompress.training.compressed import CompressedModule
from fxcompress.training.distributed import refuse_sharded
from fxcompress.training.left_behind import note_unchanged, warn_of_left_behind, warn_of_untrained
from fxcompress.training.network import Settings, SizedNetwork
from fxcompress.training.piece import become_plain
from fxcompress.training.removal import remove_dead
from fxcompress.training.restore_pieces import Recuts, plan_load_pieces


@dataclass(frozen=True, slots=True)
class Outside:
    """What is known of a model besides its pieces.

    Attributes:
        why: it has no graph as a whole.
        parameters: that lie in no piece, and stay as they are, by name with the reason.
    """

    why: str
    parameters: dict[str, str]


class CompressedPieces(SizedNetwork):
    """A copy of a model some modules of which are networks that compress themselves, each a :class:`CompressedModule`.

    Made by :func:`fxcompress.compress` where a model reads the values of tensors, as a detection network does. It is
    of the model's own class as well, with its methods and the names of its modules, and trains by the same loop as a
    CompressedModule. Sizes are of all pieces together. What lies in no piece trains along as it is, in floats.

    Attributes:
        outside: what lies in no piece, and why.
    """

    outside: Outside
    fxc_paths: tuple[str, ...]

    @property
    def pieces(self) -> dict[str, CompressedModule]:
        """The networks that compress themselves, by the names of the modules that they were."""
        found = {path: self.get_submodule(path) for path in self.fxc_paths}
        return {path: piece for path, piece in found.items() if isinstance(piece, CompressedModule)}

    def __reduce__(self) -> Any:  # noqa: ANN401
        """By the class of the model, as pickle cannot find the one that was made of it."""
        return _unpickled, (self.fxc_own,), {k: v for k, v in self.__dict__.items() if not k.startswith("_fxc_")}

    def fxc_parts(self) -> dict[str, CompressedModule]:
        """All pieces."""
        return self.pieces

    @property
    def graph(self) -> NoReturn:
        """There is none.

        Raises:
            UnsupportedModelError: always; it says which pieces have one.
        """
        raise UnsupportedModelError(
            f"{type(self).__name__} has no graph as a whole: {self.outside.why}\n  its pieces have one each: "
            f"net.pieces[name].graph, and ChannelGraph.of_pieces(net, inputs); they are {', '.join(self.fxc_paths)}"
        )

    def unquantized(self) -> tuple[Unquantized, ...]:
        """The weights that have no quantizer, in a piece or outside of all; see :meth:`SizedModule.unquantized`."""
        found = [item.within(path) for path, piece in self.pieces.items() for item in piece.unquantized()]
        parameters = {name: self.get_parameter(name) for name in self.outside.parameters}
        reasons = self.outside.parameters
        found += [Unquantized(name, p.numel(), reasons[name]) for name, p in parameters.items() if is_weight(p)]
        return tuple(sorted(found, key=lambda item: -item.elements))

    def refresh(self) -> None:
        """Find anew what is dead, for when tensors were set from outside, by a broadcast for instance."""
        for piece in self.pieces.values():
            piece.refresh()

    def step(self) -> None:
        """To be called after each ``optimizer.step()``; see :meth:`CompressedModule.step`."""
        warn_of_left_behind(self)
        warn_of_untrained(self)
        for piece in self.pieces.values():
            piece.liveness.step()
        note_unchanged(self)

    def prune(
        self, optimizer: Optimizer | Sequence[Optimizer] | None = None, *, averages: Iterable[nn.Module] = ()
    ) -> PruneReport:
        """Remove dead channels and branches from all pieces, or from none; see :meth:`CompressedModule.prune`."""
        return remove_dead(self, self.pieces, optimizer, averages, self._report)

    def _report(self, reports: dict[str, PruneReport]) -> PruneReport:
        before = elements_in(self)
        lost = sum(report.parameters[0] - report.parameters[1] for report in reports.values())
        return joined_report(reports, (before, before - lost), self.outside.why, self.outside.parameters)

    def plan_load(self, state: Mapping[str, Any], *, strict: bool = True) -> Recuts | None:
        """How the pieces will be cut when ``state`` is loaded; None where their shapes stay. Changes nothing.

        Raises:
            CheckpointError: it does not fit.
        """
        return plan_load_pieces(self, self.pieces, state, strict=strict)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:  # noqa: ANN401, FBT001, FBT002
        """As of any module, but first the pieces are cut; see :meth:`CompressedModule.load_state_dict`.

        Raises:
            CheckpointError: it does not fit, or a piece has lost what it still has. Nothing has changed then.
        """
        recuts = self.plan_load(state_dict, strict=strict)
        if recuts is not None:
            recuts.commit()
        return super().load_state_dict(state_dict, strict, assign)

    @ordinary
    def finalize(self, *, prune: bool = True, fold: bool = True, narrow: Narrow = False) -> nn.Module:
        """A network of the model's own class, with the weights of its pieces on their grid and no quantizers.

        Args:
            prune: see :meth:`CompressedModule.finalize`.
            fold: the same.
            narrow: the same.

        Raises:
            ValueError: see :meth:`CompressedModule.finalize`.
        """
        refuse_sharded(self)
        with unhooked(*self.pieces.values()):
            own = copy.deepcopy(self)
        for path, piece in self.pieces.items():
            target = own.get_submodule(path)
            assert isinstance(target, CompressedModule)
            become_plain(target, piece.finalize(prune=prune, fold=fold, narrow=narrow))
        plain: nn.Module = own
        plain.__class__ = self.fxc_own  # type: ignore[assignment]
        noted = [name for name in plain.__dict__ if name.startswith("_fxc_")]
        for name in ("settings", "outside", "fxc_paths", *noted):
            plain.__dict__.pop(name, None)
        return plain


Compressed = CompressedModule | CompressedPieces
"""What :func:`fxcompress.compress` returns."""


def _class_in_pieces(own: type[nn.Module]) -> type[nn.Module]:
    about = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__, "fxc_own": own}
    return type(own.__name__, (CompressedPieces, own), about)


def _unpickled(own: type[nn.Module]) -> nn.Module:
    kind = _class_in_pieces(own)
    return kind.__new__(kind)


def become_pieces(model: nn.Module, paths: tuple[str, ...], settings: Settings, outside: Outside) -> CompressedPieces:
    """Let a copy of a model, some modules of which compress themselves, be a network in training, in place.

    Args:
        model: the copy.
        paths: of these modules.
        settings: of the whole.
        outside: what lies in none of them.
    """
    model.__class__ = _class_in_pieces(type(model))
    assert isinstance(model, CompressedPieces)
    model.fxc_paths, model.settings, model.outside = paths, settings, outside
    settings.groups = tuple(group["name"] for group in model.param_groups())
    return model
