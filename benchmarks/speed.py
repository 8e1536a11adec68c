"""How long it takes to prune half of a network, beside Torch-Pruning.

Both sides get copies of the same network, in which half of the channels of each layer are dead, and take out half of
the channels of each layer. They run in turn, in one process, on the same example input. Copies are made, and results
are checked, outside of the timing.
"""

import argparse
import copy
import cProfile
import pstats
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fxcompress as fxc
from benchmarks.dead import CLASSES, EXAMPLE, difference, network, parameters_of, randomise, spread, zero_share
from benchmarks.record import Claim, Column, Record, Table, command, parser, settings, write
from benchmarks.timing import CLOCKS, Stopwatch, median_total, medians, paired_ratio, rotated, settle, threads
from fxcompress.channels.analysis import analyse
from fxcompress.channels.constants import knowns_of, values_known
from fxcompress.channels.plan import make_plan
from fxcompress.passes.branches import dead_branches
from fxcompress.passes.rewrite import carry_out
from fxcompress.trace.inputs import ExampleInputs
from fxcompress.trace.tracer import trace

MODELS = (
    "resnet50", "resnet18", "mobilenet_v2", "densenet121", "vit_b_16", "convnext_tiny", "googlenet", "regnet_y_400mf",
    "efficientnet_b0", "mnasnet1_0", "squeezenet1_0", "vgg16_bn", "inception_v3",
)  # fmt: skip
SHARE = 0.5
LIMIT = 0.2
OURS, THEIRS = ("passes", "prune"), ("pruner", "groups")
Run = Callable[[nn.Module, Tensor, Stopwatch], nn.Module]


def by_passes(model: nn.Module, example: Tensor, watch: Stopwatch) -> nn.Module:
    """Ours, phase by phase, from the untraced model to the rewritten one."""
    inputs = ExampleInputs.of(example)
    with torch.no_grad():
        with watch.phase("trace"):
            traced = trace(model, inputs)
        with watch.phase("analyse"):
            analysis = analyse(traced, inputs)
        with watch.phase("constants"):
            knowns = knowns_of(analysis, values_known)
        with watch.phase("plan"):
            branches = dead_branches(analysis, knowns)
            plan = make_plan(analysis, knowns)
        with watch.phase("rewrite"):
            result = carry_out(analysis, plan)
            assert result.module.code  # made when it is first asked for, or called
    assert not branches, "a whole branch is dead: fxcompress.prune() would take it out first"
    return result.module


def by_prune(model: nn.Module, example: Tensor, watch: Stopwatch) -> nn.Module:
    """Ours, the public call: the same, and a report, and copies of what was not cut."""
    with watch.phase("all"):
        return fxc.prune(model, example).module


def by_pruner(model: nn.Module, example: Tensor, watch: Stopwatch) -> nn.Module:
    """Torch-Pruning as its documentation shows it: a pruner, and one step of it."""
    import torch_pruning as tp

    importance = tp.importance.GroupMagnitudeImportance(p=2)
    with watch.phase("graph"):
        # Dicts of its own: the default ones are shared between pruners, and would keep every model alive.
        pruner = tp.pruner.BasePruner(
            model, example, importance, pruning_ratio=SHARE, ignored_layers=classifiers(model),
            in_channel_groups={}, out_channel_groups={}, num_heads={},
        )  # fmt: skip
    with watch.phase("prune"):
        pruner.step()
    return model


def by_groups(model: nn.Module, example: Tensor, watch: Stopwatch) -> nn.Module:
    """Torch-Pruning without its pruner: the graph, and every second channel of each of its groups."""
    import torch_pruning as tp

    with watch.phase("graph"):
        graph = tp.DependencyGraph().build_dependency(model, example_inputs=example)
    with watch.phase("prune"):
        for group in graph.get_all_groups(classifiers(model), [nn.Conv2d, nn.Linear]):
            group.prune(spread(len(group[0].idxs), SHARE))
    return model


RUNS: dict[str, Run] = {"passes": by_passes, "pruner": by_pruner, "groups": by_groups, "prune": by_prune}
LABELS = {
    "passes": "fxcompress, pass by pass",
    "prune": "fxcompress.prune",
    "pruner": "Torch-Pruning, BasePruner",
    "groups": "Torch-Pruning, DependencyGraph",
}


def classifiers(model: nn.Module) -> list[nn.Module]:
    """The layers that make the output, which Torch-Pruning must be told to leave alone."""
    return [
        m
        for m in model.modules()
        if (isinstance(m, nn.Linear) and m.out_features == CLASSES)
        or (isinstance(m, nn.Conv2d) and m.out_channels == CLASSES)
    ]


def usable(model: nn.Module) -> nn.Module:
    """The same, with what the examples of Torch-Pruning do by hand: this network holds its width as a number."""
    from torchvision.models import VisionTransformer

    if isinstance(model, VisionTransformer):
        model.hidden_dim = model.conv_proj.out_channels
    return model


def attempt(run: Run, model: nn.Module, example: Tensor) -> tuple[Stopwatch, nn.Module]:
    """One run on a copy."""
    own, watch = copy.deepcopy(model), Stopwatch()
    settle()
    return watch, run(own, example, watch)


def check(model: nn.Module, example: Tensor) -> dict[str, dict[str, Any]]:
    """Run everybody once, which warms up as well: what is left, and how far the output is off."""
    probe = torch.randn(example.shape, generator=torch.Generator().manual_seed(1))
    facts = {name: _facts(name, model, example, probe) for name in RUNS}
    for name in OURS:
        assert facts[name]["error"] < 1e-4, f"{name} changed the output by {facts[name]['error']}"
    assert facts["passes"]["left"] == facts["prune"]["left"]
    return facts


def _facts(name: str, model: nn.Module, example: Tensor, probe: Tensor) -> dict[str, Any]:
    try:
        _, result = attempt(RUNS[name], model, example)
        with torch.no_grad():
            return {"left": parameters_of(result), "error": difference(model(probe), usable(result).eval()(probe))}
    except Exception as error:
        if name in OURS:
            raise
        return {"failure": f"{type(error).__name__}: {error}"}  # of the peer: a result like any other


def measure(name: str, model: nn.Module, options: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """All measurements on one network: a row for each contestant and number of threads, and the samples."""
    example = torch.randn(EXAMPLE, generator=torch.Generator().manual_seed(options.seed))
    rows, samples = [], {}
    for count in options.threads:
        with threads(count) as used:
            facts = check(model, example)
            names = [n for n in RUNS if "failure" not in facts[n]]
            watches: dict[str, list[Stopwatch]] = {n: [] for n in names}
            for turn in range(options.repeats):
                for n in rotated(names, turn):
                    watches[n].append(attempt(RUNS[n], model, example)[0])
            for n in RUNS:
                row = {"model": name, "threads": used, "run": n, "label": LABELS[n], **facts[n]}
                rows.append(row | (_summary(watches[n]) if n in names else {}))
            samples[f"{name}, {used} threads"] = {n: [w.laps for w in watches[n]] for n in names}
    return rows, samples


def _summary(watches: list[Stopwatch]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for clock in CLOCKS:
        result[clock] = median_total(watches, clock)
        result |= {f"{clock} {phase}": seconds for phase, seconds in medians(watches, clock).items()}
        result[f"{clock} all runs"] = [w.total(clock) for w in watches]
    return result


def compare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each network and number of threads: ours beside the cheaper way to use Torch-Pruning."""
    result = []
    for ours in (row for row in rows if row["run"] == "passes"):
        same = {r["run"]: r for r in rows if (r["model"], r["threads"]) == (ours["model"], ours["threads"])}
        able = [same[n] for n in THEIRS if "cpu" in same[n]]
        row = {"model": ours["model"], "threads": ours["threads"]}
        for clock in CLOCKS:
            row |= {f"{clock} ours": ours[clock], f"{clock} call": same["prune"][clock]}
            if able:
                best = min(able, key=lambda r: r[clock])
                row |= {f"{clock} theirs": best[clock], f"{clock} best": best["run"]}
                row[f"{clock} ratio"] = paired_ratio(ours[f"{clock} all runs"], best[f"{clock} all runs"])
            if "cpu" in same["pruner"]:
                pruner = same["pruner"]
                row[f"{clock} pruner"] = pruner[clock]
                row[f"{clock} pruner ratio"] = paired_ratio(ours[f"{clock} all runs"], pruner[f"{clock} all runs"])
        result.append(row)
    return result


def tables(rows: list[dict[str, Any]], compared: list[dict[str, Any]]) -> list[Table]:
    """What the page shows."""
    names = (Column("model", "network"), Column("threads", "threads", "d"))
    result = [
        Table(
            f"{title}, seconds",
            (
                *names,
                Column(f"{clock} ours", "ours", ".3f"),
                Column(f"{clock} call", "`prune()`", ".3f"),
                Column(f"{clock} theirs", "TP, cheaper way", ".3f"),
                Column(f"{clock} best", "which"),
                Column(f"{clock} ratio", "ours / TP", ".2f"),
                Column(f"{clock} pruner", "TP, its pruner", ".3f"),
                Column(f"{clock} pruner ratio", "ours / pruner", ".2f"),
            ),
            compared,
            "Medians of the rounds. *ours* is trace, analysis, plan and rewrite; `prune()` adds the report and copies "
            "of what was not cut. Ratios are medians of the ratios within a round.",
        )
        for clock, title in (("cpu", "CPU time"), ("wall", "Wall time"))
    ]
    phases = ("trace", "analyse", "constants", "plan", "rewrite")
    shown = tuple(Column(f"cpu {phase}", phase, ".3f") for phase in phases)
    ours = [row for row in rows if row["run"] == "passes"]
    result.append(Table("Our phases, CPU seconds", (*names, *shown, Column("cpu", "sum", ".3f")), ours))
    left = (Column("label", "contestant"), Column("left", "parameters left", ",d"), Column("error", "off by", ".1e"))
    theirs = (Column("cpu graph", "graph", ".3f"), Column("cpu prune", "prune", ".3f"), Column("failure", "failure"))
    text = (
        "*off by*: the largest change of the output, relative to its largest entry. Torch-Pruning chooses its own "
        "channels; where it takes others than the dead ones, the output changes by design."
    )
    result.append(Table("What is left, and Torch-Pruning's phases", (*names, *left, *theirs), rows, text))
    return result


def claims(compared: list[dict[str, Any]]) -> list[Claim]:
    """The claim that this benchmark is for, on each clock, against both ways to use Torch-Pruning."""
    found = []
    for row in compared:
        for clock in CLOCKS:
            for key, words in (("ratio", "at its cheapest"), ("pruner ratio", "by its pruner")):
                if row["model"] == "resnet50" and f"{clock} {key}" in row:
                    text = f"resnet50, threads: {row['threads']}, {clock} time, ours / Torch-Pruning {words}"
                    found.append(Claim(text, row[f"{clock} {key}"], LIMIT))
    return found


def profile(names: list[str], seed: int) -> None:
    """Print where our own time goes, in one run after a first one; with one thread."""
    for name in names:
        model, example = prepared(name, seed), torch.zeros(EXAMPLE)
        with threads(1):
            attempt(by_passes, model, example)
            settle()
            with cProfile.Profile() as profiler:
                by_passes(model, example, Stopwatch())
        for order in ("tottime", "cumtime"):
            pstats.Stats(profiler).strip_dirs().sort_stats(order).print_stats(30)


def prepared(name: str, seed: int) -> nn.Module:
    """A network with dead channels."""
    model = network(name, seed)
    randomise(model, seed)
    zero_share(model, torch.zeros(EXAMPLE), SHARE)
    return model


def main(arguments: list[str] | None = None) -> None:
    options = parser("speed", __doc__, repeats=7)
    options.add_argument("--models", nargs="+", default=["resnet50"], choices=[*MODELS, "all"], help="of torchvision")
    options.add_argument("--profile", action="store_true", help="only print where our own time goes")
    chosen = options.parse_args(arguments)
    chosen.models = list(MODELS) if "all" in chosen.models else chosen.models
    if chosen.profile:
        profile(chosen.models, chosen.seed)
        return
    try:
        import torch_pruning  # noqa: F401
    except ImportError:
        sys.exit("this benchmark compares with Torch-Pruning: pip install 'fxcompress[bench]'")
    rows, samples = [], []
    for name in chosen.models:
        found, timed = measure(name, prepared(name, chosen.seed), chosen)
        rows += found
        samples.append(timed)
        for row in compare(found):
            print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()})
    compared = compare(rows)
    record = Record(
        "speed", "Speed of pruning", command("speed", chosen), settings(chosen), tables(rows, compared),
        claims(compared), samples,
    )  # fmt: skip
    print(write(record, chosen.out).read_text("utf-8"))


if __name__ == "__main__":
    main()
