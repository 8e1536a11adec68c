"""The network that compresses itself while it trains."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from torch import Tensor, nn
from torch.optim import Optimizer

from fxcompress.channels.analysis import analyse
from fxcompress.errors import UnsupportedModelError
from fxcompress.objectives import starting_costs
from fxcompress.passes.own_code import shrink_with_own_code, with_own_code
from fxcompress.passes.prune_report import PruneReport
from fxcompress.passes.shrink import Narrow, check_narrow, shrink
from fxcompress.passes.unquantized import unquantized
from fxcompress.progress import progress
from fxcompress.provenance import Provenance, attach, provenance_of
from fxcompress.quantizer import Quantizer
from fxcompress.trace.basics.precision import ordinary
from fxcompress.trace.support import check_finite
from fxcompress.trace.traced import TracedModule
from fxcompress.trace.weights.opened import was_opened
from fxcompress.training.altered import check_hooks, unhooked
from fxcompress.training.census import free_entries
from fxcompress.training.distributed import refuse_sharded
from fxcompress.training.left_behind import note_unchanged, warn_of_left_behind, warn_of_untrained
from fxcompress.training.liveness import Liveness
from fxcompress.training.network import Settings
from fxcompress.training.plain_copy import plain_copy
from fxcompress.training.record import encode
from fxcompress.training.removal import remove_dead
from fxcompress.training.restore import Recut, plan_load
from fxcompress.training.sized import LIVENESS, SizedModule

_LOG = logging.getLogger("fxcompress")


class CompressedModule(SizedModule):
    """A GraphModule whose weights pass through quantizers with trained bits and exponents.

    Made by :func:`fxcompress.compress`. It trains like any module, with three additions to the loop::

        loss = task_loss + gamma * net.size()
        ...; optimizer.step(); net.step()
        net.prune(optimizer)          # as often as wanted
    """

    settings = cast("Settings", None)  # until it starts; so that one of the model's modules may be called so

    def fxc_start(self, settings: Settings) -> None:
        """Take up self-compression; called once, by :func:`fxcompress.compress`."""
        self.settings = settings
        for quantizer in self._quantizers().values():
            quantizer.keep_range = settings.keep_range
        settings.channels = sum(q.bits.numel() for q in self._quantizers().values())
        settings.groups = tuple(group["name"] for group in self.param_groups())
        analysis = analyse(self, settings.inputs)
        settings.start_costs = starting_costs(analysis, {n.removesuffix("_quantizer") for n in self._quantizers()})
        free = free_entries(analysis)
        sizes = {name: len(may) for name, may in free.items()}
        sizes |= {n: b.numel() for n, b in self.named_buffers() if b.ndim == 1 and b.is_floating_point()}
        bits = {f"{name}.bits": quantizer.bits for name, quantizer in self._quantizers().items()}
        self.add_module(LIVENESS, Liveness(sizes, free, bits, next(self.parameters()).device))

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
        return plan_load(self, state, strict=strict)

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

    def step(self) -> None:
        """To be called after each ``optimizer.step()``.

        Projects bits to [0, 24], lets exponents follow (see ``keep_range`` of :func:`fxcompress.compress`), shrinks the
        biases of channels without bits by a proximal step, sets the running statistics of batch norm right at the
        moment when a channel dies, keeps one channel of a layer that the network cannot do without, and holds at zero
        what is dead.
        """
        warn_of_left_behind(self)
        warn_of_untrained(self)
        self.liveness.step()
        note_unchanged(self)

    def prune(
        self, optimizer: Optimizer | Sequence[Optimizer] | None = None, *, averages: Iterable[nn.Module] = ()
    ) -> PruneReport:
        """Remove dead channels and branches, in place, with their part of the optimizer's state.

        With many processes, each must call it at the same point: where a ``DistributedDataParallel`` holds this network
        (as it is or in another module), all ranks compare what they would remove before any removes it, and the wrapper
        is rebuilt in place for the new parameters.

        Args:
            optimizer: whose parameters are those of this network; its groups and its schedulers go on. Several, where
                more than one trains it (Muon for weights, say, and AdamW for the rest). A warning names parameters that
                are cut, require gradients and are in none of them: one that is left out would train what was cut off.
                Without any, the next ``step()`` warns where what was cut has a gradient and nothing has changed it.
            averages: moving averages of this network, such as ``torch.optim.swa_utils.AveragedModel(net)``: each is a
                copy of it, or holds one. They lose the same channels, whatever the averages of these are by now, and
                the averages of all others stay as they are, so averaging goes on.

        Raises:
            AverageError: one of ``averages`` is no copy of this network, or has not lost what it has lost. Nothing has
                changed then.
            DistributedError: the ranks disagree, or one has died or cannot remove. Nothing has changed on any rank.
            OptimizerError: it holds other parameters and lacks some of the network's, or holds state that cannot be
                cut. Nothing has changed then.
            UnsupportedModelError: ``forward`` was replaced on the instance, and would go on running the old graph.
        """
        return remove_dead(self, {"": self}, optimizer, averages, lambda reports: reports[""])

    @ordinary
    def finalize(self, *, prune: bool = True, fold: bool = True, narrow: Narrow = False) -> TracedModule:
        """The network as an ordinary GraphModule: weights on their grid, no quantizers; this one stays as it is.

        With ``compress(..., keep_code=True)`` it is no GraphModule, but a module of the model's own class. It is in the
        mode that this network is in: call ``eval()`` before you use it.

        Args:
            prune: also remove what can be proved removable now that the weights are fixed.
            fold: with ``prune``, also remove channels that are constant, and not zero, in evaluation: what they add
                goes into the biases of the layers that read them. Layers may get a bias for that.
            narrow: with ``prune``, also remove channels of one path into a sum that are zero there and alive in the
                sum, see :func:`fxcompress.prune`.

        Raises:
            UnsupportedModelError: a parameter holds NaN or infinite values.
                Or the model's code, which is to stay, would compute something else with what is left.
            ValueError: ``narrow`` is something else than True, False and ``"measure"``, or asked for without ``prune``
                or with ``keep_code``.
        """
        shell, inputs = self.settings.shell, self.settings.inputs
        check_narrow(narrow, keep_code=shell is not None)
        if narrow and not prune:
            raise ValueError("narrow removes channels: pass prune=True with it")
        refuse_sharded(self)
        check_finite(self)
        self.fxc_tell_of_steps()
        check_hooks(self, inputs, root=True)
        with progress(f"finalizing {type(self).__name__}"):
            return self._finalized(prune=prune, fold=fold, narrow=narrow)

    def _finalized(self, *, prune: bool, fold: bool, narrow: Narrow) -> TracedModule:
        shell, inputs = self.settings.shell, self.settings.inputs
        provenance = provenance_of(self)
        with unhooked(self):
            plain, grids = plain_copy(self)
        base = provenance or Provenance({})
        kept = {name: dims for name, dims in base.kept.items() if name in base.shapes}
        attach(plain, replace(base, kept=kept, grids=grids))
        if shell is None:
            return shrink(plain, inputs, fold=fold, narrow=narrow).module if prune else plain
        if prune:
            _, result, decided = shrink_with_own_code(shell, plain, inputs, fold=fold)
            if decided is not None and not decided.is_proved:
                _LOG.warning("fxcompress: %s: %s", type(result).__name__, decided)
        else:
            result = with_own_code(shell, plain, inputs)
        # One type for both, as compress() has it: what only a graph has is missed where it is asked for.
        return cast("TracedModule", result)


def new_compressed(traced: TracedModule, settings: Settings) -> CompressedModule:
    """A CompressedModule from a traced module with quantizers, whose tensors it takes over."""
    check_quantizers(traced)
    _give_way(traced)
    result = CompressedModule(traced, traced.graph, traced.train_graph, type(traced).__name__)
    result.meta = dict(traced.meta)
    result.fxc_start(settings)
    return result


def _give_way(traced: TracedModule) -> None:
    """Leave plain attributes that are called like something of a network in training; no graph reads them."""
    names = (set(dir(CompressedModule)) - set(dir(TracedModule))) | {"settings"}
    for name in sorted(names & traced.__dict__.keys()):
        del traced.__dict__[name]


def check_quantizers(traced: TracedModule) -> None:
    """Check that a traced module has a quantizer.

    Raises:
        UnsupportedModelError: it has none.
    """
    if not any(isinstance(module, Quantizer) for module in traced.modules()):
        found = unquantized(traced)
        reasons = f"\n  {'; '.join(map(str, found[:3]))}" if found else ""
        if any(was_opened(weight.name) for weight in found):
            reasons += (
                "\n  torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight'), or the matching "
                "torch.nn.utils.remove_* function, makes a plain weight of what a layer computes"
            )
        raise UnsupportedModelError(
            f"{type(traced).__name__} has no weight to quantize: no convolution or linear layer with a trainable "
            f"weight that nothing else reads{reasons}"
        )
