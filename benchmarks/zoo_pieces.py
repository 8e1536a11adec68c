"""The checks of a network that has no graph as a whole, and is pruned in pieces.

What is compared are the raw outputs of every piece (the features of a backbone, the logits and box regressions of each
head), at every call, and what the network makes of them.
"""

from typing import Any

import numpy as np
from torch import nn

import fxcompress as fxc
from benchmarks.timing import Stopwatch, settle
from benchmarks.zoo_groups import chosen_units, forced_rewrite
from benchmarks.zoo_models import Arguments, Case
from benchmarks.zoo_report import Report
from benchmarks.zoo_subject import CONTROL, Subject, build, outputs, timed_prune
from fxcompress.channels.analysis import Analysis
from fxcompress.trace.model.skeleton import skeleton
from fxcompress.trace.pieces.graph_forward import install
from fxcompress.trace.traced import TracedModule
from tests.exactness import atoms_of, difference, kill, removable_units


def steady(result: Any) -> Any:  # noqa: ANN401 - what a network returns
    """A result without what rounding decides: which one of many boxes with nearly the same score is left of them.

    The raw outputs do not have that problem, and hold all that detections are picked from, by code that is not touched.
    """
    if isinstance(result, dict) and "scores" in result:
        return []
    return [steady(one) for one in result] if isinstance(result, list | tuple) else result


class Watched(nn.Module):
    """A network that returns what some of its modules return as well, at each call.

    Args:
        net: the network.
        paths: names of the modules.
    """

    def __init__(self, net: nn.Module, paths: tuple[str, ...]) -> None:
        super().__init__()
        self.net = net
        self.paths = paths

    def forward(self, *arguments: Any) -> Any:  # noqa: ANN401 - those of the network
        """The results of the modules by their names, and that of the network."""
        raw: dict[str, list[Any]] = {path: [] for path in self.paths}
        hooks = [
            self.net.get_submodule(path).register_forward_hook(lambda _m, _args, out, raw=raw[path]: raw.append(out))
            for path in self.paths
        ]
        try:
            result = self.net(*arguments)
            return raw, steady(result)
        finally:
            for hook in hooks:
                hook.remove()


def prepared_pieces(case: Case, seed: int, report: Report, watch: Stopwatch, *, first: bool) -> Subject | None:
    """Build a network, make 30 % of the groups of each piece dead, and prune it."""
    net, arguments = build(case), case.example(seed)
    with report.step("trace"):
        graphs = fxc.ChannelGraph.of_pieces(net, arguments)
    if "trace" in report.failures:
        return None
    analyses = {path: graph.analysis for path, graph in graphs.items()}
    chosen = {path: chosen_units(analysis, seed) for path, analysis in analyses.items()}
    if first:
        movable = sum(graph.share * _size(graph.analysis.module) for graph in graphs.values())
        report.add(
            traced=f"in {len(graphs)} pieces",
            share=movable / _size(net),
            groups=sum(len(removable_units(analysis)) for analysis in analyses.values()),
            unknown=sorted({op for graph in graphs.values() for op in graph.unknown_ops}),
        )
        _control(net, arguments, analyses, chosen, report)
        settle()
    dead = {path: atoms_of(analysis, chosen[path]) for path, analysis in analyses.items()}
    for path, analysis in analyses.items():
        kill(analysis, dead[path])
    with report.step("prune"):
        result = timed_prune(net, arguments, watch, report)
    if "prune" in report.failures:
        return None
    paths, reasons = tuple(graphs), {kept.tensor: kept.reason for kept in result.report.kept}
    within = {f"net.{path}": analysis for path, analysis in analyses.items()}
    gone = {f"net.{path}": atoms for path, atoms in dead.items()}
    return Subject(Watched(net, paths), arguments, within, gone, Watched(result.module.eval(), paths), reasons)


def _control(
    net: nn.Module, arguments: Arguments, analyses: dict[str, Analysis], units: dict[str, np.ndarray], report: Report
) -> None:
    """The negative control: the same rewrite on groups that are alive must change what some piece returns."""
    with report.step("control"):
        rewritten = skeleton(net)
        for path, analysis in analyses.items():
            module = forced_rewrite(analysis, units[path])
            assert isinstance(module, TracedModule)
            install(rewritten.get_submodule(path), module)
        paths = tuple(analyses)
        expected, found = (outputs(Watched(n, paths), arguments) for n in (net, rewritten))
        same = [(a, b) for a, b in zip(expected, found, strict=False) if a.shape == b.shape and a.is_floating_point()]
        worst = max(difference(a, b) for a, b in same)
        report.add(control=worst)
        if worst <= CONTROL:
            raise ValueError(f"without dead channels the output changes by {worst:.1e} only")


def _size(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())
