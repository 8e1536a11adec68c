"""Code that asks what kind of thing a value is takes the same path in the graph as in the model."""

import functools
import subprocess
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, is_tensor, nn
from torch.utils._pytree import tree_map, tree_map_only

import fxcompress as fxc
import tests.test_questions
from fxcompress.errors import PathError, TraceError
from fxcompress.trace import tracer
from fxcompress.trace.inputs import ExampleInputs
from fxcompress.trace.symbolic.questions import asking_type
from fxcompress.trace.tracer import trace
from tests.exactness import TOLERANCE, Fingerprint, difference, outputs
from tests.nets import made_dead
from tests.test_weight_norm import FORMS

D = 6
helpers = ModuleType("helpers")


class Net(nn.Module):
    """Two layers; the second half of what lies between them depends on a question."""

    def __init__(self, between: Callable[["Net", Any], Any]) -> None:
        super().__init__()
        self.first, self.last, self.between = nn.Linear(4, D), nn.Linear(D, 3), between
        self.lstm, self.scale = nn.LSTM(D, D), nn.Parameter(torch.rand(D) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self, self.first(x)))  # type: ignore[no-any-return]


def twice_if(condition: Callable[["Net", Any], bool]) -> Callable[["Net", Any], Any]:
    """The value twice if the answer is yes."""
    return lambda net, h: h * 2 if condition(net, h) else h


def batched(value: Tensor | Sequence[Tensor]) -> Tensor:
    """As libraries take one thing or many."""
    many = [value] if isinstance(value, Tensor) else list(value)
    return torch.stack([F.gelu(item) for item in many]).sum(0)


def kind_of(value: object) -> str:
    if isinstance(value, tuple | list):
        return "many"
    return "one" if isinstance(value, Tensor) else "none"


@functools.singledispatch
def trebled(value: Any) -> Any:  # noqa: ANN401
    """As libraries take apart what they are given, by its class."""
    return value


@trebled.register
def _(value: Tensor) -> Tensor:
    return value * 3


@trebled.register
def _(value: tuple) -> Any:  # type: ignore[type-arg] # noqa: ANN401
    return trebled(value[0])


class Trebles:
    """The same in a method."""

    @functools.singledispatchmethod
    def of(self, value: Any) -> Any:  # noqa: ANN401
        return value

    @of.register
    def _(self, value: Tensor) -> Tensor:
        return value * 3


ANSWERED: dict[str, Callable[[Net, Any], Any]] = {
    "isinstance": twice_if(lambda net, h: isinstance(h, Tensor)),
    "of a tuple of classes": twice_if(lambda net, h: isinstance(h, (list, Tensor))),
    "of a union": twice_if(lambda net, h: isinstance(h, int | Tensor)),
    "not a tuple": twice_if(lambda net, h: not isinstance(h, tuple)),
    "no parameter": twice_if(lambda net, h: not isinstance(h, nn.Parameter)),
    "a parameter": lambda net, h: h * (net.scale if isinstance(getattr(net, "scale"), nn.Parameter) else 0.0),  # noqa: B009
    "torch.is_tensor": twice_if(lambda net, h: torch.is_tensor(h)),
    "is_tensor": twice_if(lambda net, h: is_tensor(h)),
    "hasattr": twice_if(lambda net, h: hasattr(h, "tensors")),
    "hasattr of a tensor": twice_if(lambda net, h: hasattr(h, "shape") and not hasattr(h, "__name__")),
    "getattr": twice_if(lambda net, h: getattr(h, "mask", None) is not None),
    "callable": twice_if(lambda net, h: callable(h)),
    "a helper": lambda net, h: batched(h),
    "a helper, of many": lambda net, h: batched((h, h * 2)),
    "of a product": twice_if(lambda net, h: isinstance(h * 2 + h.mean(), Tensor)),
    "of a function": twice_if(lambda net, h: isinstance(F.max_pool1d(h[None], 1), Tensor)),
    "of a method": twice_if(lambda net, h: kind_of(h.view(h.size(0), -1).t()) == "one"),
    "of several tensors": twice_if(lambda net, h: kind_of(h.split(2, 1)) == "many"),
    "of a layer of several": twice_if(lambda net, h: isinstance(net.lstm(h), tuple)),
    "of a size": twice_if(lambda net, h: isinstance(h.shape[0], int)),
    "of a shape": twice_if(lambda net, h: isinstance(h.shape, tuple)),
    "torch.jit.isinstance": twice_if(lambda net, h: torch.jit.isinstance(h, Tensor)),
    "torch.jit.isinstance of a list": twice_if(lambda net, h: torch.jit.isinstance([h], list[Tensor])),
    "torch.jit.isinstance of several": twice_if(lambda net, h: torch.jit.isinstance(h.split(2, 1), tuple[Tensor, ...])),
    "torch.jit.isinstance of a size": twice_if(lambda net, h: torch.jit.isinstance(h.shape[0], int)),
    "tree_map_only": lambda net, h: tree_map_only(Tensor, torch.sin, h),
    "tree_map_only of several": lambda net, h: tree_map_only(Tensor, torch.sin, (h, [net.lstm(h)[0]]))[1][0],
    "tree_map of a layer of several": lambda net, h: tree_map(lambda t: t * 3, net.lstm(h))[0],
    "singledispatch": lambda net, h: trebled(h),
    "singledispatch of a layer of several": lambda net, h: trebled(net.lstm(h)),
    "singledispatchmethod": lambda net, h: Trebles().of(h),
    "type of a module": twice_if(lambda net, h: type(net.lstm) is nn.LSTM),
    "type, to no end": twice_if(lambda net, h: type(h).__name__ != ""),
}


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("name", ANSWERED)
def test_questions_are_answered(name: str, *, given: bool) -> None:
    net, x = made_dead(Net(ANSWERED[name])), torch.randn(5, 4, dtype=torch.float64)
    visit = Fingerprint(net)
    module = fxc.prune(net, x if given else None).module
    visit.check()
    for training in (False, True):
        assert difference(outputs(net, (x,), training=training), outputs(module, (x,), training=training)) <= TOLERANCE


@pytest.mark.parametrize(
    "condition",
    [lambda net, h: type(h) is Tensor, lambda net, h: h.__class__ is Tensor, lambda net, h: type(h) in (Tensor, int)],
)
def test_what_cannot_be_answered_is_refused(condition: Callable[[Net, Any], bool]) -> None:
    """Neither a stand-in nor a fake tensor has the type of a tensor."""
    net, x = made_dead(Net(twice_if(condition))), torch.randn(5, 4, dtype=torch.float64)
    with pytest.raises(TraceError, match=r"asks for the type of a value \(type\(x\), .* or tree_map\).*test_questions"):
        fxc.prune(net, x)


class Asks(Net):
    """Asks in its own forward."""

    answer: type[Any] = Tensor

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(h * 2 if type(h) is self.answer else h)  # type: ignore[no-any-return]


def test_what_a_forward_asks_is_refused_as_well() -> None:
    net, x = made_dead(Asks(lambda net, h: h)), torch.randn(5, 4, dtype=torch.float64)
    with pytest.raises(TraceError, match=r"forward asks for the type of a value"):
        fxc.prune(net, x)


def twice_for_tensors(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """A decorator that looks at what it hands on."""

    @functools.wraps(function)
    def wrapper(self: Any, x: Any) -> Any:  # noqa: ANN401
        return function(self, x * 2 if type(x) is Tensor else x)

    return wrapper


class Decorated(Net):
    """Asks in a decorator of its own forward."""

    @twice_for_tensors
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x))  # type: ignore[no-any-return]


def test_what_a_decorator_asks_is_refused_as_well() -> None:
    net, x = made_dead(Decorated(lambda net, h: h)), torch.randn(5, 4, dtype=torch.float64)
    with pytest.raises(TraceError, match=r"forward asks for the type of a value"):
        fxc.prune(net, x)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("asked", [Tensor, int])
def test_a_question_without_consequence_is_no_obstacle_under_weight_norm(form: str, asked: type) -> None:
    """The graph holds the weights themselves: it is compared with a model that does so as well."""
    net, x = Asks(lambda net, h: h).double(), torch.randn(5, 4, dtype=torch.float64)
    FORMS[form](net.first)
    net.answer = asked
    if asked is Tensor:
        with pytest.raises(TraceError, match=r"forward asks for the type of a value"):
            trace(net, ExampleInputs.of(x))
    else:
        assert difference([net(x)], [trace(net, ExampleInputs.of(x))(x)]) <= TOLERANCE


def test_what_a_leaf_asks_is_no_question_of_the_model() -> None:
    depth = pytest.importorskip("torchvision").ops.StochasticDepth(0.1, "row")
    assert asking_type(nn.Sequential(nn.Linear(4, 4), depth)) is None


class Takes(Net):
    """Takes a tensor or several."""

    def forward(self, x: Any) -> Tensor:  # noqa: ANN401 - a tensor, or several
        h = self.first(x) if isinstance(x, Tensor) else self.first(x[0]) + self.first(x[1])
        return self.last(h)  # type: ignore[no-any-return]


@pytest.mark.parametrize("many", [True, False])
def test_inputs_are_what_they_are(*, many: bool) -> None:
    torch.manual_seed(0)
    net = Takes(lambda net, h: h).double().eval()
    x = torch.randn(5, 4, dtype=torch.float64)
    argument = (x, x + 1) if many else x
    module = fxc.prune(net, (argument,)).module
    assert difference(net(argument), module(argument)) <= TOLERANCE


def test_what_torch_asks_itself_is_no_question_of_the_model() -> None:
    """A function of torch as an attribute leads to code of torch that asks for types."""
    layer = nn.TransformerEncoderLayer(D, 2, 8, activation=F.gelu, batch_first=True)
    net = nn.Sequential(nn.Linear(4, D), layer, nn.Linear(D, 2)).double().eval()
    assert asking_type(net) is None


def test_questions_outside_of_a_trace_are_pythons_own() -> None:
    import builtins

    before = builtins.isinstance, builtins.hasattr, builtins.callable
    with pytest.raises(TraceError):
        fxc.prune(made_dead(Net(lambda net, h: h * 2 if h.sum() > 0 else h)))
    assert (builtins.isinstance, builtins.hasattr, builtins.callable) == before


CAUGHT: dict[str, Callable[[Tensor], object]] = {
    "int": lambda x: int(x.shape[0]) > 2,
    "float": lambda x: float(x.shape[0]) > 2,
    "len": lambda x: len(x) > 2,
    "bool": lambda x: x.shape[0] > 2 or None,
    "iter": lambda x: len([*x]) > 2,
}


class Tries(nn.Module):
    """Asks what no stand-in can answer, and goes another way where it fails."""

    def __init__(self, question: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.question, self.layer = question, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        try:
            factor = 2.0 if self.question(x) else 1.0
        except Exception:  # noqa: BLE001
            factor = 5.0
        return self.layer(x) * factor  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", CAUGHT)
def test_an_error_counts_where_the_model_catches_it(name: str) -> None:
    model = Tries(CAUGHT[name])
    with pytest.raises(TraceError, match=r"(?s)^torch\.fx cannot trace Tries: .*pass example_inputs"):
        trace(model)
    for count in (1, 3):
        x = torch.randn(count, 4)
        assert torch.equal(trace(model, ExampleInputs.of(x))(x), model(x))


class Padded(nn.Module):
    """Offers each layer and function an argument that most do not take, as containers of layers for sequences do."""

    def __init__(self, *parts: Callable[..., Any], looks: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(part for part in parts if isinstance(part, nn.Module))
        self.parts, self.looks = [None if isinstance(part, nn.Module) else part for part in parts], looks

    def forward(self, x: Tensor) -> Tensor:
        if self.looks and x.shape[0] > 100:
            return x
        layers = iter(self.layers)
        for part in self.parts:
            call: Callable[..., Any] = part or next(layers)
            try:
                x = call(x, lengths=x.new_ones(1))
            except TypeError:
                x = call(x)
        return x


@pytest.mark.parametrize("looks", [False, True])
@pytest.mark.parametrize("function", [[], [F.silu]])
def test_an_argument_that_is_not_taken(function: list[Callable[..., Any]], *, looks: bool) -> None:
    layers: list[Callable[..., Any]] = [nn.LeakyReLU(), *function, nn.BatchNorm1d(D)]
    net, x = Padded(nn.Linear(4, D), *layers, nn.Linear(D, 3), looks=looks).double().eval(), torch.randn(5, 4).double()
    module = fxc.prune(net, x).module
    assert difference(outputs(net, (x,)), outputs(module, (x,))) <= TOLERANCE


class Scaled(Net):
    """Asks what its second argument is."""

    def forward(self, x: Tensor, scale: Any) -> Tensor:  # type: ignore[override] # noqa: ANN401
        h = self.first(x)
        if isinstance(scale, bool | list | tuple):
            return self.last(h * (2 if scale else 3))  # type: ignore[no-any-return]
        return self.last(h * scale if isinstance(scale, int) else h / scale)  # type: ignore[no-any-return]


@pytest.mark.parametrize("example", [3, 3.5, True, [1.0], (1.0,)])
def test_what_an_argument_is_holds_for_one_call_only(example: object) -> None:
    net, x = made_dead(Scaled(lambda net, h: h)), torch.randn(5, 4, dtype=torch.float64)
    module = fxc.prune(net, (x, example)).module
    assert difference(net(x, example), module(x, example)) <= TOLERANCE
    others: list[Any] = [4, 2.5, False, [], (), torch.tensor(2.0).double()]
    for other in others:
        try:
            found = module(x, other)
        except PathError as error:
            assert "scale" in str(error)  # noqa: PT017 - either is right
            continue
        assert difference(net(x, other), found) <= TOLERANCE


HOW_IT_RUNS: dict[str, Callable[[Net, Any], bool]] = {
    "traced": lambda net, h: torch.fx._symbolic_trace.is_fx_tracing(),
    "stand-in": lambda net, h: isinstance(h, torch.fx.Proxy),
    "compared with text": lambda net, h: bool(h == "auto"),
    "list of tensors": lambda net, h: torch.jit.isinstance(h, list[Tensor]),
}


@pytest.mark.parametrize("name", HOW_IT_RUNS)
def test_how_the_code_runs(name: str) -> None:
    net, x = made_dead(Net(twice_if(HOW_IT_RUNS[name]))), torch.randn(5, 4, dtype=torch.float64)
    module = fxc.prune(net, x).module
    assert difference(net(x), module(x)) <= TOLERANCE
    assert module.get_parameter("first.weight").shape[0] < D


@pytest.mark.parametrize("factor", [1, 2])
def test_whether_gradients_are_on_must_change_nothing(factor: int) -> None:
    net = made_dead(Net(lambda net, h: h if torch.is_grad_enabled() else h * factor))
    x = torch.randn(5, 4, dtype=torch.float64)
    if factor == 1:
        assert difference(net(x), fxc.prune(net, x).module(x)) <= TOLERANCE
        return
    with pytest.raises(TraceError, match=r"how it runs \(is_grad_enabled\)"):
        fxc.prune(net, x)


def test_code_without_a_file() -> None:
    """As ``python -c`` runs it; a number as text must not be that of a stand-in."""
    space: dict[str, Any] = {}
    exec("def between(net, h):\n    return h * {'5': 2}.get(f'{h.shape[0]}', 3)", space)
    net, x = made_dead(Net(space["between"])), torch.randn(5, 4, dtype=torch.float64)
    assert difference(net(x), fxc.prune(net, x).module(x)) <= TOLERANCE


class Plain(nn.Module):
    """Its own method asks for a type."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * (2 if type(x) is Tensor else 5)  # type: ignore[no-any-return]


@pytest.mark.parametrize("model", [Plain(), nn.Sequential(nn.Linear(4, 4), Plain())])
def test_methods_that_ask_for_a_type_are_found(model: nn.Module) -> None:
    assert asking_type(model) is Plain.forward
    with pytest.raises(TraceError, match=r"forward asks for the type of a value .* the graph computes something else"):
        trace(model, ExampleInputs.of(torch.randn(2, 4)))


def class_of(x: object) -> str:
    """A function that asks for a type, and that has the name of what the next models read."""
    return type(x).__name__


helpers.named = class_of  # type: ignore[attr-defined]


class Reads(nn.Module):
    """Reads a layer that has the name of a global function."""

    def __init__(self) -> None:
        super().__init__()
        self.class_of = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return next(self.class_of(y) for y in (x,)).relu()  # type: ignore[no-any-return]


class Calls(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) * len(class_of(x))  # type: ignore[no-any-return]


class CallsInside(Net):
    def forward(self, x: Tensor) -> Tensor:
        return max((self.first(x) * len(class_of(y)) for y in (x,)), key=len)  # type: ignore[no-any-return]


class CallsOfModule(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) * len(helpers.named(x))  # type: ignore[no-any-return]


class CallsOfPackage(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) * len(tests.test_questions.helpers.named(x))  # type: ignore[no-any-return]


class CallsByName(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) * len(getattr(helpers, "named")(x))  # type: ignore[no-any-return]  # noqa: B009


def test_an_attribute_is_no_global_function_of_its_name() -> None:
    assert asking_type(Reads()) is None
    x = torch.randn(2, 4)
    assert fxc.compress(Reads(), x).weights == 16


@pytest.mark.parametrize("kind", [Calls, CallsInside, CallsOfModule, CallsOfPackage, CallsByName])
def test_a_function_that_is_called_is_found(kind: type[Net]) -> None:
    assert asking_type(kind(lambda _, value: value)) is class_of


class Taking(nn.Module):
    """Two layers, and a factor that depends on what is asked; subclasses have a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, D), nn.Linear(D, 3)
        self.scales = {D: 3.0, "double": 2.0}
        self.heads = nn.ModuleDict({"a": nn.Linear(4, 3)})

    def run(self, x: Tensor, factor: Any) -> Tensor:  # noqa: ANN401 - a number or a tensor
        return self.last(torch.relu(self.first(x))) * factor  # type: ignore[no-any-return]


class Named(NamedTuple):
    """Some inputs in one."""

    x: Tensor
    mask: Tensor | None = None
    mean: Tensor | None = None


def matching(net: Taking, x: Tensor) -> Tensor:
    match x.shape:
        case (_, 4):
            return net.run(x, 2)
    return net.run(x, 1)


X = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4)
ARGUMENTS: dict[str, tuple[Callable[..., Any], Any]] = {
    "None": (lambda net, x, mask: net.run(x, 2 if mask is None else 1), (X, None)),
    "no None": (lambda net, x, mask: net.run(x, 2 if mask is None else 1), (X, X)),
    "a flag": (lambda net, x, flag: net.run(x, 2 if flag is True else 1), (X, True)),
    "by name": (lambda net, x, mask=1: net.run(x, 2 if mask is None else 1), {"x": X, "mask": None}),
    "left out": (lambda net, x, **rest: net.run(x, 2 if rest.get("mask") is None else 1), (X,)),
    "in the rest": (lambda net, x, **rest: net.run(x, 2 if rest["mask"] is None else 1), {"x": X, "mask": None}),
    "a tensor in the rest": (lambda net, x, **rest: net.run(x, rest["scale"].mean()), {"x": X, "scale": X + 1}),
    "a tensor of several": (lambda net, x, *rest: net.run(x, rest[1].mean()), (X, X, X + 1)),
    "one of several": (lambda net, x, *rest: net.run(x, 2 if rest[1] is None else 1), (X, X, None)),
    "an item": (lambda net, b: net.run(b["x"], 2 if b["mask"] is None else 1), ({"x": X, "mask": None},)),
    "an item left out": (lambda net, b: net.run(b["x"], 2 if b.get("mask") is None else 1), ({"x": X},)),
    "an item of an item": (lambda net, x, y: net.run(x, 2 if y[0]["a"] is None else 1), (X, [{"a": None}])),
    "a field": (lambda net, b: net.run(b.x, 2 if b.mask is None else 1), (Named(X),)),
    "a field of a tensor's": (lambda net, b: net.run(b.x, 2 if b.mean is None else 1), (Named(X),)),
    "a field by getattr": (lambda net, b: net.run(b.x, 2 if getattr(b, "mask", 0) is None else 1), (Named(X),)),
    "unpacked": (lambda net, x, y: net.run(x, 2 if y[1] is None else 1), (X, (X, None))),
    "a gradient": (lambda net, x: net.run(x, 2 if x.grad is None else 1), (X,)),
    "a number in a set": (lambda net, x, n: net.run(x, 2 if n in {2, 3} else 1), (X, 3)),
    "a number in a dict": (lambda net, x, n: net.run(x, net.scales.get(n, 1.0)), (X, D)),
    "a name in a dict": (lambda net, x, name: net.run(x, net.scales.get(name, 1.0)), (X, "double")),
    "a name in modules": (lambda net, x, n: net.run(x, net.heads[n](x) if n in net.heads else 1), (X, "a")),
    "a size in a set": (lambda net, x: net.run(x, 2 if x.shape[1] in {4, 5} else 1), (X,)),
    "a size in a dict": (lambda net, x: net.run(x, net.scales.get(x.shape[1] + 2, 1.0)), (X,)),
    "a dtype in a set": (lambda net, x: net.run(x, 2 if x.dtype in {X.dtype, torch.bool} else 1), (X,)),
    "a number in a name": (lambda net, x, n: net.run(x, net.scales.get(f"double{n}"[:-1], n)), (X, 7)),
    "a size in a name": (lambda net, x: net.run(x, 2 if "4" in str(x.shape[1]) else 1), (X,)),
    "a dtype's name": (lambda net, x: net.run(x, 2 if str(x.dtype) == "torch.float64" else 1), (X,)),
    "a device's text": (lambda net, x: net.run(x, 2 if "cpu" in f"{x.device}" else 1), (X,)),
    "a dtype by is": (lambda net, x: net.run(x, 2 if x.dtype is X.dtype else 1), (X,)),
    "a flag of a tensor by is": (lambda net, x: net.run(x, 2 if x.is_contiguous() is True else 1), (X,)),
    "a decision by is": (lambda net, x: net.run(x, 2 if (x.dim() == 2) is True else 1), (X,)),
    "a pattern": (matching, (X,)),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_are_what_they_are(name: str) -> None:
    """A stand-in is not None, True or 3, and no key of a dict, whatever it is for."""
    asked, inputs = ARGUMENTS[name]
    torch.manual_seed(0)
    net = made_dead(type("Asked", (Taking,), {"forward": asked})())
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    expected, result = net(*args, **kwargs), fxc.prune(net, inputs).module
    assert difference(expected, result(*args, **kwargs)) <= TOLERANCE
    assert result.get_parameter("first.weight").shape[0] == D - 1


def test_what_is_imported_meanwhile_keeps_no_answers() -> None:
    """Torch imports its compiler when it first needs it: in a model without layers, while that is traced."""
    code = """
import torch
import fxcompress as fxc
from fxcompress.trace import tracer

class Scaled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(3))

    def forward(self, x):
        return x * (self._parameters["scale"] * 2)

fxc.ChannelGraph.of(Scaled(), torch.zeros(2, 3))
run = torch.compile(lambda x: x + 1 if isinstance(x, torch.Tensor) else x, backend="eager", fullgraph=True)
print(run(torch.zeros(2)).tolist())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "[1.0, 1.0]\n", done.stderr


class Asserting(nn.Module):
    """A size in the message of an assertion, as the transformers of torchvision have it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        n, width = x.shape
        torch._assert(width == 4, f"width is {width} and not 4, in a batch of {n}")
        return self.last(torch.relu(self.first(x)))  # type: ignore[no-any-return]


def test_a_message_is_no_question(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracer, "_trace_by_running", None)  # which takes longer, and is not needed
    x = torch.randn(3, 4)
    net = Asserting()
    assert torch.equal(fxc.prune(net, x).module(x), net(x))
