"""Times single layers, as they run inside a network."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

from fxcompress.channels.sites import SiteAtoms

_LEAST = 1e-3
"""Seconds of one measurement: shorter calls are repeated within it."""
_MOST_CALLS = 100
_PATIENCE = 3.0
"""Seconds after which a progress bar appears."""

Widths = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Work:
    """All that the time of a layer depends on; equal ones are measured once.

    Attributes:
        source, source_dim: the shape of what it reads, and the dim of the channels.
        weight, row, column: the shape of its weight, and the dims of output and input channels.
        groups, transposed, biased: of a convolution; 1 and False for a linear layer.
        options: stride, padding, dilation and output padding of a convolution; empty for a linear layer.
        dtype, device: of its weight.
    """

    source: tuple[int, ...]
    source_dim: int
    weight: tuple[int, ...]
    row: int
    column: int
    groups: int
    transposed: bool
    biased: bool
    options: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def outputs(self) -> int:
        """Output channels, over all groups."""
        return self.weight[self.row] * (self.groups if self.transposed else 1)

    @property
    def inputs(self) -> int:
        """Input channels, over all groups."""
        return self.source[self.source_dim]

    def call(self, outputs: int, inputs: int) -> Callable[[], Tensor]:
        """The layer with fewer channels, ready to run; of a grouped convolution, with fewer groups."""
        groups = self.groups * outputs // self.outputs if self.groups > 1 else 1
        source, weight = list(self.source), list(self.weight)
        source[self.source_dim] = inputs
        if self.groups > 1:
            weight[0] = inputs if self.transposed else outputs
        else:
            weight[self.row], weight[self.column] = outputs, inputs
        x, bias = self._filled(source), self._filled([outputs]) if self.biased else None
        if not self.options:
            # As a linear layer has it: each output's weights in a row.
            w = self._filled(weight[::-1]).t()
            return (lambda: torch.mm(x, w)) if bias is None else (lambda: torch.addmm(bias, x, w))
        w = self._filled(weight)
        stride, padding, dilation, beyond = self.options
        return lambda: torch.convolution(x, w, bias, stride, padding, dilation, self.transposed, beyond, groups)

    def _filled(self, shape: Sequence[int]) -> Tensor:
        # Not random numbers, whose generator is the caller's, and not uninitialised ones, which may be slow denormals.
        return torch.full(tuple(shape), 0.5, dtype=self.dtype, device=self.device)


def work_of(sites: SiteAtoms, device: torch.device) -> Work:
    """What one use of a layer does.

    Args:
        sites: the use.
        device: of its weight.
    """
    site, args = sites.site, sites.call.args
    options: tuple[tuple[int, ...], ...] = ()
    if site.weight.rank > 2 or site.source.rank > 2:
        options = tuple(tuple(int(n) for n in args[place]) for place in (3, 4, 5, 7))
    return Work(
        tuple(site.source.shape), site.source_dim, tuple(site.weight.shape), site.row, site.column, site.groups,
        site.transposed, site.bias is not None, options, site.weight.meta.dtype, device,
    )  # fmt: skip


def machine(works: Iterable[Work]) -> dict[str, str]:
    """What the times hold for, for people."""
    found = list(works)
    devices, dtypes = (sorted({str(w) for w in seen}) for seen in ((w.device for w in found), (w.dtype for w in found)))
    names = [torch.cuda.get_device_name(d) if d.startswith("cuda") else d for d in devices]
    return {
        "device": ", ".join(names),
        "dtype": ", ".join(d.removeprefix("torch.") for d in dtypes),
        "torch": str(torch.__version__),
        "threads": str(torch.get_num_threads()),
    }


def measure(
    grids: Sequence[tuple[Work, Widths, Widths]],
    repeats: int,
    whole: Callable[[], object] | None = None,
    *,
    progress: bool,
) -> tuple[list[np.ndarray], float]:
    """Median seconds of each layer at each of its widths, and of a whole network, all in turn, ``repeats`` times over.

    Args:
        grids: layers, with their output and input channels; all pairs of them, or of a grouped convolution the pairs
            in order.
        repeats: rounds.
        whole: one call of the network, on the device of the first layer; None for none.
        progress: show a bar where it takes more than a few seconds.

    Returns:
        For each layer (outputs, inputs) seconds, or (outputs, 1) of a grouped convolution; and those of the network,
        0 where none is given.
    """
    jobs = [(work, pair) for work, outputs, inputs in grids for pair in _pairs(work, outputs, inputs)]
    times: list[list[float]] = [[] for _ in jobs]
    of_all: list[float] = []
    with _Bar(len(jobs) * repeats, enabled=progress) as bar, torch.inference_mode():
        for _ in range(repeats):
            if whole is not None and jobs:
                of_all.append(_seconds(whole, jobs[0][0].device))
            for (work, (outputs, inputs)), found in zip(jobs, times, strict=True):
                found.append(_seconds(work.call(outputs, inputs), work.device))
                bar.advance()
    medians = iter([median(found) for found in times])
    layers = [
        np.array([next(medians) for _ in _pairs(work, outputs, inputs)]).reshape(len(outputs), -1)
        for work, outputs, inputs in grids
    ]
    return layers, median(of_all) if of_all else 0.0


def _pairs(work: Work, outputs: Widths, inputs: Widths) -> list[tuple[int, int]]:
    if work.groups > 1:
        return list(zip(outputs, inputs, strict=True))
    return [(o, i) for o in outputs for i in inputs]


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Of one call, after one to warm up that also tells how many are worth timing together."""
    calls = min(_MOST_CALLS, max(1, math.ceil(_LEAST / max(1e-9, _elapsed(call, 1, device)))))
    return _elapsed(call, calls, device) / calls


def _elapsed(call: Callable[[], Any], calls: int, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    """Until the device has done what it was told; the CPU has when a call returns."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


class _Bar:
    """A progress bar that appears once it is worth while."""

    def __init__(self, total: int, *, enabled: bool) -> None:
        self._bar = Progress(transient=True, disable=not enabled)
        self._task = self._bar.add_task("measuring layers", total=total)
        self._began = time.perf_counter()
        self._shown = False

    def __enter__(self) -> "_Bar":  # noqa: PYI034 - typing.Self needs Python 3.11
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            self._bar.stop()

    def advance(self) -> None:
        """One measurement more."""
        if not self._shown and time.perf_counter() - self._began > _PATIENCE:
            self._bar.start()
            self._shown = True
        self._bar.advance(self._task)
