"""Before a state_dict is loaded: how the network must be cut first, and whether all of it fits then."""

import logging
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fxcompress.channels.analysis import analyse
from fxcompress.errors import CheckpointError
from fxcompress.passes.prune_channels import Pruned
from fxcompress.passes.recut import ShapeError, missing_branches, recut
from fxcompress.provenance import Provenance, provenance_of
from fxcompress.trace.model.state_dict_hooks import plain_state
from fxcompress.training.altered import unhooked
from fxcompress.training.liveness import name_of
from fxcompress.training.record import decode
from fxcompress.training.sized import LIVENESS, SizedModule
from fxcompress.training.takeover import take_over

_LOG = logging.getLogger("fxcompress")
RECORD = "_extra_state"
"""The key of the record in a state_dict, as torch names it."""
_BITS = "_quantizer.bits"
"""What the name of a weight's bits has more than that of the weight."""
_SHOWN = 5


@dataclass(frozen=True, slots=True, eq=False)
class Recut:
    """A cut that has been worked out in full, and not yet made.

    Attributes:
        net: the network as it is.
        pruned: what it will be, and what it loses.
        provenance: of that.
    """

    net: SizedModule
    pruned: Pruned
    provenance: Provenance

    def names(self) -> dict[int, str]:
        """The names that the parameters of the present network will have, by their ids; those that go have none."""
        old = {id(cut.new): id(cut.old) for cut in self.pruned.cuts.values()}
        return {old.get(id(p), id(p)): name for name, p in self.pruned.module.named_parameters()}

    def commit(self) -> None:
        """Cut the network. Its parameters stay the same objects, so that an optimizer goes on holding them."""
        self._keep_parameters()
        take_over(self.net, self.pruned, self.provenance)

    def _keep_parameters(self) -> None:
        """Let the present parameters have the new shapes: like any load, this one changes them in place."""
        made = {id(cut.new): cut.old for cut in self.pruned.cuts.values() if isinstance(cut.old, nn.Parameter)}
        for module in self.pruned.module.modules():
            for leaf, new in module._parameters.items():
                old = made.get(id(new))
                if new is not None and isinstance(old, nn.Parameter):
                    old.grad = None
                    old.data = new.detach()
                    module._parameters[leaf] = old


def check_state(state: object) -> None:
    """Check that something is a state_dict.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"expected a state_dict, got {type(state).__name__}; pass what net.state_dict() returned")


def plan_load(net: SizedModule, state: Mapping[str, Any], *, strict: bool) -> Recut | None:
    """How to cut ``net`` before ``state`` is loaded; None where nothing is to be cut. Nothing is changed yet.

    Args:
        net: the network with quantizers.
        state: the part of a state_dict that is its own, without prefix.
        strict: whether the keys must be the same.

    Raises:
        CheckpointError: the state_dict is of another network, lacks what the network has, or holds what it has lost.
    """
    check_state(state)
    state = plain_state(net, state)
    have = provenance_of(net) or Provenance({})
    want = decode(state[RECORD]) if RECORD in state else have
    _check_origin(net, have, want)
    try:
        plan = None
        if missing_branches(have, want) or have.kept != want.kept:
            with unhooked(net):
                pruned = recut(analyse(net, net.settings.inputs), have, want)
            plan = Recut(net, pruned, replace(want, grids=have.grids, inputs=have.inputs, graph=have.graph))
    except ShapeError as error:
        raise CheckpointError(
            f"the state_dict does not fit {type(net).__name__}: {error}; load it into a network fresh from compress()"
        ) from error
    _check_state(net, plan, state, strict=strict)
    return plan


def _check_origin(net: nn.Module, have: Provenance, want: Provenance) -> None:
    """Both must have been made from the same original, at least by its names and shapes."""
    kind = type(net).__name__
    for name in sorted(have.shapes.keys() | want.shapes.keys()):
        own, other = have.shapes.get(name), want.shapes.get(name)
        if own != other:
            raise CheckpointError(
                f"the state_dict is of another network: its original had {_shown(name, other)}, that of this {kind} "
                f"{_shown(name, own)}; build the model with the arguments that it was built with"
            )
    if have.weights != want.weights:
        raise CheckpointError(
            f"the state_dict is of another network: it started with {want.weights:,} quantized weights, this {kind} "
            f"with {have.weights:,}; call compress() on what it was called on then, with the same weights frozen"
        )
    if not set(want.biases) <= set(have.biases):
        raise CheckpointError(
            f"the state_dict is of another network: it was made from one in which {min(want.biases)} had got a bias by "
            "fold=True; call compress() on the network that prune() or load() returned"
        )
    missing = [join.place for join in want.joins if join not in have.joins]
    if missing:
        raise CheckpointError(
            f"the state_dict is of another network: it was made from one in which a path into {missing[0]} had been "
            "narrowed; call compress() on the network that prune() or load() returned"
        )


def _shown(name: str, shape: tuple[int, ...] | None) -> str:
    return f"no {name}" if shape is None else f"{name} of shape {shape}"


def _check_state(net: nn.Module, plan: Recut | None, state: Mapping[str, Any], *, strict: bool) -> None:
    """Whether all tensors fit the network once it is cut."""
    module = net if plan is None else plan.pruned.module
    own = _expected(module, () if plan is None else plan.pruned.gone)
    kind = type(net).__name__
    given = {name: value for name, value in state.items() if name != RECORD}
    if strict:
        plain = "" if RECORD in state else "; one without quantizers goes into the model, before compress()"
        check_names(own, given, kind, plain)
    shapes = [(n, tuple(value.shape), own[n]) for n, value in given.items() if n in own and torch.is_tensor(value)]
    wrong = [f"{name} is {found}, not {expected}" for name, found, expected in shapes if found != expected]
    if wrong:
        more = any(math.prod(found) > math.prod(expected) for _, found, expected in shapes)
        remedy = "; this network has lost some of that: load it into one fresh from compress()" if more else ""
        if RECORD not in state:
            remedy = f"; it has no {RECORD}, which tells what was cut: save net.state_dict() whole"
        raise CheckpointError(f"the state_dict does not fit {kind}: {listed(wrong)}{remedy}")
    weights = [name.removesuffix(_BITS) for name in own.keys() - given.keys() if name.endswith(_BITS)]
    alone = [name for name in weights if name in given]
    if alone:
        _LOG.warning(
            "fxcompress: the state_dict has weights of %s, and not their bits and exponents: they are rounded on grids "
            "that were chosen for others: %s\n  load it into the model, before compress()", kind, listed(alone),
        )  # fmt: skip


def _expected(module: nn.Module, gone: Collection[str]) -> dict[str, tuple[int, ...]]:
    """The shape of each entry of the state_dict. Flags are cut later, and will be of the size of what they speak of."""
    sizes = {n: tuple(p.shape) for n, p in module.named_parameters(remove_duplicate=False)}
    sizes |= {n: tuple(b.shape) for n, b in module.named_buffers(remove_duplicate=False)}
    expected: dict[str, tuple[int, ...]] = {}
    liveness = f"{LIVENESS}."
    for name, value in module.state_dict(keep_vars=True).items():
        if name.startswith(liveness):
            of = name_of(name.removeprefix(liveness)).partition("!")[0]
            if of not in gone:
                expected[name] = (math.prod(sizes[of]),)
        elif name != RECORD:
            expected[name] = tuple(value.shape) if torch.is_tensor(value) else ()
    return expected


def check_names(own: Mapping[str, object], given: Mapping[str, object], kind: str, remedy: str = "") -> None:
    """Check that a state_dict has the names that a network has, and no others.

    Raises:
        CheckpointError: it has not.
    """
    for what, names in (("lacks", own.keys() - given.keys()), ("has too much:", given.keys() - own.keys())):
        if names:
            raise CheckpointError(f"the state_dict does not fit {kind}: it {what} {listed(names)}{remedy}")


def listed(names: Iterable[str]) -> str:
    """Some names, for a message; the first few of many."""
    ordered = sorted(names)
    more = f" and {len(ordered) - _SHOWN} more" if len(ordered) > _SHOWN else ""
    return ", ".join(ordered[:_SHOWN]) + more
