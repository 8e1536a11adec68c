"""Attention: heads, dims of heads and shared heads go when they are dead, and the output stays what it was."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.channels.prepare import prepare
from fxcompress.passes.rewrite import carry_out
from tests.attention import Attention, Form
from tests.exactness import difference, forced, outputs

FORMS = {
    "sdpa": Form(4, 6, 5),
    "sdpa, packed": Form(4, 6, 5, packed=True),
    "sdpa, scale given": Form(4, 6, 6, scaled="literal"),
    "sdpa, shared": Form(4, 6, 5, shared=2),
    "matmul": Form(4, 6, 5, "matmul"),
    "matmul, packed": Form(4, 6, 6, "matmul", packed=True),
    "matmul, shared": Form(4, 6, 5, "matmul", shared=2),
    "matmul, temperature": Form(4, 6, 5, "matmul", extra="temperature"),
    "einsum": Form(4, 6, 5, "einsum"),
    "transposed": Form(4, 6, 6, "transposed"),
}
SIZE = 4


def build(form: Form) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 12, 1), Attention(12, form, SIZE**2), nn.ReLU(), nn.Conv2d(12, 4, 1))
    return net.double().eval(), torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64)


def rows(net: nn.Sequential, part: int) -> tuple[Tensor, Tensor]:
    """Weight and bias that make q (0), k (1) or v (2), in the form (heads, dims, ...)."""
    attention = net[1]
    assert isinstance(attention, Attention)
    form = attention.form
    layer = attention.qkv if form.packed else (attention.q, attention.k, attention.v)[part]
    tensors = [layer.weight, layer.bias]
    if form.packed:
        tensors = [t.split(attention.sizes)[part] for t in tensors]
    size = form.value if part == 2 else form.head
    return tuple(t.unflatten(0, (-1, size)) for t in tensors)


def zero(net: nn.Sequential, part: int, head: int | slice, dim: int | slice) -> None:
    with torch.no_grad():
        for tensor in rows(net, part):
            tensor[head, dim] = 0


class Grouped(nn.Module):
    """Two heads of queries share one of keys and values; ``product`` multiplies queries (N, 2, T, 3) and keys."""

    def __init__(self, product: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(8, 6), nn.Linear(8, 3), nn.Linear(8, 3), nn.Linear(6, 8)
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, 3)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        y: Tensor = self.out((self.product(q, k).softmax(-1) @ v).transpose(1, 2).flatten(2))
        return y


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matmul": lambda q, k: q @ k.transpose(-1, -2),
    "einsum": lambda q, k: torch.einsum("...ld, ...sd -> ...ls", q, k),
    "einsum of a list": lambda q, k: torch.einsum("bhld,bhsd->bhls", [q, k]),
    "einsum of numbers": lambda q, k: torch.einsum(q, [..., 0, 1], k, [..., 2, 1], [..., 0, 2]),
    "by hand": lambda q, k: (q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1),
    "vecdot": lambda q, k: torch.linalg.vecdot(q.unsqueeze(-2), k.unsqueeze(-3)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_one_dim_of_each_head_is_left_and_shared_keys_have_two(name: str) -> None:
    """torch.einsum takes a dim of one entry for all entries: of each head's other dim, here."""
    torch.manual_seed(0)
    net, x = Grouped(PRODUCTS[name]).double(), torch.randn(2, 5, 8, dtype=torch.float64)
    with torch.no_grad():
        for tensor in net.q.parameters():
            tensor[[0, 2, 3, 4]] = 0
    result = fxc.prune(net, x)
    assert difference(outputs(net, (x,)), outputs(result.module, (x,))) <= 1e-12
    assert [result.module.get_parameter(f"{n}.weight").shape[0] for n in "qk"] == [4, 2]


class Beside(nn.Module):
    """Queries of (N, keys, queries to each, T, d) meet keys of (N, keys, 1, T, d)."""

    def __init__(self, keys: int, each: int, product: str) -> None:
        super().__init__()
        self.q, self.out = nn.Linear(8, keys * each * 4), nn.Linear(keys * each * 4, 8)
        self.k, self.v = nn.Linear(8, keys * 4), nn.Linear(8, keys * 4)
        self.keys, self.each, self.product = keys, each, product

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (self.keys, self.each, 4)).permute(0, 2, 3, 1, 4)
        k, v = (layer(x).unflatten(-1, (self.keys, 4)).transpose(1, 2) for layer in (self.k, self.v))
        if self.product == "matmul":
            y = (q @ k.unsqueeze(2).transpose(-1, -2)).softmax(-1) @ v.unsqueeze(2)
        else:
            y = torch.einsum("ngrts,ngsd->ngrtd", torch.einsum("ngrtd,ngsd->ngrts", q, k).softmax(-1), v)
        return self.out(y.permute(0, 3, 1, 2, 4).flatten(2))  # type: ignore[no-any-return]


@pytest.mark.parametrize("product", ["matmul", "einsum"])
@pytest.mark.parametrize(("keys", "each"), [(2, 3), (3, 2), (1, 4)])
@pytest.mark.parametrize("dead", ["dims", "values", "keys"])
def test_queries_beside_the_keys_that_they_share(product: str, keys: int, each: int, dead: str) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(8, 8), Beside(keys, each, product)).double(), torch.randn(2, 5, 8).double()
    attention = net[1]
    assert isinstance(attention, Beside)
    with torch.no_grad():
        for layer in {"dims": (attention.q, attention.k), "keys": (attention.k,), "values": (attention.v,)}[dead]:
            for tensor in layer.parameters():
                tensor.unflatten(0, (-1, 4))[:, [1, 2]] = 0
    module = fxc.prune(net, x).module
    gone = ("v",) if dead == "values" else ("q", "k")
    for name in "qkv":
        heads = keys * each if name == "q" else keys
        assert module.get_parameter(f"1.{name}.weight").shape[0] == heads * (2 if name in gone else 4)
    for rows in (1, 3):
        other = torch.randn(rows, 6, 8).double()
        assert difference(outputs(net, (other,)), outputs(module, (other,))) <= 1e-12


def sizes(module: nn.Module) -> list[int]:
    """Rows of q, k and v together, and what the layer after the attention reads."""
    parameters = dict(module.named_parameters())
    made = sum(
        p.shape[0] for name, p in parameters.items() if name in {f"1.{n}.weight" for n in ("q", "k", "v", "qkv")}
    )
    return [made, parameters["1.out.weight"].shape[1]]


def check(net: nn.Sequential, x: Tensor) -> list[int]:
    """What is left after pruning, which changes nothing, on other sizes either."""
    module = fxc.prune(net, x).module
    for inputs in (x, torch.randn(3, 3, SIZE + 1, SIZE, dtype=torch.float64)):
        assert difference(outputs(net, (inputs,)), outputs(module, (inputs,))) <= 1e-9
    assert list(module.state_dict()) == list(net.state_dict())
    module.train()(x).sum().backward()
    return sizes(module)


@pytest.mark.parametrize("name", FORMS)
def test_a_dead_head_goes(name: str) -> None:
    form = FORMS[name]
    net, x = build(form)
    zero(net, 2, 1, slice(None))
    before, left = sizes(net), check(net, x)
    if form.product == "transposed":
        assert left[1] < before[1]
    else:
        queries = form.shared * form.head
        assert before[0] - left[0] == queries + form.head + form.value
        assert before[1] - left[1] == form.shared * form.value


@pytest.mark.parametrize("name", [name for name, form in FORMS.items() if form.product != "transposed"])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_dim_that_is_dead_in_each_head_goes(name: str, part: int) -> None:
    form = FORMS[name]
    net, x = build(form)
    zero(net, part, slice(None), 2)
    before, left = sizes(net), check(net, x)
    heads = form.heads // form.shared
    assert before[0] - left[0] == (heads if part == 2 else heads + form.heads)
    assert before[1] - left[1] == (form.heads if part == 2 else 0)


@pytest.mark.parametrize("name", FORMS)
def test_all_at_once(name: str) -> None:
    form = FORMS[name]
    net, x = build(form)
    zero(net, 2, 0, slice(None))
    zero(net, 0, slice(None), 1)
    zero(net, 2, slice(None), 3)
    assert sum(check(net, x)) < sum(sizes(net))


def test_a_dim_that_is_dead_in_some_heads_stays() -> None:
    net, x = build(FORMS["sdpa"])
    zero(net, 0, 2, 2)
    assert check(net, x) == sizes(net)
    report = fxc.prune(net, x).report
    assert [(kept.tensor, kept.channel) for kept in report.kept] == [("1.q.weight", 14)]
    assert "not be rectangular" in report.kept[0].reason


RAGGED = [name for name, form in FORMS.items() if form.product != "transposed"]


@pytest.mark.parametrize("name", RAGGED)
def test_heads_may_lose_different_dims_as_long_as_they_are_as_many(name: str) -> None:
    form = FORMS[name]
    net, x = build(form)
    heads = form.heads // form.shared
    for head in range(heads):
        zero(net, 1, head, (2 * head + 1) % form.head)
        zero(net, 2, head, slice(head % 3, head % 3 + 2))
    zero(net, 2, 0, 4)  # one more than the others: it stays
    before, left = sizes(net), check(net, x)
    assert before[0] - left[0] == heads + form.heads + 2 * heads
    assert before[1] - left[1] == 2 * form.heads


@pytest.mark.parametrize("name", RAGGED)
def test_a_dead_head_and_different_dims_of_the_others(name: str) -> None:
    form = FORMS[name]
    net, x = build(form)
    heads = form.heads // form.shared
    zero(net, 2, heads - 1, slice(None))
    for head in range(heads - 1):
        zero(net, 0, slice(head * form.shared, (head + 1) * form.shared), head)
    before, left = sizes(net), check(net, x)
    queries, keys = form.heads * form.head, heads * form.head
    rest = (heads - 1) * (form.shared + 1) * (form.head - 1)
    assert before[0] - left[0] == queries + keys - rest + form.value


def test_different_dims_stay_where_heads_share_a_parameter_for_each() -> None:
    class Gained(Attention):
        def __init__(self) -> None:
            super().__init__(12, FORMS["matmul"], SIZE**2)
            self.gain = nn.Parameter(torch.rand(6) + 0.5)

        def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return super().attend(q * self.gain, k, v)

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 12, 1), Gained()).double().eval()
    for head in range(4):
        zero(net, 0, head, head)
        zero(net, 0, head, 5)
    x = torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64)
    module = fxc.prune(net, x).module
    assert difference(outputs(net, (x,)), outputs(module, (x,))) <= 1e-9
    assert module.get_parameter("1.gain").shape == (5,)
    assert module.get_parameter("1.q.weight").shape[0] == 20


@pytest.mark.parametrize("name", FORMS)
def test_all_heads_but_one_go_at_once(name: str) -> None:
    form = FORMS[name]
    net, x = build(form)
    zero(net, 2, slice(1, None), slice(None))
    made, read = check(net, x)
    assert read == form.shared * form.value
    assert form.product == "transposed" or made == form.shared * form.head + form.head + form.value


class Channels(nn.Module):
    """Attention over the channels of each head, or over tokens, by one reshaped projection, as in XCiT and ViT."""

    def __init__(self, *, across: bool) -> None:
        super().__init__()
        self.before, self.qkv, self.out = nn.Linear(5, 16), nn.Linear(16, 48), nn.Linear(16, 4)
        self.temperature, self.across = nn.Parameter(torch.rand(4, 1, 1) + 0.5), across

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        packed = self.qkv(x).reshape(x.shape[0], x.shape[1], 3, 4, 4)
        q, k, v = packed.permute(2, 0, 3, 4, 1).unbind(0) if self.across else packed.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = ((q @ k.transpose(-2, -1)) * self.temperature).softmax(-1) @ v
        mixed = mixed.permute(0, 3, 1, 2) if self.across else mixed.transpose(1, 2)
        return self.out(mixed.flatten(2))  # type: ignore[no-any-return]


@pytest.mark.parametrize("left", [1, 2, 3])
@pytest.mark.parametrize("across", [False, True])
def test_heads_of_a_reshaped_projection_go_down_to_one(*, across: bool, left: int) -> None:
    torch.manual_seed(0)
    net, x = Channels(across=across).double().eval(), torch.randn(2, 6, 5, dtype=torch.float64)
    with torch.no_grad():
        for tensor in (net.qkv.weight, net.qkv.bias):
            tensor.view(3, 4, 4, -1)[2, left:] = 0
    module = fxc.prune(net, x).module
    for inputs in (x, torch.randn(3, 9, 5, dtype=torch.float64)):
        assert difference(outputs(net, (inputs,)), outputs(module, (inputs,))) <= 1e-9
    assert module.get_parameter("qkv.weight").shape[0] == 12 * left
    again = fxc.prune(module, x).module
    assert difference(outputs(net, (x,)), outputs(again, (x,))) <= 1e-9


def test_the_last_head_stays() -> None:
    net, x = build(FORMS["sdpa"])
    zero(net, 2, slice(None), slice(None))
    made, read = check(net, x)
    assert 0 < made < sizes(net)[0]
    assert read > 0


@pytest.mark.parametrize("name", FORMS)
def test_taking_out_what_is_alive_changes_the_output(name: str) -> None:
    net, x = build(FORMS[name])
    analysis = prepare(net, x)
    made = "qkv" if FORMS[name].packed else "v"
    unit = analysis.units[int(analysis.atoms[f"1.{made}.weight"][0][-1])]
    result = carry_out(analysis, forced(analysis, np.array([unit])))
    assert difference(outputs(net, (x,)), outputs(result.module, (x,))) > 1e-6


def test_share() -> None:
    """All of an attention but what it reads and returns hangs on removable units."""
    net = nn.Sequential(Attention(12, FORMS["sdpa"], SIZE**2))
    assert fxc.ChannelGraph.of(net, torch.randn(1, 12, SIZE, SIZE)).share > 0.98


def norm_of_heads(q: Tensor) -> Tensor:
    return nn.functional.layer_norm(q, q.shape[-1:])


@pytest.mark.parametrize("function", [norm_of_heads, lambda q: q.softmax(-1), lambda q: q - q.mean(-1, keepdim=True)])
def test_heads_go_although_their_dims_are_mixed(function: Callable[[Tensor], Tensor]) -> None:
    class Mixed(Attention):
        def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return super().attend(function(q), k, v)

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 12, 1), Mixed(12, FORMS["matmul"], SIZE**2)).double().eval()
    zero(net, 2, 3, slice(None))
    x = torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64)
    module = fxc.prune(net, x).module
    assert difference(outputs(net, (x,)), outputs(module, (x,))) <= 1e-9
    assert module.get_parameter("1.q.weight").shape[0] == 18
