"""A network that has no graph as a whole, and compresses itself in pieces."""

import copy
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from fxcompress.errors import UnsupportedModelError
from fxcompress.passes.history import extended
from fxcompress.passes.pieces import joined_report
from fxcompress.passes.prune_report import PruneReport
from fxcompress.passes.shrink import Narrow
from fxcompress.training.agreement import agreed
from fxcompress.training.averages import copies_of
from fxcompress.training.compressed import CompressedModule
from fxcompress.training.distributed import check_wrapper, rebuild, refuse_sharded, wrappers_of
from fxcompress.training.network import Settings, SizedNetwork
from fxcompress.training.optimizer import PreparedResize, check_optimizer, prepare_resize
from fxcompress.training.piece import become_plain
from fxcompress.training.removal import Removal, plan_removal, replacements
from fxcompress.training.restore_pieces import Recuts, plan_load_pieces
from fxcompress.training.takeover import take_over


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

    def refresh(self) -> None:
        """Find anew what is dead, for when tensors were set from outside, by a broadcast for instance."""
        for piece in self.pieces.values():
            piece.refresh()

    def step(self) -> None:
        """To be called after each ``optimizer.step()``; see :meth:`CompressedModule.step`."""
        for piece in self.pieces.values():
            piece.step()

    def prune(
        self, optimizer: Optimizer | Sequence[Optimizer] | None = None, *, averages: Iterable[nn.Module] = ()
    ) -> PruneReport:
        """Remove dead channels and branches from all pieces, or from none; see :meth:`CompressedModule.prune`."""
        copies = tuple(averages)
        optimizers = (optimizer,) if isinstance(optimizer, Optimizer) else tuple(optimizer or ())
        wrappers = wrappers_of(self)
        removals = agreed(wrappers, lambda: self._planned(wrappers, optimizers, copies))
        if not removals.report.modified:
            return removals.report
        for path, piece in self.pieces.items():
            removal = removals.parts[path]
            if removal.pruned.modified:
                provenance = extended(piece, removal.pruned)
                for net, pruned in ((piece, removal.pruned), *removal.averages):
                    take_over(net, pruned, provenance)
        for prepared in removals.optimizers:
            prepared.commit()
        for wrapper in wrappers:
            rebuild(wrapper)
        return removals.report

    def _planned(
        self,
        wrappers: list[DistributedDataParallel],
        optimizers: tuple[Optimizer, ...],
        averages: tuple[nn.Module, ...],
    ) -> "Removals":
        for wrapper in wrappers:
            check_wrapper(wrapper)
        for optimizer in optimizers:
            check_optimizer(optimizer, self.parameters())
        pieces, copies = self.pieces, copies_of(self, averages)
        parts = {
            path: plan_removal(piece, (), [copy.get_submodule(path) for copy in copies])
            for path, piece in pieces.items()
        }
        modified = {path: removal.pruned for path, removal in parts.items() if removal.pruned.modified}
        changes = [change for path, pruned in modified.items() for change in replacements(pieces[path], pruned)]
        prepared = [prepare_resize(optimizer, changes) for optimizer in optimizers if modified]
        return Removals(parts, self._report(parts), prepared, tuple(type(one).__name__ for one in optimizers))

    def _report(self, parts: Mapping[str, Removal]) -> PruneReport:
        reports = {path: removal.report for path, removal in parts.items()}
        before = sum(p.numel() for p in self.parameters())
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
        own = copy.deepcopy(self)
        for path, piece in self.pieces.items():
            target = own.get_submodule(path)
            assert isinstance(target, CompressedModule)
            become_plain(target, piece.finalize(prune=prune, fold=fold, narrow=narrow))
        plain: nn.Module = own
        plain.__class__ = self.fxc_own  # type: ignore[assignment]
        for name in ("settings", "outside", "fxc_paths", "_fxc_joined"):
            plain.__dict__.pop(name, None)
        return plain


Compressed = CompressedModule | CompressedPieces
"""What :func:`fxcompress.compress` returns."""


@dataclass(frozen=True, slots=True, eq=False)
class Removals:
    """What the pieces of a network lose, worked out in full and not yet made.

    Attributes:
        parts: by the paths of the pieces.
        report: of all of them.
        optimizers: what becomes of the optimizers; empty where nothing goes.
        kinds: names of their classes.
    """

    parts: dict[str, Removal]
    report: PruneReport
    optimizers: list[PreparedResize]
    kinds: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """See :class:`Removal`."""
        told = [*self.kinds, *(f"{path}={removal.fingerprint}" for path, removal in self.parts.items())]
        return hashlib.sha256("\n".join(told).encode()).hexdigest()

    def __str__(self) -> str:
        """One line, for messages."""
        before, after = self.report.parameters
        return f"{before - after} of {before} parameters, {self.report.channels} channels"


def become_pieces(model: nn.Module, paths: tuple[str, ...], settings: Settings, outside: Outside) -> CompressedPieces:
    """Let a copy of a model, some modules of which compress themselves, be a network in training, in place.

    Args:
        model: the copy.
        paths: of these modules.
        settings: of the whole.
        outside: what lies in none of them.
    """
    own = type(model)
    about = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__, "fxc_own": own}
    model.__class__ = type(own.__name__, (CompressedPieces, own), about)
    assert isinstance(model, CompressedPieces)
    model.fxc_paths, model.settings, model.outside = paths, settings, outside
    settings.groups = tuple(group["name"] for group in model.param_groups())
    return model
