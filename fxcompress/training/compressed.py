"""The network that compresses itself while it trains."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from fxcompress.channels.analysis import analyse
from fxcompress.errors import UnsupportedModelError
from fxcompress.objectives import OBJECTIVES, Objective, SizeTerms, size_terms
from fxcompress.passes.finalize import finalize_quantizers
from fxcompress.passes.history import extended
from fxcompress.passes.prune_channels import Pruned, prune_channels
from fxcompress.passes.prune_report import PruneReport
from fxcompress.passes.shrink import shrink
from fxcompress.provenance import Provenance, attach, provenance_of
from fxcompress.quantizer import Quantizer, compile_quantizers, storage_bits
from fxcompress.trace.inputs import ExampleInputs
from fxcompress.trace.traced import TracedModule
from fxcompress.training.agreement import agreed
from fxcompress.training.census import free_entries
from fxcompress.training.distributed import check_wrapper, rebuild, refuse_sharded, wrappers_of
from fxcompress.training.liveness import Liveness, LivenessUpdate
from fxcompress.training.record import encode
from fxcompress.training.removal import Removal, plan_removal
from fxcompress.training.restore import Recut, plan_load

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
    """

    inputs: ExampleInputs
    objective: Objective
    bias_shrink: float
    death_limit: float = 1.0
    channels: int = 0
    groups: tuple[str, ...] = ()

    @property
    def deaths(self) -> int:
        """How many channels may lose their last bit in one step."""
        return max(1, int(self.death_limit * self.channels))


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
        settings.channels = sum(q.bits.numel() for q in self._quantizers().values())
        settings.groups = tuple(group["name"] for group in self.param_groups())
        free = free_entries(analyse(self, settings.inputs))
        sizes = {name: len(may) for name, may in free.items()}
        sizes |= {n: b.numel() for n, b in self.named_buffers() if b.ndim == 1 and b.is_floating_point()}
        self.add_module(LIVENESS, Liveness(sizes, free, next(self.parameters()).device))

    def get_extra_state(self) -> Tensor:
        """What was cut out, as a part of the state_dict: see :meth:`plan_load`; uint8 (n,)."""
        return encode(provenance_of(self) or Provenance({}))

    def set_extra_state(self, state: object) -> None:
        """Nothing: the record is read before any tensor is loaded."""

    def plan_load(self, state: Mapping[str, Any], *, strict: bool = True) -> Recut | None:
        """How this network will be cut when ``state`` is loaded; None where its shape stays. Changes nothing.

        Raises:
            CheckpointError: it does not fit.
        """
        return plan_load(
            self, self.settings.inputs, state, strict=strict, liveness=LIVENESS, take_over=self._take_over
        )  # fmt: skip

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:  # noqa: ANN401, FBT001, FBT002
        """As of any module, but first the network is cut to the shape of the one that ``state_dict`` is of.

        Parameters stay the same objects (unless with ``assign``); an optimizer is built after this call, or taken up
        together with the network by :func:`fxcompress.load_checkpoint`.

        Raises:
            CheckpointError: it does not fit, or the network has lost what it still has. Nothing has changed then.
        """
        recut = self.plan_load(state_dict, strict=strict)
        if recut is not None:
            recut.commit()
        return super().load_state_dict(state_dict, strict, assign)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:  # noqa: ANN401
        """The same as a part of another module, which looks after missing keys itself."""
        own = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        recut = self.plan_load(own, strict=False)
        if recut is not None:
            recut.commit()
        self.refresh()
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def refresh(self) -> None:
        """Find anew what is dead, for when tensors were set from outside, by a broadcast for instance."""
        self.__dict__.pop(_UPDATE, None)
        self.__dict__.pop(_TERMS, None)

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
        return [group for group in groups if group["params"] or group["name"] in self.settings.groups]

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

    def size(self, objective: Objective | None = None) -> Tensor:
        """Q of the paper: the size of the network over N, a scalar with a gradient.

        By equation 4 this is the mean number of bits of a starting weight. By equation 5, the default, it is about
        twice that; see :mod:`fxcompress.objectives`.

        Raises:
            ValueError: there is no such objective.
        """
        chosen = objective or self.settings.objective
        if chosen not in OBJECTIVES:
            raise ValueError(f"objective {chosen!r} is none of {', '.join(OBJECTIVES)}")
        bits = torch.cat([p.to(torch.promote_types(p.dtype, torch.float32)) for p in self.liveness.bits])
        return self._size_terms(bits).size(bits, chosen)

    def _size_terms(self, bits: Tensor) -> SizeTerms:
        update = self.liveness
        key = (update.version, bits.device, bits.dtype)
        cached = self.__dict__.get(_TERMS)
        if cached is None or cached[0] != key:
            rows = {name: (span.start, span.stop - span.start) for name, span in update.census.weights.items()}
            terms = size_terms(update.census.analysis, update.plan, rows, self.weights).to(bits.device, bits.dtype)
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
        alive = torch.from_numpy(self.liveness.alive_rows()).to(bits.device)
        per_row = (terms.kernel * terms.inputs)[terms.row_block]
        return float(per_row[alive[terms.rows]].sum()) / self.weights

    def removable(self) -> float:
        """The share of the quantized weights, as they are now, that :meth:`prune` would take out."""
        version = self.liveness.version
        cached = self.__dict__.get(_REMOVABLE)
        if cached is None or cached[0] != version:
            present = sum(self.get_parameter(name.removesuffix("_quantizer")).numel() for name in self._quantizers())
            cached = self.__dict__[_REMOVABLE] = (version, max(0.0, 1 - self.weights_left() * self.weights / present))
        share: float = cached[1]
        return share

    @torch.no_grad()
    def channels_left(self) -> int:
        """Output channels of quantized weights that are left, counting as gone what could be removed at once."""
        return int(self.liveness.alive_rows().sum())

    def step(self) -> None:
        """To be called after each ``optimizer.step()``.

        Projects bits to >= 0, shrinks the biases of channels without bits by a proximal step, sets the running
        statistics of batch norm right at the moment when a channel dies, keeps one channel of a layer that the network
        cannot do without, and holds at zero what is dead.
        """
        self.liveness.step()

    def prune(self, optimizer: Optimizer | None = None) -> PruneReport:
        """Remove dead channels and branches, in place, with their part of the optimizer's state.

        With many processes, each must call it at the same point: where a ``DistributedDataParallel`` holds this network
        (as it is or in another module), all ranks compare what they would remove before any removes it, and the wrapper
        is rebuilt in place for the new parameters.

        Args:
            optimizer: whose parameters are those of this network; its groups and its schedulers go on.

        Raises:
            DistributedError: the ranks disagree, or one has died or cannot remove. Nothing has changed on any rank.
            OptimizerError: it holds other parameters, or state that cannot be cut. Nothing has changed then.
            UnsupportedModelError: ``forward`` was replaced on the instance, and would go on running the old graph.
        """
        wrappers = wrappers_of(self)
        removal = agreed(wrappers, lambda: self._planned(wrappers, optimizer))
        if not removal.pruned.modified:
            return removal.report
        attach(self, extended(self, removal.pruned))
        self._take_over(removal.pruned)
        if removal.optimizer is not None:
            removal.optimizer.commit()
        for wrapper in wrappers:
            rebuild(wrapper)
        return removal.report

    def _planned(self, wrappers: list[DistributedDataParallel], optimizer: Optimizer | None) -> Removal:
        for wrapper in wrappers:
            check_wrapper(wrapper)
        return plan_removal(self, self.liveness, self.settings.inputs, optimizer)

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
        self.refresh()

    def finalize(self, *, prune: bool = True, fold: bool = True) -> TracedModule:
        """The network as an ordinary GraphModule: weights on their grid, no quantizers; this one stays as it is.

        Args:
            prune: also remove what can be proved removable now that the weights are fixed.
            fold: with ``prune``, also remove channels that are constant, and not zero, in evaluation: what they add
                goes into the biases of the layers that read them. Layers may get a bias for that.
        """
        refuse_sharded(self)
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
