"""Nodes that are not run in the check of a rewrite: their results are those of a run."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

import fxcompress as fxc
from fxcompress.channels.analysis import Analysis, analyse
from fxcompress.channels.constants import knowns_of, values_known
from fxcompress.channels.plan import Plan, make_plan
from fxcompress.channels.values import LabelTensor, Value, replace
from fxcompress.passes import rewrite
from fxcompress.passes.commuting import Commuting
from fxcompress.passes.replay import MismatchError, Replay
from fxcompress.trace.inputs import ExampleInputs
from fxcompress.trace.tracer import trace

_IMAGE = (2, 3, 8, 8)


def _conv(inputs: int, outputs: int, kernel: int = 3, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.last = _conv(3, 8), _conv(8, 8), _conv(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.block(x)
        y += x
        out: Tensor = self.last(torch.relu(x + y).mul(0.5) + y * x)
        return out


class _Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = _conv(3, 8), _conv(8, 8, groups=8)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.pool, self.last = nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.deep(self.stem(x))
        out: Tensor = self.last(torch.sigmoid(self.excite(torch.relu(self.squeeze(self.pool(x))))) * x)
        return out


class _Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = _conv(3, 8), _conv(8, 6)
        self.last, self.rows = nn.Conv2d(17, 4, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x)
        b = self.second(a)
        out: Tensor = self.last(torch.cat([a, b, x], 1)) + self.rows(torch.cat((a, a), 2))[:, :, :8]
        return out


class _Aliased(nn.Module):
    """A view is read after its memory was written to."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = x.transpose(2, 3)
        x += y
        out: Tensor = self.last(nn.functional.relu(x, inplace=True) + y)
        return out


class _Mixer(nn.Module):
    """Linear layers behind more dims than two, over channels and over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.down = nn.Conv2d(3, 8, 1), nn.Linear(8, 12), nn.Linear(12, 8, bias=False)
        self.mix, self.last = nn.Linear(64, 6), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.stem(x).flatten(2).transpose(1, 2)
        tokens = tokens + self.down(torch.relu(self.up(tokens)))
        tokens = self.mix(tokens.transpose(1, 2)).transpose(1, 2)
        out: Tensor = self.last(tokens)
        return out


def _shared() -> nn.Module:
    conv = nn.Conv2d(8, 8, 1)
    return nn.Sequential(nn.Conv2d(3, 8, 1), conv, nn.SiLU(), conv, nn.Conv2d(8, 4, 1))


NETS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "residual": (_Residual, 12),
    "gated": (_Gated, 10),
    "dense": (_Dense, 9),
    "aliased": (_Aliased, 2),
    "mixer": (_Mixer, 4),
    "one layer twice": (_shared, 4),
}
"""Each with the number of nodes that need not be run, at least."""


def _analysed(make: Callable[[], nn.Module], left: int = 0) -> tuple[Analysis, Plan]:
    """A network whose layers have lost each second channel, or all but ``left``, and how it is to be cut."""
    torch.manual_seed(0)
    net = make().eval()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.Linear):
                gone = slice(left, None) if left else slice(1, None, 2)
                module.weight[gone] = 0.0
                if module.bias is not None:
                    module.bias[gone] = 0.0
    inputs = ExampleInputs.of(torch.randn(_IMAGE))
    with torch.no_grad():
        analysis = analyse(trace(net, inputs), inputs)
        return analysis, make_plan(analysis, knowns_of(analysis, values_known))


@pytest.fixture(name="replays")
def _replays(monkeypatch: pytest.MonkeyPatch) -> list[Replay]:
    made: list[Replay] = []

    class Kept(Replay):
        def __init__(self, *args: Any) -> None:  # noqa: ANN401 - as Replay has it
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(rewrite, "Replay", Kept)
    return made


@pytest.fixture(name="known")
def _known(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The nodes that were not run."""
    names: list[str] = []
    find = Commuting.result

    def result(self: Commuting, node: fx.Node, module: nn.Module | None, args: tuple[Any, ...]) -> LabelTensor | None:
        found = find(self, node, module, args)
        names.extend([node.name] if found is not None else [])
        return found

    monkeypatch.setattr(Commuting, "result", result)
    return names


def _shown(replay: Replay) -> dict[str, Any]:
    def shown(value: Value) -> tuple[Any, ...]:
        layers = [layer.tolist() for layer in replay.left.canonical(value.layers)]
        return tuple(value.shape), value.meta.stride(), value.meta.dtype, layers

    return {name: replace(shown, Value, result) for name, result in replay.trail.values.items()}


@pytest.mark.parametrize("left", [0, 1, 2])
@pytest.mark.parametrize("name", NETS)
def test_the_result_is_that_of_a_run(
    name: str, left: int, replays: list[Replay], known: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make, least = NETS[name]
    analysis, plan = _analysed(make, left)
    assert plan.changes
    quick = rewrite.carry_out(analysis, plan)
    assert left == 1 or len(known) >= least, known
    monkeypatch.setattr(Commuting, "result", lambda *_: None)
    slow = rewrite.carry_out(analysis, plan)
    first, second = replays
    assert _shown(first) == _shown(second)
    assert str(quick.module.graph) == str(slow.module.graph)


def test_a_plan_that_parts_what_belongs_together_is_found(known: list[str]) -> None:
    analysis, plan = _analysed(_Residual)
    alive = plan.alive.copy()
    alive[np.flatnonzero(alive & ~analysis.pinned)[0]] = False
    with pytest.raises(MismatchError):
        rewrite.carry_out(analysis, Plan(alive))
    assert not known


def test_a_convolution_with_one_group_left_is_run(known: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, groups=4), nn.Conv2d(8, 4, 1))
    inputs = ExampleInputs.of(torch.randn(_IMAGE))
    analysis = analyse(trace(net, inputs), inputs)
    alive = np.ones(analysis.space.size, dtype=bool)
    for row in range(2, 8):
        alive[analysis.component == analysis.component[analysis.atoms["1.weight"][0][row]]] = False
    for _ in range(2):
        with pytest.raises(MismatchError):
            rewrite.carry_out(analysis, Plan(alive))
        assert "_1" not in known
        monkeypatch.setattr(Commuting, "result", lambda *_: None)


class _Written(nn.Module):
    """Adds in place to what a linear layer has made: memory that the layer's own steps had other names for."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.other, self.last = (
            nn.Conv2d(3, 6, 1),
            nn.Linear(6, 8),
            nn.Conv2d(3, 8, 1),
            nn.Linear(8, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        made = self.up(self.stem(x).flatten(2).transpose(1, 2).contiguous())
        made.transpose(1, 2).unflatten(2, x.shape[2:]).add_(self.other(x))
        out: Tensor = self.last(made)
        return out


def test_what_a_linear_layer_makes_on_its_way_is_written_to_as_well() -> None:
    net, x = _Written().double(), torch.randn(_IMAGE, dtype=torch.float64)
    with torch.no_grad():
        for layer in (net.up, net.other):
            layer.weight[:3] = 0.0
            layer.bias[:3] = 0.0  # type: ignore[index]
    pruned = fxc.prune(net, x).module
    assert pruned.get_parameter("up.weight").shape == (5, 6)
    torch.testing.assert_close(pruned(x), net(x), rtol=1e-12, atol=1e-12)
