"""Copies of module trees that share their tensors, and traced modules that are compiled when they are needed."""

import copy
import inspect
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

import fxcompress as fxc
from fxcompress.channels.rules.pointwise import POINTWISE
from fxcompress.channels.shapes import shapes
from fxcompress.trace.model.skeleton import shallow, skeleton
from fxcompress.trace.traced import TracedModule
from fxcompress.trace.tracer import trace
from tests.nets import ResidualNet


class Holder(nn.Module):
    """Holds one list in two places, modules in a list, and an own way to be unpickled."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 2, 3)
        self.same = nn.ModuleList([self.layer, nn.BatchNorm2d(2)])
        self.shared: list[int] = []
        self.again: dict[str, Any] = {
            "shared": self.shared,
            "layers": [self.layer],
            "sizes": (1, (2, 3)),
            "hooks": OrderedDict(),
        }
        self.restored = 0

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.restored += 1


@pytest.mark.parametrize(
    "held",
    [
        np.arange(3), [np.ones(2), 1], {"table": np.zeros((2, 2))}, torch.arange(3), [torch.arange(3)],
        {"made": torch.arange(3.0)}, (torch.ones(2), 1), {}, [], None,
    ],
)  # fmt: skip
def test_a_module_may_hold_whatever_has_no_truth_value(held: Any) -> None:  # noqa: ANN401
    net = nn.Linear(2, 2)
    net.held = net.again = held
    own = skeleton(net)
    assert own.held is own.again
    assert type(own.held) is type(held)
    assert str(own.held) == str(held)
    assert own.held is not held or not isinstance(held, dict | list | np.ndarray)


class Own(nn.Linear):
    """Says itself how it is copied."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Own":
        new = Own(self.in_features, self.out_features)
        new.weight, new.bias = self.weight, self.bias
        return new


def test_a_skeleton_is_what_deepcopy_makes_with_shared_tensors() -> None:
    net = nn.Sequential(ResidualNet(), Holder(), Own(2, 2), nn.MultiheadAttention(8, 2), nn.LSTM(3, 4))
    tensors = {id(t): t for t in net.state_dict(keep_vars=True).values()}
    ours, theirs = skeleton(net), copy.deepcopy(net, dict(tensors))
    for (path, a), (name, b) in zip(ours.named_modules(), theirs.named_modules(), strict=True):
        assert (path, type(a), list(a.__dict__)) == (name, type(b), list(b.__dict__))
        assert a is not net.get_submodule(path)
        for key, value in a.__dict__.items():
            assert type(value) is type(b.__dict__[key])
            if isinstance(value, dict | list | set):
                assert value is not net.get_submodule(path).__dict__[key]
    assert {id(t) for t in ours.state_dict(keep_vars=True).values()} == set(tensors)


def test_what_is_shared_inside_a_module_is_shared_inside_its_copy() -> None:
    own = skeleton(Holder())
    assert own.again["shared"] is own.shared
    assert own.again["layers"] == [own.layer] == [own.same[0]]
    assert own.restored == 1


def test_a_shallow_copy_is_what_copy_makes() -> None:
    layer = nn.Conv2d(1, 2, 3)
    ours, theirs = shallow(layer), copy.copy(layer)
    assert ours is not layer
    assert {k: id(v) for k, v in ours.__dict__.items()} == {k: id(v) for k, v in theirs.__dict__.items()}


USES: dict[str, Callable[[TracedModule], object]] = {
    "call": lambda traced: traced(torch.zeros(1, 3, 8, 8)),
    "code": lambda traced: traced.code,
    "signature": lambda traced: inspect.signature(traced.forward),
    "print": str,
}


@pytest.mark.parametrize("use", USES)
def test_a_traced_module_is_compiled_when_it_is_needed(use: str) -> None:
    net = ResidualNet().eval()
    traced, x = trace(net), torch.randn(1, 3, 8, 8)
    before = traced.is_compiled
    USES[use](traced)
    assert (before, traced.is_compiled) == (False, True)
    assert torch.equal(traced(x), net(x))


def test_a_traced_module_is_pickled_before_it_is_compiled() -> None:
    net, x = ResidualNet().eval(), torch.randn(1, 3, 8, 8)
    assert torch.equal(pickle.loads(pickle.dumps(trace(net)))(x), net(x))


def test_copies_are_compiled_as_their_original_is() -> None:
    traced = trace(ResidualNet())
    assert not copy.deepcopy(traced).is_compiled
    traced.recompile()
    assert copy.deepcopy(traced).is_compiled
    assert not skeleton(traced, compiled=False).is_compiled


class Frozen(nn.Module):
    """Another function in training, though no code of it reads ``training``."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0

    def train(self, mode: bool = True) -> "Frozen":  # noqa: FBT001, FBT002 - as nn.Module has it
        self.scale = 2.0 if mode else 1.0
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def test_a_module_with_a_train_of_its_own_is_traced_in_both_modes() -> None:
    traced = trace(nn.Sequential(Frozen(), nn.Linear(2, 2)))
    assert traced.train_graph is not None
    assert [n.args[1] for g in traced.graphs.values() for n in g.nodes if n.op == "call_function"] == [1.0, 2.0]


def test_a_node_knows_its_line() -> None:
    node = next(n for n in trace(nn.Sequential(Frozen())).graph.nodes if n.op == "call_function")
    assert str(node.stack_trace).splitlines()[-1].startswith(f'  File "{__file__}"')


def test_shapes_tell_numbers_of_different_types_apart() -> None:
    whole = torch.ones(2, dtype=torch.int64)
    found = [shapes(POINTWISE, torch.ops.aten.sub.Tensor, (whole, number), {}).dtype for number in (1, 1.0, True + 0)]
    assert found == [torch.int64, torch.float32, torch.int64]


def test_shapes_tell_strides_apart() -> None:
    x = torch.zeros(1, 4, 3, 3)
    last = x.to(memory_format=torch.channels_last)
    found = [shapes(POINTWISE, torch.ops.aten.exp.default, (t,), {}) for t in (x, last, x)]
    assert [t.stride() for t in found] == [x.stride(), last.stride(), x.stride()]
    assert found[0] is found[2]
    assert all(isinstance(t, Tensor) and t.is_meta for t in found)


def test_a_graph_can_be_traced_again_before_it_is_compiled() -> None:
    traced = trace(ResidualNet())
    again = fx.symbolic_trace(traced)
    assert {str(n.target) for n in again.graph.nodes} >= {str(n.target) for n in traced.graph.nodes if n.op != "output"}


class Keeping(nn.Module):
    """Keeps what it computes for others to look at, as maps of attention are."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.first, self.last, self.way = nn.Linear(6, 8), nn.Linear(8, 3), way

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        self.kept: Any = {"attribute": h, "list": [h], "nested": {"layers": [(h, h.mean())]}}[self.way]
        return self.last(h)  # type: ignore[no-any-return]


@pytest.mark.parametrize("keep_code", [False, True])
@pytest.mark.parametrize("way", ["attribute", "list", "nested"])
def test_a_model_that_keeps_tensors_of_its_last_run(way: str, *, keep_code: bool) -> None:
    model, x = Keeping(way), torch.randn(4, 6)
    model(x)
    kept = model.kept
    result = copy.deepcopy(fxc.prune(model, x, keep_code=keep_code).module)
    torch.testing.assert_close(result(x), model(x))
    net = copy.deepcopy(fxc.compress(model, x, keep_code=keep_code))
    torch.testing.assert_close(net.finalize()(x), model(x), rtol=0.1, atol=0.05)
    assert model.kept is not kept  # by the calls here alone
    assert type(model.kept) is type(kept)
