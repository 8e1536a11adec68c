"""What keeps the time of pruning in proportion to the network, by what is done and not by the clock."""

import gc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from fxcompress.channels.analysis import Analysis
from fxcompress.channels.constants import knowns_of, values_known
from fxcompress.channels.plan import make_plan
from fxcompress.channels.prepare import prepare
from fxcompress.channels.reads import SiteCheck
from fxcompress.channels.space import Reason
from fxcompress.channels.worklist import Index, Rule, Worklist
from fxcompress.trace.basics.garbage_collection import without_collections
from fxcompress.trace.tracer import trace

IMAGE = torch.zeros(1, 3, 8, 8)


def chain(depth: int) -> nn.Sequential:
    """Convolutions all of whose channels but the last ones are dead."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, padding=1), *(nn.Conv2d(4, 4, 3, padding=1) for _ in range(depth))]
    for layer in layers:
        nn.init.zeros_(layer.weight)
        assert layer.bias is not None
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def analysed(depth: int) -> Analysis:
    return prepare(chain(depth), IMAGE)


def test_the_work_of_a_plan_is_in_proportion_to_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[SiteCheck] = []
    whole = SiteCheck.broken

    def broken(self: SiteCheck, dead: np.ndarray) -> np.ndarray:
        looks.append(self)
        return whole(self, dead)

    monkeypatch.setattr(SiteCheck, "broken", broken)
    counts = []
    for depth in (8, 16, 32):
        analysis = analysed(depth)
        knowns = knowns_of(analysis, values_known)
        looks.clear()
        plan = make_plan(analysis, knowns)
        assert len(plan.kept) == depth  # each layer keeps a channel: its plan was not settled at once
        counts.append(len(looks))
    assert counts[2] - counts[1] == 2 * (counts[1] - counts[0])


@pytest.mark.parametrize("number", range(20))
def test_a_worklist_finds_what_looking_at_everything_finds(number: int) -> None:
    random, size = np.random.default_rng(number), 40
    component = np.concatenate([np.arange(20), random.integers(0, 20, 20)])
    pairs = random.integers(0, size, (30, 2)).tolist()
    rules = [Rule(_implied(a, b), Reason("rule", f"{a} needs {b}"), (np.array([a, b]),)) for a, b in pairs]
    seed = random.integers(0, size, 3)
    found = settled(rules, component, seed, everything=False)
    assert found == settled(rules, component, seed, everything=True)
    assert len(found[1]) > len(np.unique(component[seed]))  # the rules have put something back


def settled(
    rules: list[Rule], component: np.ndarray, seed: np.ndarray, *, everything: bool
) -> tuple[list[bool], dict[int, str]]:
    """What stays dead and why the rest is back; with all rules looked at anew after each change, or as they need it."""
    dead, why = np.ones(len(component), dtype=bool), dict[int, str]()
    work, members = Worklist(rules, component), Index(component, len(component))

    def restore(atoms: np.ndarray, reason: Reason) -> None:
        roots = np.unique(component[atoms])
        dead[members.of(roots)] = False
        work.reopen(component if everything else roots)
        for root in roots.tolist():
            why.setdefault(root, reason.text)

    restore(seed, Reason("seed", "seed"))
    while work.sweep(restore, dead):
        pass
    return dead.tolist(), why


def _implied(a: int, b: int) -> Callable[[np.ndarray], np.ndarray]:
    """A rule: ``b`` stays where ``a`` does."""
    return lambda dead: np.array([b] if dead[b] and not dead[a] else [], dtype=np.int64)


def test_an_index_knows_all_places() -> None:
    numbers = np.array([2, 0, 2, 5, 0, 2])
    index = Index(numbers, 7)
    assert index.of(np.array([2, 1, 0])).tolist() == [0, 2, 5, 1, 4]
    assert index.of(np.array([3])).tolist() == []
    assert index.of(np.zeros(0, dtype=np.int64)).tolist() == []


@pytest.mark.parametrize("on", [True, False])
def test_the_collector_is_as_it_was(on: bool) -> None:  # noqa: FBT001
    before = gc.isenabled()
    inside = []

    @without_collections
    def inner() -> None:
        inside.append(gc.isenabled())

    @without_collections
    def outer(*, fails: bool) -> None:
        inner()
        inside.append(gc.isenabled())  # still off: the inner one has not turned it on
        if fails:
            raise KeyError

    try:
        (gc.enable if on else gc.disable)()
        outer(fails=False)
        assert gc.isenabled() == on
        with pytest.raises(KeyError):
            outer(fails=True)
        assert gc.isenabled() == on
    finally:
        (gc.enable if before else gc.disable)()
    assert inside == [False] * 4


class Weights(nn.Module):
    """Reads its tensors in ways of its own."""

    scale: Tensor

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(depth))
        self.blocks[-1].weight = self.blocks[0].weight
        self.register_buffer("scale", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            assert isinstance(block, nn.Linear)
            x = nn.functional.linear(x, block.weight, block.bias) * self.scale
        return x


def test_names_of_tensors_are_those_that_torch_gives() -> None:
    ours = [n.target for n in trace(Weights(3)).graph.nodes if n.op == "get_attr"]
    tracer = fx.Tracer()
    tracer.proxy_buffer_attributes = True
    assert ours == [n.target for n in tracer.trace(Weights(3)).nodes if n.op == "get_attr"]


def test_tensors_are_listed_once_for_all_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    lists: list[nn.Module] = []
    whole = nn.Module.named_parameters

    def named_parameters(self: nn.Module, *args: Any, **options: Any) -> Iterator[tuple[str, nn.Parameter]]:  # noqa: ANN401
        lists.append(self)
        return whole(self, *args, **options)

    monkeypatch.setattr(nn.Module, "named_parameters", named_parameters)
    counts = []
    for depth in (4, 16):
        lists.clear()
        trace(Weights(depth))
        counts.append(len(lists))
    assert counts[0] == counts[1]
