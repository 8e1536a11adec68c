"""Pictures of a run: size and accuracy over its epochs, and what became of each layer. Needs matplotlib."""

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fxcompress.errors import FxCompressError
from fxcompress.report.layers import LayerWidth
from fxcompress.report.summary import Comparison
from fxcompress.training.history import EpochRecord

_BITS, _WEIGHTS, _BASELINE, _INK = "#2457c5", "#d9660f", "#8a8f98", "#22262d"
_STYLE = {
    "axes.edgecolor": _BASELINE, "axes.labelcolor": _INK, "axes.spines.right": False, "axes.spines.top": False,
    "axes.titlelocation": "left", "axes.titlesize": 11, "axes.titleweight": "bold", "font.size": 9.5,
    "grid.alpha": 0.35, "grid.color": "#c8ccd2", "legend.frameon": False, "lines.linewidth": 1.8,
    "text.color": _INK, "xtick.color": _INK, "ytick.color": _INK,
}  # fmt: skip
_DPI = 130


def draw_progress(comparison: Comparison, path: str | os.PathLike[str]) -> None:
    """Size and weights left over the epochs, and beside them the accuracy of both networks.

    Raises:
        FxCompressError: matplotlib is missing.
    """
    plt = _pyplot()
    with plt.rc_context(_STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.7), layout="constrained")
        _draw_size(left, comparison.compressed.history)
        _draw_accuracy(right, comparison)
        _save(plt, figure, path)


def draw_layers(layers: Sequence[LayerWidth], path: str | os.PathLike[str]) -> None:
    """Output channels of each layer before and after, and the mean bits of what is left.

    Raises:
        FxCompressError: matplotlib is missing.
    """
    plt = _pyplot()
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(9.6, 0.34 * len(layers) + 1.2), layout="constrained")
        places = range(len(layers))
        axes.barh(places, [w.before[0] for w in layers], 0.72, color="#dde1e7", label="before")
        axes.barh(places, [w.after[0] for w in layers], 0.72, color=_BITS, label="after")
        for place, width in zip(places, layers, strict=True):
            note = f"{width.after[0]} of {width.before[0]}, {width.bits:.1f} bits" if width.after[0] else "gone"
            axes.annotate(note, (width.before[0], place), (5, 0), textcoords="offset points", va="center")
        axes.set(title="Channels of each layer", xlabel="output channels", yticks=list(places))
        axes.set_yticklabels([w.name for w in layers])
        axes.set_xlim(0, 1.2 * max((w.before[0] for w in layers), default=1))
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        axes.legend(loc="lower right")
        _save(plt, figure, path)


def _draw_size(axes: Any, history: Sequence[EpochRecord]) -> None:  # noqa: ANN401
    epochs = [record.epoch for record in history]
    for values, color, label in (
        ([100 * record.weights for record in history], _WEIGHTS, "weights"),
        ([100 * record.size for record in history], _BITS, "bits (fractional)"),
    ):
        axes.plot(epochs, values, color=color, label=label)
        axes.annotate(f"{values[-1]:.3g} %", (epochs[-1], values[-1]), (4, 0), textcoords="offset points",
                      va="center", color=color, fontweight="bold")  # fmt: skip
    axes.set(title="What is left", xlabel="epoch", ylabel="% of the original, logarithmic", yscale="log")
    _percent_ticks(axes, [100 * min(min(record.size, record.weights) for record in history), 100.0])
    axes.set_xlim(0, 1.13 * epochs[-1])
    axes.grid(visible=True)
    axes.legend(loc="best")


def _percent_ticks(axes: Any, span: Sequence[float]) -> None:  # noqa: ANN401
    """Round numbers on a logarithmic axis of percentages."""
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if span[0] / 2 <= t <= span[1] * 1.01]
    axes.set_ylim(span[0] / 1.35, span[1] * 1.2)
    axes.set_yticks([t for t in ticks if t >= span[0] / 1.35], minor=False)
    axes.set_yticklabels([f"{t:g}" for t in ticks if t >= span[0] / 1.35])
    axes.minorticks_off()


def _draw_accuracy(axes: Any, comparison: Comparison) -> None:  # noqa: ANN401
    for network, color, label in (
        (comparison.baseline, _BASELINE, "float baseline"),
        (comparison.compressed, _BITS, "self-compressing"),
    ):
        points = [(r.epoch, 100 * (1 - r.metric)) for r in network.history if r.metric is not None]
        axes.plot(*zip(*points, strict=True), color=color, label=f"{label}, {network.accuracy:.2%} at the end")
    axes.set(title="Error on the test set", xlabel="epoch", ylabel="wrong, %, logarithmic", yscale="log")
    axes.set_ylim(0.2, 100)
    axes.set_yticks([0.2, 0.5, 1, 2, 5, 10, 20, 50, 100])
    axes.set_yticklabels(["0.2", "0.5", "1", "2", "5", "10", "20", "50", "100"])
    axes.minorticks_off()
    axes.grid(visible=True)
    axes.legend(loc="upper right")


def _save(plt: Any, figure: Any, path: str | os.PathLike[str]) -> None:  # noqa: ANN401
    # Without the name of the software, the same figures give the same bytes.
    figure.savefig(Path(path), dpi=_DPI, metadata={"Software": None})
    plt.close(figure)


def _pyplot() -> Any:  # noqa: ANN401
    """Pyplot, drawing into files whatever the display."""
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ImportError as error:
        raise FxCompressError('pictures need matplotlib: pip install "fxcompress[plot]"') from error
    matplotlib.use("agg")
    return importlib.import_module("matplotlib.pyplot")
