"""What a network with one graph weighs while it trains, and what of it is dead."""

import numpy as np
import torch
from torch import Tensor

from fxcompress.channels.plan import Plan
from fxcompress.objectives import SizeTerms, size_terms
from fxcompress.passes.unquantized import Unquantized, unquantized
from fxcompress.provenance import provenance_of
from fxcompress.quantizer import Quantizer
from fxcompress.trace.traced import TracedModule
from fxcompress.training.altered import check_layers, check_parameters
from fxcompress.training.distributed import refuse_sharded
from fxcompress.training.liveness import Liveness, LivenessUpdate
from fxcompress.training.network import SizedNetwork

LIVENESS = "fxcompress_liveness"
"""The child module that holds the flags of dead channels."""

_UPDATE, _TERMS, _REMOVABLE = "_fxc_update", "_fxc_terms", "_fxc_removable"


class SizedModule(SizedNetwork, TracedModule):
    """A GraphModule with quantizers that knows what is dead, and what is left."""

    def fxc_parts(self) -> "dict[str, SizedModule]":
        """Itself."""
        return {"": self}

    @torch.no_grad()
    def refresh(self) -> None:
        """Find anew what is dead, for when tensors were set from outside, by a broadcast for instance."""
        self.fxc_forget()
        for name, quantizer in self._quantizers().items():
            self.fxc_flags.keep_last(f"{name}.bits", quantizer.bits)

    def fxc_forget(self) -> None:
        """Find anew what is dead when it is asked for, after a removal; training goes on as if there had been none."""
        for key in (_UPDATE, _TERMS, _REMOVABLE):
            self.__dict__.pop(key, None)

    def fxc_start_selection(self, shrink: float) -> None:
        """Forget which channels another training has chosen, and let biases of dead channels go in time for this one.

        Args:
            shrink: what each step is to take off them at least.
        """
        self.fxc_flags.noted.clear()
        if self.settings.shrink < shrink:
            self.settings.least_shrink = shrink
            self.fxc_forget()

    def _quantizers(self) -> dict[str, Quantizer]:
        return {name: module for name, module in self.named_modules() if isinstance(module, Quantizer)}

    @property
    def fxc_flags(self) -> Liveness:
        """What is remembered from step to step."""
        flags = self.get_submodule(LIVENESS)
        assert isinstance(flags, Liveness)
        return flags

    @property
    def liveness(self) -> LivenessUpdate:
        """What is dead, and what follows from it."""
        update = self.__dict__.get(_UPDATE)
        if update is None:
            refuse_sharded(self)
            check_layers(self)
            check_parameters(self, self._quantizers())
            settings = self.settings
            with torch.inference_mode(mode=False):
                update = LivenessUpdate(
                    self, self.fxc_flags, settings.inputs, settings.shrink, settings.deaths,
                    keep_range=settings.keep_range,
                )  # fmt: skip
            self.__dict__[_UPDATE] = update
        assert isinstance(update, LivenessUpdate)
        return update

    @property
    def weights(self) -> int:
        """N of the paper: the quantized weights of the starting network."""
        provenance = provenance_of(self)
        return provenance.weights if provenance is not None else 0

    @property
    def fxc_bits(self) -> list[Tensor]:
        """All bit depths that something reads; (O,) each."""
        return self.liveness.bits

    def fxc_alive(self) -> np.ndarray:
        """Of all bits one after the other, which belong to channels that could not be removed at once; bool (R,)."""
        return self.liveness.alive_rows()

    def fxc_terms(self, bits: Tensor) -> SizeTerms:
        """What objectives are made of, on the device and in the dtype of ``bits``; the same until a channel dies."""
        update = self.liveness
        key = (update.version, bits.device, bits.dtype)
        cached = self.__dict__.get(_TERMS)
        if cached is None or cached[0] != key:
            with torch.inference_mode(mode=False):
                cached = self.__dict__[_TERMS] = (key, self._terms_of(update.plan).to(bits.device, bits.dtype))
        terms = cached[1]
        assert isinstance(terms, SizeTerms)
        return terms

    def _terms_of(self, plan: Plan) -> SizeTerms:
        census = self.liveness.census
        rows = {name: (span.start, span.stop - span.start) for name, span in census.weights.items()}
        return size_terms(census.analysis, plan, rows, self.weights, self.settings.start_costs)

    def fxc_left(self) -> float:
        """The quantized weights that are left, counting as gone what could be removed at once."""
        if not self.fxc_bits:
            return 0.0
        update, bits = self.liveness, self._all_bits()
        held = update.left is not update.plan
        terms = self._terms_of(update.left).to(bits.device, bits.dtype) if held else self.fxc_terms(bits)
        alive = torch.from_numpy(self.fxc_alive()).to(bits.device)
        return float((terms.kernel * terms.inputs)[terms.row_block][alive[terms.rows]].sum())

    def fxc_present(self) -> int:
        """The quantized weights that have not been removed yet."""
        return sum(self.get_parameter(name.removesuffix("_quantizer")).numel() for name in self._quantizers())

    def unquantized(self) -> tuple[Unquantized, ...]:
        """The weights that have no quantizer, each with the reason, largest first; no size counts them."""
        return unquantized(self)

    def removable(self) -> float:
        """The share of the quantized weights, as they are now, that :meth:`prune` would take out."""
        left = self.liveness.left
        cached = self.__dict__.get(_REMOVABLE)
        if cached is None or cached[0] is not left:
            cached = self.__dict__[_REMOVABLE] = (left, super().removable())
        share: float = cached[1]
        return share
