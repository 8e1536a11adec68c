"""Models that symbolic tracing cannot do: what a trace by running gets right, what it checks, what it refuses."""

import copy
import math
import pickle
import random
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxcompress as fxc
from fxcompress.channels.prepare import in_pieces_by_inputs
from fxcompress.errors import ExampleInputError, PathError, TraceError
from fxcompress.trace.graph.guards import check, check_argument, shape_of
from fxcompress.trace.inputs import ExampleInputs
from fxcompress.trace.traced import TracedModule
from fxcompress.trace.tracer import trace
from tests.exactness import Fingerprint, difference

fx.wrap("pick_rows")


def pick_rows(x: Tensor) -> Tensor:
    """Another path for each length, which a trace must not bake in."""
    return x[::2] if len(x) > 3 else x


class Net(nn.Module):
    """conv (3 -> 8), one or more convs (8 -> 8), as the function says, and a linear layer (8 -> 4)."""

    def __init__(self, body: Callable[["Net", Tensor], Any]) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.body = body

    def forward(self, x: Tensor) -> Any:  # noqa: ANN401
        if x.shape[1] != 3:  # symbolic tracing gives up here
            raise ValueError("three channels")
        return self.body(self, x)


def image(*shape: int) -> Tensor:
    return torch.randn(shape or (2, 3, 8, 8), generator=torch.Generator().manual_seed(1))


def traced(model: nn.Module, *args: Any, **kwargs: Any) -> TracedModule:  # noqa: ANN401
    """A trace by running that leaves the model and the random numbers alone."""
    visit, state = Fingerprint(model), torch.get_rng_state()
    python, numpy = random.getstate(), str(np.random.get_state())  # noqa: NPY002
    result = trace(model, ExampleInputs(args, kwargs))
    visit.check()
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python
    assert str(np.random.get_state()) == numpy  # noqa: NPY002
    assert list(result.state_dict()) == list(model.state_dict())
    assert any(node.target is check_argument for node in result.graph.nodes), "symbolic tracing did it"
    result.graph.lint()
    return result


def same(a: nn.Module, b: nn.Module, *args: Any, **kwargs: Any) -> bool:  # noqa: ANN401
    results = []
    for net in (a, b):
        torch.manual_seed(0)
        results.append(copy.deepcopy(net)(*args, **kwargs))
    return type(results[0]) is type(results[1]) and difference(*results) == 0


def looped(net: Net, x: Tensor) -> Tensor:
    """One convolution for each four rows, then the mean over space."""
    x = F.relu(net.conv1(x))
    for _ in range(x.shape[2] // 4):
        x = x + net.conv2(x)
    n, c, h, w = x.shape
    return net.head(x.view(n, c, h * w).mean(-1))  # type: ignore[no-any-return]


def test_a_loop_over_a_size() -> None:
    model = Net(looped).eval()
    net = traced(model, image())
    for shape in ((2, 3, 8, 8), (1, 3, 8, 8), (5, 3, 8, 12), (3, 3, 11, 5)):
        assert same(model, net, image(*shape))
    with pytest.raises(
        PathError,
        match=r"(?s)test_concrete\.py:\d+: a decision on sizes \(12,\) came out as 3, and was 2 "
        r"in the trace\n  trace the network again with example inputs of this size",
    ):
        net(image(2, 3, 12, 8))


def branching(net: Net, x: Tensor) -> Tensor:
    x = net.conv1(x)
    return net.conv2(x) if x.shape[-1] > 8 and x.size(0) != 7 else x


def test_a_branch_on_a_shape() -> None:
    model = Net(branching).eval()
    wide, narrow = traced(model, image(2, 3, 8, 12)), traced(model, image(2, 3, 8, 8))
    for net, right, wrong in (
        (wide, [(2, 3, 8, 9), (4, 3, 4, 30)], (2, 3, 8, 8)),
        (narrow, [(1, 3, 5, 1)], (2, 3, 8, 9)),
    ):
        assert all(same(model, net, image(*shape)) for shape in right)
        with pytest.raises(PathError, match="another path"):
            net(image(*wrong))
    with pytest.raises(PathError, match=r"sizes \(7,\) came out as False, and was True"):
        wide(image(7, 3, 8, 12))
    with pytest.raises(
        PathError, match="argument x is a tensor of rank 3; the network was traced with a tensor of rank 4"
    ):
        wide(image(3, 8, 12))


READS: dict[str, Callable[[Net, Tensor], Any]] = {
    "index": lambda net, x: net.conv1(x) * [1, 2, 3, 4, 5][x.shape[0]],
    "repeat": lambda net, x: torch.cat([net.conv1(x)] * x.shape[0]),
    "hash": lambda net, x: net.conv1(x) * {2: 3.0, 3: 4.0, 4: 5.0}[x.shape[0]],
    "float": lambda net, x: net.conv1(x) * math.fsum([np.sqrt(x.shape[0])]),
    "len": lambda net, x: net.conv1(x) * [1, 2, 3, 4, 5][len(x)],
    "iterate": lambda net, x: sum(net.conv1(row[None]) for row in x),
    "equal shapes": lambda net, x: net.conv1(x) * (2 if x.shape == (2, 3, 8, 8) else 3),
    "numel": lambda net, x: net.conv1(x) * (2 if x[:, :, 0, 0].numel() == 6 else 3),
    "maximum": lambda net, x: net.conv1(x) * max(range(x.shape[0])),
    "text": lambda net, x: net.conv1(x) * len(str(x.shape[0] * 50)),
    "format": lambda net, x: net.conv1(x) * {"2": 3.0, "size(2)": 4.0}.get(f"{x.shape[0]}", 5.0),
    "name": lambda net, x: getattr(net, f"conv{x.shape[0] - 1}")(x),
}


@pytest.mark.parametrize("name", READS)
def test_every_way_to_read_a_size_is_a_decision(name: str) -> None:
    model = Net(READS[name]).eval()
    net = traced(model, image())
    assert same(model, net, image())
    with pytest.raises(PathError, match=r"trace the network again"):
        net(image(3, 3, 8, 8))


KINDS: dict[str, Callable[[Tensor], Any]] = {
    "layout": lambda x: x.layout is torch.strided,
    "sparse": lambda x: not x.is_sparse,
    "quantized": lambda x: not x.is_quantized,
    "complex": lambda x: not x.is_complex(),
    "float": lambda x: x.is_floating_point(),
    "contiguous": lambda x: x.is_contiguous(memory_format=torch.contiguous_format),
    "rank": lambda x: x.dim() == 4,
}


@pytest.mark.parametrize("name", KINDS)
def test_what_kind_of_tensor_it_is_can_be_asked(name: str) -> None:
    def body(net: Net, x: Tensor) -> Tensor:
        if not KINDS[name](x):
            x = x.to_dense()
        h = net.conv1(x)
        return h if KINDS[name](h) else h.relu()  # type: ignore[no-any-return]

    model = Net(body).eval()
    net = traced(model, image())
    assert same(model, net, image(3, 3, 6, 10))
    if name in {"layout", "sparse"}:
        with pytest.raises(PathError, match="another path"):
            net(image().to_sparse())


def told(x: Tensor) -> Tensor:
    """Texts for a reader are no decisions."""
    torch._assert(x.dim() == 4, f"{x.shape[2]} rows, and {x.dim()} dims")
    assert x.shape[3] < 1000, f"{x.shape[3]} columns"
    if x.shape[0] > 1000:
        raise ValueError(f"{x.shape[0]} of them")
    return x


ARITHMETIC: dict[str, Callable[[Tensor], Any]] = {
    "view": lambda x: x.view(x.size(0), -1, x.shape[-1] // 2, 2),
    "len": lambda x: x.reshape(len(x), -1) * len(x),
    "len of a row": lambda x: x[0].expand(len(x), -1, -1, -1) * len(x[0]),
    "reversed operands": lambda x: x[:, : 10 - x.shape[0]] * (1 / x.shape[0]),
    "power": lambda x: x * x.shape[-1] ** -0.5,
    "range": lambda x: x + torch.arange(x.shape[-1], device=x.device),
    "interpolate": lambda x: F.interpolate(x, size=(x.shape[2] * 2, x.shape[3] + 1)),
    "shape arithmetic": lambda x: x.new_ones((*x.shape[1:], 1)) * round(x.shape[0] / 2) * abs(-x.shape[1]),
    "messages": told,
    "negation": lambda x: x[:, :, -(x.shape[2] // 2) :, divmod(x.shape[3], 3)[1] :],
}


@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic_on_sizes_is_part_of_the_graph(name: str) -> None:
    def body(net: Net, x: Tensor) -> Tensor:
        assert isinstance(x.shape[0], int)
        return ARITHMETIC[name](net.conv1(x))  # type: ignore[no-any-return]

    model = Net(body).eval()
    net = traced(model, image())
    for shape in ((2, 3, 8, 8), (3, 3, 6, 10), (1, 3, 4, 8)):
        assert same(model, net, image(*shape))


class Dicts(nn.Module):
    """Takes and returns dicts; the keyword argument and a flag change what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(
        self, batch: dict[str, Any], *more: Tensor, scale: float = 2.0, flag: bool = False, **rest: Tensor
    ) -> dict[str, Any]:
        named = {**batch, **rest}
        result = {key: self.fc(value) * scale for key, value in named.items() if isinstance(value, Tensor)}
        return {"first": result, "second": (*result.values(), *more), "none": None, "rows": len(more) if flag else None}


def test_nested_arguments_and_results() -> None:
    model, x, y, z = Dicts(), torch.randn(2, 4), torch.randn(3, 4), torch.randn(4, 4)
    net = traced(model, {"a": x, "b": y, "n": 3})
    assert same(model, net, {"a": y, "b": z, "n": 3})
    assert net({"a": x, "b": y, "n": 3})["none"] is None
    with pytest.raises(
        PathError, match="argument batch is a dict of 'a': a tensor of rank 2, 'n': an int; the network was"
    ):
        net({"a": x, "n": 3})
    with pytest.raises(PathError, match="argument flag is True; the network was traced with False"):
        net({"a": x, "b": y, "n": 3}, flag=True)
    with pytest.raises(PathError, match=r"argument scale is 3\.0; the network was traced with 2\.0"):
        net({"a": x, "b": y, "n": 3}, scale=3.0)
    given = traced(model, {"a": x}, y, scale=3.0, c=z)
    assert same(model, given, {"a": z}, y, scale=3.0, c=x)
    assert same(model, given, {"a": z}, y, scale=4.0, c=x)
    assert given({"a": x}, y, scale=3.0, c=z)["first"].keys() == {"a", "c"}


@dataclass
class Pair:
    first: Tensor
    second: Tensor | None = None


@pytest.mark.parametrize(
    ("kind", "read"),
    [(Pair, lambda r: r.first), (lambda first: OrderedDict(first=first), lambda r: r["first"])],
)
def test_results_of_a_kind_of_their_own(kind: Callable[[Tensor], Any], read: Callable[[Any], Tensor]) -> None:
    model = Net(lambda net, x: kind(F.relu(net.conv1(x)))).eval()
    net = traced(model, image())
    found, expected = net(image(3, 3, 8, 8)), model(image(3, 3, 8, 8))
    assert type(found) is type(expected)
    assert torch.equal(read(found), read(expected))
    with torch.no_grad():
        model.conv1.weight[1] = 0
        model.conv1.bias[1] = 0  # type: ignore[index]
    assert not fxc.prune(model, image()).report.modified  # what the result holds is an output of the network


def test_a_wrapped_function_stays_whole() -> None:
    model = Net(lambda net, x: pick_rows(net.conv1(x))).eval()
    net = traced(model, image())
    assert [node.target for node in net.graph.nodes if node.target is pick_rows] == [pick_rows]
    assert same(model, net, image(7, 3, 8, 8))


class Straight(torch.autograd.Function):
    """sign, with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ANN401
        return x.sign()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ANN401
        return gradient


def test_gradients() -> None:
    """Autograd functions keep their backward; what runs without gradients goes on doing so."""

    def body(net: Net, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = net.conv2(x.new_ones(1, 8, 4, 4)).amax()
        return Straight.apply(net.conv1(x)) * scale  # type: ignore[no-any-return]

    model = Net(body)
    net = traced(model, image())
    for module in (model, net):
        module.zero_grad()
        module(image(3, 3, 8, 8)).square().sum().backward()
        assert module.get_parameter("conv2.weight").grad is None
        module.register_buffer("found", module.get_parameter("conv1.weight").grad)
    assert model.found is not None
    assert torch.equal(model.found, net.found)  # type: ignore[arg-type]


def test_both_modes_and_what_reads_them() -> None:
    class Modes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Net(lambda net, x: F.dropout(net.conv1(x), 0.5, net.training))
            self.norm, self.drop = nn.BatchNorm2d(8), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.inner(x))
            return x + self.drop(x) * torch.rand(x.shape[0], 1, 1, 1)  # type: ignore[no-any-return]

    model = Modes()
    net = traced(model, image())
    assert set(net.graphs) == {"eval", "train"}
    assert net.mode_readers == ("inner",)
    for training in (False, True):
        model.train(training), net.train(training)
        assert same(model, net, image(5, 3, 8, 8))
    model.eval(), net.eval()
    model.drop.train(), net.get_submodule("drop").train()
    assert same(model, net, image(5, 3, 8, 8)), "dropout that returns its argument is taken for it"


def test_buffers_are_written_by_the_traced_network_only() -> None:
    def body(net: Net, x: Tensor) -> Tensor:
        net.seen.add_(x.shape[0])  # type: ignore[operator]
        return net.conv1(x) + net.seen  # type: ignore[no-any-return]

    model = Net(body)
    net = copy.deepcopy(traced(model, image()))
    assert same(model, net, image(3, 3, 8, 8))
    net(image()), net(image(3, 3, 8, 8))
    assert net.get_buffer("seen") == 5
    assert model.seen == 0


def in_place(net: Net, x: Tensor) -> Tensor:
    x = net.conv1(x)
    y, flat = x, x.view(-1)
    x += 1
    x[:, 0] = 2
    y.mul_(3).relu_()
    mask = y > 1
    mask &= y < 5
    return flat + x.view(-1) * mask.view(-1)


def test_a_trace_by_running_can_be_pickled() -> None:
    def body(x: Tensor) -> Tensor:
        halves = x.chunk(2, 1)
        return halves[0] * float(x.shape[0]) if int(x.shape[2] / 2) else halves[1]

    net = traced(Net(lambda net, x: body(net.conv1(x))).eval(), image())
    del net.__dict__["body"]
    again = pickle.loads(pickle.dumps(net))
    assert same(net, again, image(2, 3, 8, 4))
    assert same(net, again, image(3, 3, 8, 8))
    with pytest.raises(PathError):
        again(image(3, 3, 1, 8))


def test_symbolic_tracing_leaves_buffers_alone() -> None:
    """torch.fx has the values of buffers at hand, and would write to them for real."""

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.seen.add_(1)  # type: ignore[operator]
            return x * 2

    model = Counts()
    net = copy.deepcopy(trace(model))
    assert model.seen == 0
    net.train()(image()), net.eval()(image())
    assert net.get_buffer("seen") == 1


def test_in_place_ops_stay_in_place() -> None:
    model = Net(in_place).eval()
    assert same(model, traced(model, image()), image(3, 3, 8, 8))


class Follows(nn.Module):
    """Makes tensors on the device of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] == 9:
            return x
        return self.fc(x) + torch.arange(4, device=x.device) + torch.zeros(x.shape, device=self.fc.weight.device)  # type: ignore[no-any-return]


def test_devices_follow_the_input() -> None:
    net = traced(Follows(), torch.randn(2, 4))
    assert "device(type" not in net.code
    assert net.to("meta")(torch.randn(3, 4, device="meta")).device.type == "meta"


def scratch(net: Net, x: Tensor) -> Tensor:
    net.pad = net.conv1(x)
    return net.conv2(net.pad)  # type: ignore[no-any-return]


def test_an_attribute_that_is_only_a_scratch_pad() -> None:
    model = Net(scratch).eval()
    assert same(model, traced(model, image()), image(3, 3, 8, 8))


def remember(net: Net, x: Tensor) -> Tensor:
    net.count = getattr(net, "count", 0) + 1  # type: ignore[assignment]
    return net.conv1(x) * net.count  # type: ignore[no-any-return]


def swallow(net: Net, x: Tensor) -> Tensor:
    """On values it computes one thing, on fakes another."""
    try:
        return net.conv1(x) * float(x.sum())  # type: ignore[no-any-return]
    except Exception:  # noqa: BLE001
        return x


REFUSED: dict[str, tuple[Callable[[Net, Tensor], Any], str]] = {
    "value": (lambda net, x: x if x.sum() > 0 else -x, r"reads values out of a tensor at .*test_concrete\.py:\d+"),
    "item": (lambda net, x: net.conv1(x) * x.sum().item(), r"reads values out of a tensor.*keep them in tensors"),
    "python": (lambda net, x: net.conv1(x) * random.random(), r"draws random numbers from Python or numpy"),
    "numpy": (lambda net, x: net.conv1(x) * np.random.rand(), r"draws random numbers from Python or numpy"),  # noqa: NPY002
    "count": (remember, r"sets its attribute (body\.)?count while it runs"),
    "vmap": (
        lambda net, x: torch.vmap(torch.sin)(net.conv1(x)),
        r"transforms a function by torch\.vmap or torch\.func at .*test_concrete\.py:\d+.*for all of the batch",
    ),
    "copy": (lambda net, x: copy.copy(net.conv1(x)), r"copies a tensor .* at .*test_concrete\.py:\d+.*x\.clone\(\)"),
    "array": (lambda net, x: x * net.conv1(x).detach().numpy().mean(), r"numpy of a tensor at .*test_concrete\.py:\d+"),
    "list": (
        lambda net, x: x * sum(net.conv1(x).mean((1, 2, 3)).tolist()),
        r"reads values out of a tensor at .*test_concrete\.py:\d+ \((tolist|item)\).*keep them in tensors",
    ),
    "swallowed": (swallow, r"reads values out of a tensor"),
    "object": (lambda net, x: object(), r"a object .*a graph cannot hold it"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_graph_can_do_is_refused(name: str) -> None:
    body, text = REFUSED[name]
    model = Net(body)
    visit, state = Fingerprint(model), random.getstate()
    with pytest.raises(
        TraceError, match=rf"(?s)^torch\.fx cannot trace Net: .*Nor can it be traced by running it.*{text}"
    ):
        trace(model, ExampleInputs((image(),)))
    visit.check()
    assert random.getstate() == state


@pytest.mark.parametrize("gradients", [True, False])
def test_a_tensor_made_of_a_tensor_shares_its_memory(gradients: bool) -> None:  # noqa: FBT001 - a parameter of the test
    def body(net: Net, x: Tensor) -> Tensor:
        h = net.conv1(x)
        with torch.set_grad_enabled(gradients):
            same = torch.Tensor(h)
        if gradients:  # torch forbids it otherwise
            same.mul_(2.0)
        y: Tensor = net.conv2(h * torch.Tensor(same.relu()))
        return y

    model = dead(Net(body))
    pruned = fxc.prune(model, image()).module
    assert pruned.get_parameter("conv1.weight").shape[0] == 6
    for each in (model, pruned):
        each(image(3, 3, 8, 8)).sum().backward()
    assert same(model, traced(model, image()), image(3, 3, 8, 8))
    assert torch.allclose(model(image(3, 3, 8, 8)), pruned(image(3, 3, 8, 8)))


def test_without_inputs_the_error_asks_for_them() -> None:
    with pytest.raises(TraceError, match=r"or pass example_inputs: it is then traced by running it on them"):
        trace(Net(looped))


def test_ways_out_of_an_error_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise TraceError("torch.fx cannot trace Net: its forward is wrapped by a decorator")

    monkeypatch.setattr("fxcompress.trace.tracer._trace_symbolically", refuse)
    with pytest.raises(TraceError) as caught:
        trace(Net(looped))
    _, way, pieces = str(in_pieces_by_inputs(caught.value)).splitlines()
    assert way == "  pass example_inputs: it is then traced by running it on them"
    assert pieces.startswith("  where it has no graph even then, those of its modules that have one are taken")


def dead(model: Net) -> Net:
    with torch.no_grad():
        for layer in (model.conv1, model.conv2):
            layer.weight[[1, 4]] = 0
            layer.bias[[1, 4]] = 0  # type: ignore[index]
    return model


@pytest.mark.parametrize("inputs", [image(), None])
def test_pruning_is_exact_and_other_sizes_still_work(inputs: Tensor | None) -> None:
    model = dead(Net(looped)).eval().double()
    result = fxc.prune(model, inputs if inputs is None else inputs.double())
    assert result.module.get_parameter("conv1.weight").shape == (6, 3, 3, 3)
    assert result.module.get_parameter("head.weight").shape == (4, 6)
    rows = 8 if inputs is not None else 224
    for shape in ((2, 3, rows, 8), (5, 3, rows + 2, 9)):
        assert difference(model(image(*shape).double()), result.module(image(*shape).double())) <= 1e-12
    with pytest.raises(PathError):
        result.module(image(2, 3, rows + 4, 8).double())
    twice = fxc.prune(result.module, image(2, 3, rows, 8).double())
    assert not twice.report.modified


COUNTED: dict[str, Callable[[Tensor], int]] = {
    "a product": lambda x: x.shape[1] * x.shape[2],
    "numel": lambda x: x[0, :, :, 0].numel(),
    "numel by a function": lambda x: torch.numel(x[0, :, :, 0]),
    "a part of it": lambda x: 2 * x.numel() // (x.shape[0] * x.shape[3] * 2),
    "two sizes": lambda x: x.size(1) * len(x[0, 0]),
}


@pytest.mark.parametrize("name", COUNTED)
def test_a_decision_on_sizes_that_are_cut_is_taken_on_those_of_before(name: str) -> None:
    """Sizes of channels and of rows: the others may be any that take the same path."""

    def body(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.conv1(x))
        x = net.conv2(x) if COUNTED[name](x) <= 64 else x
        return net.head(x.mean((2, 3)))  # type: ignore[no-any-return]

    model = dead(Net(body)).eval().double()
    result = fxc.prune(model, image().double())
    assert result.module.get_parameter("conv1.weight").shape == (6, 3, 3, 3)
    with torch.no_grad():
        for tensor in ("conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias"):
            model.get_parameter(tensor)[5] = 0
            result.module.get_parameter(tensor)[3] = 0
    again = fxc.prune(result.module, image().double())
    assert again.module.get_parameter("conv1.weight").shape == (5, 3, 3, 3)
    for net in (result.module, again.module):
        for shape in ((2, 3, 8, 8), (4, 3, 8, 3), (3, 3, 5, 9)):
            assert difference(model(image(*shape).double()), net(image(*shape).double())) <= 1e-12
        with pytest.raises(PathError, match=r"came out as False, and was True"):  # 6 * 9 <= 64, but 8 * 9 is not
            net(image(2, 3, 9, 8).double())


def test_a_decision_on_sizes_that_cannot_be_written_stands_for_those_only() -> None:
    def body(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.conv1(x))
        x = net.conv2(x) if x.flatten(1, 2).shape[1] <= 64 else x
        return net.head(x.mean((2, 3)))  # type: ignore[no-any-return]

    model = dead(Net(body)).eval().double()
    result = fxc.prune(model, image().double())
    assert result.module.get_parameter("conv1.weight").shape == (6, 3, 3, 3)
    assert difference(model(image(4, 3, 8, 3).double()), result.module(image(4, 3, 8, 3).double())) <= 1e-12
    with pytest.raises(PathError):
        result.module(image(2, 3, 7, 8).double())


def test_a_size_in_a_value_stays_what_it_was() -> None:
    def body(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.conv1(x))
        x = x / torch.sqrt(torch.tensor(x.shape[1]))
        return net.head(F.relu(net.conv2(x)).mean((2, 3)))  # type: ignore[no-any-return]

    model = dead(Net(body)).eval().double()
    result = fxc.prune(model, image().double())
    assert result.module.get_parameter("conv2.weight").shape == (6, 6, 3, 3)
    assert difference(model(image(3, 3, 6, 9).double()), result.module(image(3, 3, 6, 9).double())) <= 1e-12


def test_checks_stay_when_their_branch_goes() -> None:
    def body(net: Net, x: Tensor) -> Tensor:
        y = net.conv2(net.conv1(x))
        return net.conv1(x) + (y if y.shape[3] < 20 else 0 * y)  # type: ignore[no-any-return]

    model = Net(body).eval()
    with torch.no_grad():
        model.conv2.weight.zero_()
        model.conv2.bias.zero_()  # type: ignore[union-attr]
    result = fxc.prune(model, image())
    assert result.report.modified
    assert isinstance(result.module, fx.GraphModule)
    assert any(node.target is check for node in result.module.graph.nodes)
    assert torch.equal(result.module(image(1, 3, 4, 4)), model(image(1, 3, 4, 4)))
    with pytest.raises(PathError):
        result.module(image(1, 3, 4, 30))


def test_training_a_compressed_network() -> None:
    model = Net(looped)
    net = fxc.compress(model, image())
    net(image(3, 3, 8, 8)).sum().backward()
    assert net.get_parameter("conv2.weight").grad is not None
    net.prune()
    assert net.finalize()(image(4, 3, 8, 8)).shape == (4, 4)


def test_a_rank_that_depends_on_a_size() -> None:
    def body(net: Net, x: Tensor) -> Tensor:
        x = net.conv1(x).squeeze()
        return x.sum(-1) if x.dim() == 4 else x

    net = traced(Net(body).eval(), image())
    assert any(node.target is shape_of for node in net.graph.nodes)
    with pytest.raises(PathError):
        net(image(1, 3, 8, 8))


def test_an_input_that_does_not_run() -> None:
    with pytest.raises(
        ExampleInputError,
        match=r"does not run on the example inputs \(2, 4, 8, 8\) float32: ValueError: three channels at",
    ):
        fxc.prune(Net(looped), image(2, 4, 8, 8))
