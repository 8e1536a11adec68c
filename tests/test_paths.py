"""Decisions that change nothing: a graph that was traced with one batch takes others where the model does the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.errors import PathError, TraceError
from fxcompress.trace.inputs import ExampleInputs
from fxcompress.trace.traced import TracedModule
from fxcompress.trace.tracer import trace

Body = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """Adds something to features (N, T, 8), between two linear layers, as ``body`` says."""

    one: Tensor
    table: nn.Embedding

    def __init__(self, body: Body) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 12), nn.Linear(12, 4)
        self.table = nn.Embedding(40, 12)
        self.register_buffer("one", torch.ones(1, 1, 12))
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != 8:  # symbolic tracing gives up here
            raise ValueError("eight features")
        result: Tensor = self.last(self.body(self, self.first(x)))
        return result


def features(batch: int, length: int = 5) -> Tensor:
    return torch.randn(batch, length, 8, generator=torch.Generator().manual_seed(batch))


def traced(body: Body, batch: int) -> tuple[Net, TracedModule]:
    """A network, and its graph from a batch of that size."""
    net = Net(body).eval()
    return net, trace(net, ExampleInputs.of(features(batch))).eval()


def expanded(net: Net, x: Tensor) -> Tensor:
    """Positions for each row, made of one row where there are more; so do the decoders of Hugging Face."""
    places = torch.arange(x.shape[1]).unsqueeze(0)
    if x.shape[0] != places.shape[0]:
        places = places.expand(x.shape[0], -1)
    found: Tensor = net.table(places)
    return x + found


def expanded_twice(net: Net, x: Tensor) -> Tensor:
    """Two such decisions, in two layers."""
    return expanded(net, expanded(net, x).relu())


def compared(net: Net, x: Tensor) -> Tensor:
    """All sizes compared at once."""
    one = net.one.expand(1, x.shape[1], -1)
    if one.shape != x.shape:
        one = one.expand(x.shape)
    return x * one


def repeated(net: Net, x: Tensor) -> Tensor:
    """A copy where there are more rows, and none where there is one."""
    one = net.one
    if one.shape[0] != x.shape[0]:
        one = one.repeat(x.shape[0], 1, 1)
    return x * one


def padded(_: Net, x: Tensor) -> Tensor:
    """Padded up to a whole number of pairs of rows; with two rows, by nothing."""
    more = x.shape[0] - 2
    if more != 0:
        x = F.pad(x, (0, 0, 0, 0, 0, more))
    return x


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("body", [expanded, expanded_twice, compared, repeated])
def test_graph_takes_other_batches(body: Body, batch: int) -> None:
    net, graph = traced(body, batch)
    for rows in (1, 2, 4):
        for length in (5, 7, 1):
            x = features(rows, length)
            assert torch.equal(graph(x), net(x))


def test_pruned_network_takes_other_batches() -> None:
    net = Net(expanded).eval()
    with torch.no_grad():
        for tensor in (net.first.weight, net.first.bias, net.table.weight.T):
            tensor[3:7] = 0
    small = fxc.prune(net, features(2)).module
    assert small.get_parameter("first.weight").shape[0] == 8
    for rows in (1, 3):
        torch.testing.assert_close(small(features(rows)), net(features(rows)))


def test_decision_that_matters_stays_a_check() -> None:
    def centred(_: Net, x: Tensor) -> Tensor:
        return x if x.shape[0] == 1 else x - x.mean(0, keepdim=True)

    def shuffled(net: Net, x: Tensor) -> Tensor:
        return x + net.table.weight[: x.shape[1]].expand(1, -1, -1) if x.shape[0] != 1 else x

    def wide(net: Net, x: Tensor) -> Tensor:  # expands along another dim than that which was compared
        one = net.one
        return x * (one.expand(-1, x.shape[0], -1).sum(1, keepdim=True) if one.shape[0] != x.shape[0] else one)

    for body in (centred, shuffled):
        for batch, other in ((2, 1), (1, 2)):
            net, graph = traced(body, batch)
            assert torch.equal(graph(features(batch)), net(features(batch)))
            with pytest.raises(PathError, match="another path"):
                graph(features(other))
    net, graph = traced(wide, 2)
    with pytest.raises(PathError):
        graph(features(1))


def test_copy_that_is_written_to_is_another_path() -> None:
    def marked(net: Net, x: Tensor) -> Tensor:
        one = net.one * 1
        again = one.repeat(x.shape[0], 1, 1) if one.shape[0] != x.shape[0] else one
        again[:, :, 0] = 5.0
        return x * one + again  # of one row, both are the same tensor

    net, graph = traced(marked, 2)
    assert torch.equal(graph(features(3)), net(features(3)))
    with pytest.raises(PathError):
        graph(features(1))


def test_decisions_must_agree() -> None:
    class Two(Net):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x) + super().forward(y)

    net = Two(expanded).eval()
    graph = trace(net, ExampleInputs.of((features(2), features(2)))).eval()
    for rows in (1, 3):
        assert torch.equal(graph(features(rows), features(rows)), net(features(rows), features(rows)))
    with pytest.raises(PathError, match="sizes"):
        graph(features(1), features(3))


def test_padding_to_a_size_needs_that_size() -> None:
    net, graph = traced(padded, 2)
    assert torch.equal(graph(features(2)), net(features(2)))


def asks_for_gradients(net: Net, x: Tensor) -> Tensor:
    """A question with no consequence for the numbers, such as where a hook is registered."""
    if x.requires_grad:
        x = x.view(x.shape)
    return x.relu() * net.one


@pytest.mark.parametrize("frozen", [False, True])
def test_question_for_gradients_that_changes_nothing(*, frozen: bool) -> None:
    net = Net(asks_for_gradients)
    net.requires_grad_(not frozen)
    graph = trace(net, ExampleInputs.of(features(2)))
    with torch.no_grad():
        assert torch.equal(graph(features(2)), net(features(2)))
    graph.requires_grad_()
    assert torch.equal(graph(features(2)), net(features(2)))
    graph(features(2)).sum().backward()
    trained = fxc.compress(net, features(2))
    trained.eval()(features(2)).sum().backward()


def test_question_for_gradients_that_matters() -> None:
    """Evaluation is without gradients, as a rule, and training with them; anything else is said."""

    def doubled(_: Net, x: Tensor) -> Tensor:
        return x * 2 if x.requires_grad else x

    net, graph = traced(doubled, 2)
    with torch.no_grad():
        assert torch.equal(graph(features(2)), net(features(2)))
    with pytest.raises(PathError, match=r"reads off tensors, \(True,\) came out as True"):
        graph(features(2))
    graph.train(), net.train()
    assert torch.equal(graph(features(2)), net(features(2)))
    with torch.no_grad(), pytest.raises(PathError, match=r"reads off tensors, \(False,\) came out as False"):
        graph(features(2))


def test_networks_that_ask_for_gradients_are_compressed() -> None:
    def doubled(net: Net, x: Tensor) -> Tensor:
        return x.relu() * (2 if x.requires_grad else 3) * net.one

    net = Net(doubled)
    compressed = fxc.compress(net, features(2))
    with torch.no_grad():
        net.first.weight[[0, 3]] = 0
        net.first.bias[[0, 3]] = 0
    result = fxc.prune(net, features(2)).module
    assert result.get_parameter("first.weight").shape[0] == 10
    compressed(features(3)).sum().backward()
    assert torch.allclose(result.train()(features(3)), net.train()(features(3)), atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(result.eval()(features(3)), net.eval()(features(3)), atol=1e-5)


def test_runs_leave_nothing_behind() -> None:
    def constant(_: Net, x: Tensor) -> Tensor:
        shift = torch.tensor([1.0, 2.0] * 6)
        return x + (shift if shift[None].shape[0] == x.shape[0] else shift.expand(x.shape[0], 1, -1))

    _, graph = traced(constant, 2)
    held: list[Any] = [value for value in vars(graph).values() if isinstance(value, Tensor)]
    assert len(held) <= 1


def wakes(net: Net, x: Tensor) -> Tensor:
    """Lets its input have gradients in training, as a checkpoint needs it."""
    x = x.detach()
    if net.training:
        x.requires_grad = True
    return x * net.one


@pytest.mark.parametrize("symbolic", [False, True])
def test_setting_requires_grad(*, symbolic: bool) -> None:
    class Plain(Net):
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.last(self.body(self, self.first(x)).relu())
            return result

    net = (Plain if symbolic else Net)(wakes)
    with torch.no_grad():
        net.first.weight[2], net.first.bias[2] = 0, 0
    small = fxc.prune(net, features(2)).module
    assert small.get_parameter("last.weight").shape == (4, 11)
    for training in (False, True):
        torch.testing.assert_close(small.train(training)(features(2)), net.train(training)(features(2)))
    assert isinstance(small, TracedModule)
    assert small.train_graph is not None
    (asked,) = small.train_graph.find_nodes(op="call_method", target="requires_grad_")
    assert asked.args[1] is True


def test_setting_data_has_no_graph() -> None:
    class Sets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc(x)
            y.data = y.data * 2
            return y

    with pytest.raises(TraceError, match="it sets data of a tensor"):
        trace(Sets(), ExampleInputs.of(torch.zeros(2, 8)))


def test_example_with_gradients() -> None:
    net = Net(expanded).eval()
    example = (features(2) * 1.0).requires_grad_()
    graph = trace(net, ExampleInputs.of(example * 1.0)).eval()  # no leaf
    assert torch.equal(graph(features(1)), net(features(1)))
    assert example.grad is None
