"""What the adapters share: self-compression in a training loop that somebody else runs. Knows none of the libraries."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from fxcompress.errors import OptimizerError, UnsupportedModelError
from fxcompress.passes.prune_report import PruneReport
from fxcompress.training.aims import Aims
from fxcompress.training.compressed import CompressedModule
from fxcompress.training.controller import ConstantGamma, Gamma, gamma_now, own_gamma
from fxcompress.training.distributed import wrappers_of
from fxcompress.training.fit import gamma_of
from fxcompress.training.held import stepping
from fxcompress.training.in_pieces import CompressedPieces
from fxcompress.training.optimizer import check_optimizers
from fxcompress.training.parallel import Processes
from fxcompress.training.policy import PrunePolicy, prune_policy
from fxcompress.training.selection import Selection
from fxcompress.training.suited import what_is_mixed, what_lacks
from fxcompress.training.target import begin_selection, tell_of_selection, tell_of_target

_REMEDY = "build one optimizer for it after compress(): torch.optim.Adam(net.param_groups(lr=1e-3))"


@dataclass(slots=True)
class Pressure:
    """Adds the gradient of ``gamma * net.size()`` to what the loop's own backward pass has left.

    The loop's loss stays as it is, so that nothing of its code must change. The size depends on the bits alone, so this
    takes no second pass through the network, and no hook on a parameter fires (those of DistributedDataParallel, say).

    Attributes:
        given: from (progress, size); what a training adapts is kept in ``gamma``, a copy where it is one of ours.
        gamma: of the present training.
        last: gamma of the last step.

    >>> from fxcompress import compress
    >>> net = compress(nn.Linear(3, 2))
    >>> Pressure(ConstantGamma(0.1)).press(net, progress=0.0)
    >>> net.weight_quantizer.bits.grad
    tensor([0.0500, 0.0500])
    """

    given: Gamma
    gamma: Gamma = field(init=False)
    last: float = 0.0

    def __post_init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Forget what was adapted in an earlier training."""
        self.gamma, self.last = own_gamma(self.given), 0.0

    def press(self, net: CompressedModule, progress: float, scale: Tensor | float = 1.0) -> None:
        """To be called once for each optimizer step, when its gradients are complete.

        Args:
            net: whose ``grad`` fields are added to.
            progress: share of the training that is done, 0 to 1.
            scale: what the gradients are multiplied by at this time, by a gradient scaler.
        """
        self.last = gamma_now(self.gamma, progress, self._fraction(net))
        bits = [p for p in net.fxc_bits if p.requires_grad]
        if not bits or self.last == 0:
            return
        with torch.enable_grad():
            gradients = torch.autograd.grad(net.size(), bits)
        for parameter, gradient in zip(bits, gradients, strict=True):
            more = gradient * self.last * scale
            if parameter.grad is None:
                parameter.grad = more.to(parameter.dtype)
            else:
                parameter.grad.add_(more)

    def _fraction(self, net: CompressedModule) -> float:
        return math.nan if isinstance(self.gamma, ConstantGamma) else net.fractional_size()

    def needs_length(self) -> bool:
        """Whether gamma depends on how far the training is."""
        return not isinstance(self.gamma, ConstantGamma)

    def state_dict(self) -> dict[str, Any]:
        """What gamma has adapted, where it can say so; numbers only, fit for JSON."""
        save = getattr(self.gamma, "state_dict", None)
        return {} if save is None else dict(save())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        load = getattr(self.gamma, "load_state_dict", None)
        if load is not None and state:
            load(state)


@dataclass(slots=True, eq=False)
class Removals:
    """When to remove in a loop that somebody else runs, and what went.

    Attributes:
        policy: decides after each step; None for never.
        reports: what each removal took out.
    """

    policy: PrunePolicy | None
    reports: list[PruneReport] = field(default_factory=list)
    _due: bool = False

    def begin(self) -> None:
        """Forget what an earlier training has counted, and left to be done."""
        self._due = False
        if self.policy is not None:
            self.policy.wasted = 0.0

    def count(self, net: CompressedModule) -> None:
        """To be called after each ``net.step()``."""
        if self.policy is not None and self.policy.due(net.removable()):
            self._due = True

    def make(self, net: CompressedModule, optimizer: Optimizer, *, last: bool = False) -> None:
        """Remove, if that is due; at the end of the training in any case, unless it is never.

        Raises:
            DistributedError: see :meth:`CompressedModule.prune`.
        """
        if self._due or (last and self.policy is not None):
            self._due = False
            report = net.prune(optimizer)
            self.reports += [report] if report.modified else []

    def state_dict(self) -> dict[str, Any]:
        """The policy and what it has counted; numbers only, fit for JSON."""
        policy = self.policy
        return {} if policy is None else {"cost": policy.cost, "every": policy.every, "wasted": policy.wasted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self.policy = PrunePolicy(**state) if state else None


def share_buffers(net: CompressedModule) -> None:
    """Where several processes train ``net``, give each the buffers of the first: running statistics are of its own."""
    for wrapper in wrappers_of(net)[:1]:
        if wrapper.process_group.size() > 1:
            Processes(net, wrapper).share_buffers()


@dataclass(slots=True)
class Lead:
    """Leads to a share of the multiply-adds or of the latency, in a loop that somebody else runs.

    Attributes:
        aims: what the user asked for; perhaps nothing.
        selection: of the present training.
    """

    aims: Aims
    selection: Selection | None = None
    _stored: dict[str, Any] | None = None

    def begin(self) -> None:
        """Forget an earlier training."""
        self.selection, self._stored = None, None

    def start(
        self,
        net: CompressedModule,
        optimizer: Optimizer,
        steps: int,
        progress: Callable[[], float] | None = None,
    ) -> list[RemovableHandle]:
        """To be called at the start of a training, or when it is taken up, before other hooks on the optimizer are set.

        Args:
            net: as it is by then.
            optimizer: that trains it.
            steps: of the whole training.
            progress: see :meth:`Selection.follow`.

        Raises:
            ValueError: the network is below the target already, or the table does not fit.
        """
        self.selection = self.aims.selection(net, steps)
        if self.selection is None:
            return []
        begin_selection(self.selection, self._stored)
        return self.selection.follow(optimizer, progress)

    def metrics(self) -> dict[str, float]:
        """What there is to log of it."""
        return {} if self.selection is None else {f"size/{self.selection.kind}": self.selection.left()}

    def state_dict(self) -> dict[str, Any]:
        """What was chosen so far; fit for JSON."""
        return (self._stored or {}) if self.selection is None else self.selection.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave, at the next :meth:`start`."""
        self._stored = state


class SelfCompressing:
    """What the callbacks of all loops hold and do.

    Attributes:
        pressure: on the bits.
        lead: to a share of the multiply-adds or of the latency.
        removals: when to remove, and what went.
    """

    pressure: Pressure
    lead: Lead
    removals: Removals
    _hooks: list[RemovableHandle]

    def _aim(
        self,
        target_size: float | None,
        gamma: float | Gamma | None,
        aims: Aims,
        *,
        fine_tune: bool,
        prune: bool | int | PrunePolicy,
    ) -> None:
        """Take in what the user asked for; the arguments are those of the callbacks."""
        self.pressure = Pressure(gamma_of(gamma, target_size, fine_tune=fine_tune, required=not aims))
        self.lead, self.removals, self._hooks = Lead(aims), Removals(prune_policy(prune)), []

    @property
    def reports(self) -> list[PruneReport]:
        """What each removal took out."""
        return self.removals.reports

    def _begin(self) -> None:
        """Forget an earlier training."""
        for part in (self.pressure, self.removals, self.lead):
            part.begin()

    def _metrics(self, net: CompressedModule) -> dict[str, float]:
        """What there is to log."""
        return metrics(net, self.pressure.last) | self.lead.metrics()

    def _end(self, net: CompressedModule, optimizer: Optimizer, *, tells: bool) -> None:
        """Remove what is dead, tell of targets that were missed, and leave the optimizer alone again."""
        share_buffers(net)
        self.removals.make(net, optimizer, last=True)
        if tells:
            tell_of_target(net, self.pressure.gamma)
            tell_of_selection(self.lead.selection)
        self._release()

    def _release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def metrics(net: CompressedModule, gamma: float) -> dict[str, float]:
    """What there is to log.

    >>> from fxcompress import compress
    >>> metrics(compress(nn.Linear(3, 2)), gamma=0.1)
    {'size/fractional': 0.25, 'size/weights': 1.0, 'size/channels': 2.0, 'size/gamma': 0.1}
    """
    return {
        "size/fractional": net.fractional_size(),
        "size/weights": net.weights_left(),
        "size/channels": float(net.channels_left()),
        "size/gamma": gamma,
    }


def step_after(optimizer: Optimizer, net: CompressedModule) -> RemovableHandle:
    """Call ``net.step()`` after each step that the optimizer really makes: not one that a gradient scaler skips."""
    return stepping(optimizer).register_step_post_hook(lambda *_: net.step())


def compressed(net: object, where: str) -> CompressedModule:
    """``net``, if it can be trained here.

    Raises:
        UnsupportedModelError: it is not the result of compress().
    """
    if not isinstance(net, CompressedModule | CompressedPieces):
        raise UnsupportedModelError(
            f"{where} is a {type(net).__name__}, not a network from fxcompress.compress(); compress it before the "
            "optimizer is built"
        )
    return cast("CompressedModule", net)  # what is called here, both have


def optimizer_of(net: CompressedModule, optimizers: Iterable[Optimizer]) -> Optimizer:
    """The optimizer that trains ``net``.

    Raises:
        OptimizerError: none or several do, it does not hold all bits, it lacks some of the network's parameters and
            holds others, or it treats bits as it does weights.
    """
    own = {id(p) for p in net.parameters()}
    holders = [optimizer for optimizer in optimizers if any(id(p) in own for p in _held(optimizer))]
    if len(holders) != 1:
        some = "no optimizer holds" if not holders else f"{len(holders)} optimizers share"
        raise OptimizerError(f"{some} the parameters of the compressed network; {_REMEDY}")
    check_optimizers(holders, net.parameters())
    _check_groups(holders[0], net)
    return holders[0]


def _check_groups(optimizer: Optimizer, net: CompressedModule) -> None:
    found = what_lacks(optimizer, net) or what_is_mixed(optimizer, net)
    if found:
        raise OptimizerError(f"{found}; {_REMEDY}")


def _held(optimizer: Optimizer) -> Iterable[nn.Parameter]:
    return (p for group in optimizer.param_groups for p in group["params"])
