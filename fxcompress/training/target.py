"""A target size: whether a network can get there, and whether it has."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fxcompress.training.controller import TargetSize
from fxcompress.training.guard import Guard
from fxcompress.training.history import EpochRecord
from fxcompress.training.network import SizedNetwork
from fxcompress.training.selection import KEEP, Selection

MISSED = 1.2
"""How far from its target, as a factor, a training may end above it without a word."""
FAR_BELOW = 1.5
"""How far, as a factor, it may end below it."""
_HARDLY, _LONG_ENOUGH = 0.05, 100
"""By what share a size has to change in a training with pressure, and from how many steps on."""
_BELOW = 1.25
"""How far it may begin below its target."""
MISSED_MACS = 1.05
"""How far it may end above it in multiply-adds and seconds, which are steered to in whole channels."""
_BRAKES = (
    "; min_accuracy= and max_loss_increase= hold the pressure off while the network is worse than they allow, as many "
    "are in their first epochs alone"
)
_LOG = logging.getLogger("fxcompress")


def check_target(net: SizedNetwork, gamma: Callable[[float, float], float]) -> None:
    """Check, before a training, that its target is not far above where the network is.

    One that another training has led to the target, and perhaps a little below it, may be trained on.

    Raises:
        ValueError: it is.
    """
    if not isinstance(gamma, TargetSize):
        return
    size = net.fractional_size()
    if size * _BELOW < gamma.target:
        raise ValueError(
            f"target_size={gamma.target} is more than the network's present size of {size:.3g}, and training never "
            "adds bits on purpose; begin with more: compress(model, bits=...)"
        )


def tell_of_target(net: SizedNetwork, gamma: Callable[[float, float], float], why: str = "") -> None:
    """Warn where a training has ended well above its target, or far below it.

    Args:
        net: at its end.
        gamma: that led it.
        why: what the record of the training shows of it, in words.
    """
    if not isinstance(gamma, TargetSize):
        return
    size = net.fractional_size()
    if size > MISSED * gamma.target:
        _LOG.warning(
            "fxcompress: the target of %.3g of the bits was not reached: %.3g are left%s\n"
            "  take more epochs, or a target nearer to this%s", gamma.target, size, why, _BRAKES if why else "",
        )  # fmt: skip
    elif size * FAR_BELOW < gamma.target:
        _LOG.warning(
            "fxcompress: the training was to end at %.3g of the bits, and %.3g are left%s: what is dead does not come "
            "back\n  take more epochs, or lower learning rates of bits, so that no layer dies at once", gamma.target,
            size, why,
        )  # fmt: skip


def tell_of_bits(
    net: SizedNetwork, gamma: Callable[[float, float], float], before: float, history: Sequence[EpochRecord], steps: int
) -> None:
    """Warn where a training with pressure has left the size as it was; where there is a target, that is told.

    Args:
        net: at its end.
        gamma: that led it.
        before: its size at the start.
        history: of all epochs.
        steps: of all of it.
    """
    pressed = steps >= _LONG_ENOUGH and all(record.gamma > 0 for record in history)
    size = net.fractional_size()
    if isinstance(gamma, TargetSize) or not pressed or abs(size - before) > _HARDLY * before:
        return
    if any(bits.requires_grad for bits in net.fxc_bits):
        _LOG.warning(
            "fxcompress: %d steps with a gamma of %.3g have left the bits as they were: %.4g of the original, where "
            "there were %.4g\n  take a larger gamma, or learning rates of bits as net.param_groups() has them for the "
            "Adam family: SGD needs bits_lr=500 or so, and schedulers that set a learning rate need one for each group",
            steps, history[-1].gamma, size, before,
        )  # fmt: skip


def check_selection(selection: Selection) -> None:
    """Check, before a training, that a network has multiply-adds or seconds, and more of them than it is to end with.

    Raises:
        ValueError: it has not.
    """
    if not selection.net.fxc_all_terms().start.macs:
        raise ValueError(
            f"{selection.argument}= is a share of the {selection.what} of quantized layers, and the network has none"
        )
    floor = selection.floor()
    if floor > MISSED_MACS * selection.target:
        more = "; narrow layers take hardly less time than wide ones here: measure with a larger batch, or aim at "
        more = f"{more}multiply-adds" if selection.kind == "latency" else ""
        raise ValueError(
            f"{selection.argument}={selection.target} cannot be reached: {floor:.3g} of the {selection.what} are left "
            f"where each layer keeps {KEEP:.0%} of its channels, and what cannot go in training stays, such as what "
            f"the graph holds together (print(fxcompress.ChannelGraph.of(model, inputs)) says what){more}"
        )
    left = selection.left()
    if left < selection.target:
        raise ValueError(
            f"{selection.argument}={selection.target} is more than the {left:.3g} of the {selection.what} that the "
            "network has now"
        )


def begin_selection(selection: Selection, state: Mapping[str, Any] | None, *, progress: bool = False) -> None:
    """Go on from a state or, where there is none, measure what is to be measured, and check the target.

    Args:
        selection: of the training.
        state: of an earlier :meth:`Selection.state_dict`.
        progress: see :meth:`Selection.measure`.

    Raises:
        ValueError: see :func:`check_selection`.
    """
    if state:
        selection.load_state_dict(state)
    else:
        selection.measure(progress=progress)
        check_selection(selection)


def tell_of_selection(selection: Selection | None, why: str = "") -> None:
    """Warn where a training has ended well above its share of the multiply-adds, or of the latency.

    Args:
        selection: that led it; None where nothing did.
        why: what the record of the training shows of it, in words.
    """
    left = 0.0 if selection is None else selection.left()
    if selection is not None and left > MISSED_MACS * selection.target:
        _LOG.warning(
            "fxcompress: the target of %.3g of the %s was not reached: %.3g are left%s\n  take more epochs, "
            "so that biases of channels without bits have time to shrink to 0, or a target nearer to this%s",
            selection.target, selection.what, left, why, _BRAKES if why else "",
        )  # fmt: skip


def tell_of_accuracy(history: Sequence[EpochRecord], guard: Guard) -> None:
    """Warn where the last epoch was not good enough, or none was for any pressure, as with percent for shares."""
    reached = [record.metric for record in history if record.metric is not None]
    least = guard.min_metric
    if least is None or not guard.low:
        return
    if len(history) > 1 and not any(metric >= least for metric in reached):
        _LOG.warning(
            "fxcompress: no epoch reached min_accuracy=%.4g, so there was no pressure after the first one: the best "
            "had %.4g\n  validate and min_accuracy must be in the same unit: both shares, or both percent",
            least, max(reached, default=float("nan")),
        )  # fmt: skip
    else:
        _LOG.warning(
            "fxcompress: the training ended with %.4g where min_accuracy=%.4g was asked for\n  take more epochs, a "
            "larger target or a smaller gamma; min_accuracy= holds the pressure off, and does not make good what the "
            "last of it has cost", reached[-1] if reached else float("nan"), least,
        )  # fmt: skip


def held_epochs(history: Sequence[EpochRecord]) -> str:
    """How often a brake held the pressure off, in words; a gamma of 0 alone does not say so."""
    held = sum(record.held for record in history)
    return f"; there was no pressure at the end of {held} of {len(history)} epochs" if held else ""
