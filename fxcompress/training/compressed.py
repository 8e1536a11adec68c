"""The network that compresses itself while it trains."""

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.optim import Optimizer

from fxcompress.channels.analysis import analyse
from fxcompress.errors import UnsupportedModelError
from fxcompress.objectives import Objective, SizeTerms, Start, objective_of, size_terms, starting_costs
from fxcompress.passes.finalize import finalize_quantizers
from fxcompress.passes.history import extended
from fxcompress.passes.prune_channels import Pruned, prune_channels
from fxcompress.passes.prune_report import PruneReport, make_report
from fxcompress.passes.shrink import shrink
from fxcompress.provenance import Provenance, attach, provenance_of
from fxcompress.quantizer import Quantizer, compile_quantizers, storage_bits
from fxcompress.trace.inputs import ExampleInputs
from fxcompress.trace.traced import TracedModule
from fxcompress.training.census import free_entries, seeds
from fxcompress.training.liveness import Liveness, LivenessUpdate
from fxcompress.training.optimizer import Replacement, check_optimizer, prepare_resize

LIVENESS = "fxcompress_liveness"
"""The child module that holds the flags of dead channels."""

_UPDATE, _TERMS = "_fxc_update", "_fxc_terms"


@dataclass(slots=True)
class Settings:
    """How a network compresses itself.

    Attributes:
        inputs: that it runs on.
        objective: what :meth:`CompressedModule.size` counts.
        bias_shrink: what each step takes off the bias of a channel without bits.
        start_costs: what the starting network costs, which objectives are stated over.
    """

    inputs: ExampleInputs
    objective: str | Objective
    bias_shrink: float
    start_costs: Start = field(default_factory=Start)


class CompressedModule(TracedModule):
    """A GraphModule whose weights pass through quantizers with trained bits and exponents.

    Made by :func:`fxcompress.compress`. It trains like any module, with three additions to the loop::

        loss = task_loss + gamma * net.size()
        ...; optimizer.step(); net.step()
        net.prune(optimizer)          # as often as wanted
    """

    settings: Settings

    def start(self, settings: Settings) -> None:
        """Take up self-compression; called once, by :func:`fxcompress.compress`."""
        self.settings = settings
        analysis = analyse(self, settings.inputs)
        settings.start_costs = starting_costs(analysis, {n.removesuffix("_quantizer") for n in self._quantizers()})
        free = free_entries(analysis)
        sizes = {name: len(may) for name, may in free.items()}
        sizes |= {n: b.numel() for n, b in self.named_buffers() if b.ndim == 1 and b.is_floating_point()}
        self.add_module(LIVENESS, Liveness(sizes, free, next(self.parameters()).device))

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """As of any module; what is dead is found anew."""
        result = super().load_state_dict(*args, **kwargs)
        self.__dict__.pop(_UPDATE, None)
        return result

    def _quantizers(self) -> dict[str, Quantizer]:
        return {name: module for name, module in self.named_modules() if isinstance(module, Quantizer)}

    @property
    def liveness(self) -> LivenessUpdate:
        """What is dead, and what follows from it."""
        update = self.__dict__.get(_UPDATE)
        if update is None:
            flags = self.get_submodule(LIVENESS)
            assert isinstance(flags, Liveness)
            update = LivenessUpdate(self, flags, self.settings.inputs, self.settings.bias_shrink)
            self.__dict__[_UPDATE] = update
        assert isinstance(update, LivenessUpdate)
        return update

    def param_groups(
        self,
        lr: float = 1e-3,
        *,
        weight_decay: float = 0.0,
        bits_lr: float = 0.5,
        bits_eps: float = 1e-3,
        **options: Any,  # noqa: ANN401
    ) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer of the Adam family, with the paper's setting for bits and exponents.

        Args:
            lr: of weights, biases and norms.
            weight_decay: of weights alone.
            bits_lr: of bits and exponents.
            bits_eps: the same. The large eps matters: it makes their step proportional to their
                gradient, so that layers shrink by what they cost, not all at the same speed.
            options: further entries of the first two groups, such as ``eps``.
        """
        quantizers = [p for q in self._quantizers().values() for p in (q.bits, q.exponent)]
        special = {id(p) for p in quantizers}
        others = [p for p in self.parameters() if id(p) not in special and p.requires_grad]
        weights = [p for p in others if p.ndim > 1]
        rest = [p for p in others if p.ndim <= 1]
        groups: list[dict[str, Any]] = [
            {"params": weights, "lr": lr, "weight_decay": weight_decay, **options, "name": "weights"},
            {"params": rest, "lr": lr, "weight_decay": 0.0, **options, "name": "biases and norms"},
            {"params": quantizers, "lr": bits_lr, "eps": bits_eps, "weight_decay": 0.0, "name": "bits"},
        ]
        return [group for group in groups if group["params"]]

    def compile_quantizers(self, **options: Any) -> None:  # noqa: ANN401
        """Compile the quantizers alone: see :func:`fxcompress.quantizer.compile_quantizers`.

        ``torch.compile(net)`` compiles all of the network instead, and anew after each removal.
        """
        compile_quantizers(self, **options)

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
        bits = torch.cat([p.to(torch.promote_types(p.dtype, torch.float32)) for p in self.liveness.bits])
        size = chosen(self._size_terms(bits), bits)
        if size.ndim:
            raise ValueError(f"objective {chosen!r} returned shape {tuple(size.shape)}; it must return a scalar")
        return size

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
        bits = torch.cat([p.detach() for p in self.liveness.bits])
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
        bits = torch.cat([p.detach() for p in self.liveness.bits])
        terms = self._size_terms(bits)
        alive = torch.from_numpy(self._alive_rows()).to(bits.device)
        per_row = (terms.kernel * terms.inputs)[terms.row_block]
        return float(per_row[alive[terms.rows]].sum()) / self.weights

    @torch.no_grad()
    def channels_left(self) -> int:
        """Output channels of quantized weights that are left, counting as gone what could be removed at once."""
        return int(self._alive_rows().sum())

    def _alive_rows(self) -> np.ndarray:
        update = self.liveness
        census = update.census
        alive = np.zeros(max((s.stop for s in census.weights.values()), default=0), dtype=bool)
        for sites in census.analysis.sites:
            span = census.weights.get(sites.weight_name)
            if span is not None:
                alive[span.start : span.stop] = update.plan.alive[sites.rows] | (sites.rows == 0)
        return alive

    def step(self) -> None:
        """To be called after each ``optimizer.step()``.

        Projects bits to >= 0, shrinks the biases of channels without bits by a proximal step, sets the running
        statistics of batch norm right at the moment when a channel dies, keeps one channel of a layer that the network
        cannot do without, and holds at zero what is dead.
        """
        self.liveness.step()

    def prune(self, optimizer: Optimizer | None = None) -> PruneReport:
        """Remove dead channels and branches, in place, with their part of the optimizer's state.

        Args:
            optimizer: whose parameters are those of this network; its groups and its schedulers go on.

        Raises:
            OptimizerError: it holds other parameters, or state that cannot be cut. Nothing has changed then.
        """
        if optimizer is not None:
            check_optimizer(optimizer, self.parameters())
        update = self.liveness
        zeros = update.zeros()
        analysis = update.census.analysis if update.census.view is self else None
        pruned = prune_channels(
            self, self.settings.inputs, lambda _, trail: seeds(trail, zeros), modes=(True,), analysis=analysis
        )
        report = make_report(self, pruned, explain=False)
        if not pruned.modified:
            return report
        changes = _replacements(self, pruned)
        prepared = None if optimizer is None else prepare_resize(optimizer, changes)
        attach(self, extended(self, pruned))
        self._take_over(pruned)
        if prepared is not None:
            prepared.commit()
        return report

    def _take_over(self, pruned: Pruned) -> None:
        """Become the pruned network; modules that stay keep their identity."""
        flags = self.get_submodule(LIVENESS)
        assert isinstance(flags, Liveness)
        for name, cut in pruned.cuts.items():
            flags.keep(name, cut.indices.get(0))
        for name in pruned.gone:
            flags.keep(name, None)
        new = dict(pruned.module.named_modules())
        del new[LIVENESS]
        _transplant(self, new)
        self.set_graphs(pruned.module.graph, pruned.module.train_graph)
        self.__dict__.pop(_UPDATE, None)
        self.__dict__.pop(_TERMS, None)

    def finalize(self, *, prune: bool = True, fold: bool = True) -> TracedModule:
        """The network as an ordinary GraphModule: weights on their grid, no quantizers; this one stays as it is.

        Args:
            prune: also remove what can be proved removable now that the weights are fixed.
            fold: with ``prune``, also remove channels that are constant, and not zero, in evaluation: what they add
                goes into the biases of the layers that read them. Layers may get a bias for that.
        """
        own = copy.deepcopy(self)
        provenance = provenance_of(own)
        delattr(own, LIVENESS)
        plain = TracedModule(own, own.graph, own.train_graph, type(self).__name__)
        plain.__dict__.pop("settings", None)
        grids = finalize_quantizers(plain)
        base = provenance or Provenance({})
        kept = {name: dims for name, dims in base.kept.items() if name in base.shapes}
        attach(plain, replace(base, kept=kept, grids=grids))
        if prune and fold:
            return shrink(plain, self.settings.inputs).module
        if prune:
            pruned = prune_channels(plain, self.settings.inputs)
            attach(pruned.module, extended(plain, pruned))
            return pruned.module
        return plain


def new_compressed(traced: TracedModule, settings: Settings) -> CompressedModule:
    """A CompressedModule from a traced module with quantizers, whose tensors it takes over."""
    if not any(isinstance(module, Quantizer) for module in traced.modules()):
        raise UnsupportedModelError(
            f"{type(traced).__name__} has no weight to quantize: no convolution or linear layer with a trainable "
            "weight that nothing else reads; unfreeze its weights first"
        )
    result = CompressedModule(traced, traced.graph, traced.train_graph, type(traced).__name__)
    result.meta = dict(traced.meta)
    result.start(settings)
    return result


def _transplant(old: nn.Module, new: dict[str, nn.Module], prefix: str = "") -> None:
    """Give the modules of a tree the tensors and attributes of their counterparts; drop those without one."""
    source = new[prefix.removesuffix(".")]
    old._parameters, old._buffers = source._parameters, source._buffers
    for key, value in source.__dict__.items():
        if not key.startswith("_") and not isinstance(old, fx.GraphModule):
            old.__dict__[key] = value
    for name, child in list(old._modules.items()):
        if prefix + name in new and child is not None:
            _transplant(child, new, f"{prefix}{name}.")
        elif name != LIVENESS:
            del old._modules[name]


def _replacements(before: TracedModule, pruned: Pruned) -> list[Replacement]:
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
