"""A Lightning callback: ``Trainer(callbacks=[SelfCompression(target_size=0.05)])``."""

import math
from operator import attrgetter
from typing import Any

from torch.optim import Optimizer

from fxcompress.adapters.core import SelfCompressing, compressed, optimizer_of, step_after
from fxcompress.errors import MissingPackageError, UnsupportedModelError
from fxcompress.objectives import LatencyTable
from fxcompress.training.aims import Aims
from fxcompress.training.compressed import CompressedModule
from fxcompress.training.controller import Gamma
from fxcompress.training.held import stepping
from fxcompress.training.policy import PrunePolicy
from fxcompress.training.suited import check_objective
from fxcompress.training.target import check_target

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.core.optimizer import LightningOptimizer
    from lightning.pytorch.strategies import DDPStrategy
except ImportError as error:
    raise MissingPackageError('this adapter needs Lightning: pip install "fxcompress[lightning]"') from error

_PROGRESS_BAR = ("size/fractional",)
_AVERAGING = frozenset({"StochasticWeightAveraging", "WeightAveraging"})  # by name: the latter is not in all releases


class SelfCompression(SelfCompressing, Callback):
    """Lets a network inside a LightningModule compress itself; ``training_step`` stays as it is.

    The module makes its network by :func:`fxcompress.compress` in ``__init__``, and its optimizer from the network's
    ``param_groups()``. In automatic and in manual optimization, for each step of that optimizer:

    - before gradients are clipped, the gradient of ``gamma * net.size()`` is added; once for each step, whatever
      ``accumulate_grad_batches`` is, and unscaled, whatever the precision is;
    - after the step, unless the gradient scaler skipped it, ``net.step()`` is called.

    Dead channels are removed after a batch, when that pays, and at the end. Several processes train one network with
    ``Trainer(strategy="ddp")``; all of them remove the same. ``size/fractional``,
    ``size/weights``, ``size/channels`` and ``size/gamma`` go to the module's loggers, and can be monitored by other
    callbacks. Several networks in one module have a callback each, and what is logged is named after them:
    ``generator/size/fractional``.

    Args:
        target_size: share of the original 32-bit weights to end at (fractional); gamma is steered to it.
        gamma: in its place the weight of ``net.size()`` in the loss, or a function of (progress, size).
        target_macs: share of the multiply-adds to end at: the channels that the task misses least for what they save
            are chosen, and lose their bits; the others keep theirs, unless there is a size or a gamma as well.
        target_latency: the same with the share of the seconds that its layers take, by ``latency_table``, or as they
            are measured at the start, in the first process.
        latency_table: of :meth:`fxcompress.LatencyTable.measure`.
        fine_tune: the weights are trained already: the target is reached after a quarter of the training in place of
            half. Build the optimizer of ``net.param_groups(..., fine_tune=True)``, and let bits and exponents rest long
            at the end: ``fxc.cosine(optimizer, steps, settle=0.4)``.
        net: where the network is in the LightningModule; dots lead into its children.
        prune: True: remove what is dead when the steps it has slowed down have cost as much as a removal does; a
            number: after so many steps; a :class:`fxcompress.PrunePolicy`; False: never.

    Attributes:
        done: optimizer steps that were made.

    Raises:
        ValueError: nothing to aim at is given, both of ``target_size`` and ``gamma``, or of ``target_macs`` and
            ``target_latency``, or a value is out of range.
    """

    def __init__(
        self,
        target_size: float | None = None,
        *,
        gamma: float | Gamma | None = None,
        target_macs: float | None = None,
        target_latency: float | None = None,
        latency_table: LatencyTable | None = None,
        fine_tune: bool = False,
        net: str = "net",
        prune: bool | int | PrunePolicy = True,
    ) -> None:
        aims = Aims(target_macs, target_latency, latency_table)
        self._aim(target_size, gamma, aims, fine_tune=fine_tune, prune=prune)
        self.net = net
        self.done = 0
        self._total = math.inf
        self._noted = 0
        self._prefix = ""
        self._optimizer: Optimizer | None = None

    @property
    def state_key(self) -> str:
        """Of each network its own, where a callback for each of several is given."""
        return str(super().state_key) if self.net == "net" else str(self._generate_state_key(net=self.net))

    def state_dict(self) -> dict[str, Any]:
        """How far the training is, what gamma has adapted and when to remove, for a checkpoint."""
        gamma, removals = self.pressure.state_dict(), self.removals.state_dict()
        return {"done": self.done, "gamma": gamma, "removals": removals, "lead": self.lead.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self.done = state_dict["done"]
        self.pressure.load_state_dict(state_dict["gamma"])
        self.removals.load_state_dict(state_dict["removals"])
        self.lead.load_state_dict(state_dict.get("lead", {}))  # missing in files of earlier versions

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the network before anything is built.

        Raises:
            UnsupportedModelError: the module has no such network, it is not compressed, or several processes train it
                in another way than by DistributedDataParallel.
        """
        if stage != "fit":
            return
        self._network(pl_module)
        if trainer.world_size > 1 and not isinstance(trainer.strategy, DDPStrategy):
            raise UnsupportedModelError(
                f"the network is trained by {trainer.world_size} processes under {type(trainer.strategy).__name__}, "
                'which cannot follow when channels are removed; use Trainer(strategy="ddp"), or devices=1'
            )
        if not trainer.global_step:  # a training of its own, unless a checkpoint is loaded after this
            self.done = 0
            self._begin()

    def _network(self, pl_module: LightningModule) -> CompressedModule:
        where = f"{type(pl_module).__name__}.{self.net}"
        try:
            net = attrgetter(self.net)(pl_module)
        except AttributeError as error:
            raise UnsupportedModelError(
                f"there is no {where}; name the attribute that holds the network: SelfCompression(net=...)"
            ) from error
        return compressed(net, where)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the optimizer and follow its steps.

        Raises:
            OptimizerError: none is right for the network.
            UnsupportedModelError: a callback keeps averages of parameters, and channels are to be removed.
            ValueError: the training has no known end, and gamma or a target depends on it; the objective has no
                gradient, the network is below a target already, or the table of latencies does not fit.
        """
        net = self._network(pl_module)
        self._refuse_averages(trainer)
        net.refresh()  # with several processes, it has taken over the tensors of the first by now
        self._optimizer = optimizer_of(net, trainer.optimizers)
        check_objective(net)
        if not self.done:
            check_target(net, self.pressure.gamma)
        self._total = float(trainer.estimated_stepping_batches)
        if math.isinf(self._total) and (self.pressure.needs_length() or self.lead.aims):
            raise ValueError(
                "gamma, or a target, depends on how far the training is: set max_epochs or max_steps of the Trainer"
            )
        self._noted = self.done
        several = sum(isinstance(callback, SelfCompression) for callback in trainer.callbacks) > 1
        self._prefix = f"{self.net}/" if several else ""
        self._release()

        def count(*_: object) -> None:
            self.done += 1
            self.removals.count(net)

        steps = 0 if math.isinf(self._total) else int(self._total)
        self._hooks = self.lead.start(net, self._optimizer, steps, lambda: self._progress(trainer, pl_module))
        self._hooks += [step_after(self._optimizer, net), stepping(self._optimizer).register_step_post_hook(count)]

    def _refuse_averages(self, trainer: Trainer) -> None:
        """A callback that keeps a copy of the parameters adds up tensors of two shapes after a removal."""
        averaging = (c for c in trainer.callbacks if any(kind.__name__ in _AVERAGING for kind in type(c).__mro__))
        found = next(averaging, None)
        if found is not None and self.removals.policy is not None:
            raise UnsupportedModelError(
                f"{type(found).__name__} keeps a copy of all parameters, which does not follow when channels go; pass "
                "SelfCompression(..., prune=False): finalize() then removes what is dead in the average"
            )

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Add the gradient of the size."""
        own = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        if own is not self._optimizer:
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scaled = scaler is not None and getattr(self._optimizer, "_step_supports_amp_scaling", False)
        scale = scaler.get_scale() if scaler is not None and scaled else 1.0
        self.pressure.press(self._network(pl_module), self._progress(trainer, pl_module), scale)

    def _progress(self, trainer: Trainer, pl_module: LightningModule) -> float:
        """The share of the training that is done; with manual optimization a batch may make many steps, or none."""
        if pl_module.automatic_optimization:
            return self.done / max(1.0, self._total)
        steps = trainer.global_step / trainer.max_steps if trainer.max_steps > 0 else 0.0
        batches = float(trainer.num_training_batches) * max(0, trainer.max_epochs or 0)
        return max(steps, trainer.fit_loop.epoch_loop.total_batch_idx / batches if batches else 0.0)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Remove and log, where a step was made since the last batch."""
        before, self._noted = self._noted, self.done
        if self.done == before:
            return
        assert self._optimizer is not None
        self.removals.make(self._network(pl_module), self._optimizer)
        every = trainer.log_every_n_steps
        if every and self.done // every > before // every:
            self._log(pl_module, on_step=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log."""
        self._log(pl_module, on_step=False)

    def _log(self, pl_module: LightningModule, *, on_step: bool) -> None:
        for name, value in self._metrics(self._network(pl_module)).items():
            bar = name in _PROGRESS_BAR
            pl_module.log(self._prefix + name, value, on_step=on_step, on_epoch=not on_step, prog_bar=bar)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove what is dead, and leave the optimizer alone again."""
        assert self._optimizer is not None
        self._end(self._network(pl_module), self._optimizer, tells=trainer.is_global_zero)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The same when the training breaks off."""
        self._release()
