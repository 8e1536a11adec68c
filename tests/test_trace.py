"""From a model to its graph: both modes, names, arguments, attributes, and errors."""

import copy
import functools
import importlib.util
import inspect
import operator
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxcompress as fxc
from fxcompress.errors import ExampleInputError, PathError, TraceError
from fxcompress.trace.inputs import ExampleInputs, infer_inputs
from fxcompress.trace.model.skeleton import skeleton
from fxcompress.trace.traced import TracedModule
from fxcompress.trace.tracer import trace
from tests.exactness import Fingerprint, difference


class Modes(nn.Module):
    """Functional dropout, and a second head in training."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.aux = nn.Conv2d(3, 4, 1), nn.Linear(4, 2), nn.Linear(4, 3)
        self.note = {"why": "kept"}

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = F.dropout(self.body(x).mean((2, 3)), 0.5, self.training)
        return (self.head(x), self.aux(x)) if self.training else self.head(x)


def test_a_network_with_a_graph_for_each_mode_names_its_arguments() -> None:
    for model in (Modes(), fxc.compress(Modes(), torch.randn(2, 3, 4, 4))):
        traced = trace(model) if isinstance(model, Modes) else model
        assert len(traced.graphs) == 2
        assert list(inspect.signature(traced.forward).parameters) == ["x"]


class Defaults(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, scale: float = 2.0, y: Tensor | None = None, *, twice: bool = False) -> Tensor:
        x = self.fc(x) * scale
        x = x if y is None else x + self.fc(y)
        return self.fc(x) if twice else x


def test_both_modes() -> None:
    traced = trace(Modes())
    assert set(traced.graphs) == {"eval", "train"}
    x = torch.randn(2, 3, 4, 4)
    assert isinstance(traced.eval()(x), Tensor)
    assert len(traced.train()(x)) == 2
    assert torch.equal(traced.eval()(x), traced(x))
    assert not torch.equal(traced.train()(x)[0], traced(x)[0])


class FrozenPart(nn.Module):
    """The same twice, one of them to be frozen, and batch norm, which may be in any mode."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.norm, self.body = Modes(), nn.BatchNorm2d(3), nn.Sequential(nn.Conv2d(3, 3, 1), nn.Dropout())

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return self.frozen(self.norm(self.body(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_graph_is_that_of_the_modules_that_read_the_mode(*, rest: bool, frozen: bool) -> None:
    model, x = FrozenPart().train(rest), torch.randn(2, 3, 4, 4)
    model.frozen.train(frozen)
    traced = trace(model)
    assert traced.mode_readers == ("frozen",)
    results = []
    for net in (model, traced, copy.deepcopy(traced), trace(traced)):
        torch.manual_seed(0)
        results.append([t.detach() for t in (net(x) if frozen else [net(x)])])
    assert len(results[0]) == 1 + frozen
    for result in results[1:]:
        assert all(map(torch.equal, results[0], result))


def test_a_mixture_of_modes_that_no_graph_has_is_refused() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleDict({"a": Modes(), "b": Modes()})

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.parts["a"](x), self.parts["b"](x)

    traced = trace(Both()).eval()
    traced(torch.randn(1, 3, 4, 4))
    traced.get_submodule("parts.b").train()
    with pytest.raises(TraceError, match=r"parts\.a is in evaluation, parts\.b in training"):
        traced(torch.randn(1, 3, 4, 4))


class Hidden(nn.Module):
    """Reads a parameter past torch.fx, and computes with it at once."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return x * (self._parameters["weight"] * 2)  # type: ignore[operator]


def test_what_is_computed_from_a_parameter_is_no_constant() -> None:
    model, x = Hidden(), torch.randn(2, 3)
    with pytest.raises(TraceError, match="computes with a parameter in a way that torch"):
        trace(model)
    traced = trace(model, ExampleInputs.of(x))  # by running
    nn.init.constant_(traced.get_parameter("weight"), 5.0)
    assert torch.equal(traced(x), model(x))


def test_one_mode() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout())
    traced = trace(model)
    assert set(traced.graphs) == {"eval"}
    assert traced.training


@pytest.mark.parametrize("training", [False, True])
def test_a_trace_leaves_the_model_alone(training: bool) -> None:  # noqa: FBT001
    model = Modes().train(training)
    model.aux.eval()
    visit = Fingerprint(model)
    traced = trace(model)
    visit.check()
    assert traced.training is training
    assert not traced.get_submodule("aux").training
    assert traced.get_parameter("body.weight") is model.body.weight
    assert list(traced.state_dict()) == list(model.state_dict())
    assert type(traced).__name__ == "Modes"


def test_plain_attributes_are_kept() -> None:
    model = Modes()
    traced = trace(model)
    note = traced.__dict__["note"]
    assert note == {"why": "kept"}
    assert note is not model.note


@pytest.mark.parametrize("training", [False, True])
def test_deepcopy(training: bool) -> None:  # noqa: FBT001
    traced = trace(Modes()).train(training)
    traced.meta["mine"] = 1
    twin = copy.deepcopy(traced)
    x = torch.randn(2, 3, 4, 4)
    assert isinstance(twin, TracedModule)
    assert twin.training is training
    assert twin.meta == traced.meta
    assert set(twin.graphs) == {"eval", "train"}
    assert difference(traced.eval()(x), twin.eval()(x)) == 0
    assert len(twin.train()(x)) == 2
    with torch.no_grad():
        twin.get_parameter("head.bias").add_(1)
    assert difference(traced.eval()(x), twin.eval()(x)) > 0
    assert [n.name for n in twin.graph.nodes] == [n.name for n in traced.graph.nodes]


def test_a_trace_of_a_trace() -> None:
    traced = trace(trace(Modes()))
    x = torch.randn(2, 3, 4, 4)
    assert set(traced.graphs) == {"eval", "train"}
    assert len(traced.train()(x)) == 2
    assert isinstance(traced.eval()(x), Tensor)


def test_a_graph_module_of_torch() -> None:
    plain = fx.symbolic_trace(nn.Sequential(nn.Linear(3, 4), nn.ReLU()))
    x = torch.randn(2, 3)
    assert torch.equal(trace(plain)(x), plain(x))


def test_unused_modules_are_kept() -> None:
    class Unused(Modes):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(x)  # type: ignore[no-any-return]

    model = Unused()
    assert list(trace(model).state_dict()) == list(model.state_dict())


def test_defaults() -> None:
    x, y, model = torch.randn(2, 4), torch.randn(2, 4), Defaults()
    assert difference(trace(model)(x), model(x)) == 0
    given = trace(model, ExampleInputs.of({"x": x, "y": y}))
    assert difference(given(x, y=y), model(x, y=y)) == 0
    assert difference(given(x=x, y=y), model(x, y=y)) == 0
    assert [node.target for node in given.graph.find_nodes(op="placeholder")] == ["x", "scale", "y", "twice"]
    with pytest.raises(PathError, match=r"(?s)traced with y=None, its default.*example inputs that hold it"):
        trace(model)(x, y=y)
    with pytest.raises(AssertionError, match=r"traced with twice=False, its default.*example_inputs that hold it"):
        trace(model)(x, twice=True)


class Masked(nn.Module):
    """Attention that is causal where it gets no mask, and scales that are learned where it gets none."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.last = nn.Linear(4, 12), nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        h = h if scale is None else h * 2
        return F.layer_norm(self.last(h), (4,), scale)


def test_an_argument_that_was_given_must_be_given() -> None:
    """``mask is None`` is False of a symbol, and what comes of it is in the graph: attention that is not causal."""
    x, mask, scale, model = torch.randn(2, 5, 4), torch.randn(5, 5), torch.randn(4), Masked()
    traced = trace(model, ExampleInputs.of({"x": x, "mask": mask, "scale": scale}))
    small = fxc.prune(model, {"x": x, "mask": mask, "scale": scale}).module
    for module in (traced, small, copy.deepcopy(traced)):
        assert difference(module(x[:1], mask, scale=scale), model(x[:1], mask, scale=scale)) == 0
        with pytest.raises(PathError, match=r"argument mask is None; the network was traced with a tensor"):
            module(x, scale=scale)
        with pytest.raises(PathError, match=r"argument scale is None"):
            module(x, mask, scale=None)
    half = trace(model, ExampleInputs.of((x, mask)))
    assert difference(half(x, mask), model(x, mask)) == 0


def test_a_method_of_the_model_is_missed_with_a_word_on_where_it_is() -> None:
    x = torch.randn(2, 4)
    net = fxc.compress(nn.Linear(4, 2), x)
    for module in (net, net.finalize(), trace(nn.Linear(4, 2))):
        with pytest.raises(AttributeError, match=r"(?s)no attribute .predict.: this network runs .*keep_code=True"):
            module.predict(x)
        with pytest.raises(AttributeError, match=r"no attribute '_predict'$"):
            module._predict(x)


def test_in_place_sums_stay_in_place() -> None:
    """torch.fx makes ``x = x + y`` of ``x += y``, and other names of x miss it."""

    class Alias(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x * 1
            view = x.view(-1)
            x += 1
            x *= 2
            x -= 3
            x /= 4
            return view + x.view(-1)

    x = torch.randn(2, 3)
    traced = trace(Alias())
    assert {operator.iadd, operator.imul, operator.isub, operator.itruediv} <= {n.target for n in traced.graph.nodes}
    assert torch.equal(traced(x), Alias()(x))


def test_a_skeleton_shares_tensors_only() -> None:
    model = Modes()
    twin = skeleton(model)
    assert twin.body is not model.body
    assert twin.note is not model.note
    assert all(a is b for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_control_flow_on_values() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if x.sum() > 0 else x - 1

    with pytest.raises(TraceError) as caught:
        trace(Branching())
    text = str(caught.value)
    assert text.startswith("torch.fx cannot trace Branching: symbolically traced variables cannot be used as inputs")
    assert "test_trace.py:" in text
    assert "return x + 1 if x.sum() > 0 else x - 1" in text
    assert "torch.fx.wrap" in text
    assert caught.value.__cause__ is not None


def test_a_decorator_around_forward_is_named() -> None:
    """As models of transformers have one; torch.fx fails to call what lies inside."""

    def passing(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(function)
        def wrapper(self: nn.Module, *args: object, **kwargs: object) -> Tensor:
            return function(self, *args, **kwargs)

        return wrapper

    class Decorated(nn.Module):
        @passing
        def forward(self, x: Tensor, y: Tensor | None = None, z: Tensor | None = None, **more: object) -> Tensor:
            return x + 1 if x.sum() > 0 else x - 1

    with pytest.raises(TraceError, match="its forward is wrapped by a decorator") as caught:
        trace(Decorated())
    assert "control flow" not in str(caught.value)
    with pytest.raises(TraceError, match=r"(?s)wrapped by a decorator.*it reads values out of a tensor"):
        trace(Decorated(), ExampleInputs.of(torch.ones(2)))


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("abc", r"example_inputs is a str; pass a tensor, a tuple of positional arguments, or a dict"),
        (3, r"example_inputs is a int"),
    ],
)
def test_inputs_of_no_known_kind(given: object, text: str) -> None:
    with pytest.raises(ExampleInputError, match=text):
        ExampleInputs.of(given)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ((1, 2, 3, 4, 5), r"forward takes 4 arguments \(x, scale, y, twice\); 5 given"),
        ({"x": 1, "z": 2}, r"forward has no argument z; it takes x, scale, y, twice"),
        ({"scale": 1}, r"example_inputs leaves out x; forward takes x, scale, y, twice"),
    ],
)
def test_inputs_that_do_not_fit(given: object, text: str) -> None:
    with pytest.raises(ExampleInputError, match=text):
        ExampleInputs.of(given).bind(trace(Defaults()).graph)


def test_inputs_bind() -> None:
    graph = trace(Defaults()).graph
    assert ExampleInputs.of((1, 3.0)).bind(graph)["scale"] == 3.0
    assert ExampleInputs.of([1]).bind(graph)["x"] == 1
    assert str(ExampleInputs.of({"x": torch.zeros(2, 3), "n": 4, "s": object()})) == "x=(2, 3) float32, n=4, s=object"


def test_inference_asks_where_it_cannot_know() -> None:
    with pytest.raises(
        ExampleInputError, match=r"(?s)takes 2 arguments without a default \(input1, input2\).*pass example"
    ):
        infer_inputs(nn.Bilinear(2, 3, 4), lambda guess: True)
    with pytest.raises(ExampleInputError, match=r"tried \(2, 4\) float32; \(2, 16, 4\) float32\n"):
        infer_inputs(nn.Linear(4, 4), lambda guess: False)
    with pytest.raises(ExampleInputError, match=r"tried nothing, as it has no layer that says"):
        infer_inputs(nn.ReLU(), lambda guess: True)
    with pytest.raises(ExampleInputError, match=r"; and \d+ more\n"):
        infer_inputs(nn.Conv2d(1, 2, 3), lambda guess: False)


def test_inference_takes_the_first_that_works() -> None:
    guess = infer_inputs(nn.Conv1d(2, 3, 3).half(), lambda guess: guess.args[0].shape[-1] == 256)
    assert str(guess) == "(2, 2, 256) float16 (inferred)"
    assert infer_inputs(nn.Embedding(5, 2), lambda guess: True).args[0].dtype == torch.int64


def test_a_trace_can_be_pickled() -> None:
    traced = trace(nn.Sequential(nn.Linear(3, 4), nn.ReLU()))
    x = torch.randn(2, 3)
    assert torch.equal(pickle.loads(pickle.dumps(traced))(x), traced(x))


def test_a_tensor_that_is_made_and_written_to_is_made_in_each_run() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            scale = torch.arange(4.0).view(1, 4).add_(1)
            scale.mul_(h.shape[1])
            return h * scale.to(h)  # type: ignore[no-any-return]

    net, x = Scaled(), torch.randn(2, 3)
    module = trace(net, ExampleInputs.of(x))
    for _ in range(3):
        assert torch.allclose(module(x), net(x))
    with pytest.raises(TraceError, match=r"makes a tensor and writes to it \(mul_\)"):
        trace(net)


class ReadyForQuantization(nn.Module):
    """Sums and products by modules, which observe them later; the numbers are floats still."""

    def __init__(self) -> None:
        super().__init__()
        self.take, self.give = torch.ao.quantization.QuantStub(), torch.ao.quantization.DeQuantStub()
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(16, 2, 1)
        self.sums = torch.ao.nn.quantized.FloatFunctional()

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(self.take(x))
        y = self.sums.add_relu(self.sums.mul(h, self.sums.add_scalar(h, 2.0)), self.sums.mul_scalar(h, 0.5))
        return self.give(self.last(self.sums.cat([y, self.sums.add(y, h)], 1)))  # type: ignore[no-any-return]


def test_models_that_are_to_be_quantized_are_float_models() -> None:
    net, x = ReadyForQuantization().double().eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        net.first.weight[[1, 4]], net.first.bias[[1, 4]] = 0, 0  # type: ignore[index]
    module = fxc.prune(net, x).module
    assert module.get_parameter("first.weight").shape == (6, 3, 3, 3)
    assert difference(net(x), module(x)) <= 1e-12


def test_equal_annotations_are_one_object() -> None:
    """Of two that are not, torch 2.6 cannot write the code."""

    class Masked(nn.Module):
        def forward(self, x: Tensor, mask: Tensor | None = None, other: Tensor | None = None) -> Tensor:
            x = x if mask is None else x * mask
            return x if other is None else x + other

    x = torch.randn(2, 3)
    traced = trace(Masked(), ExampleInputs.of((x, x, x)))
    kinds = [node.type for node in traced.graph.find_nodes(op="placeholder")]
    assert kinds[1] == (Tensor | None)
    assert kinds[1] is kinds[2]
    assert torch.equal(traced(x, x, x), x * x + x)


def test_a_user_whose_folder_is_called_like_ours_is_told_the_line(tmp_path: Path) -> None:
    path = tmp_path / "fxcompress_trials" / "net.py"
    path.parent.mkdir()
    path.write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def forward(self, x):\n"
        "        return x if x.sum() > 0 else -x\n"
    )
    spec = importlib.util.spec_from_file_location("trial", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(TraceError, match=r"net\.py:4\n    return x if x.sum\(\) > 0 else -x"):
        fxc.ChannelGraph.of(module.Net(), torch.zeros(2, 3))


def test_numbers_of_numpy_are_written_as_numbers() -> None:
    """``np.sqrt(4)`` is a float, but its name in the code of a graph would not be known there."""
    net = Applies(lambda x: x * np.sqrt(4) + np.float64(0.5))
    traced = trace(net)
    assert torch.equal(traced(torch.ones(2)), torch.full((2,), 2.5))


class Applies(nn.Module):
    """Does something with its input."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)
