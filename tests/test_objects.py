"""Objects that a model makes and returns, as language models return the keys and values that they remember."""

from collections import OrderedDict
from collections.abc import Callable
from enum import Enum
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

import fxcompress as fxc
from fxcompress.errors import TraceError
from tests.exactness import difference


class Memory:
    """What a layer remembers."""

    def __init__(self, kind: type, keys: Tensor) -> None:
        self.kind = kind
        self.keys = keys
        self.length = keys.shape[1]
        self.layers: list[Any] = []


class Remembers(nn.Module):
    """Returns one object twice, with another one in it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.hidden = nn.Linear(8, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> dict[str, Any]:
        remembered = F.relu(self.first(x))
        y = self.last(F.relu(self.hidden(remembered)))
        outer = Memory(Memory, 2 * remembered)
        outer.layers.append(Memory(list, x[:, :, :1].flip(1)))
        if self.training and x.shape[0] == 0:
            outer.length += int(y.flatten()[0])
        return {"y": y, "memory": outer, "again": [outer]}


class Endless(Remembers):
    """The object holds itself."""

    def forward(self, x: Tensor) -> dict[str, Any]:
        result = super().forward(x)
        result["memory"].layers.append(result["memory"])
        return result


class Keeps(Remembers):
    """The object is there before the model runs."""

    def __init__(self) -> None:
        super().__init__()
        self.store = [Memory(list, torch.zeros(1, 1))]

    def forward(self, x: Tensor) -> dict[str, Any]:
        return super().forward(x) | {"memory": self.store[0]}


def dead() -> Remembers:
    """Two channels of each layer but the last are zero."""
    torch.manual_seed(0)
    net = Remembers().double().eval()
    with torch.no_grad():
        for layer in (net.first, net.hidden):
            layer.weight[2:4] = 0
            layer.bias[2:4] = 0
    return net


def test_an_object_is_made_again_and_what_it_holds_stays() -> None:
    net, x = dead(), torch.randn(2, 5, 4, dtype=torch.float64)
    pruned = fxc.prune(net, x).module
    assert pruned.get_parameter("hidden.weight").shape == (6, 8)
    assert pruned.get_parameter("first.weight").shape == (8, 4)  # the object holds what it makes
    for given in (x, torch.randn(3, 7, 4, dtype=torch.float64)):
        expected, found = net(given), pruned(given)
        assert difference(expected["y"], found["y"]) <= 1e-12
        memory = found["memory"]
        assert type(memory) is Memory
        assert found["again"][0] is memory
        assert memory.kind is Memory
        assert memory.length == given.shape[1]
        assert difference(expected["memory"].keys, memory.keys) == 0
        assert type(memory.layers[0]) is Memory
        assert difference(expected["memory"].layers[0].keys, memory.layers[0].keys) == 0
    assert found["memory"] is not pruned(x)["memory"]


def test_networks_that_return_objects_train() -> None:
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    net = fxc.compress(dead(), x)
    (net(x)["y"].square().mean() + net.size()).backward()
    net.step()
    assert difference(net.finalize()(x)["memory"].keys, net(x)["memory"].keys) <= 1e-12


@pytest.mark.parametrize("kind", [Endless, Keeps])
def test_objects_that_cannot_be_made_again_are_refused(kind: type[Remembers]) -> None:
    with pytest.raises(TraceError, match=r"a Memory.* a graph cannot hold it\n.*use_cache=False"):
        fxc.ChannelGraph.of(kind().double(), torch.zeros(2, 5, 4, dtype=torch.float64))


def test_a_language_model_with_its_cache() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=20, num_key_value_heads=2, max_position_embeddings=16, **sizes)
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.arange(6)[None]
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3:9] = 0
        pruned = fxc.prune(model, {"input_ids": ids}).module.eval()
        assert pruned.get_parameter("model.layers.0.mlp.up_proj.weight").shape == (18, 16)
        expected, found = model(input_ids=ids), pruned(input_ids=ids)
    assert difference(expected.logits, found.logits) <= 1e-5
    cache = found.past_key_values
    assert type(cache) is transformers.DynamicCache
    assert cache.get_seq_length() == 6
    assert difference(expected.past_key_values.layers[0].keys, cache.layers[0].keys) <= 1e-5


class Named(NamedTuple):
    """Two tensors."""

    y: Tensor
    hidden: Tensor


class Colour(Enum):
    """Two of them."""

    RED = 1
    BLUE = "b"


class ReturnsNamed(nn.Module):
    """Puts a named tuple somewhere into its result. Where its input is a dict, it is traced by running."""

    def __init__(self, put: Callable[[Named], object]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
        self.put = put

    def forward(self, inputs: Any) -> object:  # noqa: ANN401 - a tensor or a dict of one
        x = inputs["x"] if isinstance(inputs, dict) else inputs
        h = F.relu(self.first(x))
        return self.put(Named(self.last(h), h.sum(-1)))


PLACES: dict[str, Callable[[Named], object]] = {
    "bare": lambda named: named,
    "in a dict": lambda named: {"result": named},
    "in a list": lambda named: [named, named.y],
    "in a dict in a list": lambda named: [{"a": {"b": (named, named.hidden)}}],
    "in itself": lambda named: {"outer": Named(named, named)},  # type: ignore[arg-type]
    "beside members of an enum": lambda named: {"colours": (Colour.RED, [Colour.BLUE]), "result": named},
    "in an ordered dict": lambda named: [OrderedDict(a=named.y, b=OrderedDict(c=named))],
    "in an object": lambda named: [Memory(list, named.hidden[:, :, None]), {"b": named}],
}


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_all_sorts_of_results(place: str, *, running: bool) -> None:
    torch.manual_seed(0)
    net, given = ReturnsNamed(PLACES[place]).double(), torch.randn(2, 5, 4).double()
    x = {"x": given} if running else given
    with torch.no_grad():
        for parameter in net.first.parameters():
            parameter[2:5] = 0
    expected = net(x)
    for found in (fxc.prune(net, (x,)).module, fxc.compress(net, (x,), bits=24), fxc.compress(net, (x,)).finalize()):
        result = found(x)
        assert str(tree_map(type, result)) == str(tree_map(type, expected))
        leaves = zip(tree_leaves(result), tree_leaves(expected), strict=True)
        tensors = [(a, b) for a, b in leaves if isinstance(b, Tensor)]
        assert tensors
        assert all(difference(a, b) <= 0.1 for a, b in tensors)


@pytest.mark.parametrize("running", [False, True])
def test_keys_that_a_graph_cannot_hold_are_refused(*, running: bool) -> None:
    net, x = ReturnsNamed(lambda named: {Colour.RED: named.y}), torch.randn(2, 5, 4)
    with pytest.raises(TraceError, match="a key that is a Colour"):
        fxc.prune(net, ({"x": x},) if running else (x,))
