"""Pictures of a run: size and accuracy over its epochs, and what became of each layer. Needs matplotlib."""

import importlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fxcompress.errors import FxCompressError
from fxcompress.report.comparison import Comparison, Network
from fxcompress.report.layers import LayerWidth

_BITS, _WEIGHTS, _BASELINE, _INK = "#2457c5", "#d9660f", "#8a8f98", "#22262d"
_STYLE = {
    "axes.edgecolor": _BASELINE, "axes.labelcolor": _INK, "axes.spines.right": False, "axes.spines.top": False,
    "axes.titlelocation": "left", "axes.titlesize": 11, "axes.titleweight": "bold", "font.size": 9.5,
    "grid.alpha": 0.35, "grid.color": "#c8ccd2", "legend.frameon": False, "lines.linewidth": 1.8,
    "text.color": _INK, "xtick.color": _INK, "ytick.color": _INK,
}  # fmt: skip
_DPI = 130
_NONE_WRONG = 0.13
"""Where an error of 0 % is drawn on the logarithmic axis."""


def draw_progress(comparison: Comparison, path: str | os.PathLike[str]) -> None:
    """Size and weights left over the epochs, and beside them the accuracy of both networks.

    Raises:
        FxCompressError: matplotlib is missing.
    """
    with _figure((9.8, 3.9), path) as figure:
        left, right = figure.subplots(1, 2)
        _draw_size(left, comparison.compressed)
        _draw_accuracy(right, comparison)


def draw_layers(layers: Sequence[LayerWidth], path: str | os.PathLike[str]) -> None:
    """Output channels of each layer before and after, and the mean bits of what is left.

    Raises:
        FxCompressError: matplotlib is missing.
    """
    with _figure((9.6, 0.34 * len(layers) + 1.2), path) as figure:
        axes = figure.subplots()
        places = range(len(layers))
        axes.barh(places, [w.before[0] for w in layers], 0.72, color="#dde1e7", label="before")
        axes.barh(places, [w.after[0] for w in layers], 0.72, color=_BITS, label="after")
        for place, width in zip(places, layers, strict=True):
            note = f"{width.after[0]} of {width.before[0]}, {width.bits:.1f} bits" if width.after[0] else "gone"
            axes.annotate(note, (width.before[0], place), (5, 0), textcoords="offset points", va="center")
        axes.set(title="Channels of each layer", xlabel="output channels", yticks=list(places))
        axes.set_yticklabels([w.name for w in layers])
        axes.set_xlim(0, 1.2 * max((w.before[0] for w in layers), default=1))
        axes.set_ylim(len(layers) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0)  # above, where no bar ends


def _draw_size(axes: Any, network: Network) -> None:  # noqa: ANN401
    """Lines over the epochs; beside their ends, what the finished network takes when stored, and as a file."""
    history, end = network.history, network.history[-1].epoch
    epochs = [record.epoch for record in history]
    weights, bits = [100 * record.weights for record in history], [100 * record.size for record in history]
    axes.plot(epochs, weights, color=_WEIGHTS, label="weights")
    axes.plot(epochs, bits, color=_BITS, label="bits (fractional)")
    _end_note(axes, end, weights[-1], _WEIGHTS, f"{weights[-1]:.3g} %")
    stored, file = 100 * network.sizes.stored, 100 * network.sizes.file
    axes.plot([end, end], [stored, file], "o", color=_BITS, markersize=4, clip_on=False)
    heights = _apart([bits[-1], stored, file], 1.26)
    for value, height, label in zip((bits[-1], stored, file), heights, ("", " stored", " file"), strict=True):
        _end_note(axes, end, height, _BITS, f"{value:.3g} %{label}")
    axes.set(title="What is left", xlabel="epoch", ylabel="% of the original, logarithmic", yscale="log")
    _percent_ticks(axes, 0.75 * bits[-1], 115)
    axes.set_xlim(0, end)
    _finish(axes)


def _end_note(axes: Any, x: float, y: float, color: str, text: str) -> None:  # noqa: ANN401
    axes.annotate(text, (x, y), (7, 0), textcoords="offset points", va="center", color=color, annotation_clip=False)


def _apart(values: Sequence[float], factor: float) -> list[float]:
    """Rising values, moved up where they are closer than a factor.

    >>> _apart([1.0, 1.5, 8.0], 2)
    [1.0, 2.0, 8.0]
    """
    result: list[float] = []
    for value in values:
        result.append(max(value, factor * result[-1]) if result else value)
    return result


def _draw_accuracy(axes: Any, comparison: Comparison) -> None:  # noqa: ANN401
    for network, color, label in (
        (comparison.baseline, _BASELINE, "float baseline"),
        (comparison.compressed, _BITS, "self-compressing"),
    ):
        points = [(r.epoch, max(_NONE_WRONG, 100 * (1 - r.metric))) for r in network.history if r.metric is not None]
        axes.plot(*zip(*points, strict=True), color=color, label=f"{label} ({100 - 100 * network.accuracy:.2f} %)")
    axes.set(title="Error on the test set", xlabel="epoch", ylabel="wrong, %, logarithmic", yscale="log")
    _percent_ticks(axes, _NONE_WRONG, 110)
    axes.set_yticks([_NONE_WRONG, *axes.get_yticks()])
    axes.set_yticklabels(["0", *(f"{tick:g}" for tick in axes.get_yticks()[1:])])
    axes.set_xlim(0, comparison.compressed.history[-1].epoch)
    _finish(axes)


def _percent_ticks(axes: Any, low: float, high: float) -> None:  # noqa: ANN401
    """Round numbers on a logarithmic axis of percentages."""
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low < t < high]
    axes.set_ylim(low, high)
    axes.set_yticks(ticks)
    axes.set_yticklabels([f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def _finish(axes: Any) -> None:  # noqa: ANN401
    """Grid; the legend in one line between title and lines, where it covers nothing; whole epochs below."""
    axes.grid(visible=True)
    axes.locator_params(axis="x", integer=True)
    axes.set_title(axes.get_title("left"), pad=24)
    legend = axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=3, fontsize=8.5, borderpad=0.3, borderaxespad=0,
        handlelength=1.4, columnspacing=1.2,
    )  # fmt: skip
    legend.set_in_layout(False)


@contextmanager
def _figure(size: tuple[float, float], path: str | os.PathLike[str]) -> Iterator[Any]:
    """A figure, written as PNG in the end. Not one of pyplot's: nothing changes for what the caller draws with it."""
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ImportError as error:
        raise FxCompressError('pictures need matplotlib: pip install "fxcompress[plot]"') from error
    with matplotlib.rc_context(_STYLE):
        figure = importlib.import_module("matplotlib.figure").Figure(figsize=size, layout="constrained")
        yield figure
        # Without the name of the software, the same figures give the same bytes.
        figure.savefig(Path(path), format="png", dpi=_DPI, metadata={"Software": None})
