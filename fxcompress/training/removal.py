"""A removal that has been worked out in full, and not yet made."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from fxcompress.errors import UnsupportedModelError
from fxcompress.passes.prune_channels import Pruned, prune_channels
from fxcompress.passes.prune_report import PruneReport, make_report
from fxcompress.passes.repeat import repeat_removal
from fxcompress.trace.traced import TracedModule
from fxcompress.training.averages import copies_of
from fxcompress.training.census import Zeros, seeds
from fxcompress.training.optimizer import PreparedResize, Replacement, check_optimizer, prepare_resize
from fxcompress.training.sized import SizedModule


@dataclass(frozen=True, slots=True, eq=False)
class Removal:
    """What :func:`plan_removal` found.

    Attributes:
        pruned: the smaller network.
        report: what goes, in words.
        optimizers: what becomes of the optimizers; empty where nothing goes.
        averages: the averaged copies of the network, and what becomes of each.
        fingerprint: the same number on two machines exactly when they hold networks of the same shapes, with the same
            zeros, and would remove the same.
    """

    pruned: Pruned
    report: PruneReport
    optimizers: list[PreparedResize]
    averages: list[tuple[SizedModule, Pruned]]
    fingerprint: str

    def __str__(self) -> str:
        """One line, for messages."""
        before, after = self.report.parameters
        return f"{before - after} of {before} parameters, {self.report.channels} channels"


def plan_removal(net: SizedModule, optimizers: Sequence[Optimizer], averages: Iterable[nn.Module] = ()) -> Removal:
    """Work out what :meth:`CompressedModule.prune` removes, and change nothing yet.

    Raises:
        AverageError: as there.
        OptimizerError: as there.
        UnsupportedModelError: as there.
    """
    for optimizer in optimizers:
        check_optimizer(optimizer, net.parameters())
    copies = copies_of(net, averages)
    update, inputs = net.liveness, net.settings.inputs
    zeros = update.zeros()
    analysis = update.census.analysis if update.census.view is net else None
    pruned = prune_channels(net, inputs, lambda _, trail: seeds(trail, zeros), modes=(True,), analysis=analysis)
    _check_forward(net, pruned)
    report = make_report(net, pruned, explain=False)
    changes = replacements(net, pruned) if pruned.modified else []
    prepared = [prepare_resize(optimizer, changes) for optimizer in optimizers if pruned.modified]
    followed = [(other, repeat_removal(other, pruned)) for other in copies if pruned.modified]
    return Removal(pruned, report, prepared, followed, _fingerprint(net, zeros, pruned, optimizers))


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


def replacements(before: TracedModule, pruned: Pruned) -> list[Replacement]:
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


def _fingerprint(net: TracedModule, flagged: Zeros, pruned: Pruned, optimizers: Sequence[Optimizer]) -> str:
    """Of shapes, zeros and cuts. Values other than zero are left out: another kind of hardware may round them."""
    now = torch.cat([net.get_parameter(name).detach().flatten() == 0 for name in flagged]) if flagged else None
    parts: list[object] = [
        [type(optimizer).__name__ for optimizer in optimizers],
        [(name, tuple(p.shape)) for name, p in net.named_parameters()],
        [(name, dead.tobytes()) for name, dead in flagged.items()],
        b"" if now is None else now.cpu().numpy().tobytes(),
        [(name, [(dim, kept.tolist()) for dim, kept in cut.indices.items()]) for name, cut in pruned.cuts.items()],
        [place for place, _ in pruned.branches],
        list(pruned.gone),
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()
