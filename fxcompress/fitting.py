"""``fxcompress.fit``: compress, train, shrink and finalize in one call."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxcompress.compress import compress
from fxcompress.training.compressed import CompressedModule
from fxcompress.training.fit import FitResult, Gamma, Loss, Scheduler, batches, cosine, gamma_of, train
from fxcompress.training.history import EpochRecord


def fit(
    model: nn.Module,
    loader: Iterable[Any],
    loss_fn: Loss,
    *,
    epochs: int,
    gamma: float | Gamma | None = None,
    target_size: float | None = None,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    optimizer: Optimizer | None = None,
    scheduler: Scheduler | None = None,
    example_inputs: object = None,
    validate: Callable[[nn.Module], float] | None = None,
    prune: bool = True,
    progress: bool = True,
    on_epoch: Callable[[EpochRecord], None] | None = None,
) -> FitResult:
    """Compress a model while it trains, and return it as a smaller ordinary network.

    Where torch.distributed is initialised, all processes train one network together: each passes a loader of its own
    part of the data, with as many batches as the others, and gets the same result. See docs/distributed.md.

    Args:
        model: any network, or one from :func:`compress`. A plain model is left as it is; a compressed one is trained.
        loader: batches (input, ..., target), with a length; gone through once each epoch.
        loss_fn: of (output, target).
        epochs: how often.
        gamma: weight of ``net.size()`` in the loss, or a function of (progress, size); or else
        target_size: share of the original 32-bit weights to end at (fractional); gamma is steered to it.
        lr: of the weights, for the default optimizer, Adam.
        weight_decay: the same.
        optimizer: of a compressed model's ``param_groups()``; only with a model from :func:`compress`.
        scheduler: stepped after each batch; half a cosine down to 0 by default, for bits as well.
        example_inputs: taken from the first batch by default.
        validate: called with the network in evaluation mode after each epoch; its result is the record's metric.
        prune: remove what is dead after each epoch; at the end what is dead goes in any case.
        progress: show a live display, in the first process.
        on_epoch: called with each record.

    Raises:
        ValueError: neither or both of ``gamma`` and ``target_size`` are given, or an optimizer of a plain model.
        FxCompressError: see :func:`compress`.
        DistributedError: processes have different numbers of batches, disagree, or have died.
    """
    control = gamma_of(gamma, target_size)
    if epochs < 1:
        raise ValueError(f"epochs={epochs} must be at least 1")
    net = _compressed(model, loader, optimizer, example_inputs)
    chosen = optimizer or torch.optim.Adam(net.param_groups(lr, weight_decay=weight_decay))
    steps = epochs * batches(loader)
    return train(
        net,
        loader,
        loss_fn,
        epochs=epochs,
        gamma=control,
        optimizer=chosen,
        scheduler=scheduler or cosine(chosen, steps, min(steps // 20, 100)),
        validate=validate,
        prune=prune,
        progress=progress,
        on_epoch=on_epoch,
    )


def _compressed(
    model: nn.Module, loader: Iterable[Any], optimizer: Optimizer | None, example_inputs: object
) -> CompressedModule:
    if isinstance(model, CompressedModule):
        return model
    if optimizer is not None:
        raise ValueError(
            "an optimizer needs the compressed network's parameters: net = compress(model), build the optimizer from "
            "net.param_groups(), and call fit(net, ..., optimizer=optimizer)"
        )
    return compress(model, example_inputs if example_inputs is not None else _first(loader))


def _first(loader: Iterable[Any]) -> tuple[Any, ...]:
    """The inputs of the first batch, two samples of each at most."""
    batch = next(iter(loader))
    inputs = batch[:-1] if isinstance(batch, tuple | list) and len(batch) > 1 else (batch,)
    return tuple(item[:2] if isinstance(item, Tensor) and item.ndim else item for item in inputs)
