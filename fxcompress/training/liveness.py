"""Which channels are dead, for good: the part of training that turns zero bits into removable channels.

A channel may recover until its bits and its biases are both zero. From then on it is flagged, and held at zero by
:meth:`Liveness.step`, so that training goes the same way whether it is removed at once, later, or never.
"""

import numpy as np
import torch
from torch import Tensor, nn

from fxcompress.channels.plan import Plan
from fxcompress.trace.inputs import ExampleInputs
from fxcompress.trace.traced import TracedModule
from fxcompress.training.census import Census, Span, Zeros


class Liveness(nn.Module):
    """Flags of dead bits and biases, kept as buffers so that checkpoints hold them."""

    def __init__(self, names: dict[str, int], device: torch.device) -> None:
        super().__init__()
        for name, size in names.items():
            self.register_buffer(key_of(name), torch.zeros(size, dtype=torch.bool, device=device))

    def flags(self, name: str) -> Tensor | None:
        """The flags of a bits parameter or bias; None where it has none."""
        return self._buffers.get(key_of(name))

    def keep(self, name: str, indices: Tensor | None) -> None:
        """Cut the flags of a parameter that was cut; drop them where ``indices`` is None."""
        flags = self._buffers.pop(key_of(name), None)
        if flags is not None and indices is not None:
            self._buffers[key_of(name)] = flags[indices.to(flags.device)]


def key_of(name: str) -> str:
    """The name of the buffer for a parameter."""
    return name.replace(".", ":")


class LivenessUpdate:
    """Works on the parameters of a network after each optimizer step.

    Args:
        module: the network with quantizers.
        flags: its flags.
        inputs: that it runs on.
        shrink: what is taken off the absolute value of a bias in each step, once all that it is added to is zero.
    """

    def __init__(self, module: TracedModule, flags: Liveness, inputs: ExampleInputs, shrink: float) -> None:
        self.module = module
        self.flags = flags
        self.shrink = shrink
        self.census = Census(module, inputs)
        self.accepted: set[str] = set()
        self.plan: Plan | None = None
        self.version = 0
        self._bind()
        self._refresh(self._zero())

    def _bind(self) -> None:
        """Look up the parameters once; they change only when channels are removed."""
        self.bits = [self.module.get_parameter(name) for name in self.census.bits]
        self.biases = [self.module.get_parameter(name) for name in self.census.biases]
        self._limits = [torch.zeros_like(bias) for bias in self.biases]
        self._hold()

    @torch.no_grad()
    def step(self) -> None:
        """Project bits to >= 0, hold what is dead at zero, shrink biases of dead channels, and flag what has died."""
        if not self.bits:
            return
        torch._foreach_clamp_min_(self.bits, 0.0)
        torch._foreach_mul_(self.bits, self._keep_bits)
        if self.biases:
            torch._foreach_mul_(self.biases, self._keep_biases)
            self._soft_threshold()
        zero = self._zero()
        if not torch.equal(zero, self._seen):
            self._refresh(zero)

    def _soft_threshold(self) -> None:
        size = torch._foreach_abs(self.biases)
        torch._foreach_sub_(size, self._limits)
        torch._foreach_clamp_min_(size, 0.0)
        torch._foreach_copy_(self.biases, [s.copysign(b) for s, b in zip(size, self.biases, strict=True)])

    def _zero(self) -> Tensor:
        """Which bits and biases are zero just now, in one vector on the device."""
        return torch.cat([p.detach() == 0 for p in (*self.bits, *self.biases)]) if self.bits else torch.zeros(0)

    def _refresh(self, zero: Tensor) -> None:
        """All that follows from a change in what is zero; a few times an epoch, not every step."""
        count = sum(p.numel() for p in self.bits)
        now = zero.cpu().numpy()
        rows, biases = self._guard(now[:count]), now[count:]
        zeros = _split(self.census.bits, rows) | _split(self.census.biases, biases)
        before = self.census.before_biases(self.census.known(zeros))
        self._reset_statistics(before)
        for bias, limit in zip(self.census.biases, self._limits, strict=True):
            may = before[bias] & self.census.removable(bias)
            limit.copy_(torch.from_numpy(may).to(limit) * self.shrink)
        if self._flag(rows, biases) or self.plan is None:
            self._replan()
        self._hold()
        self._seen = self._zero()

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
        assert flags is not None
        best = int(torch.where(flags, -torch.inf, exponent).argmax())
        bits.data[best] = 1.0
        zero = zero.copy()
        zero[self.census.weights[name].start + best] = False
        return zero

    def _reset_statistics(self, before: Zeros) -> None:
        """Where batch norm reads only zeros from now on, evaluation must give what training gives: beta."""
        for (mean, var), zero in self.census.statistics(before).items():
            earlier = self.flags.flags(mean)
            now = torch.from_numpy(zero).to(self.module.get_buffer(mean).device)
            fresh = now if earlier is None else now & ~earlier
            if bool(fresh.any()):
                self.module.get_buffer(mean).masked_fill_(fresh, 0.0)
                self.module.get_buffer(var).masked_fill_(fresh, 1.0)
            if earlier is not None:
                earlier.copy_(now)

    def _flag(self, rows: np.ndarray, biases: np.ndarray) -> bool:
        """Flag what is dead for good; whether anything is new."""
        flagged_rows, flagged = self._flagged(self.census.bits), self._flagged(self.census.biases)
        pair_row, pair_bias = self.census.pairs
        waiting = np.zeros_like(rows)
        waiting[pair_row[~biases[pair_bias]]] = True
        new_rows = flagged_rows | (rows & self.census.removable_rows & ~waiting)
        new = flagged
        while True:
            zeros = _split(self.census.bits, new_rows) | _split(self.census.biases, new)
            before = self.census.before_biases(self.census.known(zeros))
            may = [before[name] & self.census.removable(name) for name in self.census.biases]
            more = new | (np.concatenate(may) & biases if may else new)
            if np.array_equal(more, new):
                break
            new = more
        changed = bool((new_rows != flagged_rows).any() or (new != flagged).any())
        self._store(self.census.bits, new_rows)
        self._store(self.census.biases, new)
        return changed

    def _flagged(self, spans: dict[str, Span]) -> np.ndarray:
        parts = [self._stored(name, span) for name, span in spans.items()]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=bool)

    def _stored(self, name: str, span: Span) -> np.ndarray:
        flags = self.flags.flags(name)
        return np.zeros(span.stop - span.start, dtype=bool) if flags is None else flags.cpu().numpy()

    def _store(self, spans: dict[str, Span], values: np.ndarray) -> None:
        for name, span in spans.items():
            flags = self.flags.flags(name)
            if flags is not None:
                flags.copy_(torch.from_numpy(values[span.start : span.stop]))

    def zeros(self) -> Zeros:
        """What is flagged, by name."""
        spans = self.census.bits | self.census.biases
        return {name: self._stored(name, span) for name, span in spans.items()}

    def _replan(self) -> None:
        """What could be removed at once; dead branches leave the census for good."""
        view = self.census.view
        knowns = self.census.drop_dead_branches(self.zeros())
        if self.census.view is not view:
            self.accepted &= set(self.census.weights)
            self._bind()
        self.plan = self.census.plan(knowns)
        self.version += 1

    def _hold(self) -> None:
        self._keep_bits = [self._keep(name, p) for name, p in zip(self.census.bits, self.bits, strict=True)]
        self._keep_biases = [self._keep(name, p) for name, p in zip(self.census.biases, self.biases, strict=True)]

    def _keep(self, name: str, parameter: Tensor) -> Tensor:
        flags = self.flags.flags(name)
        return torch.ones_like(parameter) if flags is None else (~flags).to(parameter.dtype)


def _split(spans: dict[str, Span], values: np.ndarray) -> Zeros:
    return {name: values[span.start : span.stop] for name, span in spans.items()}
