"""Weight norm: the weight itself becomes the parameter, and the original's state_dict still loads."""

import copy
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import fxcompress as fxc
from fxcompress.errors import CheckpointError, OptimizerError, TraceError, UnsupportedModelError
from tests.exactness import Fingerprint, difference

Norm = Callable[..., nn.Module]


def by_hook(module: nn.Module, name: str = "weight", dim: int | None = 0) -> nn.Module:
    """The form of old, which warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(module, name, dim)  # type: ignore[arg-type]


FORMS: dict[str, Norm] = {"parametrization": parametrizations.weight_norm, "hook": by_hook}
X = torch.randn(2, 3, 12, dtype=torch.float64)


def parts(module: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401 - a module with attributes
    """The length and the direction of a weight."""
    if hasattr(module, "weight_g"):
        return module.weight_g, module.weight_v
    steps = module.parametrizations["weight"]
    return steps.original0, steps.original1


def network(norm: Norm, dim: int | None = 0) -> nn.Sequential:
    """Conv (3 -> 8), relu, conv (8 -> 6), relu, conv (6 -> 2); the first two with weight norm."""
    net = nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Conv1d(8, 6, 3), nn.ReLU(), nn.Conv1d(6, 2, 3)).double()
    for i in (0, 2):
        norm(net[i], dim=dim)
        nn.init.uniform_(parts(net[i])[0], 0.5, 1.5)
    return net


def kill(net: nn.Sequential, channels: list[int], dim: int | None = 0) -> None:
    """Make channels of the first layer zero: by their length, or by their direction where they have no own length."""
    with torch.no_grad():
        parts(net[0])[0 if dim == 0 else 1][channels] = 0
        net.get_parameter("0.bias")[channels] = 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dim", [0, 1, None])
def test_dead_channels_go_and_the_original_stays_as_it_is(form: str, dim: int | None) -> None:
    net = network(FORMS[form], dim).eval()
    kill(net, [2, 5], dim)
    visit, before = Fingerprint(net), net(X)
    result = fxc.prune(net, X)
    visit.check()
    assert difference(before, result.module(X)) <= 1e-12
    assert difference(before, net(X)) == 0
    assert result.module.get_parameter("0.weight").shape == (6, 3, 3)
    assert result.module.get_parameter("2.weight").shape == (6, 6, 3)
    assert result.report.plain_weights == ("0.weight", "2.weight")
    assert "0.weight was computed by weight norm and is a plain parameter now" in str(result.report)
    again = fxc.prune(result.module, X)
    assert (again.report.modified, again.report.plain_weights) == (False, ())


@settings(max_examples=15)
@given(st.sampled_from(sorted(FORMS)), st.sets(st.integers(0, 7), max_size=7), st.integers(0, 99))
def test_any_set_of_dead_channels(form: str, dead: set[int], seed: int) -> None:
    torch.manual_seed(seed)
    net = network(FORMS[form]).eval()
    kill(net, sorted(dead))
    module = fxc.prune(net, X).module
    assert module.get_parameter("0.weight").shape[0] == 8 - len(dead)
    assert difference(net(X), module(X)) <= 1e-12


@pytest.mark.parametrize("form", FORMS)
def test_the_quantizers_take_the_weights(form: str, tmp_path: Path) -> None:
    net = network(FORMS[form])
    compressed = fxc.compress(net, X, bits=6.0)
    assert compressed.size().item() > 0
    with torch.no_grad():
        compressed.get_parameter("0.weight_quantizer.bits")[3] = 0
        compressed.get_parameter("0.bias")[3] = 0
    compressed.step()
    compressed.prune()
    final = compressed.eval().finalize()
    assert final.get_parameter("0.weight").shape == (7, 3, 3)
    assert difference(compressed(X), final(X)) <= 1e-12
    fxc.save(final, tmp_path / "net.fxc")
    loaded = fxc.load(tmp_path / "net.fxc", model=network(FORMS[form]))
    assert difference(final(X), loaded(X)) == 0


@pytest.mark.parametrize("saved", FORMS)
@pytest.mark.parametrize("form", FORMS)
def test_a_state_dict_of_the_original_loads(form: str, saved: str) -> None:
    other = network(FORMS[saved]).eval()
    state = copy.deepcopy(other.state_dict())
    compressed = fxc.compress(network(FORMS[form]), X)
    assert not compressed.load_state_dict(state, strict=False).unexpected_keys
    module = fxc.prune(network(FORMS[form]), X).module.eval()
    module.load_state_dict(state)
    assert difference(other(X), module(X)) <= 1e-12
    assert difference(other(X), copy.deepcopy(module)(X)) <= 1e-12
    assert difference(other[0].weight, compressed.get_parameter("0.weight")) <= 1e-12
    module.load_state_dict(module.state_dict())
    assert difference(other(X), module(X)) <= 1e-12
    narrow = compressed.state_dict()
    narrow["0.weight"] = narrow["0.weight"][1:]
    with pytest.raises(CheckpointError, match=r"0.weight is \(7, 3, 3\), not \(8, 3, 3\)"):
        compressed.load_state_dict(narrow)


@pytest.mark.parametrize("form", FORMS)
def test_a_layer_alone(form: str) -> None:
    layer = FORMS[form](nn.Linear(4, 5).double())
    module = fxc.prune(layer, torch.zeros(2, 4, dtype=torch.float64)).module
    assert list(module.state_dict()) == ["weight", "bias"]
    nn.init.normal_(parts(layer)[0])
    copy.deepcopy(module).load_state_dict(layer.state_dict())
    module.load_state_dict(layer.state_dict())
    x = torch.randn(2, 4, dtype=torch.float64)
    assert difference(layer(x), module(x)) <= 1e-12


@pytest.mark.parametrize("form", FORMS)
def test_recurrent_layers(form: str) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.fc = nn.LSTM(3, 6, batch_first=True), nn.Linear(6, 2)
            FORMS[form](self.lstm, "weight_hh_l0")
            with torch.no_grad():
                self.fc.weight[:, 2] = 0

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.lstm(x)[0])  # type: ignore[no-any-return]

    net, x = Recurrent().double(), torch.randn(2, 5, 3, dtype=torch.float64)
    result = fxc.prune(net, x)
    assert result.report.plain_weights == ("lstm.weight_hh_l0",)
    assert difference(net(x), result.module(x)) <= 1e-12


class Tied(nn.Module):
    """Two layers with one length and one direction."""

    def __init__(self, *, whole: bool) -> None:
        super().__init__()
        self.a, self.b = (by_hook(nn.Linear(6, 6)) for _ in range(2))
        self.b.weight_v = self.a.weight_v
        if whole:
            self.b.weight_g = self.a.weight_g
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)))  # type: ignore[no-any-return]


def test_a_weight_of_two_layers_stays_one() -> None:
    net, x = Tied(whole=True), torch.randn(2, 6, dtype=torch.float64)
    module = fxc.prune(net, x).module
    assert module.get_parameter("a.weight") is module.get_parameter("b.weight")
    assert difference(net(x), module(x)) <= 1e-12
    with pytest.raises(UnsupportedModelError, match="is a parameter of something else as well"):
        fxc.prune(Tied(whole=False), x)


def test_what_is_trained_stays_so() -> None:
    net = network(parametrizations.weight_norm)
    for part in parts(net[0]):
        part.requires_grad_(False)
    module = fxc.prune(net, X).module
    assert [p.requires_grad for p in module.parameters()] == [False, *[True] * 5]


def test_a_model_in_pieces() -> None:
    body = network(parametrizations.weight_norm)
    kill(body, [1])
    net = ReadsValues(body).eval()
    visit = Fingerprint(net)
    result = fxc.prune(net, X)
    visit.check()
    assert result.report.plain_weights == ("inner.0.weight", "inner.2.weight")
    assert result.module.get_parameter("inner.2.weight").shape == (6, 7, 3)
    assert difference(net(X), result.module(X)) <= 1e-12


def test_refusals() -> None:
    net = network(parametrizations.weight_norm)
    optimizer = torch.optim.Adam(net.parameters())
    with pytest.raises(OptimizerError, match=r"lengths and directions of weight norm.*prune without the optimizer"):
        fxc.prune(net, X, optimizer)
    nn.init.zeros_(parts(net[0])[1])
    with pytest.raises(UnsupportedModelError, match="NaN or infinite values in 'weight': a direction of length 0"):
        fxc.prune(net, X)


@pytest.mark.parametrize("run", [fxc.prune, fxc.compress])
def test_what_cannot_be_run_is_refused_before_it_is(run: Callable[..., object]) -> None:
    meta = parametrizations.weight_norm(nn.Linear(4, 4)).to("meta")
    with pytest.raises(UnsupportedModelError, match="is on the meta device"):
        run(meta, torch.zeros(2, 4))
    lazy = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.LazyLinear(3))
    with pytest.raises(UnsupportedModelError, match="it is lazy and has no shape yet"):
        run(lazy, torch.zeros(2, 4))


QUESTIONS: dict[str, Callable[[Any], Any]] = {
    "its length": lambda layer: parts(layer)[0].sum(),
    "whether it has a length": lambda layer: 3 if hasattr(layer, "weight_g") else 1,
    "whether it has parametrizations": lambda layer: 3 if hasattr(layer, "parametrizations") else 1,
    "whether it is parametrized": lambda layer: 3 if parametrize.is_parametrized(layer) else 1,
    "its class": lambda layer: len(type(layer).__name__),
    "its hooks": lambda layer: len(layer._forward_pre_hooks) + 1,
    "its parameters": lambda layer: len([name for name, _ in layer.named_parameters()]),
    "the state that it saves": lambda layer: len(layer.state_dict()),
    "one of its sizes": lambda layer: layer.weight.shape[0],
    "its bias": lambda layer: 1 if layer.bias is None else 2,
}


class Asks(nn.Module):
    """Multiplies a branch that starts as next to nothing by what a question to a layer with weight norm returns."""

    def __init__(self, norm: Norm, question: str) -> None:
        super().__init__()
        self.body = network(norm)
        nn.init.constant_(self.body.get_parameter("4.weight"), 1e-9)
        nn.init.zeros_(self.body.get_parameter("4.bias"))
        self.question = question

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x) * QUESTIONS[self.question](self.body[0])
        return y + x[:, :2, 3:-3]


class ReadsValues(nn.Module):
    """Has no graph as a whole."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y * 2 if y.sum().item() > 0 else y


def pruned_or_refused(net: nn.Module, inputs: Tensor | None, *, reads: bool) -> nn.Module | None:
    """The pruned network, or None where an error says that its code asks how a weight is made."""
    told = "asks how they are made, or reads a length or a direction" + ("|has no attribute" if reads else "")
    try:
        return fxc.prune(net, inputs).module
    except (UnsupportedModelError, TraceError) as error:
        if re.search(told, str(error)) is None:
            raise
        return None


@pytest.mark.sampled(2)
@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("how", ["values", "zeros", "inferred"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("question", QUESTIONS)
def test_code_that_asks_how_a_weight_is_made(question: str, form: str, how: str, *, pieces: bool) -> None:
    """It is refused, or does what it did before: also when the branch that it belongs to has come to life."""
    if pieces and how == "inferred":
        return  # pieces need inputs
    asks = Asks(FORMS[form], question)
    kill(asks.body, [1])
    net = ReadsValues(asks) if pieces else asks
    path = "inner.body" if pieces else "body"
    visit = Fingerprint(net)
    inputs = {"values": X, "zeros": torch.zeros_like(X), "inferred": None}[how]
    pruned = pruned_or_refused(net, inputs, reads=question == "its length")
    visit.check()
    if pruned is None:
        return
    assert pruned.get_parameter(f"{path}.0.weight").shape[0] == 7 or question == "one of its sizes"
    with torch.no_grad():
        for each in (net, pruned):
            each.get_parameter(f"{path}.4.weight").fill_(0.5)
    for x in (X, -X):
        assert difference(net(x), pruned(x)) <= 1e-12


def test_which_questions_are_refused() -> None:
    """So that the test above does not pass by refusing all."""
    for form, norm in FORMS.items():
        for question in ("one of its sizes", "its bias"):
            fxc.prune(Asks(norm, question), X)
        question = "whether it has " + ("a length" if form == "hook" else "parametrizations")
        with pytest.raises(UnsupportedModelError, match=r"Asks computes something else where the weights"):
            fxc.prune(Asks(norm, question), X)


@pytest.mark.parametrize("form", FORMS)
def test_a_network_can_be_pickled(form: str) -> None:
    """With weight norm it could not; without it nothing is left that stands in the way."""
    net = fxc.compress(network(FORMS[form]), X)
    final = net.finalize().eval()
    for one in (net, final):
        twin = pickle.loads(pickle.dumps(one))
        assert torch.equal(twin(X), one(X))
        twin.load_state_dict(copy.deepcopy(one.state_dict()))
    old = network(by_hook).state_dict()
    assert "0.weight_g" in old
    pickle.loads(pickle.dumps(final)).load_state_dict(old)
