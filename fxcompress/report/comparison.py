"""A compressed network next to the one that it is compared with: the figures of a report, as rows and as JSON."""

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any

from fxcompress.report.layers import LayerWidth
from fxcompress.report.measure import Latency, Sizes, first_and_last
from fxcompress.training.history import EpochRecord


@dataclass(frozen=True, slots=True)
class Network:
    """The figures of one network.

    Attributes:
        accuracy: on the test set, a share.
        sizes: over the same N for both networks of a comparison.
        weights: of convolutions and linear layers.
        multiply_adds: for one sample.
        history: of its training.
    """

    accuracy: float
    sizes: Sizes
    weights: int
    multiply_adds: int
    history: list[EpochRecord]

    @property
    def epoch_seconds(self) -> tuple[float, float]:
        """Training time of an epoch, at the start and at the end."""
        return first_and_last([record.seconds for record in self.history])


@dataclass(frozen=True, slots=True)
class Comparison:
    """A baseline and what compression made of it.

    Attributes:
        title: one line: what was trained on what.
        baseline, compressed: the two networks.
        latency: of both, for some batch sizes.
        layers: widths before and after.
        seconds: of the whole comparison, and of its parts.
        settings: how it was made: seed, epochs, command, ...; for people and for JSON.
    """

    title: str
    baseline: Network
    compressed: Network
    latency: Sequence[Latency]
    layers: Sequence[LayerWidth]
    seconds: dict[str, float]
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table, all of it text.

    Attributes:
        label: what is compared.
        baseline, compressed: the two figures.
        left: the second over the first, or their difference.
    """

    label: str
    baseline: str
    compressed: str
    left: str


def rows(comparison: Comparison) -> list[Row]:
    """The table: baseline against compressed."""
    a, b = comparison.baseline, comparison.compressed
    points = 100 * (b.accuracy - a.accuracy)
    result = [Row("accuracy", f"{a.accuracy:.2%}", f"{b.accuracy:.2%}", f"{points:+.2f} points")]
    labels = ("size, fractional bits", "size, stored bits", "size, file")
    for label, one, two in zip(labels, asdict(a.sizes).values(), asdict(b.sizes).values(), strict=True):
        result.append(Row(label, f"{one:.1%}", f"{two:.2%}", _ratio(two, one)))
    for label, few, many in (("weights", b.weights, a.weights), ("multiply-adds", b.multiply_adds, a.multiply_adds)):
        result.append(Row(label, f"{many:,}", f"{few:,}", _ratio(few, many)))
    for item in comparison.latency:
        label = f"latency, batch of {item.batch}"
        result.append(Row(label, f"{item.baseline:.2f} ms", f"{item.compressed:.2f} ms", f"{item.ratio:.0%}"))
    for label, one, two in zip(("first", "last"), a.epoch_seconds, b.epoch_seconds, strict=True):
        result.append(Row(f"training, {label} epochs", f"{one:.2f} s", f"{two:.2f} s", _ratio(two, one)))
    return result


def _ratio(part: float, whole: float) -> str:
    share = part / whole if whole else 0.0
    return f"{share:.2%}" if share < 0.1 else f"{share:.0%}"


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Everything that was measured, for ``report.json``."""
    a, b = comparison.baseline, comparison.compressed
    return {
        "title": comparison.title,
        "baseline": _network(a),
        "compressed": _network(b),
        "size": asdict(b.sizes),
        "weights": _shares(b.weights, a.weights),
        "multiply_adds": _shares(b.multiply_adds, a.multiply_adds),
        "latency_ms": [asdict(item) for item in comparison.latency],
        "layers": [asdict(layer) for layer in comparison.layers],
        "seconds": comparison.seconds,
        "settings": comparison.settings,
        "versions": versions(),
    }


def _shares(compressed: int, baseline: int) -> dict[str, float]:
    return {"left": compressed / max(baseline, 1), "baseline": baseline, "compressed": compressed}


def _network(network: Network) -> dict[str, Any]:
    first, last = network.epoch_seconds
    return {
        "accuracy": network.accuracy,
        "file": network.sizes.file,
        "epoch_seconds": {"first": first, "last": last},
        "history": [record.as_dict() for record in network.history],
    }


def versions() -> dict[str, str]:
    """Of Python and of the packages that figures depend on."""
    found = {"python": platform.python_version()}
    return found | {name: _version(name) for name in ("fxcompress", "torch", "numpy", "scikit-learn")}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
