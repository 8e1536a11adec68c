"""What the scoreboard does with one network, in a process of its own.

It prints a line of JSON for every finding, so that those made before a crash or a timeout are not lost.
"""

import resource
import sys
import time
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fxcompress as fxc
from benchmarks.timing import Stopwatch, settle
from benchmarks.zoo_extra import extra_cases
from benchmarks.zoo_groups import chosen_units, forced_rewrite
from benchmarks.zoo_models import Arguments, Case, torchvision_cases
from benchmarks.zoo_pieces import prepared_pieces
from benchmarks.zoo_report import Report, peak
from benchmarks.zoo_subject import CONTROL, TOLERANCE, Subject, build, outputs, timed_prune
from benchmarks.zoo_uses import check_trains, expected_in_training, uses
from fxcompress.channels.analysis import Analysis
from fxcompress.trace.tracer import trace
from tests.exactness import atoms_of, difference, kill, removable_units, tensors


def all_cases(extra: list[str]) -> list[Case]:
    """All networks, and those of other libraries that were asked for."""
    return torchvision_cases() + [case for library in extra for case in extra_cases(library)]


def examine(case: Case, seeds: list[int], report: Report) -> None:
    """All steps for one network."""
    watch, prepare = Stopwatch(), prepared
    errors: list[float] = []
    for turn, seed in enumerate(seeds):
        subject = prepare(case, seed, report, watch, first=turn == 0)
        if subject is None and report.failures.get("trace", "").startswith("TraceError"):
            report.passed("trace")
            prepare = prepared_pieces
            subject = prepare(case, seed, report, watch, first=turn == 0)
        if subject is None:
            break
        with report.step(f"exact, seed {seed}"):
            errors.append(compare(subject, report))
        if turn == 0:
            uses(case, subject, report)
            with report.step("trains"):
                report.add(trains=False)
                expected, pruned = expected_in_training(case, subject), subject.pruned
                del subject  # gradients need its memory
                settle()
                check_trains(case, pruned, expected)
                report.add(trains=True)
        subject = None
        settle()
    found = len(errors) == len(seeds) and not any(s.startswith(("exact", "control")) for s in report.failures)
    report.add(exact=found, error=max(errors, default=None), step="done")


def prepared(case: Case, seed: int, report: Report, watch: Stopwatch, *, first: bool) -> Subject | None:
    """Build and analyse a network, make 30 % of its groups dead, and prune it."""
    with report.step("build"):
        net, arguments = build(case), case.example(seed)
        shown = [str(tuple(t.shape)) for t in tensors(arguments)]
        report.add(input=" ".join(shown), parameters=sum(p.numel() for p in net.parameters()))
        if first:
            check_runs(net, arguments, report)
    if "build" in report.failures:
        return None
    with report.step("trace"):
        graph = fxc.ChannelGraph.of(net, arguments)
        net = _own(net, graph.analysis, arguments)
    if "trace" in report.failures:
        return None
    analysis = graph.analysis
    chosen = chosen_units(analysis, seed)
    if first:
        report.add(
            traced=how(net, analysis),
            share=graph.share,
            groups=len(removable_units(analysis)),
            unknown=sorted(graph.unknown_ops),
        )
        control(net, arguments, analysis, chosen, report)
        settle()  # a rewritten module is part of a cycle, and large
    dead = atoms_of(analysis, chosen)
    kill(analysis, dead)
    with report.step("prune"):
        result = timed_prune(net, arguments, watch, report)
    if "prune" in report.failures:
        return None
    reasons = {kept.tensor: kept.reason for kept in result.report.kept}
    return Subject(net, arguments, {"": analysis}, {"": dead}, result.module.eval(), reasons)


def check_runs(net: nn.Module, arguments: Arguments, report: Report) -> None:
    """Run the original; where it asks for float32 by name, it is given float64, as float32 would hide small changes."""
    casts: Any = Casts()  # type: ignore[no-untyped-call]
    try:
        with casts:
            outputs(net, arguments)
    except RuntimeError:
        casts.found = True
    if casts.found:
        plain = torch.Tensor.to
        torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]

        def wide(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401
            return plain(x, *map(_wide, args), **{name: _wide(value) for name, value in kwargs.items()})

        torch.Tensor.to = wide  # type: ignore[method-assign,assignment]
        outputs(net, arguments)
        report.add(note="what it casts to float32 is float64 here")


class Casts(TorchDispatchMode):
    """Sees whether float64 is cast to float32."""

    found = False

    def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        cast = func is torch.ops.aten._to_copy.default and args[0].dtype == torch.float64  # noqa: SLF001 - an op
        self.found |= cast and (kwargs or {}).get("dtype") == torch.float32
        return func(*args, **(kwargs or {}))


def _wide(argument: Any) -> Any:  # noqa: ANN401
    return torch.float64 if argument is torch.float32 else argument


def how(net: nn.Module, analysis: Analysis) -> str:
    """How the network became a graph: what symbolic tracing makes of it alone is compared with what was analysed."""
    module = analysis.module
    try:
        same = [node.name for node in trace(net).graph.nodes] == [node.name for node in module.graph.nodes]
    except fxc.FxCompressError:
        same = False
    return ("symbolic" if same else "by running") + ("" if module.train_graph is None else ", a graph for each mode")


def _own(net: nn.Module, analysis: Analysis, arguments: Arguments) -> nn.Module:
    """The network whose parameters were analysed: ``net``, or what it was lowered to, which must compute the same."""
    theirs = {id(p) for p in net.parameters()}
    if all(id(p) in theirs for p in analysis.module.parameters()):
        return net
    found = difference(outputs(net, arguments), outputs(analysis.module, arguments))
    if found > TOLERANCE:
        raise ValueError(f"lowering changed the output by {found:.1e}")
    return analysis.module


def control(net: nn.Module, arguments: Arguments, analysis: Analysis, units: np.ndarray, report: Report) -> None:
    """The negative control: the same rewrite on groups that are alive must change the output."""
    with report.step("control"):
        rewritten = forced_rewrite(analysis, units)
        found = difference(outputs(net, arguments), outputs(rewritten, arguments))
        report.add(control=found)
        if found <= CONTROL:
            raise ValueError(f"without dead channels the output changes by {found:.1e} only")


def compare(subject: Subject, report: Report) -> float:
    """The change of the output; raises where it is too large, or where something is missing or left over."""
    expected = outputs(subject.net, subject.arguments)
    if not all(bool(t.isfinite().all()) for t in expected if t.is_floating_point()):
        raise ValueError("the original returns values that are not finite")
    found = difference(expected, outputs(subject.pruned, subject.arguments))
    left, renamed = left_over(subject), list(subject.pruned.state_dict()) != list(subject.net.state_dict())
    if left:
        report.fail("gone", f"dead channels are left in {'; '.join([*left[:2], left[-1]])}")
    report.add(gone="gone" not in report.failures, names=not renamed)
    if found > TOLERANCE or renamed:
        raise ValueError("names of the state changed" if renamed else f"the output changes by {found:.1e}")
    return found


def left_over(subject: Subject) -> list[str]:
    """The parameters that are larger than what is alive in them, and a reason for one."""
    found = []
    for path, analysis in subject.analyses.items():
        for name, parameter in subject.pruned.get_submodule(path).named_parameters():
            for dim, atoms in analysis.atoms.get(name, {}).items():
                alive = int((~subject.dead[path][atoms.numpy()]).sum())
                if parameter.shape[dim] > max(alive, 1):
                    found.append(f"{name} ({parameter.shape[dim]} of which {alive} are alive)")
    return found + [f"{name}: {reason}" for name, reason in list(subject.reasons.items())[:1] if found]


def main(arguments: list[str]) -> None:
    """Arguments: the name, the memory limit in GB, the libraries joined by commas, and the seeds."""
    name, limit, libraries, *seeds = arguments
    size = int(float(limit) * 1e9)
    resource.setrlimit(resource.RLIMIT_DATA, (size, size))
    case = next(case for case in all_cases([x for x in libraries.split(",") if x]) if case.name == name)
    start, report = time.perf_counter(), Report()
    examine(case, [int(seed) for seed in seeds], report)
    report.add(memory=peak(), seconds=time.perf_counter() - start)


if __name__ == "__main__":
    main(sys.argv[1:])
