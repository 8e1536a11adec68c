"""Running statistics of batch norm that belong to the weights as they are.

While bits and exponents move, the outputs of layers do, and averages over the last steps lag behind: a network that is
right in training may fail in evaluation. So before it is measured, statistics are taken anew, of a few of the last
batches, as ``torch.optim.swa_utils.update_bn`` takes them for averaged weights.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxcompress.trace.basics.trees import tensors_in
from fxcompress.training.batches import Batch
from fxcompress.training.randomness import random_states, restore_random

_SAMPLES = 512
"""Samples that are enough."""
_SHARE = 0.1
"""Share of an epoch's batches that may be run once more."""
_LEAST, _MOST = 4, 32
"""Batches that are taken in any case, and at most."""


class LastBatches:
    """The last batches of an epoch, as few as will do.

    Args:
        count: batches of an epoch.
    """

    def __init__(self, count: int) -> None:
        self._most = int(min(_MOST, max(_LEAST, _SHARE * count)))
        self._kept: deque[tuple[int, Any]] = deque()

    def see(self, batch: object) -> None:
        """Keep a batch, and leave out what is no longer needed."""
        samples = next((len(tensor) for tensor in tensors_in(batch) if tensor.ndim), 1)
        self._kept.append((samples, batch))
        while len(self._kept) > self._most or sum(n for n, _ in list(self._kept)[1:]) >= _SAMPLES:
            self._kept.popleft()

    def take(self) -> list[Any]:
        """What was kept, which is forgotten."""
        batches = [batch for _, batch in self._kept]
        self._kept.clear()
        return batches


def lagging(net: nn.Module) -> list[_BatchNorm]:
    """The norms whose statistics follow training with a momentum."""
    found = (m for m in net.modules() if isinstance(m, _BatchNorm) and m.training and m.running_mean is not None)
    return [norm for norm in found if norm.momentum is not None]


@torch.no_grad()
def refresh_statistics(net: nn.Module, batches: Iterable[Batch]) -> None:
    """Set running statistics to the mean of those of some batches, in place; all else stays as it is.

    Norms in evaluation, those without a momentum, which average over all of the training, and those that average over
    processes are left alone.

    Args:
        net: in training.
        batches: on its device; none of them changes nothing.

    >>> net = nn.Sequential(nn.BatchNorm1d(2)).train()
    >>> refresh_statistics(net, [Batch((torch.tensor([[1.0, 2.0], [3.0, 4.0]]),), {}, None)])
    >>> net[0].running_mean, net[0].momentum
    (tensor([2., 3.]), 0.1)
    """
    norms = [norm for norm in lagging(net) if not isinstance(norm, nn.SyncBatchNorm)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    own = {id(buffer) for norm in norms for buffer in (norm.running_mean, norm.running_var)}
    others = [(buffer, buffer.clone()) for buffer in net.buffers() if id(buffer) not in own]
    random = random_states()
    try:
        for batch in _averaging(norms, batches):
            net(*batch.args, **batch.kwargs)
    finally:
        restore_random(random)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for buffer, before in others:
            buffer.copy_(before)


def _averaging(norms: Sequence[_BatchNorm], batches: Iterable[Batch]) -> Iterable[Batch]:
    """The batches, while the statistics of each count as much as those of any other."""
    for number, batch in enumerate(batches, 1):
        for norm in norms:
            norm.momentum = 1 / number
        yield batch
