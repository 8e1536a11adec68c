"""What a network in training weighs, and what of it is dead."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fxcompress.objectives import Objective, SizeTerms, Start, objective_of, size_terms
from fxcompress.provenance import provenance_of
from fxcompress.quantizer import Quantizer, storage_bits
from fxcompress.trace.inputs import ExampleInputs
from fxcompress.trace.traced import TracedModule
from fxcompress.training.distributed import refuse_sharded
from fxcompress.training.liveness import Liveness, LivenessUpdate

LIVENESS = "fxcompress_liveness"
"""The child module that holds the flags of dead channels."""

_UPDATE, _TERMS, _REMOVABLE = "_fxc_update", "_fxc_terms", "_fxc_removable"


@dataclass(slots=True)
class Settings:
    """How a network compresses itself.

    Attributes:
        inputs: that it runs on.
        objective: what :meth:`CompressedModule.size` counts.
        bias_shrink: what each step takes off the bias of a channel without bits.
        death_limit: share of the starting channels that may lose their last bit in one step.
        channels: how many channels there were at the start.
        groups: names of the parameter groups that there were at the start. One that has lost all of its parameters
            stays, as it does in an optimizer, so that the optimizer's checkpoint fits one that is built later.
        start_costs: what the starting network costs, which objectives are stated over.
    """

    inputs: ExampleInputs
    objective: str | Objective
    bias_shrink: float
    death_limit: float = 1.0
    channels: int = 0
    groups: tuple[str, ...] = ()
    start_costs: Start = field(default_factory=Start)

    @property
    def deaths(self) -> int:
        """How many channels may lose their last bit in one step."""
        return max(1, int(self.death_limit * self.channels))


class SizedModule(TracedModule):
    """A GraphModule with quantizers that knows what is dead, and what is left."""

    settings: Settings

    def refresh(self) -> None:
        """Find anew what is dead, for when tensors were set from outside, by a broadcast for instance."""
        for key in (_UPDATE, _TERMS, _REMOVABLE):
            self.__dict__.pop(key, None)

    def _quantizers(self) -> dict[str, Quantizer]:
        return {name: module for name, module in self.named_modules() if isinstance(module, Quantizer)}

    @property
    def liveness(self) -> LivenessUpdate:
        """What is dead, and what follows from it."""
        update = self.__dict__.get(_UPDATE)
        if update is None:
            refuse_sharded(self)
            flags = self.get_submodule(LIVENESS)
            assert isinstance(flags, Liveness)
            settings = self.settings
            update = LivenessUpdate(self, flags, settings.inputs, settings.bias_shrink, settings.deaths)
            self.__dict__[_UPDATE] = update
        assert isinstance(update, LivenessUpdate)
        return update

    @property
    def weights(self) -> int:
        """N of the paper: the quantized weights of the starting network."""
        provenance = provenance_of(self)
        return provenance.weights if provenance is not None else 0

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
        bits = self._bits()
        size = chosen(self._size_terms(bits), bits)
        if size.ndim:
            raise ValueError(f"objective {chosen!r} returned shape {tuple(size.shape)}; it must return a scalar")
        return size

    def _bits(self) -> Tensor:
        """The bit depths of all channels; none are left where all of a network's branches have gone."""
        bits = [p.to(torch.promote_types(p.dtype, torch.float32)) for p in self.liveness.bits]
        return torch.cat(bits) if bits else torch.zeros(0)

    def _size_terms(self, bits: Tensor) -> SizeTerms:
        update = self.liveness
        key = (update.version, bits.device, bits.dtype)
        cached = self.__dict__.get(_TERMS)
        if cached is None or cached[0] != key:
            rows = {name: (span.start, span.stop - span.start) for name, span in update.census.weights.items()}
            start = self.settings.start_costs
            terms = size_terms(update.census.analysis, update.plan, rows, self.weights, start)
            terms = terms.to(bits.device, bits.dtype)
            cached = self.__dict__[_TERMS] = (key, terms)
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
        bits = self._bits()
        whole = storage_bits(bits).to(torch.float64)
        terms = self._size_terms(bits)
        per_row = torch.zeros_like(whole).index_add(
            0, terms.rows, (terms.kernel * terms.inputs).to(whole)[terms.row_block]
        )
        left = (whole > 0).sum()
        return float((whole * per_row).sum() + 40 * left) / (32 * self.weights)

    @torch.no_grad()
    def weights_left(self) -> float:
        """The quantized weights that are left, over N, counting as gone what could be removed at once."""
        bits = self._bits()
        terms = self._size_terms(bits)
        alive = torch.from_numpy(self.liveness.alive_rows()).to(bits.device)
        per_row = (terms.kernel * terms.inputs)[terms.row_block]
        return float(per_row[alive[terms.rows]].sum()) / self.weights

    def removable(self) -> float:
        """The share of the quantized weights, as they are now, that :meth:`prune` would take out."""
        version = self.liveness.version
        cached = self.__dict__.get(_REMOVABLE)
        if cached is None or cached[0] != version:
            present = sum(self.get_parameter(name.removesuffix("_quantizer")).numel() for name in self._quantizers())
            gone = max(0.0, 1 - self.weights_left() * self.weights / present) if present else 0.0
            cached = self.__dict__[_REMOVABLE] = (version, gone)
        share: float = cached[1]
        return share

    @torch.no_grad()
    def channels_left(self) -> int:
        """Output channels of quantized weights that are left, counting as gone what could be removed at once."""
        return int(self.liveness.alive_rows().sum())
