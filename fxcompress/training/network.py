"""What every network in training offers, whether it has one graph or is in pieces: its sizes and parameter groups."""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, fx, nn

from fxcompress.errors import check_number
from fxcompress.objectives import Objective, SizeTerms, Start, joined_terms, objective_of
from fxcompress.quantizer import Quantizer, compile_quantizers, storage_bits
from fxcompress.trace.inputs import ExampleInputs

_JOINED, _UNSTEPPED = "_fxc_joined", "_fxc_unstepped"
_PAPERS_STEP, FINE_STEP = 0.5, 0.1
"""The most that bits move by in a step of Adam: its learning rate."""
_SLOPE = 500
"""That over its eps: how far bits move for a small gradient."""
_EXPONENTS = 0.05
"""Learning rate of exponents where none is given, nor one of bits."""
_LOG = logging.getLogger("fxcompress")


@dataclass(slots=True)
class Settings:
    """How a network compresses itself.

    Attributes:
        inputs: that it runs on.
        objective: what :meth:`SizedNetwork.size` counts.
        bias_shrink: what each step takes off the bias of a channel without bits, as was asked for.
        death_limit: share of the starting channels that may lose their last bit in one step.
        keep_range: whether exponents follow the bits.
        channels: how many channels there were at the start.
        groups: names of the parameter groups that there were at the start. One that has lost all of its parameters
            stays, as it does in an optimizer, so that the optimizer's checkpoint fits one that is built later.
        start_costs: what the starting network costs, which objectives are stated over.
        shell: the model without its tensors, where the finalized network is to run the model's code; else None.
        least_shrink: what is taken off biases at least, so that channels that were chosen go in time.
    """

    inputs: ExampleInputs
    objective: str | Objective
    bias_shrink: float
    death_limit: float = 1.0
    keep_range: bool = True
    channels: int = 0
    groups: tuple[str, ...] = ()
    start_costs: Start = field(default_factory=Start)
    shell: nn.Module | None = None
    least_shrink: float = 0.0

    @property
    def shrink(self) -> float:
        """What each step takes off the bias of a channel without bits, as things are."""
        return max(self.bias_shrink, self.least_shrink)

    @property
    def deaths(self) -> int:
        """How many channels may lose their last bit in one step."""
        return max(1, int(self.death_limit * self.channels))


class Part(Protocol):
    """A network with one graph, as a part of what is weighed."""

    @property
    def weights(self) -> int:
        """N of the paper."""
        ...

    @property
    def fxc_bits(self) -> list[Tensor]:
        """All bit depths that something reads; (O,) each."""
        ...

    def fxc_alive(self) -> np.ndarray:
        """Of all bits one after the other, which belong to channels that could not be removed at once; bool (R,)."""
        ...

    def fxc_terms(self, bits: Tensor) -> SizeTerms:
        """What objectives are made of; the same object until a channel dies."""
        ...

    def fxc_present(self) -> int:
        """The quantized weights that have not been removed yet."""
        ...

    def fxc_left(self) -> float:
        """Those that could not be removed at once either."""
        ...

    @property
    def graphs(self) -> dict[str, fx.Graph]:
        """Its graph of each mode."""
        ...


class SizedNetwork(nn.Module):
    """A network with quantizers, whose sizes are known.

    What is not for users is named ``fxc_...``: a plain name would hide a child module of that name.

    Attributes:
        settings: how it compresses itself.
    """

    settings: Settings

    def fxc_parts(self) -> Mapping[str, Part]:
        """The graphs that it is made of, by their paths; itself alone, where it has one graph."""
        raise NotImplementedError

    def refresh(self) -> None:
        """Find anew what is dead, for when tensors were set from outside, by a broadcast for instance."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """What ``double()``, ``to()`` and the like do to each tensor: they do it to the example inputs as well."""
        before = _kinds(self)
        result = super()._apply(fn, *args, **kwargs)  # type: ignore[no-untyped-call]
        if "settings" in self.__dict__ and _kinds(self) != before:
            self.settings.inputs = self.settings.inputs.converted(fn)
            self.refresh()
        return result

    @property
    def weights(self) -> int:
        """N of the paper: the quantized weights of the starting network."""
        return sum(part.weights for part in self.fxc_parts().values())

    @property
    def fxc_bits(self) -> list[Tensor]:
        """All bit depths that something reads; (O,) each."""
        return [p for part in self.fxc_parts().values() for p in part.fxc_bits]

    @torch.no_grad()
    def fxc_tell_of_steps(self) -> None:
        """Warn, once, where bits are below 0: the optimizer has made steps that no ``step()`` has followed."""
        if _UNSTEPPED not in self.__dict__ and bool((self._all_bits() < 0).any()):
            self.__dict__[_UNSTEPPED] = True
            _LOG.warning(
                "fxcompress: %s has bits below 0, at which a channel is no zero and its size is negative: call "
                "net.step() after each optimizer.step(), and before prune() and finalize()", type(self).__name__,
            )  # fmt: skip

    def _all_bits(self) -> Tensor:
        """The bit depths of all channels; none are left where all of a network's branches have gone.

        Even then a size has a gradient, so that a loop goes on that has nothing left to train.
        """
        bits = [p.to(torch.promote_types(p.dtype, torch.float32)) for p in self.fxc_bits]
        if bits:
            return torch.cat(bits)
        return torch.zeros(0, device=next((p.device for p in self.parameters()), "cpu"), requires_grad=True)

    def size(self, objective: str | Objective | None = None) -> Tensor:
        """Q of the paper: what the network costs over what it cost at the start, a scalar with a gradient.

        By equation 4 this is the mean number of bits of a starting weight. By equation 5, the default, it is about
        twice that; see :mod:`fxcompress.objectives` for all of them.

        Args:
            objective: a name, or a function of (terms, bits); that of :func:`fxcompress.compress` by default.

        Raises:
            ValueError: there is no such objective, or it returned something other than a scalar.
        """
        chosen = objective_of(self.settings.objective if objective is None else objective)
        bits = self._all_bits()
        return _scalar(chosen(self._size_terms(bits), bits), chosen)

    def _size_terms(self, bits: Tensor) -> SizeTerms:
        parts = self.fxc_parts()
        found = {path: part.fxc_terms(bits) for path, part in parts.items()}
        if list(found) == [""]:
            return found[""]
        cached = self.__dict__.get(_JOINED)
        own = list(found.values())
        if cached is None or len(cached[0]) != len(own) or any(a is not b for a, b in zip(cached[0], own, strict=True)):
            rows = [sum(p.numel() for p in part.fxc_bits) for part in parts.values()]
            with torch.inference_mode(mode=False):
                cached = self.__dict__[_JOINED] = (own, joined_terms(found, rows))
        terms = cached[1]
        assert isinstance(terms, SizeTerms)
        return terms

    @torch.no_grad()
    def fractional_size(self) -> float:
        """The real-valued bits that are left, over the 32 N bits of the starting weights (the paper's measure)."""
        return float(self.size("eq4")) / 32

    @torch.no_grad()
    def stored_size(self) -> float:
        """Whole bits for the codes of each channel and the bytes of its bits and exponent (1 + 4), over 32 N bits."""
        bits = self._all_bits()
        terms = self._size_terms(bits)
        rows, block = terms.rows.cpu(), terms.row_block.cpu()
        whole = storage_bits(bits).cpu().to(torch.float64)  # there, as not every device has float64
        per_row = torch.zeros_like(whole).index_add(0, rows, (terms.kernel * terms.inputs).to(whole)[block])
        left = (whole[rows.unique()] > 0).sum()
        return float((whole * per_row).sum() + 40 * left) / (32 * self.weights)

    @torch.no_grad()
    def macs_left(self) -> float:
        """The multiply-adds that are left, whatever the bits, over those of the starting network.

        Those of quantized layers, in evaluation, on the example inputs, counting as gone what could be removed at once.
        """
        terms = self.fxc_all_terms()
        return float((terms.macs * terms.outputs * terms.inputs).sum()) / max(1, terms.start.macs)

    def fxc_all_terms(self) -> SizeTerms:
        """What objectives are made of, of all parts together."""
        return self._size_terms(self._all_bits())

    @torch.no_grad()
    def weights_left(self) -> float:
        """The quantized weights that are left, over N, counting as gone what could be removed at once."""
        return sum(part.fxc_left() for part in self.fxc_parts().values()) / self.weights

    def _all_alive(self) -> np.ndarray:
        return np.concatenate([part.fxc_alive() for part in self.fxc_parts().values()])

    def removable(self) -> float:
        """The share of the quantized weights, as they are now, that :meth:`prune` would take out."""
        present = sum(part.fxc_present() for part in self.fxc_parts().values())
        return max(0.0, 1 - self.weights_left() * self.weights / present) if present else 0.0

    @torch.no_grad()
    def channels_left(self) -> int:
        """Output channels of quantized weights that are left, counting as gone what could be removed at once."""
        return int(self._all_alive().sum())

    def param_groups(
        self,
        lr: float = 1e-3,
        *,
        weight_decay: float = 0.0,
        bits_lr: float | None = None,
        bits_eps: float | None = None,
        exponents_lr: float | None = None,
        fine_tune: bool | float = False,
        **options: Any,  # noqa: ANN401
    ) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer of the Adam family, with the paper's setting for bits.

        What stands in a group wins over what the optimizer is given: say here what learning rate and weight decay
        weights get.

        Args:
            lr: of weights, biases and norms.
            weight_decay: of weights alone.
            bits_lr: of bits; 0.5 by default, as in the paper.
            bits_eps: of bits and exponents; 1e-3 by default. The large eps matters: it makes the step of bits
                proportional to their gradient, so that layers shrink by what they cost, not all at the same speed.
            exponents_lr: of exponents; a tenth of ``bits_lr`` where that is given, or else 0.05. The paper has the same
                for both. But while bits move by their size alone, exponents follow the task, whose gradient is far
                above the eps: at 0.5 they move by half a power of two in a step, which a trained network does not
                survive.
            fine_tune: the weights are trained already. Bits move as far for a small gradient, but by a tenth at most in
                a step, or by a number that is given: that is ``bits_lr`` then, and ``bits_eps`` a 500th of it.
                Otherwise what the task says in a single batch takes the last bit of a channel now and then, and that
                does not come back. In a hundred steps a tenth takes them nowhere.
            options: further entries of the first two groups, such as ``eps``.

        Raises:
            TypeError, ValueError: one of these is no number, or negative. Optimizers do not check what is set
                for a group.
        """
        named = {"bits_lr": bits_lr, "bits_eps": bits_eps, "exponents_lr": exponents_lr}
        numbers: dict[str, float] = {"lr": lr, "weight_decay": weight_decay, "fine_tune": fine_tune}
        numbers |= {name: value for name, value in named.items() if value is not None}
        check_number(**numbers)
        for name, value in numbers.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}={value} is out of range: at least 0, and finite")
        if exponents_lr is None:
            exponents_lr = _EXPONENTS if bits_lr is None else bits_lr / 10
        own = FINE_STEP if fine_tune is True else fine_tune or _PAPERS_STEP
        bits_lr, bits_eps = own if bits_lr is None else bits_lr, own / _SLOPE if bits_eps is None else bits_eps
        quantizers = [q for q in self.modules() if isinstance(q, Quantizer)]
        bits, exponents = [q.bits for q in quantizers], [q.exponent for q in quantizers]
        special = {id(p) for p in (*bits, *exponents)}
        formats = {"eps": bits_eps, "weight_decay": 0.0}
        others = [p for p in self.parameters() if id(p) not in special and p.requires_grad]
        weights = [p for p in others if p.ndim > 1]
        rest = [p for p in others if p.ndim <= 1]
        groups: list[dict[str, Any]] = [
            {"params": weights, "lr": lr, "weight_decay": weight_decay, **options, "name": "weights"},
            {"params": rest, "lr": lr, "weight_decay": 0.0, **options, "name": "biases and norms"},
            {"params": bits, "lr": bits_lr, **formats, "name": "bits"},
            {"params": exponents, "lr": exponents_lr, **formats, "name": "exponents"},
        ]
        return [group for group in groups if group["params"] or group["name"] in self.settings.groups]

    def compile_quantizers(self, **options: Any) -> None:  # noqa: ANN401
        """Compile the quantizers alone: see :func:`fxcompress.quantizer.compile_quantizers`.

        ``torch.compile(net)`` compiles all of the network instead, and anew after each removal.
        """
        compile_quantizers(self, **options)


def _scalar(size: object, objective: Objective) -> Tensor:
    if isinstance(size, Tensor) and not size.ndim:
        return size
    what = f"shape {tuple(size.shape)}" if isinstance(size, Tensor) else f"a {type(size).__name__}"
    raise ValueError(f"objective {objective!r} returned {what}; it must return a scalar, a tensor without dims")


def _kinds(module: nn.Module) -> list[tuple[torch.dtype, torch.device]]:
    return [(tensor.dtype, tensor.device) for tensor in (*module.parameters(), *module.buffers())]
