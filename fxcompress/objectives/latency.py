"""Seconds of each layer by its width, measured, as an objective.

A network's time is taken for the sum of its layers' times. To first order, with the table's slopes at the widths of the
moment, the objective is the sum over all layers of

    dT/dO * sum over i of b[i]  +  dT/dI * sum over j of b'[j]

over the seconds of the starting network, where O and I are the output and input channels that are left and b' is as in
equation 5. A table whose seconds are proportional to multiply-adds gives the objective ``"macs"``, exactly.
"""

import copy
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxcompress.channels.analysis import Analysis
from fxcompress.channels.prepare import NO_GRAPH, prepare, prepare_pieces
from fxcompress.errors import StorageError
from fxcompress.objectives.collect import EVALUATION
from fxcompress.objectives.curves import Curve, widths_of
from fxcompress.objectives.terms import LayerUse, SizeTerms
from fxcompress.objectives.timing import Work, machine, measure, work_of
from fxcompress.quantizer import Quantizer
from fxcompress.trace.basics.generators import generators_kept
from fxcompress.trace.inputs import ExampleInputs

FORMAT = 1
WIDTHS = (0.25, 0.5, 0.75, 1.0)
"""Shares of the channels that layers are timed with."""
REPEATS = 10
"""How often each is timed."""
_DAMAGE = (KeyError, TypeError, ValueError, IndexError, AttributeError)


@dataclass(frozen=True, eq=False)
class LatencyTable:
    """The seconds of each layer of a network by its output and input channels, on one machine.

    Made by :meth:`measure` or :meth:`load`. It is an objective: ``compress(model, inputs, objective=table)``.

    Attributes:
        curves: the seconds, each by its widths.
        layers: for each weight the positions of its curves, one for each use in the order in which they run.
        about: where the table comes from: device, dtype, torch, inputs; for people.
        whole: the seconds of the whole network in the same rounds, with all that is no layer; 0 where it is not known.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> table = LatencyTable.measure(model, torch.zeros(1, 3, 8, 8), repeats=2)
    >>> table.seconds("2", inputs=4, outputs=4) <= table.seconds("2", inputs=8, outputs=4)
    True
    """

    curves: tuple[Curve, ...]
    layers: dict[str, tuple[int, ...]]
    about: dict[str, str] = field(default_factory=dict)
    whole: float = 0.0

    @classmethod
    def measure(
        cls,
        model: nn.Module,
        example_inputs: object = None,
        *,
        widths: Sequence[float] = WIDTHS,
        repeats: int = REPEATS,
        progress: bool = True,
    ) -> "LatencyTable":
        """Time every convolution and linear layer of a model, alone, at several widths.

        Each is timed on the device and in the dtype of its weight, in inference, on inputs of the shape that it gets
        from the example inputs. All are timed in turn, ``repeats`` times over, and the medians count: a machine that
        slows down for a while slows all of them. Layers of equal shapes are timed once. What is measured is made to
        rise with the width (by isotonic regression), as noise would reward growth. The network is timed as a whole
        beside them, in evaluation, unless it has quantizers or no graph.

        Args:
            model: any network that can be traced, compressed or not; it is left as it is.
            example_inputs: what it will be called with: the batch and image size matter. Inferred where left out.
            widths: shares of the output and of the input channels, all pairs of them; the groups of grouped
                convolutions.
            repeats: rounds.
            progress: show a bar where it takes more than a few seconds.

        Raises:
            ValueError: the widths are not shares in (0, 1] with at least one below 1, or ``repeats`` is below 1.
            ExampleInputError, TraceError, UnsupportedModelError: as of :func:`fxcompress.compress`.
        """
        shares = sorted({*widths, 1.0})
        if len(shares) < 2 or not 0 < shares[0] <= shares[-1] <= 1:
            raise ValueError(f"widths={tuple(widths)} must be shares in (0, 1], at least one of them below 1")
        if repeats < 1:
            raise ValueError(f"repeats={repeats} must be at least 1")
        analyses = _analyses(model, example_inputs)
        whole = _whole(analyses[""]) if list(analyses) == [""] else None
        return cls.of_analyses(analyses, shares, repeats, whole=whole, progress=progress)

    @classmethod
    def of_analyses(
        cls,
        analyses: Mapping[str, Analysis],
        shares: Sequence[float] = WIDTHS,
        repeats: int = REPEATS,
        *,
        whole: Callable[[], object] | None = None,
        progress: bool = True,
    ) -> "LatencyTable":
        """:meth:`measure` of a model that has been analysed.

        Args:
            analyses: of each of its graphs, by their paths.
            shares: see ``widths`` of :meth:`measure`; rising.
            repeats: the same.
            whole: one call of the network; None for none.
            progress: the same.
        """
        works: dict[Work, int] = {}
        layers: dict[str, tuple[int, ...]] = {}
        for path, analysis in analyses.items():
            parameters = dict(analysis.module.named_parameters(remove_duplicate=False))
            first = {id(parameter): name for name, parameter in reversed(parameters.items())}
            for sites in analysis.sites:
                if sites.mode == EVALUATION and sites.weight_name in parameters:
                    work = work_of(sites, parameters[sites.weight_name].device)
                    own = first[id(parameters[sites.weight_name])]  # the name that its quantizer has
                    name = f"{path}.{own}" if path else own
                    layers[name] = (*layers.get(name, ()), works.setdefault(work, len(works)))
        grids = [(work, *widths_of(work.outputs, work.inputs, work.groups, shares)) for work in works]
        times, total = measure(grids, repeats, whole, progress=progress)
        curves = tuple(
            Curve(outputs, inputs, work.groups, seconds)
            for (work, outputs, inputs), seconds in zip(grids, times, strict=True)
        )
        inputs = "; ".join(f"{path}: {one.inputs}" if path else str(one.inputs) for path, one in analyses.items())
        return cls(curves, layers, machine(works) | {"inputs": inputs}, total)

    def seconds(self, layer: str, inputs: int, outputs: int) -> float:
        """The time of one layer, all of its uses together, interpolated between the widths that were measured.

        Args:
            layer: its name, or that of its weight.
            inputs: its input channels. In a grouped convolution groups go whole, and the outputs say how many are left.
            outputs: its output channels.

        Raises:
            ValueError: the table does not hold the layer, or not so many channels of it.
        """
        found = self.layers.get(layer) or self.layers.get(f"{layer}.weight")
        if found is None:
            raise ValueError(f"the table holds no layer {layer!r}; it holds {', '.join(self.layers)}")
        for curve in (self.curves[place] for place in found):
            curve.check(layer, inputs, outputs)
        return sum(self.curves[place].at(outputs, inputs).seconds for place in found)

    def save(self, path: str | Path) -> None:
        """Write the table as JSON.

        Raises:
            StorageError: the file cannot be written.
        """
        try:
            Path(path).write_text(json.dumps(self.as_json(), indent=1) + "\n", "utf-8")
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error}") from error

    @classmethod
    def load(cls, path: str | Path) -> "LatencyTable":
        """Read a table that :meth:`save` wrote.

        Raises:
            StorageError: there is no such file, or it holds no table.
        """
        try:
            content: Any = json.loads(Path(path).read_text("utf-8"))
            if content["fxcompress latency table"] != FORMAT:
                raise StorageError(f"{path} has another format; measure again with this version of fxcompress")
            return cls.from_json(content)
        except OSError as error:
            raise StorageError(f"cannot read {path}: {error}; check the path") from error
        except _DAMAGE as error:
            raise StorageError(f"{path} is no latency table: {error}; measure again, and save again") from error

    def as_json(self) -> dict[str, Any]:
        """What :meth:`from_json` reads."""
        curves = [curve.as_json() for curve in self.curves]
        return {
            "fxcompress latency table": FORMAT, "about": self.about, "layers": self.layers, "curves": curves,
            "whole": self.whole,
        }  # fmt: skip

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "LatencyTable":
        """A table that :meth:`as_json` wrote; KeyError, TypeError, ValueError or IndexError for anything else."""
        curves = tuple(Curve.from_json(curve) for curve in content["curves"])
        layers = {name: tuple(int(i) for i in places) for name, places in content["layers"].items()}
        _ = [curves[i] for places in layers.values() for i in places]
        whole = float(content.get("whole", 0.0))  # missing in files of earlier versions
        return cls(curves, layers, dict(content["about"]), whole)

    def __call__(self, terms: SizeTerms, bits: Tensor) -> Tensor:
        """The objective, a scalar; see :mod:`fxcompress.objectives.latency`.

        Raises:
            ValueError: the table lacks a layer of the network, or is narrower than it.
        """
        own, read = terms.once(self, self._slopes)
        return terms.pairs(bits, own, read)

    def _slopes(self, terms: SizeTerms) -> tuple[Tensor, Tensor]:
        """(B,) each: what a bit of an output costs for each input of its block, and the other way round.

        Once for each set of widths. Divided by the number of inputs, because the sum over pairs multiplies with those
        that have bits: a layer that reads nothing costs nothing.
        """
        total = sum(c.at(u.outputs, u.inputs).seconds for u, c in self.matched(terms.start.uses))
        own, read = np.zeros((2, terms.kernel.numel()))
        for use, curve in self.matched(terms.uses):
            point = curve.at(use.outputs, use.inputs)
            blocks = slice(use.blocks[0], sum(use.blocks))
            if use.bits_of_inputs:
                own[blocks] = point.by_input / total
            else:
                own[blocks], read[blocks] = point.by_output / total, point.by_input / total
        slopes = torch.from_numpy(np.stack([own, read])).to(terms.kernel)
        return slopes[0] / terms.inputs.clamp(min=1), slopes[1] / terms.outputs.clamp(min=1)

    def matched(self, uses: tuple[LayerUse, ...]) -> list[tuple[LayerUse, Curve]]:
        """The curve of each use; where some uses of a layer are gone, the first ones stand for those that are left.

        Raises:
            ValueError: the table lacks a layer, or is narrower than it.
        """
        missing = {u.weight: None for u in uses if u.weight not in self.layers}
        if missing:
            raise ValueError(
                f"the latency table holds no layer {', '.join(missing)}; measure it on this network, or on the one "
                "that it was made from"
            )
        seen: Counter[str] = Counter()
        found = []
        for use in uses:
            places = self.layers[use.weight]
            curve = self.curves[places[min(seen[use.weight], len(places) - 1)]]
            curve.check(use.weight, use.inputs, use.outputs)
            seen[use.weight] += 1
            found.append((use, curve))
        return found


def _analyses(model: nn.Module, example_inputs: object) -> dict[str, Analysis]:
    """The analysis of a model or, where it has no graph as a whole, of its pieces by their paths."""
    try:
        return {"": prepare(model, example_inputs)}
    except NO_GRAPH as error:
        if example_inputs is None:
            raise
        return prepare_pieces(model, ExampleInputs.of(example_inputs), error, layers=1)[1]


def _whole(analysis: Analysis) -> Callable[[], object] | None:
    """One call of a network in evaluation; None where it has quantizers, which are no part of what will run."""
    if any(isinstance(module, Quantizer) for module in analysis.module.modules()):
        return None
    return call_of(copy.deepcopy(analysis.module), analysis.inputs)  # a copy, as a call may change buffers


def call_of(module: nn.Module, inputs: ExampleInputs) -> Callable[[], object]:
    """One call of a module in evaluation, where its parameters are, which leaves the caller's random numbers alone.

    Args:
        module: put into evaluation.
        inputs: that it runs on.
    """
    module.eval()
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    found = inputs.converted(lambda value: value.to(device))

    def call() -> object:
        with generators_kept():
            return module(*found.args, **found.kwargs)

    return call
