"""A callback for the Trainer of Hugging Face: ``Trainer(model=TrainerModel(net), callbacks=[...])``."""

from typing import Any

from torch import Tensor, nn
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
    import accelerate  # noqa: F401 - the Trainer cannot do without, and says so later and less clearly
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import ExportableState
except ImportError as error:
    raise MissingPackageError(
        'this adapter needs transformers and accelerate: pip install "fxcompress[huggingface]"'
    ) from error

_FUNCTION = "a function"


class TrainerModel(nn.Module):
    """A compressed network as the Trainer wants it; the network is ``net``, and is what goes on after training.

    A module of its own, because the Trainer replaces ``forward`` of what it is given (mixed precision) and so would
    keep the code of the network before a removal; and because it reads from the signature of ``forward`` what labels
    are called, and whether it may hand further arguments to the loss.

    Args:
        net: of :func:`fxcompress.compress`, with example inputs that hold what the Trainer's batches will hold,
            ``labels`` as well. It must return the loss first, or under ``"loss"``.

    Raises:
        UnsupportedModelError: it is not compressed.
    """

    accepts_loss_kwargs = False

    def __init__(self, net: CompressedModule) -> None:
        super().__init__()
        self.net = compressed(net, "net")
        self.config = getattr(net, "config", None)

    def forward(self, labels: Tensor | None = None, **inputs: Any) -> Any:  # noqa: ANN401
        """What the network returns for a batch."""
        return self.net(**inputs) if labels is None else self.net(**inputs, labels=labels)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """As of any module, but tied weights are copied: a safetensors file holds no tensor under two names."""
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        seen: set[int] = set()
        for name, value in state.items():
            if isinstance(value, Tensor) and value.numel():
                if value.data_ptr() in seen:
                    state[name] = value.clone()
                seen.add(value.data_ptr())
        return state


class SelfCompressionCallback(SelfCompressing, TrainerCallback, ExportableState):
    """Lets the network of a :class:`TrainerModel` compress itself, in the Trainer's own loop.

    For each optimizer step, after gradients were accumulated, unscaled and clipped, the gradient of
    ``gamma * net.size()`` is added, and after the step ``net.step()`` is called; neither where the gradient scaler
    skips the step. Dead channels are removed after a step, when that pays, and at the end. Several processes that
    Accelerate starts (torchrun, ``accelerate launch``) train one network; all of them remove the same.

    ``size/fractional``, ``size/weights``, ``size/channels`` and ``size/gamma`` are added to what the Trainer logs with
    its training loss: in ``state.log_history``, and for callbacks that come after this one.

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
        prune: True: remove what is dead when the steps it has slowed down have cost as much as a removal does; a
            number: after so many steps; a :class:`fxcompress.PrunePolicy`; False: never.

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
        prune: bool | int | PrunePolicy = True,
    ) -> None:
        if isinstance(gamma, str):
            raise ValueError(  # noqa: TRY004 - the user did nothing wrong with a type
                "a checkpoint cannot hold a gamma that is a function: leave restore_callback_states_from_checkpoint "
                "off; what gamma has adapted is taken up without it"
            )
        aims = Aims(target_macs, target_latency, latency_table)
        self._aim(target_size, gamma, aims, fine_tune=fine_tune, prune=prune)
        self._arguments = {
            "target_size": target_size,
            "gamma": _FUNCTION if callable(gamma) else gamma,
            "target_macs": target_macs,
            "target_latency": target_latency,  # the table is in the state
            "fine_tune": fine_tune,
            "prune": True if isinstance(prune, PrunePolicy) else prune,  # what it holds is an attribute
        }

    def state(self) -> dict[str, Any]:
        """What the Trainer writes into its checkpoints; taken up when a training is resumed."""
        attributes = {"adapted": self.adapted, "removal": self.removal, "chosen": self.chosen}
        return {"args": self._arguments, "attributes": attributes}

    @property
    def adapted(self) -> dict[str, Any]:
        """What gamma has adapted."""
        return self.pressure.state_dict()

    @adapted.setter
    def adapted(self, state: dict[str, Any]) -> None:
        self.pressure.load_state_dict(state)

    @property
    def removal(self) -> dict[str, Any]:
        """When to remove, and what counts for it."""
        return self.removals.state_dict()

    @removal.setter
    def removal(self, state: dict[str, Any]) -> None:
        self.removals.load_state_dict(state)

    @property
    def chosen(self) -> dict[str, Any]:
        """Which channels are to go."""
        return self.lead.state_dict()

    @chosen.setter
    def chosen(self, state: dict[str, Any]) -> None:
        self.lead.load_state_dict(state)

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Check what the Trainer was given.

        Raises:
            UnsupportedModelError: the model is no TrainerModel, or several devices train it in another way than by
                DistributedDataParallel.
            ValueError: an argument of the Trainer would break the training.
        """
        _network(kwargs["model"])
        if args.n_gpu > 1:
            raise UnsupportedModelError(
                f"the network is trained on {args.n_gpu} devices by one process, whose copies of it would not follow "
                f"when channels are removed; start a process for each: torchrun --nproc-per-node {args.n_gpu}, or let "
                "the process see one: CUDA_VISIBLE_DEVICES=0"
            )
        if args.fsdp or args.deepspeed:
            raise UnsupportedModelError(
                f"the parameters are sharded over processes ({'fsdp' if args.fsdp else 'deepspeed'}=), and a channel "
                "cannot be removed in pieces; leave that out, and the Trainer takes DistributedDataParallel"
            )
        if args.remove_unused_columns:
            raise ValueError(
                "set remove_unused_columns=False: the Trainer would drop all columns but the labels, as it cannot know "
                "what a TrainerModel takes"
            )
        if args.label_smoothing_factor:
            raise ValueError(
                "set label_smoothing_factor=0: the Trainer would keep the labels from the network, which computes its "
                "loss of them; smooth them in the model's own loss"
            )
        if args.gradient_checkpointing:
            raise ValueError(
                "set gradient_checkpointing=False, and switch it on in the model before compress(): "
                "model.gradient_checkpointing_enable(); what forward runs under a checkpoint then, the network does too"
            )
        if args.load_best_model_at_end:
            raise ValueError(
                "set load_best_model_at_end=False: an earlier checkpoint holds channels that are gone at the end; "
                "load it into a network fresh from compress()"
            )

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Follow the steps of the optimizer.

        Raises:
            OptimizerError: it is not right for the network.
            ValueError: the objective has no gradient, the network is below a target already, or the table of latencies
                does not fit.
        """
        net, optimizer = _network(kwargs["model"]), _unwrapped(kwargs["optimizer"])
        optimizer_of(net, [optimizer])
        check_objective(net)
        net.refresh()  # with several processes, it has taken over the tensors of the first by now
        if not state.global_step:
            self._begin()
            check_target(net, self.pressure.gamma)
        stored = (state.stateful_callbacks or {}).get(type(self).__name__)
        if state.global_step > 0 and isinstance(stored, dict):
            self.adapted, self.removal = (stored["attributes"][key] for key in ("adapted", "removal"))
            self.chosen = stored["attributes"].get("chosen", {})  # missing in files of earlier versions

        def press(optimizer: Optimizer, *_: object) -> None:
            # Fused optimizers unscale by themselves, and are told by this attribute.
            scale = getattr(optimizer, "grad_scale", None)
            self.pressure.press(net, state.global_step / max(1, state.max_steps), 1.0 if scale is None else scale)

        self._release()
        self._hooks = [
            *self.lead.start(net, optimizer, state.max_steps),
            stepping(optimizer).register_step_pre_hook(press),
            step_after(optimizer, net),
            stepping(optimizer).register_step_post_hook(lambda *_: self.removals.count(net)),
        ]

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Remove what is dead, if that is due."""
        self.removals.make(_network(kwargs["model"]), _unwrapped(kwargs["optimizer"]))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Add the sizes to what is logged of the training."""
        logs = kwargs.get("logs")
        if logs is not None and "loss" in logs:
            more = self._metrics(_network(kwargs["model"]))
            logs.update(more)
            state.log_history[-1].update(more)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Remove what is dead, and leave the optimizer alone again."""
        tells = state.is_world_process_zero
        self._end(_network(kwargs["model"]), _unwrapped(kwargs["optimizer"]), tells=tells)


def _network(model: nn.Module) -> CompressedModule:
    if not isinstance(model, TrainerModel):
        raise UnsupportedModelError(
            f"the Trainer's model is a {type(model).__name__}; give it Trainer(model=TrainerModel(net)) with a net "
            "from fxcompress.compress()"
        )
    return model.net


def _unwrapped(optimizer: Any) -> Optimizer:  # noqa: ANN401
    """The torch optimizer inside the wrappers of accelerate."""
    while not isinstance(optimizer, Optimizer) or type(optimizer).__name__ == "AcceleratedOptimizer":
        optimizer = optimizer.optimizer
    return optimizer
