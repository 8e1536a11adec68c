"""Seconds of one layer by its widths: interpolation between what was measured, never falling with a width."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Point:
    """A place on a curve.

    Attributes:
        seconds: there.
        by_output, by_input: what the last output and the last input channel add, at least 0.
    """

    seconds: float
    by_output: float
    by_input: float


@dataclass(frozen=True, eq=False)
class Curve:
    """What was measured of one layer.

    Attributes:
        outputs: (P,) numbers of output channels, rising.
        inputs: (Q,) the same of input channels. Of a grouped convolution, whose groups go whole: (P,), those that go
            with ``outputs``.
        groups: of the layer at its full width.
        measured: (P, Q) seconds; (P, 1) of a grouped convolution.
    """

    outputs: tuple[int, ...]
    inputs: tuple[int, ...]
    groups: int
    measured: np.ndarray

    def __post_init__(self) -> None:
        shape = (len(self.outputs), 1 if self.groups > 1 else len(self.inputs))
        if self.measured.shape != shape or not (np.isfinite(self.measured) & (self.measured > 0)).all():
            raise ValueError(f"seconds must be positive numbers of shape {shape}")
        for widths in (self.outputs, self.inputs):
            if not widths or widths[0] < 1 or list(widths) != sorted(set(widths)):
                raise ValueError(f"widths {widths} must be positive and rise")

    def check(self, layer: str, inputs: int, outputs: int) -> None:
        """Raise ValueError where the layer never had so many channels, or has none."""
        for count, most, what in (
            (inputs, self.inputs[-1], "input"),
            (outputs, self.outputs[-1], "output"),
        ):
            if not 1 <= count <= most:
                raise ValueError(
                    f"layer {layer!r} was measured with 1 to {most} {what} channels, and {count} are asked for; "
                    "measure the network as it is before channels are removed"
                )

    @cached_property
    def surface(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Outputs, inputs and seconds that rise with both, down to no channel at all.

        Below the narrowest width that was measured the last slope goes on, as far as there are seconds left.
        """
        seconds = self.measured
        outputs, seconds = _from_zero(np.array(self.outputs, dtype=float), seconds)
        inputs = np.zeros(1)
        if self.groups == 1:
            inputs, transposed = _from_zero(np.array(self.inputs, dtype=float), seconds.T)
            seconds = transposed.T
        for axis in (0, 1):
            seconds = np.apply_along_axis(isotonic, axis, seconds)
        return outputs, inputs, seconds

    def at(self, outputs: int, inputs: int) -> Point:
        """Seconds and slopes; at a width that was measured the slope is that of becoming narrower."""
        rows, columns, seconds = self.surface
        i, low_i, width_i = _interval(rows, outputs)
        if self.groups > 1:
            line = seconds[:, 0]
            slope = (line[i + 1] - line[i]) / width_i
            by_input = slope * self.outputs[-1] / self.inputs[-1]
            return Point(float(line[i] + slope * low_i), float(slope), float(by_input))
        j, low_j, width_j = _interval(columns, inputs)
        u, v = low_i / width_i, low_j / width_j
        (a, b), (c, d) = seconds[i : i + 2, j : j + 2]
        value = (1 - u) * ((1 - v) * a + v * b) + u * ((1 - v) * c + v * d)
        by_output = ((1 - v) * (c - a) + v * (d - b)) / width_i
        by_input = ((1 - u) * (b - a) + u * (d - c)) / width_j
        return Point(float(value), float(by_output), float(by_input))

    def as_json(self) -> dict[str, Any]:
        """What :meth:`from_json` reads."""
        widths = {"groups": self.groups, "outputs": self.outputs, "inputs": self.inputs}
        return {**widths, "seconds": self.measured.tolist()}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Curve":
        """A curve that :meth:`as_json` wrote; ValueError, KeyError or TypeError for anything else."""
        outputs, inputs = (tuple(int(n) for n in content[key]) for key in ("outputs", "inputs"))
        return cls(outputs, inputs, int(content["groups"]), np.array(content["seconds"], dtype=float))


def widths_of(
    outputs: int, inputs: int, groups: int, shares: Sequence[float]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The output and input channels to measure a layer at; of a grouped convolution, pair by pair.

    >>> widths_of(8, 3, 1, (0.25, 0.5, 1.0))
    ((2, 4, 8), (1, 2, 3))
    >>> widths_of(8, 4, 4, (0.25, 0.5, 1.0))
    ((2, 4, 8), (1, 2, 4))
    """
    if groups > 1:
        counts = _counts(groups, shares)
        return tuple(n * outputs // groups for n in counts), tuple(n * inputs // groups for n in counts)
    return _counts(outputs, shares), _counts(inputs, shares)


def _counts(full: int, shares: Sequence[float]) -> tuple[int, ...]:
    """Two at least where there are two: one point has no slope."""
    found = {max(1, round(full * share)) for share in shares}
    return tuple(sorted(found if len(found) > 1 else {1, full}))


def isotonic(values: np.ndarray) -> np.ndarray:
    """The nondecreasing sequence nearest to ``values`` in squares: neighbours that fall are pooled; (K,).

    >>> isotonic(np.array([1.0, 3.0, 2.0, 4.0])).tolist()
    [1.0, 2.5, 2.5, 4.0]
    """
    pools: list[tuple[float, int]] = []
    for value in values.tolist():
        mean, count = value, 1
        while pools and pools[-1][0] > mean:
            earlier, members = pools.pop()
            mean = (earlier * members + mean * count) / (members + count)
            count += members
        pools.append((mean, count))
    return np.concatenate([np.full(count, mean) for mean, count in pools])


def _from_zero(widths: np.ndarray, seconds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Widths and seconds (P, Q) with a row for width 0 in front, on the line through the first two."""
    first = seconds[0]
    slope = (seconds[1] - first) / (widths[1] - widths[0]) if len(widths) > 1 else first / widths[0]
    return np.concatenate([[0.0], widths]), np.vstack([np.maximum(first - slope * widths[0], 0.0), seconds])


def _interval(widths: np.ndarray, width: float) -> tuple[int, float, float]:
    """The interval that ends at or after a width: its position, how far into it the width lies, and its length."""
    i = int(np.clip(np.searchsorted(widths, width) - 1, 0, len(widths) - 2))
    return i, width - widths[i], widths[i + 1] - widths[i]
