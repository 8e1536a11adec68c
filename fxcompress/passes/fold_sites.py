"""Which constants could be folded where: weights of layers, and the constants that these read in evaluation."""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch

from fxcompress.channels.analysis import Analysis
from fxcompress.channels.rules.contraction import CONTRACTIONS, Site, may_read, pattern_of, site_of
from fxcompress.channels.rules.registry import Known
from fxcompress.channels.sites import SiteAtoms
from fxcompress.channels.values import Call, Step
from fxcompress.passes.fold_sizes import sized_values
from fxcompress.passes.readers import Reader, means_of, new_bias, reader_of, reads
from fxcompress.provenance import keeps_code
from fxcompress.trace.graph.described import place_of_node
from fxcompress.trace.graph.names import fetch_attr

Knowns = dict[str, list[Known]]
"""For each graph what is known in evaluation, then what is known in training."""


@dataclass(slots=True, eq=False)
class Foldable:
    """A weight that layers alone read.

    Attributes:
        weight: its name.
        column: the dim of it that holds the inputs.
        sites: where it is read, in all graphs.
        constants: what its inputs are in evaluation, float64 (K,); NaN where they are not constant, or may not go.
        into_bias: whether a constant adds the same to all outputs; behind zero padding it does not.
        lacks_bias: whether some layer has no bias yet, and no mean either.
        means: running means of the batch norms that alone read the layers, where these have no bias: a mean that is
            smaller is as good as a bias.
    """

    weight: str
    column: int
    sites: list[SiteAtoms]
    constants: np.ndarray
    into_bias: bool
    lacks_bias: bool
    means: tuple[str, ...] = ()

    @property
    def may(self) -> np.ndarray:
        """Which inputs can be folded, bool (K,)."""
        finite: np.ndarray = np.isfinite(self.constants)
        return finite

    @property
    def entries(self) -> np.ndarray:
        """The atoms of the inputs, (K,)."""
        return self.sites[0].entries

    def read(self, knowns: Knowns, alive: np.ndarray) -> np.ndarray:
        """Which inputs some output that stays may depend on, bool (K,)."""
        found = np.zeros(len(self.constants), dtype=bool)
        for sites in self.sites:
            for known in knowns[sites.mode]:
                weights, asked = pattern_of(sites.site, known), may_read(sites.site, known)
                found |= asked & weights.columns_of(alive[sites.rows], asked)
        return found


def foldable(analysis: Analysis, knowns: Knowns, grids: frozenset[str]) -> tuple[list[Foldable], dict[str, str]]:
    """The weights whose constant inputs can be folded.

    Args:
        analysis: of the network.
        knowns: what is known in it.
        grids: names of weights that lie on a grid of integers: their columns can be zeroed, and not mixed.

    Returns:
        the weights; and for the others that read constants, why theirs are not folded.
    """
    finder = _Finder(analysis, knowns)
    found, refused = [], dict[str, str]()
    for weight in finder.weights():
        result = finder.examine(weight)
        if isinstance(result, str):
            refused |= {weight: result} if weight in finder.not_zero else {}
        elif result is not None:
            if weight in grids and not result.into_bias:
                if (result.constants[result.may] != 0).any():
                    refused[weight] = "behind zero padding they would be merged, and its weights lie on a grid"
                result.constants[result.constants != 0] = np.nan
            found.append(result)
    return found, refused


class _Finder:
    def __init__(self, analysis: Analysis, knowns: Knowns) -> None:
        self.analysis, self.knowns = analysis, knowns
        self.parameters = dict(analysis.module.named_parameters(remove_duplicate=False))
        self.reads = reads(analysis.module)
        steps = [step for trail in analysis.trails.values() for step in trail.tape if _is_site(step)]
        self.sized = {mode: sized_values(analysis, mode) for mode in analysis.trails}
        self.not_zero: set[str] = set()
        self.calls: dict[tuple[str, str], list[tuple[SiteAtoms, Call]]] = defaultdict(list)
        for sites, step in zip(analysis.sites, steps, strict=True):
            self.calls[sites.mode, sites.node].append((sites, step.call))

    def weights(self) -> list[str]:
        """One name of each weight of a contraction without groups that reads constants."""
        found: dict[int, str] = {}
        for sites in self.analysis.sites:
            if sites.weight_name in self.parameters and sites.site.groups == 1:
                constants = self._constants_of(sites)[~self.analysis.pinned[sites.entries]]
                if np.isfinite(constants).any():
                    name = found.setdefault(id(self.parameters[sites.weight_name]), sites.weight_name)
                    self.not_zero |= {name} if constants[np.isfinite(constants)].any() else set()
        return list(found.values())

    def examine(self, weight: str) -> Foldable | str | None:
        """What can be folded into a weight; None for nothing, or why it cannot be told."""
        parameter = self.parameters[weight]
        layers: list[Reader] = []
        sites: list[SiteAtoms] = []
        uniform = True
        for mode, node in self.reads[id(parameter)]:
            layer, calls = reader_of(self.analysis.module, node), self.calls[mode, node.name]
            if layer is None or len(calls) != 1 or self.parameters.get(layer.weight) is not parameter:
                return f"{place_of_node(node)} reads its weight as well, and not as a layer does"
            layers.append(layer)
            sites.append(calls[0][0])
            uniform &= _is_uniform(calls[0][1])
        if any(s.site.groups > 1 for s in sites):
            return None
        if len({s.site.transposed for s in sites}) > 1:
            return "a convolution and a transposed one share it, and the inputs of one are the outputs of the other"
        constants = self._constants(sites)
        if not np.isfinite(constants).any():
            return None
        means = means_of(self.analysis.module, [layer.node for layer in layers if not layer.bias])
        lacks = not means and any(not layer.bias for layer in layers)
        reason = self._bias_in_use(layers, lacks=lacks) if uniform else ""
        return reason or Foldable(weight, int(not sites[0].site.transposed), sites, constants, uniform, lacks, means)

    def _constants(self, sites: list[SiteAtoms]) -> np.ndarray:
        """What all sites read in the graph of evaluation; what the others read where that has none of them."""
        own = [s for s in sites if s.mode == "eval"] or sites
        constants = np.stack([self._constants_of(s) for s in own])
        same = np.isfinite(constants).all(axis=0) & (constants == constants[0]).all(axis=0)
        same &= ~self.analysis.pinned[sites[0].entries]
        result: np.ndarray = np.where(same, constants[0], np.nan)
        return result

    def _constants_of(self, sites: SiteAtoms) -> np.ndarray:
        """What a site reads in evaluation, on images of whatever size; NaN where that is not constant."""
        if sites.site.source.key in self.sized[sites.mode]:
            return np.full(sites.site.entries, np.nan)
        return constants_of(sites.site, self.knowns[sites.mode][0])

    def _bias_in_use(self, layers: list[Reader], *, lacks: bool) -> str:
        """Why the biases of these layers cannot be changed; "" if they can."""
        own = {layer.node for layer in layers}
        for layer in layers:
            bias = self.parameters.get(layer.bias)
            if (bias is None) if layer.bias else lacks and self._exists(new_bias(layer)):
                return f"{layer.bias or new_bias(layer)} is not a bias of its own"
            others = [node for _, node in self.reads.get(id(bias), []) if node not in own]
            if others:
                return f"{place_of_node(others[0])} reads its bias as well"
            if lacks and not layer.bias and layer.node.op != "call_module" and keeps_code(self.analysis.module):
                return f"the model's code gives it no bias: {place_of_node(layer.node)}"
        return ""

    def _exists(self, name: str) -> bool:
        try:
            return fetch_attr(self.analysis.module, name) is not None
        except AttributeError:
            return False


def constants_of(site: Site, known: Known) -> np.ndarray:
    """The constant that each entry is everywhere, float64 (K,); NaN where it is none."""
    source = known.of(site.source).double().movedim(site.source_dim, 0).flatten(1)
    same = (source == source[:, :1]).all(dim=1)
    value = torch.where(same, source[:, 0], torch.nan)
    return value.expand(site.entries).numpy()


def _is_site(step: Step) -> bool:
    return step.op in CONTRACTIONS and site_of(step.call) is not None


def _is_uniform(call: Call) -> bool:
    """Whether a constant input adds the same to each place of the output."""
    if call.func.overloadpacket.__name__ != "convolution":
        return True
    weight, stride, padding, _, transposed, output_padding = (call.args[i] for i in (1, 3, 4, 5, 6, 7))
    if any(padding):
        return False
    return not transposed or not (any(n > 1 for n in (*weight.shape[2:], *stride)) or any(output_padding))
