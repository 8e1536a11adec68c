"""Networks with their own code, in which sizes decide which way it goes: what the other ways need stays."""

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.trace.inputs import ExampleInputs
from fxcompress.trace.retrace import other_sizes
from fxcompress.trace.retrace.other_sizes import other_paths
from fxcompress.trace.tracer import trace
from tests.exactness import TOLERANCE, difference, outputs
from tests.nets import lose


class Net(nn.Module):
    """Half of its hidden units are dead.

    Args:
        other: what becomes of the hidden units (b, t, 16) where sizes decide so.
        decides: whether they do, of b and t.
    """

    def __init__(self, other: Callable[["Net", Tensor], Tensor], decides: Callable[[int, int], bool]) -> None:
        super().__init__()
        self.other, self.decides, self.window = other, decides, 6
        self.fc1, self.fc2, self.fc3, self.norm = (
            nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(16, 4), nn.LayerNorm(16)
        )  # fmt: skip
        self.double().eval()
        with torch.no_grad():
            for parameter in self.fc1.parameters():
                parameter[::2] = 0

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.fc1(x))
        if self.decides(x.shape[0], x.shape[1]):
            return self.other(self, h)
        return self.fc2(h)  # type: ignore[no-any-return]


def inputs(*shape: int) -> tuple[Tensor]:
    return (torch.randn(*shape, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),)


def one_row(b: int, _: int) -> bool:
    return b == 1


def long(_: int, t: int) -> bool:
    return t > 6


NEED: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "a size as a number": lambda net, h: net.fc2(h * h.shape[-1] ** -0.5),
    "a mean over channels": lambda net, h: net.fc2(h.mean(-1, keepdim=True).expand_as(h)),
    "softmax": lambda net, h: net.fc2(h.softmax(-1)),
    "no zeros": lambda net, h: net.fc2(h + 1),
    "another order": lambda net, h: net.fc2(h.flip(-1)),
    "one channel": lambda net, h: net.fc2(h * h[..., 2:3].sigmoid()),
    "a number in the code": lambda net, h: net.fc2(h.unflatten(-1, (8, 2)).flip(-1).flatten(-2)),
    "a norm": lambda net, h: net.fc2(F.layer_norm(h, h.shape[-1:])),
    "a layer of its own": lambda net, h: net.fc3(h),
    "in training": lambda net, h: net.fc2(h * (h.shape[-1] if net.training else 1)),
    "a branch that is zero now": lambda net, h: net.fc2(h) + 0 * net.fc2(net.norm(h)),
}
SPARE: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "another number": lambda net, h: net.fc2(h * 3),
    "a step more": lambda net, h: net.fc2(torch.relu(h * 2)).cumsum(1),
}
DECIDE = {"one row": (one_row, (1, 4)), "long": (long, (2, 9)), "a product": (lambda b, t: b * t > 20, (3, 7))}


def check_same(net: nn.Module, own: nn.Module, shapes: Sequence[tuple[int, ...]], *, training: bool = True) -> None:
    for shape in shapes:
        for mode in (False, True)[: 1 + training]:
            expected, found = (outputs(each, inputs(*shape), training=mode) for each in (net, own))
            assert difference(expected, found) <= TOLERANCE


SHAPES = [(2, 4), (1, 4), (3, 4), (2, 9), (3, 7), (1, 1)]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("other", "decides"), [*((other, "long") for other in NEED), *(("softmax", decides) for decides in DECIDE)]
)
def test_what_another_path_needs_stays(other: str, decides: str) -> None:
    net = Net(NEED[other], DECIDE[decides][0])
    result = fxc.prune(net, inputs(2, 4), keep_code=True)
    check_same(net, result.module, SHAPES)
    assert not result.report.modified
    assert all("on inputs of other sizes" in kept.reason for kept in result.report.kept)


@pytest.mark.parametrize(("other", "decides"), [("another number", "one row"), ("a step more", "long")])
def test_what_no_path_needs_goes_and_the_report_says_what_was_proved(other: str, decides: str) -> None:
    net = Net(SPARE[other], DECIDE[decides][0])
    result = fxc.prune(net, inputs(2, 4), keep_code=True)
    check_same(net, result.module, SHAPES)
    found: Any = result.module
    assert found.fc1.weight.shape == (8, 8)
    decided = result.report.sizes_decide
    assert decided is not None
    assert decided.is_proved
    assert "proved to compute the same on (" in str(result.report)
    assert "test_untraced_paths.py" in decided.lines[0]


def test_nothing_is_looked_for_where_no_size_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(other_sizes, "PathProbe", None)
    net = Net(NEED["softmax"], lambda _, __: False)
    result = fxc.prune(net, inputs(2, 4), keep_code=True)
    assert result.report.modified
    assert result.report.sizes_decide is None


@pytest.mark.parametrize("other", ["softmax", "a size as a number", "a layer of its own"])
def test_what_another_path_needs_stays_in_training(other: str, caplog: pytest.LogCaptureFixture) -> None:
    net = fxc.compress(Net(NEED[other], long), inputs(2, 4), keep_code=True)
    lose(net, 0, 0.5)
    whole = net.finalize(prune=False)
    report = net.prune()
    final: Any = net.finalize()
    assert not any(name.startswith("fc1") for name in report.removed)
    check_same(whole, final, SHAPES, training=False)
    assert final.fc1.weight.shape == (16, 8)
    assert "sizes decide" not in caplog.text


def test_what_no_path_needs_goes_in_training() -> None:
    net = fxc.compress(Net(SPARE["another number"], long), inputs(2, 4), keep_code=True)
    lose(net, 0, 0.5)
    whole = net.finalize(prune=False)
    report = net.prune()
    final: Any = net.finalize()
    assert report.sizes_decide is not None
    assert report.sizes_decide.is_proved
    check_same(whole, final, SHAPES, training=False)
    assert len(final.fc1.weight) < 16
    copy.deepcopy(net).prune()


def test_constants_are_folded_only_where_other_paths_compute_the_same() -> None:
    net = Net(lambda net, h: net.fc2(h * 2), long)
    with torch.no_grad():
        assert net.fc1.bias is not None
        net.fc1.bias.fill_(1)
    same = Net(lambda net, h: net.fc2(h) * 2, long)
    same.load_state_dict(net.state_dict())
    for each, left in ((net, 16), (same, 8)):
        own: Any = fxc.prune(each, inputs(2, 4), fold=True, keep_code=True).module
        check_same(each, own, SHAPES, training=False)
        assert len(own.fc1.weight) == left


class Reads(Net):
    """On one row it reads values, which no graph holds."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.fc1(x))
        if x.shape[0] == 1 and bool(h.sum() > -1):
            return self.other(self, h)
        return self.fc2(h)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("other", "left"), [(NEED["softmax"], 16), (SPARE["another number"], 8)])
def test_a_path_without_a_graph_is_run(other: Callable[[Net, Tensor], Tensor], left: int) -> None:
    net = Reads(other, one_row)
    result = fxc.prune(net, inputs(2, 4), keep_code=True)
    own: Any = result.module
    check_same(net, own, SHAPES)
    assert len(own.fc1.weight) == left
    if left < 16:
        assert result.report.sizes_decide is not None
        assert not result.report.sizes_decide.is_proved
        assert "gave the same, which is no proof, on (1, 4, 8)" in str(result.report)
    else:
        assert "would compute something else without what has gone with it" in str(result.report)


class Steps(Net):
    """A path for each length, of which a few are looked at."""

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.fc2(torch.relu(self.fc1(x[:, i : i + 3]))) for i in range(0, x.shape[1], 3)]
        return torch.cat(parts, 1)


def test_what_is_not_proved_is_said(caplog: pytest.LogCaptureFixture) -> None:
    net = Steps(NEED["softmax"], long)
    result = fxc.prune(net, inputs(2, 4), keep_code=True)
    check_same(net, result.module, SHAPES)
    assert result.report.modified
    assert "nothing is proved of sizes that go yet another way" in str(result.report)
    trained = fxc.compress(net, inputs(2, 4), keep_code=True)
    with caplog.at_level(logging.WARNING):
        trained.finalize()
    assert "nothing is proved of sizes that go yet another way" in caplog.text


def test_a_decision_that_nothing_turns_is_named() -> None:
    net = Net(NEED["softmax"], lambda _, t: t * 1000 > 10**8 + 7)
    result = fxc.prune(net, inputs(2, 4), keep_code=True)
    assert result.report.modified
    assert "went one way on all inputs that were tried" in str(result.report)


@pytest.mark.parametrize(
    ("decides", "shape"),
    [
        (lambda b, t: b == 3 and t == 4, (3, 4)),
        (lambda b, t: b == 1 and t == 1, (1, 1)),
        (lambda _, t: t % 3 == 2, (2, 5)),
        (lambda _, t: bool({4: False}.get(t, True)), (2, 1)),
        (lambda b, t: b != t - 2, (1, 4)),
        (lambda _, t: (t + 7) // 8 > 16, (2, 129)),
    ],
)
def test_sizes_that_decide_otherwise_are_found(decides: Callable[[int, int], bool], shape: tuple[int, int]) -> None:
    net, given = Net(NEED["softmax"], decides), ExampleInputs.of(inputs(2, 4))
    assert decides(*shape)
    found = other_paths(net, trace(net, given, plain=False), given).found
    assert any(decides(*path.inputs.args[0].shape[:2]) for path in found)


class Heads(nn.Module):
    """Attention that is causal where there is more than one position."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.ModuleList(nn.Linear(8, 16) for _ in range(3)), nn.Linear(16, 8)
        with torch.no_grad():
            for parameter in self.qkv[2].parameters():
                parameter[:4] = 0
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in self.qkv)
        causal = x.shape[1] > 1 and self.out is not None
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def test_a_flag_of_attention_may_be_a_decision_on_sizes() -> None:
    net = Heads()
    for start in ((2, 4), (2, 1)):
        result = fxc.prune(net, inputs(*start), keep_code=True)
        check_same(net, result.module, SHAPES)
        assert result.report.sizes_decide is not None
        assert result.report.sizes_decide.is_proved
        own: Any = result.module
        assert own.qkv[2].weight.shape == (12, 8)


def test_other_paths_are_traced_only_where_the_model_runs() -> None:
    net = Net(lambda net, h: net.fc3(h[..., :3]), long)
    given = ExampleInputs.of(inputs(2, 4))
    assert not other_paths(net, trace(net, given, plain=False), given).found
    with pytest.raises(RuntimeError):
        net(*inputs(2, 9))
