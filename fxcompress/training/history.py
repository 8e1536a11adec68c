"""The record of a training run."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class EpochRecord:
    """The figures at the end of one epoch.

    Attributes:
        epoch: from 1.
        loss: mean task loss over the epoch.
        metric: what the user's ``validate`` returned; None without one.
        size: share of the original bits that is left (fractional); 1 for a network without quantizers.
        weights: share of the quantized weights that is left.
        channels: output channels that are left.
        gamma: pressure at the last step.
        seconds: time that training took in this epoch, validation excluded.
        metric_name: the name of the function ``validate``; an ``accuracy`` is shown as a percentage.
        cost: with ``target_macs`` or ``target_latency``, the share that is left; else None.
        counted: what that is of, in words.
        held: whether ``min_accuracy`` or ``max_loss_increase`` held the pressure off at the end.
    """

    epoch: int
    loss: float
    metric: float | None
    size: float
    weights: float
    channels: int
    gamma: float
    seconds: float
    metric_name: str = "metric"
    cost: float | None = None
    counted: str = ""
    held: bool = False

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        metric = "" if self.metric is None else f" {shown(self.metric, self.metric_name)}"
        left = f" bits {self.size:6.2%} weights {self.weights:5.1%}" if self.size < 1 else ""
        cost = "" if self.cost is None else f" {self.counted} {self.cost:5.1%}"
        return f"epoch {self.epoch} loss {self.loss:.4f}{metric}{left}{cost} channels {self.channels}"


def shown(metric: float, name: str) -> str:
    """A metric as people read it.

    Args:
        metric: its value.
        name: an ``accuracy`` is a percentage.

    >>> shown(0.5, "accuracy"), shown(0.5, "loss")
    ('accuracy 50.00%', 'loss 0.5000')
    """
    return f"{name} {metric:{'6.2%' if name == 'accuracy' else '.4f'}}"
