"""Which channels are dead, for good: the part of training that turns zero bits into removable channels.

A channel may recover until its bits and its biases are both zero. From then on it is flagged, and held at zero by
:meth:`Liveness.step`, so that training goes the same way whether it is removed at once, later, or never.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from fxcompress.channels.plan import Plan
from fxcompress.channels.rules.registry import Known
from fxcompress.passes.code_changes import CODE
from fxcompress.quantizer import RANGE_BITS
from fxcompress.trace.basics.precision import ordinary
from fxcompress.trace.inputs import ExampleInputs
from fxcompress.trace.traced import TracedModule
from fxcompress.training.altered import unhooked
from fxcompress.training.census import Census, Span, Zeros

_SHRINKS, _FREE, _ZERO, _LAST = "!shrinks", "!free", "!zero", "!last"
_RESPITE = 0.05
"""Bits of a channel whose death is put off."""
_FINEST = 24.0
"""Bits that no channel needs more of: its grid is as fine as float32. Far above, powers of 2 overflow."""


class Liveness(nn.Module):
    """What is remembered from step to step, as buffers, so that checkpoints hold it and pruning cuts it.

    All of it is flat, of whatever shape a bias is. For bits and biases: what is dead for good, and what may die at all
    (a layer that is down to one channel has no labels that would tell). For biases as well: what is being shrunk, which
    the next step needs before it has looked at anything. For bits: what was zero after the last step, and how many
    there were. For running means: what has been reset.

    Args:
        sizes: the size of each parameter or buffer, by its name.
        free: for bits and biases, which entries may die, bool (K,).
        bits: all parameters that hold bits, by their names; (K,) each.
        device: of the network.

    Attributes:
        noted: what somebody else has noted of each channel, by the names of bits parameters, (K,) each. It is cut with
            them, and part of no state_dict.
    """

    def __init__(self, sizes: dict[str, int], free: Zeros, bits: Mapping[str, Tensor], device: torch.device) -> None:
        super().__init__()
        self.noted: dict[str, Tensor] = {}
        for name, size in sizes.items():
            self._add(name, torch.zeros(size, dtype=torch.bool, device=device))
        for name, may in free.items():
            self._add(name + _SHRINKS, torch.zeros(len(may), dtype=torch.bool, device=device))
            self._add(name + _FREE, torch.from_numpy(may).to(device))
            if name.endswith(".bits"):
                self._add(name + _ZERO, torch.zeros(len(may), dtype=torch.bool, device=device))
        for name, depths in bits.items():
            self._add(name + _LAST, depths.detach().clamp(min=RANGE_BITS))

    def _add(self, name: str, flags: Tensor) -> None:
        self.register_buffer(_key(name), flags)

    def flags(self, name: str) -> Tensor:
        """The flags of a bits parameter, bias or running mean."""
        return self.get_buffer(_key(name))

    def shrinks(self, name: str) -> Tensor:
        """Which entries of a bias are being shrunk."""
        return self.flags(name + _SHRINKS)

    def zero(self, name: str) -> Tensor:
        """Which entries of a bits parameter were zero after the last step."""
        return self.flags(name + _ZERO)

    def last(self, name: str) -> Tensor:
        """The bits of a bits parameter after the last step, or :data:`RANGE_BITS` where there were fewer; (K,)."""
        return self.flags(name + _LAST)

    def keep_last(self, name: str, bits: Tensor) -> None:
        """Take these for the bits after the last step."""
        self.last(name).copy_(bits.clamp(min=RANGE_BITS))

    def free(self) -> Zeros:
        """Which entries of each bits parameter and bias may die."""
        return {name.removesuffix(_FREE): f.cpu().numpy() for name, f in self._named() if name.endswith(_FREE)}

    def dead(self) -> Zeros:
        """Which entries of each bits parameter and bias are dead for good."""
        free = {name.removesuffix(_FREE) for name, _ in self._named() if name.endswith(_FREE)}
        return {name: flags.cpu().numpy() for name, flags in self._named() if name in free}

    def reset(self) -> Zeros:
        """Which entries of each running mean have been set to zero, as batch norm reads nothing but zeros there."""
        return {name: flags.cpu().numpy() for name, flags in self._named() if self._is_statistic(name)}

    def _is_statistic(self, name: str) -> bool:
        """Whether a name is that of a vector that can hold running statistics."""
        return "!" not in name and _key(name + _FREE) not in self._buffers

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        for key, flags in self._buffers.items():
            if flags is not None:
                yield name_of(key), flags

    def keep(self, name: str, indices: Tensor | None) -> None:
        """Cut what belongs to a tensor that was cut; drop it where ``indices`` is None."""
        noted = self.noted.pop(name, None)
        if noted is not None and indices is not None:
            self.noted[name] = noted[indices.to(noted.device)]
        for suffix in ("", _SHRINKS, _FREE, _ZERO, _LAST):
            key = _key(name) + suffix
            flags = self._buffers.get(key)
            if flags is None:
                continue
            if indices is None:
                del self._buffers[key]
            else:  # in its place: averaged copies are brought up to date by the order of buffers
                self._buffers[key] = flags[indices.to(flags.device)]


class LivenessUpdate:
    """Works on the parameters of a network after each optimizer step.

    Making one changes nothing; the first :meth:`step` does.

    Args:
        module: the network with quantizers.
        flags: its flags.
        inputs: that it runs on.
        shrink: what is taken off the absolute value of a bias in each step, once all that it is added to is zero.
        deaths: channels that may lose their last bit in one step; the others get :data:`_RESPITE`.
        keep_range: whether exponents follow the bits.
    """

    def __init__(
        self,
        module: TracedModule,
        flags: Liveness,
        inputs: ExampleInputs,
        shrink: float,
        deaths: int,
        *,
        keep_range: bool,
    ) -> None:
        self.module = module
        self.flags = flags
        self.shrink = shrink
        self.deaths = deaths
        self.keep_range = keep_range
        self.accepted: set[str] = set()
        self.version = 0
        self._seen: Tensor | None = None
        with unhooked(module):
            self.census = Census(module, inputs, flags.free(), set(flags.reset()))
            self._bind()
            self._replan()

    def _bind(self) -> None:
        """Look up the parameters once; they change only when channels are removed."""
        self.bits: list[Tensor] = [self.module.get_parameter(name) for name in self.census.bits]
        self.biases: list[Tensor] = [self.module.get_parameter(name) for name in self.census.biases]
        held = self.flags.free()
        self._held = [(name, self.module.get_parameter(name)) for name in held]
        depths = [name for name, _ in self._held if name.endswith("_quantizer.bits")]
        self._projected: list[Tensor] = [self.module.get_parameter(name) for name in depths]
        self._last = [self.flags.last(name) for name in depths] if self.keep_range else []
        self._exponents: list[Tensor] = [
            self.module.get_parameter(name.removesuffix("bits") + "exponent") for name in depths
        ]
        self._limits = [
            self.flags.shrinks(n).to(b).view_as(b) * self.shrink
            for n, b in zip(self.census.biases, self.biases, strict=True)
        ]
        self._hold()

    @ordinary
    @torch.no_grad()
    def step(self) -> None:
        """Project bits to [0, 24], hold at zero what is dead, shrink biases of dead channels, flag what has died."""
        if self._projected:
            torch._foreach_clamp_min_(self._projected, 0.0)
            torch._foreach_clamp_max_(self._projected, _FINEST)
        if self._held:
            torch._foreach_mul_([p for _, p in self._held], self._keep)
        if self._last:
            self._follow()
        if not self.bits:  # all that is left is in branches that are dead
            return
        if self.biases:
            self._soft_threshold()
        zero = self._zero()
        if self._seen is None or not torch.equal(zero, self._seen):
            with unhooked(self.module):
                self._refresh(zero)

    def _follow(self) -> None:
        """Let exponents rise by as much as bits have fallen: the range 2^(e+b-1) stays, and the grid gets coarser."""
        depths = torch._foreach_clamp_min(self._projected, RANGE_BITS)
        torch._foreach_add_(self._exponents, self._last)
        torch._foreach_sub_(self._exponents, depths)
        torch._foreach_copy_(self._last, depths)

    def _soft_threshold(self) -> None:
        pairs = [(b, limit) for b, limit in zip(self.biases, self._limits, strict=True) if b.requires_grad]
        if not pairs:  # all have been frozen since the start
            return
        biases, limits = (list(part) for part in zip(*pairs, strict=True))
        size = torch._foreach_abs(biases)
        torch._foreach_sub_(size, limits)
        torch._foreach_clamp_min_(size, 0.0)
        torch._foreach_copy_(biases, [s.copysign(b) for s, b in zip(size, biases, strict=True)])

    def _zero(self) -> Tensor:
        """Which bits and biases are zero just now, in one vector on the device."""
        return (
            torch.cat([p.detach().view(-1) == 0 for p in (*self.bits, *self.biases)])
            if self.bits
            else torch.zeros(0, device="cpu")
        )

    def _refresh(self, zero: Tensor) -> None:
        """All that follows from a change in what is zero; a few times an epoch, not every step."""
        count = sum(p.numel() for p in self.bits)
        now = zero.cpu().numpy()
        rows, biases = self._guard(self._spread(now[:count])), now[count:]
        for name, values in _split(self.census.bits, rows).items():
            self.flags.zero(name).copy_(torch.from_numpy(values))
        zeros = _split(self.census.bits, rows) | _split(self.census.biases, biases)
        knowns = self.census.known(zeros)
        before = self.census.before_biases(knowns)
        self._reset_statistics(knowns)
        for bias, limit in zip(self.census.biases, self._limits, strict=True):
            may = before[bias] & self.census.free[bias]
            self.flags.shrinks(bias).copy_(torch.from_numpy(may))
            limit.copy_(self.flags.shrinks(bias).view_as(limit)).mul_(self.shrink)
        self._hold()
        self._seen = self._zero()
        if self._flag(rows, biases):
            self._hold()
            self._replan()
            while self._take_from_spare():
                self._replan()

    def _take_from_spare(self) -> bool:
        """Flag all bits of channels that nothing needs, and that stay for their number; whether there were any.

        Such are units of one direction of a recurrent layer, where the other one has lost fewer: their gates have bits.
        Which of them stay depends on what has been removed before, so none of them may weigh more than another.
        """
        flagged = self._flagged(self.census.bits)
        spare = self.census.rows_spare(self.left) & self.census.free_rows & ~flagged
        if not spare.any():
            return False
        self._store(self.census.bits, flagged | spare)
        for name, taken in _split(self.census.bits, spare).items():
            self.flags.zero(name).logical_or_(torch.from_numpy(taken).to(self.flags.zero(name).device))
        self._hold()
        torch._foreach_mul_([p for _, p in self._held], self._keep)
        return True

    def _spread(self, zero: np.ndarray) -> np.ndarray:
        """Let no more channels lose their last bit than may in one step: those of the smallest scale go first."""
        before = np.concatenate([self.flags.zero(name).cpu().numpy() for name in self.census.bits])
        # What could go at once counts for nothing, so that it does not matter whether it has gone.
        fresh = zero & ~before & self.alive_rows()
        excess = int(fresh.sum()) - self.deaths
        if excess <= 0:
            return zero
        names = [name.removesuffix("bits") + "exponent" for name in self.census.bits]
        scale = torch.cat([self.module.get_parameter(name).detach() for name in names]).cpu().numpy()
        spared = np.lexsort((np.arange(len(zero)), np.where(fresh, scale, -np.inf)))[-excess:]
        left = zero.copy()
        left[spared] = False
        for parameter, dying in zip(self.bits, _split(self.census.bits, zero & ~left).values(), strict=True):
            if dying.any():
                parameter.data[torch.from_numpy(dying).to(parameter.device)] = _RESPITE
        return left

    def _guard(self, zero: np.ndarray) -> np.ndarray:
        """Revive one channel of a layer whose death would cut the network."""
        dead = {n for n, span in self.census.weights.items() if zero[span.start : span.stop].all()}
        self.accepted &= dead
        for name in [n for n in self.census.weights if n in dead - self.accepted]:
            if self.census.is_cut(self.accepted | {name}):
                zero = self._revive(name, zero)
            else:
                self.accepted.add(name)
        return zero

    def _revive(self, name: str, zero: np.ndarray) -> np.ndarray:
        bits = self.module.get_parameter(f"{name}_quantizer.bits")
        exponent = self.module.get_parameter(f"{name}_quantizer.exponent").detach()
        flags = self.flags.flags(f"{name}_quantizer.bits")
        best = int(torch.where(flags, -torch.inf, exponent).argmax())
        bits.data[best] = 1.0
        zero = zero.copy()
        zero[self.census.weights[name].start + best] = False
        return zero

    def _reset_statistics(self, knowns: dict[str, list[Known]]) -> None:
        """Where batch norm reads only zeros from now on, evaluation must give what training gives: beta."""
        for (mean, var), zero in self.census.statistics(knowns).items():
            earlier = self.flags.flags(mean)
            now = torch.from_numpy(zero).to(self.module.get_buffer(mean).device)
            fresh = now & ~earlier
            if bool(fresh.any()):
                self.module.get_buffer(mean).masked_fill_(fresh, 0.0)
                self.module.get_buffer(var).masked_fill_(fresh, 1.0)
            earlier.copy_(now)

    def _flag(self, rows: np.ndarray, biases: np.ndarray) -> bool:
        """Flag what is dead for good; whether anything is new."""
        flagged_rows, flagged = self._flagged(self.census.bits), self._flagged(self.census.biases)
        pair_row, pair_bias = self.census.pairs
        waiting = np.zeros_like(rows)
        waiting[pair_row[~biases[pair_bias]]] = True
        new_rows = flagged_rows | (rows & self.census.free_rows & ~waiting)
        new = flagged
        while True:
            zeros = _split(self.census.bits, new_rows) | _split(self.census.biases, new)
            before = self.census.before_biases(self.census.known(zeros))
            may = [before[name] & self.census.free[name] for name in self.census.biases]
            more = new | (np.concatenate(may) & biases if may else new)
            if np.array_equal(more, new):
                break
            new = more
        changed = bool((new_rows != flagged_rows).any() or (new != flagged).any())
        self._store(self.census.bits, new_rows)
        self._store(self.census.biases, new)
        return changed

    def _flagged(self, spans: dict[str, Span]) -> np.ndarray:
        parts = [self.flags.flags(name).cpu().numpy() for name in spans]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=bool)

    def _store(self, spans: dict[str, Span], values: np.ndarray) -> None:
        for name, span in spans.items():
            self.flags.flags(name).copy_(torch.from_numpy(values[span.start : span.stop]))

    def named_bits(self) -> list[tuple[str, Tensor]]:
        """All bits that something reads, by their names."""
        return list(zip(self.census.bits, self.bits, strict=True))

    def alive_rows(self) -> np.ndarray:
        """Of all bits one after the other, which belong to channels that could not be removed at once; bool (R,)."""
        return self.census.rows_alive(self.left)

    def zeros(self) -> Zeros:
        """What is dead for good, by name, in the whole network, dead branches included."""
        return self.flags.dead()

    def _replan(self) -> None:
        """What could be removed at once; dead branches leave the census for good."""
        view = self.census.view
        knowns = self.census.drop_dead_branches(self.zeros(), self.flags.reset())
        self.modes = (True, False)[: len(next(iter(knowns.values())))]
        if self.census.view is not view:
            self.accepted &= set(self.census.weights)
            self._bind()
            self._seen = None
        self.plan: Plan = self.census.plan(knowns)
        self.left = self.plan
        self.version += 1

    def hold(self, carried_out: Plan) -> None:
        """Count as left, until something else dies, what a removal has not taken out because of the model's code.

        What the size counts is another matter: it must be the same before a removal and after it.
        """
        held = [root for root, reason in carried_out.kept.items() if reason.code == CODE]
        if held:
            knowns = self.census.drop_dead_branches(self.zeros(), self.flags.reset())
            self.left = self.census.plan(knowns, held)

    def _hold(self) -> None:
        """What each held parameter is multiplied with after a step: 0 where it is dead, in dead branches as well."""
        self._keep = [
            (~self.flags.flags(name)).to(parameter.dtype).view_as(parameter) for name, parameter in self._held
        ]


def _key(name: str) -> str:
    """The name of the buffer that belongs to a tensor; none of an attribute, whatever the tensor is called."""
    return ":" + name.replace(".", ":")


def name_of(key: str) -> str:
    """The name of the tensor that a buffer of :class:`Liveness` belongs to, with what it holds behind a "!"."""
    return key.removeprefix(":").replace(":", ".")


def _split(spans: dict[str, Span], values: np.ndarray) -> Zeros:
    return {name: values[span.start : span.stop] for name, span in spans.items()}
