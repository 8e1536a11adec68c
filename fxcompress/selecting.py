"""``select_channels``: a share of the multiply-adds, or of the latency, in a training loop of one's own."""

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from fxcompress.errors import check_number
from fxcompress.objectives import LatencyTable
from fxcompress.training.aims import Aims
from fxcompress.training.in_pieces import Compressed
from fxcompress.training.optimizer import check_optimizers
from fxcompress.training.selection import Selection
from fxcompress.training.target import begin_selection


class ChannelSelection:
    """What :func:`select_channels` has set going."""

    def __init__(self, selection: Selection, hooks: list[RemovableHandle]) -> None:
        self._selection, self._hooks = selection, hooks

    def left(self) -> float:
        """The share of the multiply-adds, or of the seconds, that is left."""
        return self._selection.left()

    def state_dict(self) -> dict[str, Any]:
        """Which channels were chosen and what the gradients have said; fit for JSON, and for ``torch.save``."""
        return self._selection.state_dict()

    def stop(self) -> None:
        """Choose no more channels, and leave the bits of those that were chosen to the training."""
        for hook in self._hooks:
            hook.remove()


def select_channels(
    net: Compressed,
    optimizer: Optimizer,
    *,
    steps: int,
    target_macs: float | None = None,
    target_latency: float | None = None,
    latency_table: LatencyTable | None = None,
    state: Mapping[str, Any] | None = None,
) -> ChannelSelection:
    """Lead a network to a share of its multiply-adds or of its latency, in a loop of one's own.

    What :func:`fxcompress.fit` does for ``target_macs`` and ``target_latency``. It hangs on the steps of the optimizer:
    before one it looks at the gradients, after one it lowers the bits of the channels that are to go, those that the
    task misses least for what they save. The loop itself stays as it is: ``net.step()`` follows each step, and
    ``net.prune(optimizer)`` removes what has died. The size need not be in the loss. A second call for the same network
    ends the first one and takes its place; ``stop()`` of what the first has returned does so without a warning.

    Args:
        net: of :func:`fxcompress.compress`.
        optimizer: of its ``param_groups()``, with the learning rates of the start.
        steps: that it will make in all. The last channel is chosen after some 40 % of them, and gone after half.
        target_macs: share of the multiply-adds of the starting network to end at; or else
        target_latency: share of the seconds that its layers take.
        latency_table: these seconds; measured now by default, in the first process, on the example inputs.
        state: of an earlier :meth:`ChannelSelection.state_dict`, to go on from, once the network is as it was then.

    Returns:
        What tells how much is left, and has the state for a checkpoint.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: neither or both targets are given, one is no share, the network is below it already, or the table
            does not fit.
        OptimizerError: the optimizer lacks parameters of the network.

    >>> import torch, fxcompress
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
    >>> x, y = torch.randn(16, 4), torch.arange(16) % 2
    >>> net = fxcompress.compress(model, x)
    >>> optimizer = torch.optim.Adam(net.param_groups(lr=1e-3))
    >>> selection = fxcompress.select_channels(net, optimizer, steps=100, target_macs=0.5)
    >>> for _ in range(100):
    ...     loss = torch.nn.functional.cross_entropy(net(x), y)
    ...     optimizer.zero_grad(); loss.backward(); optimizer.step(); net.step()
    >>> selection.left()
    0.5
    >>> net.finalize()(x).shape
    torch.Size([16, 2])
    """
    if not isinstance(net, Compressed):
        raise TypeError(f"net is a {type(net).__name__}; pass the network that compress() has returned")
    check_number(steps=steps)
    if steps != int(steps) or steps < 1:
        raise ValueError(f"steps={steps} must be a whole number, at least 1: as many as the optimizer will make")
    check_optimizers([optimizer], net.parameters())
    selection = Aims(target_macs, target_latency, latency_table).selection(net, int(steps))
    if selection is None:
        raise ValueError("pass target_macs= or target_latency=, the share to end at")
    begin_selection(selection, state, progress=True)
    return ChannelSelection(selection, selection.follow(optimizer))
