"""Sizes of channels that flow into values: they stay what they were, for inputs of every size."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import fxcompress as fxc
from tests.exactness import TOLERANCE, difference, outputs
from tests.nets import set_bits

STEPS, WIDTH, DEAD = 20, 12, [1, 4, 5, 9]


@fx.wrap
def hidden(x: Tensor) -> Tensor:
    """A function that no graph looks into, and that computes with a size."""
    return x * (1 + torch.arange(x.shape[1], dtype=x.dtype) / x.shape[2])[:, None]


def c(h: Tensor) -> int:
    return h.shape[-1]


def attention(h: Tensor, heads: int = 3) -> Tensor:
    """Heads beside the batch, as networks for diffusion write it."""
    b, t, width = h.shape
    x = h.transpose(1, 2).reshape(b * heads, width // heads, t)
    scores = torch.einsum("bct,bcs->bts", x * (width // heads) ** -0.25, x * (width // heads) ** -0.25)
    return torch.einsum("bts,bcs->bct", scores.softmax(-1), x).reshape(b, width, t).transpose(1, 2)


GO: dict[str, Callable[[Tensor], Tensor]] = {
    "a factor": lambda h: h * c(h) ** -0.5,
    "math": lambda h: h / math.sqrt(h.size(-1)),
    "with a size of the input": lambda h: h / (h.shape[1] * h.shape[2]),
    "two dims at once": lambda h: h / math.prod(h.shape[1:]),
    "numel": lambda h: h / h[0].numel(),
    "numel of all, by a function": lambda h: h * (1 + 1 / torch.numel(h)),
    "numel of a shape": lambda h: h / h.shape.numel(),
    "numel of a part of a shape": lambda h: h / h.size()[1:].numel(),
    "numel, and a size": lambda h: h / (h.numel() // c(h)),
    "a small tensor": lambda h: h * torch.tensor(c(h), dtype=h.dtype),
    "a large tensor": lambda h: h * torch.cos(torch.arange(h.shape[1], dtype=h.dtype) / c(h))[:, None],
    "linspace": lambda h: h * torch.linspace(0, c(h), STEPS)[:STEPS, None][: h.shape[1]].mean(),
    "alpha": lambda h: torch.add(h, h, alpha=c(h)),
    "clamp": lambda h: h.clamp(-1 / c(h), 1 / c(h)),
    "softplus": lambda h: h * F.softplus(h, beta=c(h)),
    "full": lambda h: h * torch.full((h.shape[0], 1, 1), 1 / c(h)),
    "full_like": lambda h: h * torch.full_like(h, 1 / c(h)),
    "a matrix": lambda h: torch.eye(h.shape[1]) / c(h) @ h,
    "baddbmm": lambda h: torch.baddbmm(h.new_zeros(1, 1, 1), h, h.mT, beta=0, alpha=c(h) ** -0.5) @ h,
    "masked_fill": lambda h: h * h.sum(-1, keepdim=True).masked_fill(h.mean(-1, keepdim=True) > 0, 1 / c(h)),
    "where": lambda h: h * torch.where(h.sum(-1, keepdim=True) > 0, 1 / c(h), 2.0),
    "padding": lambda h: F.pad(h.sum(-1), (0, 1), value=1 / c(h))[:, 1:, None] * h,
    "a place": lambda h: h * h[:, c(h) // 2 : c(h) // 2 + 1].sum(-1, keepdim=True),
    "roll": lambda h: h.roll(c(h), 1),
    "narrow": lambda h: h * h.narrow(1, c(h) - 1, 1),
    "an index": lambda h: h * h[:, torch.arange(3) * (c(h) // 4)].sum((1, 2), keepdim=True),
    "dilation": lambda h: h * F.conv1d(h.sum(-1)[:, None], torch.ones(1, 1, 3), None, 1, c(h), c(h))[:, 0, :, None],
    "a window": lambda h: h * F.avg_pool1d(h.sum(-1), c(h) // 2 * 2 + 1, 1, c(h) // 2)[..., None],
    "order of a norm": lambda h: h * torch.linalg.vector_norm(h, c(h), 1, keepdim=True),
    "index_add": lambda h: h.index_add(1, torch.tensor([0]), h[:, :1], alpha=c(h)),
    "heads beside the batch": attention,
    "written to": lambda h: torch.zeros(h.shape[0], h.shape[1], h.shape[2]).index_add_(
        1, torch.tensor([0, 2]), h[:, :2]
    ),
}
EITHER: dict[str, Callable[[Tensor], Tensor]] = {
    "in a function": hidden,
    "of a joint dim": lambda h: h / h.flatten(1).shape[1],
    "in place on what others read": lambda h: h * torch.arange(3.0).to(h).mul_(c(h)).sum(),
}


class Net(nn.Module):
    """Two branches: one whose size is used, and one beside it, which must not suffer."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.between = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 5), between
        self.other = nn.Sequential(nn.Linear(6, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 5))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.b(self.between(torch.tanh(self.a(x)))), self.other(x)


def build(between: Callable[[Tensor], Tensor], dead: list[int]) -> Net:
    torch.manual_seed(0)
    net = Net(between).double().eval()
    with torch.no_grad():
        for layer in (net.a, net.get_submodule("other.0")):
            for parameter in layer.parameters():
                parameter[dead] = 0
    return net


def check(between: Callable[[Tensor], Tensor], dead: list[int], batch: int = 2) -> list[int]:
    """Prune, compare on inputs of other sizes too, and return the widths that are left."""
    net = build(between, dead)
    module = fxc.prune(net, torch.randn(batch, STEPS, 6, dtype=torch.float64)).module
    for shape in ((batch, STEPS), (batch + 1, STEPS), (batch + 1, STEPS + 3)):
        x = torch.randn(*shape, 6, dtype=torch.float64)
        assert difference(net(x), module(x)) <= 1e-9
    return [module.get_parameter(name).shape[0] for name in ("a.weight", "other.0.weight")]


@pytest.fixture(autouse=True)
def _double() -> object:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", GO)
def test_a_size_stays_what_it_was(name: str) -> None:
    dead = [1, 2, 5, 6, 9, 10] if "heads" in name else DEAD
    assert check(GO[name], dead) == [WIDTH - len(dead)] * 2


@pytest.mark.parametrize("name", EITHER)
def test_what_cannot_stay_keeps_its_own_channels_alone(name: str) -> None:
    width, other = check(EITHER[name], DEAD)
    assert width in {WIDTH, WIDTH - len(DEAD)}
    assert other == WIDTH - len(DEAD)


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.sampled_from(sorted(GO.keys() - {"heads beside the batch"})), min_size=1, max_size=3),
    st.sets(st.integers(0, WIDTH - 1), min_size=1, max_size=WIDTH - 2),
)
def test_sizes_in_a_chain(names: list[str], dead: set[int]) -> None:
    def between(h: Tensor) -> Tensor:
        for name in names:
            h = torch.tanh(GO[name](h))
        return h

    torch.set_default_dtype(torch.float64)
    check(between, sorted(dead))


class Layers(nn.Module):
    """Layers read what is made of the width."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.waves = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 5), nn.Linear(WIDTH, 5)
        self.table, self.conv = nn.Embedding(WIDTH, 5), nn.Conv1d(1, 5, 3, padding=1, padding_mode="circular")

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        places = torch.arange(c(h), device=h.device)
        waves = self.waves(torch.sin(places / c(h)))
        kernel = self.conv(torch.cos(places / c(h))[None, None]).sum((0, 2))
        return self.b(h) + waves + self.table(places[c(h) // 2]) + kernel  # type: ignore[no-any-return]


def test_layers_that_read_what_is_made_of_a_size_are_layers_again_in_the_end() -> None:
    x = torch.randn(2, STEPS, 6)
    net = fxc.compress(Layers(), x)
    set_bits(net, "a.weight", DEAD)
    nn.init.zeros_(net.get_parameter("a.bias"))
    net.step()
    expected = net.eval()(x)
    assert net.prune().modified
    assert difference(expected, net(x)) <= 1e-9
    final = net.finalize()
    assert difference(expected, final(x)) <= 1e-9
    layers = [n.target for n in final.graph.nodes if n.op == "call_module"]
    assert sorted(layers) == ["a", "b", "conv", "table", "waves"]


def test_a_size_that_is_returned() -> None:
    class Returns(Net):
        def forward(self, x: Tensor) -> object:  # type: ignore[override]
            h = torch.tanh(self.a(x))
            return self.b(h), {"width": h.shape[-1], "as a tensor": torch.tensor(h.shape[-1])}

    net = Returns(nn.Identity()).double()
    with torch.no_grad():
        for parameter in net.a.parameters():
            parameter[DEAD] = 0
    module = fxc.prune(net, torch.randn(2, STEPS, 6)).module
    assert module.get_parameter("a.weight").shape[0] == WIDTH - len(DEAD)
    out = module(torch.randn(3, STEPS, 6))[1]
    assert (out["width"], int(out["as a tensor"])) == (WIDTH, WIDTH)


JOINED: dict[str, Callable[[Tensor], Tensor]] = {
    "size": lambda h: h.view(h.size()[:-1] + (3, 4)),  # noqa: RUF005 - as people write it
    "shape": lambda h: h.reshape(h.shape[:-1] + (3, h.size(-1) // 3)),  # noqa: RUF005
    "torch.Size": lambda h: h.view(h.shape[:2] + torch.Size([3, 4])),
    "tuple": lambda h: h.view((h.shape[0], -1) + (3, 4)),  # noqa: RUF005 - as people write it
    "starred": lambda h: h.view(*h.shape[:-1], 3, 4),
}


@pytest.mark.parametrize("dead", [[4, 5, 6, 7], [0, 4, 8], [0, 4, 5, 6, 7, 8]], ids=["group", "entries", "both"])
@pytest.mark.parametrize("name", JOINED)
def test_sizes_that_are_joined_as_tuples_follow(name: str, dead: list[int]) -> None:
    """Three groups of four entries, which are put side by side again."""

    def between(h: Tensor) -> Tensor:
        groups = torch.relu(JOINED[name](h))
        return groups.reshape(groups.size()[:-2] + (WIDTH,))  # noqa: RUF005 - as people write it

    assert check(between, dead) == [WIDTH - len(dead)] * 2
    module = fxc.prune(build(between, dead), torch.randn(2, STEPS, 6)).module
    assert isinstance(module, fx.GraphModule)
    assert [n.name for n in module.graph.nodes if not n.users and n.op != "output" and not n.is_impure()] == []


def test_the_graph_holds_no_nodes_that_nobody_uses() -> None:
    module = fxc.prune(build(GO["a factor"], DEAD), torch.randn(2, STEPS, 6)).module
    assert isinstance(module, fx.GraphModule)
    assert [n.name for n in module.graph.nodes if not n.users and n.op != "output" and not n.is_impure()] == []
    again = fxc.prune(module, torch.randn(2, STEPS, 6))
    assert not again.report.modified


def test_a_layer_that_unflattens_into_channels_follows_them(tmp_path: Path) -> None:
    """Its sizes are numbers of the module's; 6 channels of 4 positions, of which 2 are dead."""

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 24), nn.ReLU(), nn.Unflatten(1, (6, 4)), nn.Conv1d(6, 2, 3)).double()

    net, x = make(), torch.randn(3, 5, dtype=torch.float64)
    with torch.no_grad():
        for parameter in net[0].parameters():  # type: ignore[index]
            parameter[4:12] = 0.0
    result = fxc.prune(net, x).module
    assert result.get_parameter("3.weight").shape == (2, 4, 3)
    assert difference(net(x), result(x)) <= 1e-9
    fxc.save(result, tmp_path / "net.fxc")
    assert torch.equal(fxc.load(tmp_path / "net.fxc", make())(x), result.eval()(x))


class Unpooled(nn.Module):
    """Undoes a pooling, and is told the whole size that there was before, channels of others and zeros among them."""

    def __init__(self, *, layer: bool) -> None:
        super().__init__()
        self.first, self.more, self.middle, self.last = (nn.Conv2d(*n, 1) for n in ((3, 4), (4, 6), (6, 6), (6, 2)))
        self.pool, self.unpool, self.layer = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2), layer

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        more = self.more(h)
        beside = torch.zeros(x.shape[0], more.shape[1] - h.shape[1], *h.shape[2:], dtype=h.dtype)
        whole = torch.cat([h, beside], 1) + more
        size = whole.size()
        small, places = self.pool(whole)
        small = self.middle(small)
        if self.layer:
            back = self.unpool(small, places, output_size=size)
        else:
            back = nn.functional.max_unpool2d(small, places, (2, 2), output_size=size[2:])
        return self.last(back)  # type: ignore[no-any-return]


@pytest.mark.parametrize("layer", [True, False])
def test_the_size_before_a_pooling_is_a_size(*, layer: bool) -> None:
    net = Unpooled(layer=layer).double()
    with torch.no_grad():
        for name in ("first", "more", "middle"):
            for parameter in net.get_submodule(name).parameters():
                parameter[1:3] = 0
    small = fxc.prune(net, torch.randn(2, 3, 6, 6, dtype=torch.float64)).module
    assert [small.get_parameter(f"{name}.weight").shape[0] for name in ("first", "more", "middle")] == [2, 4, 4]
    for size in ((2, 3, 6, 6), (1, 3, 8, 6), (3, 3, 7, 5)):
        x = torch.randn(size, dtype=torch.float64)
        assert difference(outputs(net, (x,)), outputs(small, (x,))) <= TOLERANCE
