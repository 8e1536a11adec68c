"""Runs that only look borrow the memory of the parameters: nothing of it is copied for them, and nothing changes."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.errors import UnsupportedModelError
from fxcompress.trace import verify
from fxcompress.trace.effects.undo import UndoWrites
from fxcompress.trace.inputs import ExampleInputs
from fxcompress.trace.model.own_modes import own_modes
from fxcompress.trace.model.skeleton import copy_tensors, skeleton
from fxcompress.trace.verify import agree, computes_the_same, stirred
from tests.exactness import Fingerprint

pytestmark = pytest.mark.cpu
X = torch.ones(2, 4, dtype=torch.float64)


class Asking(nn.Module):
    """Asks for a type, so that the graph is compared with it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)
        self.tied = nn.Linear(4, 6)
        self.tied.weight = self.first.weight
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.first(x) + self.tied(x))
        kind: Any = type(x)
        return self.last(h if kind is float else h.relu())  # type: ignore[no-any-return]


class Writes(nn.Module):
    """Adds to a parameter in each call, and returns what it has become."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by, self.total = by, nn.Parameter(torch.zeros(4, dtype=torch.float64), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        self.total.add_(self.by)
        return x + self.total


class Merging(nn.Linear):
    """Puts another weight into place in evaluation."""

    def train(self, mode: bool = True) -> "Merging":  # noqa: FBT001, FBT002 - the signature of nn.Module
        super().train(mode)
        if not mode:
            self.weight.data = self.weight.data * 2
        return self


class Restless(nn.Linear):
    """Writes to its weight what is there already."""

    def train(self, mode: bool = True) -> "Restless":  # noqa: FBT001, FBT002
        super().train(mode)
        self.weight.data.copy_(self.weight.data.clone())
        return self


def memory(module: nn.Module) -> set[int]:
    return {parameter.data_ptr() for parameter in module.parameters()}


def test_borrowed_parameters_are_other_objects_over_the_same_memory() -> None:
    net = Asking()
    own = skeleton(net)
    copy_tensors(own, set(), lent=True)
    assert memory(own) == memory(net)
    assert not {id(p) for p in own.parameters()} & {id(p) for p in net.parameters()}
    assert own.tied.weight is own.first.weight
    assert own.norm.running_mean is not None
    assert net.norm.running_mean is not None
    assert own.norm.running_mean.data_ptr() != net.norm.running_mean.data_ptr()


def test_what_two_networks_share_is_stirred_once() -> None:
    net = Asking()
    copies: dict[int, Tensor] = {}
    first, second = stirred(net, copies), stirred(net, copies)
    assert memory(first) == memory(second)
    assert not memory(first) & memory(net)
    alone = stirred(net)
    for name, parameter in alone.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name))
        assert not torch.equal(parameter, net.get_parameter(name))


def test_comparing_copies_each_parameter_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In four runs of three calls."""
    net, copied = Asking(), list[int]()
    copy = copy_tensors

    def noted(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        made = copy(*args, **kwargs)
        sources = {id(p) for p in net.parameters()}
        copied.extend(key for key in made if key in sources)
        return made

    monkeypatch.setattr(verify, "copy_tensors", noted)
    visit = Fingerprint(net)
    traced = fxc.ChannelGraph.of(net, X).analysis.module
    copied.clear()
    assert computes_the_same(net, traced, ExampleInputs.of(X))
    assert len(set(copied)) == len(list(net.parameters()))
    visit.check()


def test_what_runs_write_to_borrowed_memory_is_undone_and_seen() -> None:
    inputs, one = ExampleInputs.of(X), Writes(1.0)
    assert agree(one, Writes(1.0), inputs)
    assert not agree(one, Writes(2.0), inputs)
    assert not one.total.any()


def test_running_statistics_are_undone_as_well() -> None:
    norm = nn.BatchNorm1d(4).double()
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    with torch.no_grad(), UndoWrites() as undone:
        norm(X * 3)
        assert norm.running_mean is not None
        assert norm.running_mean.any()
        assert torch.equal(undone.as_it_was(norm.running_mean), before["running_mean"])
        assert undone.as_it_was(norm.weight) is norm.weight
    assert all(torch.equal(tensor, before[name]) for name, tensor in norm.state_dict().items())


def test_a_mode_that_puts_another_weight_into_place_is_refused() -> None:
    net = Merging(4, 4)
    visit = Fingerprint(net)
    with pytest.raises(UnsupportedModelError, match="changes weight"):
        own_modes(net)
    visit.check()


def test_a_mode_that_writes_what_is_there_changes_nothing() -> None:
    assert own_modes(Restless(4, 4)) == ((), ())
