"""The removal of what is dead: worked out in full, for all parts of a network, before anything is changed."""

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

from fxcompress.errors import UnsupportedModelError
from fxcompress.passes.history import extended
from fxcompress.passes.prune_channels import Pruned, prune_channels
from fxcompress.passes.prune_report import PruneReport, make_report
from fxcompress.passes.repeat import repeat_removal
from fxcompress.progress import progress
from fxcompress.trace.basics.precision import ordinary
from fxcompress.trace.retrace.size_attributes import hold_numbers
from fxcompress.trace.traced import TracedModule
from fxcompress.training.agreement import agreed
from fxcompress.training.altered import check_hooks, unhooked
from fxcompress.training.averages import copies_of
from fxcompress.training.census import Zeros, seeds
from fxcompress.training.distributed import check_wrapper, rebuild, wrappers_of
from fxcompress.training.handover import hand_over
from fxcompress.training.left_behind import watch
from fxcompress.training.network import SizedNetwork
from fxcompress.training.optimizer import PreparedResize, Replacement, check_optimizers, prepare_resize
from fxcompress.training.plain_copy import code_breaks
from fxcompress.training.sized import SizedModule
from fxcompress.training.suited import tell_of_mixed
from fxcompress.training.takeover import take_over
from fxcompress.training.untraced import for_all_paths

_LOG = logging.getLogger("fxcompress")
_TOLD = "_fxc_told"


@dataclass(frozen=True, slots=True, eq=False)
class PartRemoval:
    """What a network with one graph loses.

    Attributes:
        net: which loses it, and the copies of it that are averages; each with what becomes of it.
        report: what goes, in words.
        fingerprint: see :class:`Removal`.
    """

    net: SizedModule
    pruned: Pruned
    averages: list[tuple[SizedModule, Pruned]]
    report: PruneReport
    fingerprint: str

    def commit(self) -> None:
        """Make it so."""
        if self.pruned.modified:
            provenance = extended(self.net, self.pruned)
            for net, pruned in ((self.net, self.pruned), *self.averages):
                take_over(net, pruned, provenance)


@dataclass(frozen=True, slots=True, eq=False)
class Removal:
    """What :func:`plan_removal` found.

    Attributes:
        parts: of the network, with what each loses.
        report: what goes, in words.
        optimizers: what becomes of the optimizers; empty where nothing goes.
        changes: what takes the place of each parameter.
        untrained: parameters that change, and could be trained, and that no given optimizer holds.
        fingerprint: the same number on two machines exactly when they hold networks of the same shapes, with the same
            zeros, and would remove the same.
    """

    parts: list[PartRemoval]
    report: PruneReport
    optimizers: list[PreparedResize]
    changes: list[Replacement]
    untrained: list[str]
    fingerprint: str

    def commit(self, *, wrapped: bool) -> None:
        """Make it so.

        Args:
            wrapped: see :func:`hand_over`.
        """
        for part in self.parts:
            part.commit()
        for prepared in self.optimizers:
            prepared.commit()
        hand_over(self.changes, wrapped=wrapped)

    def __str__(self) -> str:
        """One line, for messages."""
        before, after = self.report.parameters
        return f"{before - after} of {before} parameters, {self.report.channels} channels"


@ordinary
def remove_dead(
    net: SizedNetwork,
    parts: Mapping[str, SizedModule],
    optimizer: Optimizer | Sequence[Optimizer] | None,
    averages: Iterable[nn.Module],
    join: Callable[[dict[str, PruneReport]], PruneReport],
) -> PruneReport:
    """Remove what is dead from all parts of a network, in all processes, or from none: :meth:`CompressedModule.prune`.

    Args:
        net: the network.
        parts: of it, by their paths.
        optimizer: of its parameters, or several.
        averages: of it.
        join: makes one report of those of the parts.
    """
    optimizers = (optimizer,) if isinstance(optimizer, Optimizer) else _several(optimizer)
    if isinstance(averages, nn.Module) and not isinstance(averages, Iterable):
        raise TypeError(f"averages is a {type(averages).__name__}; pass a list: averages=[average]")
    copies, wrappers = tuple(averages), wrappers_of(net)

    def plan() -> Removal:
        for wrapper in wrappers:
            check_wrapper(wrapper)
        return plan_removal(net, parts, optimizers, copies, join)

    net.fxc_tell_of_steps()
    with progress(f"looking for dead channels of {type(net).__name__}"):
        removal = agreed(wrappers, plan)
    tell_of_mixed(net, optimizers)
    if removal.report.modified:
        removal.commit(wrapped=bool(wrappers))
        _warn_of_untrained(net, removal.untrained)
        if not optimizers:
            watch(net, removal.changes)
        for wrapper in wrappers:
            rebuild(wrapper)
    return removal.report


def _several(optimizers: object) -> tuple[Optimizer, ...]:
    """Those in a list; what is no optimizer is left to :func:`check_optimizers`."""
    if optimizers is None:
        return ()
    return tuple(optimizers) if isinstance(optimizers, list | tuple) else cast("tuple[Optimizer, ...]", (optimizers,))


def plan_removal(
    net: SizedNetwork,
    parts: Mapping[str, SizedModule],
    optimizers: Sequence[Optimizer],
    averages: Iterable[nn.Module],
    join: Callable[[dict[str, PruneReport]], PruneReport],
) -> Removal:
    """Work out what :func:`remove_dead` removes, and change nothing yet.

    Raises:
        AverageError: as :meth:`CompressedModule.prune` does.
        OptimizerError: the same.
        UnsupportedModelError: the same.
    """
    check_optimizers(optimizers, net.parameters())
    copies = copies_of(net, averages)
    for part in parts.values():
        check_hooks(part, part.settings.inputs, root=False)
    with unhooked(net, *copies):
        planned = {
            path: _plan_part(part, [copy.get_submodule(path) for copy in copies]) for path, part in parts.items()
        }
    changes = [change for part in planned.values() for change in _replacements(part.net, part.pruned)]
    prepared = [prepare_resize(optimizer, changes) for optimizer in optimizers if changes]
    told = [type(optimizer).__name__ for optimizer in optimizers]
    told += [f"{path}={part.fingerprint}" for path, part in planned.items()]
    report = join({path: part.report for path, part in planned.items()})
    untrained = _untrained(net, changes, optimizers)
    return Removal(list(planned.values()), report, prepared, changes, untrained, _digest(told))


def _plan_part(net: SizedModule, copies: Iterable[nn.Module]) -> PartRemoval:
    update, inputs = net.liveness, net.settings.inputs
    zeros = update.zeros()
    analysis = update.census.analysis if update.census.view is net else None
    known = zeros | update.flags.reset()
    prune = partial(prune_channels, net, inputs, lambda _, trail: seeds(trail, known), modes=update.modes)
    pruned = prune(analysis=analysis)
    if code_breaks(net, pruned):
        hold_numbers(net)
        pruned = prune(analysis=None)
    found = pruned.analysis
    pruned, decided = for_all_paths(net, pruned, lambda held: prune(analysis=found, held=held))
    if pruned.analysis is analysis:
        update.hold(pruned.plan)
    _check_forward(net, pruned)
    report = replace(make_report(net, pruned, explain=False), sizes_decide=decided)
    averages = cast("Iterable[SizedModule]", copies)  # of the same graphs, as copies_of has checked
    followed = [(other, repeat_removal(other, pruned)) for other in averages if pruned.modified]
    return PartRemoval(net, pruned, followed, report, _fingerprint(net, zeros, pruned))


def _untrained(net: nn.Module, changes: Iterable[Replacement], optimizers: Sequence[Optimizer]) -> list[str]:
    """Parameters that change, for which another optimizer is likely: it would go on with those that were."""
    if not optimizers:
        return []
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    missed = {id(change.old) for change in changes if change.old.requires_grad} - held
    return [name for name, parameter in net.named_parameters() if id(parameter) in missed]


def _warn_of_untrained(net: nn.Module, names: list[str]) -> None:
    """Once for each parameter."""
    told: set[str] = net.__dict__.setdefault(_TOLD, set())
    new = [name for name in names if name not in told]
    told.update(new)
    if new:
        listed = ", ".join(new[:5]) + (f" and {len(new) - 5} more" if len(new) > 5 else "")
        _LOG.warning(
            "fxcompress: prune(optimizer) has cut parameters that are in no optimizer it was given: %s\n"
            "  if another optimizer trains them, it still holds them as they were, which are no longer the network's: "
            "build it anew, and from now on pass all of them, net.prune([first, second])\n"
            "  if none does, requires_grad_(False) on them says so",
            listed,
        )


def _check_forward(net: TracedModule, pruned: Pruned) -> None:
    """A forward that was set on the instance, and not on the class, goes on running the graph that it was made from."""
    if "forward" in net.__dict__ and _sources(net) != _sources(pruned.module):
        raise UnsupportedModelError(
            f"the forward of {type(net).__name__} was replaced on the instance (Accelerate does for mixed precision) "
            "and keeps the graph of now, which the removal changes\n"
            "  hold the network in another module that calls it, and pass that module to whoever replaces forward"
        )


def _sources(module: TracedModule) -> list[str]:
    return [graph.python_code("self").src for graph in module.graphs.values()]


def _replacements(before: TracedModule, pruned: Pruned) -> list[Replacement]:
    """What takes the place of each parameter that changes or goes."""
    parameters = dict(before.named_parameters())
    changes: dict[int, Replacement] = {}
    for cut in pruned.cuts.values():
        if isinstance(cut.old, nn.Parameter) and isinstance(cut.new, nn.Parameter):
            changes.setdefault(id(cut.old), Replacement(cut.old, cut.new, cut.indices))
    left = {id(p) for p in pruned.module.parameters()}
    for name in pruned.gone:
        parameter = parameters.get(name)
        if parameter is not None and id(parameter) not in left:
            changes.setdefault(id(parameter), Replacement(parameter, None))
    return list(changes.values())


def _fingerprint(net: TracedModule, flagged: Zeros, pruned: Pruned) -> str:
    """Of shapes, zeros and cuts. Values other than zero are left out: another kind of hardware may round them."""
    now = torch.cat([net.get_parameter(name).detach().flatten() == 0 for name in flagged]) if flagged else None
    parts: list[object] = [
        [(name, tuple(p.shape)) for name, p in net.named_parameters()],
        [(name, dead.tobytes()) for name, dead in flagged.items()],
        b"" if now is None else now.cpu().numpy().tobytes(),
        [(name, [(dim, kept.tolist()) for dim, kept in cut.indices.items()]) for name, cut in pruned.cuts.items()],
        [place for place, _ in pruned.branches],
        list(pruned.gone),
    ]
    return _digest(parts)


def _digest(parts: list[Any]) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()
