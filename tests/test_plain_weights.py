"""Parameters that no layer multiplies with have quantizers: position embeddings, tables of biases, experts."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.quantizer import Quantizer
from tests.exactness import difference

pytestmark = pytest.mark.usefixtures("double")

E, D, H, T = 3, 8, 6, 5
Layout = tuple[int, int, tuple[int, ...]]


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) / 2)


class Experts(nn.Module):
    """Each row of a batch goes through all experts, whose results a gate weighs; ``way`` says how they multiply."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.turned = way, "turned" in way
        self.first, self.gate, self.last = nn.Linear(4, D), nn.Linear(D, E), nn.Linear(D, 2)
        self.up = weight(E, H, D) if self.turned else weight(E, D, H)
        self.down = weight(E, D, H) if self.turned else weight(E, H, D)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        y = EXPERTS[self.way](h, self.up, self.down)  # (E, N, D)
        return self.last(h + (y * self.gate(h).softmax(-1).t()[:, :, None]).sum(0))  # type: ignore[no-any-return]


def chosen(h: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Each row goes through one expert only."""
    best = (h[:, 0].abs() * 10).long() % E
    y = torch.einsum("nh,nhd->nd", torch.einsum("nd,ndh->nh", h, up[best]).relu(), down[best])
    return y.expand(E, -1, -1)


EXPERTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "bmm": lambda h, up, down: torch.bmm(torch.bmm(h.expand(E, -1, -1), up).relu(), down),
    "matmul": lambda h, up, down: (h @ up).relu() @ down,
    "turned": lambda h, up, down: (h @ up.transpose(1, 2)).relu() @ down.mT,
    "einsum": lambda h, up, down: torch.einsum("enh,ehd->end", torch.einsum("nd,edh->enh", h, up).relu(), down),
    "einsum, turned": lambda h, up, down: torch.einsum("enh,edh->end", torch.einsum("nd,ehd->enh", h, up).relu(), down),
    "chosen": chosen,
    "from the left, turned": lambda h, up, down: (down @ (up @ h.t()).relu()).transpose(1, 2),
}


class Chosen(nn.Module):
    """Each row goes through the two experts that it scores highest, whose weights are gathered for it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.last = nn.Linear(4, D), nn.Linear(D, E), nn.Linear(D, 2)
        self.up, self.down = weight(E, 2 * H, D), weight(E, D, H)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        scores, chosen = self.gate(h).softmax(-1).topk(2, -1)
        experts, rows = chosen.reshape(-1), h.repeat_interleave(2, 0)
        gate, up = torch.bmm(self.up[experts], rows[..., None])[..., 0].chunk(2, -1)
        made = torch.bmm(self.down[experts], (F.silu(gate) * up)[..., None])[..., 0] * scores.reshape(-1, 1)
        return self.last(h + made.view(len(h), 2, -1).sum(1))  # type: ignore[no-any-return]


class Positions(nn.Module):
    """A transformer with learned positions, and learned biases in its attention."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.first, self.qkv, self.out = nn.Linear(4, D), nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.last = nn.Linear(D, 2)
        self.pos = weight(T, D) if way == "rows" else weight(1, 2 * T, D) if way == "some of them" else weight(1, T, D)
        self.bias = weight(2 * T - 1, 2)
        self.register_buffer("index", torch.arange(T)[:, None] - torch.arange(T) + T - 1)
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        h = POSITIONS[self.way](self.first(x), self.pos)
        q, k, v = self.drop(self.qkv(h)).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        assert isinstance(self.index, Tensor)
        scores = q @ k.transpose(2, 3) / 2 + self.bias[self.index.view(-1)].view(T, T, -1).permute(2, 0, 1)
        return self.last(h + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)))  # type: ignore[no-any-return]


POSITIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "added": lambda h, pos: h + pos,
    "rows": lambda h, pos: h + pos,
    "dropped and added": lambda h, pos: F.dropout(pos, 0.0) + h,
    "scaled": lambda h, pos: h + pos * 0.5,
    "some of them": lambda h, pos: h + pos[:, : h.shape[1]],
    "resized": lambda h, pos: h + F.interpolate(pos.transpose(1, 2), size=h.shape[1], mode="linear").transpose(1, 2),
}


class Maps(nn.Module):
    """An image with a learned bias for each pixel; channels first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.pos = nn.Conv2d(3, D, 3, padding=1), nn.Conv2d(D, 2, 3), weight(1, D, 6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.last((self.first(x) + self.pos).relu()).mean((2, 3))  # type: ignore[no-any-return]


class Heads(nn.Module):
    """Attention whose weights have a dim for the heads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, D), nn.Linear(D, 2)
        self.q, self.k, self.v, self.o = weight(D, 2, 4), weight(D, 2, 4), weight(D, 2, 4), weight(2, 4, D)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        q, k, v = (torch.einsum("ntd,dhk->nhtk", h, w) for w in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.last(h + torch.einsum("nhtk,hkd->ntd", y, self.o))  # type: ignore[no-any-return]


class Expanded(nn.Module):
    """A matrix that is expanded to the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.weight, self.last = nn.Linear(4, D), weight(D, H), nn.Linear(H, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(torch.bmm(h, self.weight.expand(len(h), -1, -1)).relu())  # type: ignore[no-any-return]


class Stacked(nn.Module):
    """The weights of several layers, one behind the other in one parameter; ``way`` says how they are taken apart."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.first, self.weight, self.bias, self.last = nn.Linear(4, D), weight(E, D, D), weight(E, D), nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for w, b in zip(STACKED[self.way](self.weight), self.bias, strict=True):
            h = (h @ w + b).relu()
        return self.last(h)  # type: ignore[no-any-return]


STACKED: dict[str, Callable[[Tensor], Any]] = {
    "iterated": lambda w: [*w],
    "picked": lambda w: [w[i] for i in range(E)],
    "split": lambda w: [part.squeeze(0) for part in w.split(1)],
}


class Cross(nn.Module):
    """Learned queries read a sequence, with three matrices in one parameter, and are read by themselves before."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.queries = nn.Linear(4, D), nn.Linear(D, 2), weight(T, D)
        self.own, self.cross = (nn.MultiheadAttention(D, 2, batch_first=True) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        q = self.queries.expand(x.shape[0], -1, -1)
        q = q + self.own(q, q, q, need_weights=False)[0]
        return self.last(q + self.cross(q, h, h, need_weights=False)[0])  # type: ignore[no-any-return]


class Pair(nn.Module):
    """A bilinear layer between two others."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.pair, self.last = nn.Linear(4, D), nn.Bilinear(D, 4, H), nn.Linear(H, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.pair(self.first(x).relu(), x).relu())  # type: ignore[no-any-return]


class Grid(nn.Module):
    """Features from a plane, at the places that the input says, and a long convolution by their transform."""

    def __init__(self) -> None:
        super().__init__()
        self.plane, self.kernel, self.last = weight(1, D, 4, 4), weight(D, T), nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        places = x[:, None, :, :2].tanh()
        h = F.grid_sample(self.plane.expand(x.shape[0], -1, -1, -1), places, align_corners=False).squeeze(2)
        h = torch.fft.irfft(torch.fft.rfft(h) * torch.fft.rfft(self.kernel), n=T)
        return self.last(h.transpose(1, 2))  # type: ignore[no-any-return]


class Spectrum(nn.Module):
    """Channels are mixed at each frequency by a complex matrix, which is held as real numbers; ``way`` joins them."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.joined = SPECTRA[way]
        self.first, self.weight, self.last = nn.Linear(4, D), weight(D, H, 3, 2), nn.Linear(H, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.fft.rfft(self.first(x).mT)
        h = torch.einsum("nim,iom->nom", h, self.joined(self.weight))
        return self.last(torch.fft.irfft(h, n=T).mT)  # type: ignore[no-any-return]


SPECTRA: dict[str, Callable[[Tensor], Tensor]] = {
    "as pairs": torch.view_as_complex,
    "from parts": lambda w: torch.complex(w[..., 0], w[..., 1]),
    "there and back": lambda w: torch.view_as_complex(torch.view_as_real(torch.view_as_complex(w)) * 0.5),
}


class Factors(nn.Module):
    """A weight that is a product of two parameters."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.first, self.last, self.way = nn.Linear(4, D), nn.Linear(H, 2), way
        self.a, self.b = (weight(D, 3), weight(3, H)) if way == "of matrices" else (weight(H, D, E), weight(H, D))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.way == "of matrices":
            return self.last((h @ (self.a @ self.b)).relu())  # type: ignore[no-any-return]
        made = F.linear(basis(h).flatten(1), (self.a * self.b.unsqueeze(-1)).view(H, -1))
        return self.last(made.relu())  # type: ignore[no-any-return]


class Reshaped(nn.Module):
    """A weight that a layer reads in another shape; ``way`` says how."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.run, shape, outputs, _ = RESHAPED[way]
        self.first, self.weight, self.last = nn.Linear(4, D), weight(*shape), nn.Linear(outputs, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.run(self.first(x), self.weight).relu())  # type: ignore[no-any-return]


def basis(h: Tensor) -> Tensor:
    """Some functions of each channel, as a Kolmogorov-Arnold network has; (N, D, E)."""
    return (h[..., None] - torch.linspace(-1, 1, E)).square().neg().exp()


def mixed(h: Tensor, w: Tensor) -> Tensor:
    """A weight for each row, of a few that are mixed."""
    return torch.bmm((h[:, :E] @ w.view(E, -1)).view(-1, H, D), h[..., None])[..., 0]


RESHAPED: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...], int, Layout]] = {
    "inputs and functions": (lambda h, w: F.linear(basis(h).flatten(1), w.flatten(1)), (H, D, E), H, (H, 0, ())),
    "scaled": (lambda h, w: F.linear(basis(h).flatten(1), (w * 0.5).view(H, -1)), (H, D, E), H, (H, 0, ())),
    "turned": (lambda h, w: basis(h).flatten(1) @ w.reshape(-1, H), (D, E, H), H, (H, 2, ())),
    "a kernel": (
        lambda h, w: F.conv1d(basis(h).flatten(1)[..., None], w.view(H, -1, 1))[..., 0], (H, D, E), H, (H, 0, ())
    ),
    "mixed": (mixed, (E, H, D), H, (H, 1, ())),
    "rolled": (lambda h, w: F.linear(h, w.roll(1, 1)), (H, D), H, (H, 0, ())),
}  # fmt: skip
"""How it is read, its shape, how many outputs that makes, and where its channels are."""
Case = tuple[Callable[[], nn.Module], Callable[[], Tensor], dict[str, Layout]]


def row() -> Tensor:
    return torch.randn(6, 4)


def sequence() -> Tensor:
    return torch.randn(3, T, 4)


EXPERT_LAYOUT: dict[str, Layout] = {"up": (E * H, 2, (0,)), "down": (E * D, 2, (0,))}
TURNED_LAYOUT: dict[str, Layout] = {"up": (E * H, 1, (0,)), "down": (E * D, 1, (0,))}
POSITION_LAYOUT: dict[str, Layout] = {"pos": (D, 2, ()), "bias": (2, 1, ())}
HEADS_LAYOUT: dict[str, Layout] = {"q": (8, 2, (1,)), "k": (8, 2, (1,)), "v": (8, 2, (1,)), "o": (D, 2, ())}
CASES: dict[str, Case] = {
    **{
        f"experts, {way}": (partial(Experts, way), row, TURNED_LAYOUT if "turned" in way else EXPERT_LAYOUT)
        for way in EXPERTS
    },
    **{
        f"positions, {way}": (
            partial(Positions, way), sequence, POSITION_LAYOUT | ({"pos": (D, 1, ())} if way == "rows" else {})
        )
        for way in POSITIONS
    },
    "experts, chosen": (Chosen, row, {"up": (E * 2 * H, 1, (0,)), "down": (E * D, 1, (0,))}),
    "maps": (Maps, lambda: torch.randn(2, 3, 6, 6), {"pos": (D, 1, ())}),
    "heads": (Heads, sequence, HEADS_LAYOUT),
    "expanded": (Expanded, sequence, {"weight": (H, 1, ())}),
    **{f"stacked, {way}": (partial(Stacked, way), row, {"weight": (E * D, 2, (0,))}) for way in STACKED},
    "cross": (Cross, sequence, {"cross.in_proj_weight": (3 * D, 0, ()), "queries": (D, 1, ())}),
    "grid": (Grid, sequence, {"plane": (D, 1, ()), "kernel": (D, 0, ())}),
    "spectrum, as pairs": (partial(Spectrum, "as pairs"), sequence, {"weight": (H * 3, 1, (2,))}),
    "spectrum, there and back": (partial(Spectrum, "there and back"), sequence, {"weight": (H * 3, 1, (2,))}),
    "spectrum, from parts": (partial(Spectrum, "from parts"), sequence, {"weight": (H * 3 * 2, 1, (2, 3))}),
    "pair": (Pair, row, {"pair.weight": (H, 0, ())}),
    "factors": (partial(Factors, "of matrices"), row, {"a": (3, 1, ()), "b": (H, 1, ())}),
    "factors, entry by entry": (partial(Factors, "of entries"), row, {"a": (H, 0, ())}),
    **{f"reshaped, {way}": (partial(Reshaped, way), row, {"weight": RESHAPED[way][3]}) for way in RESHAPED},
}  # fmt: skip


def quantizers(net: nn.Module) -> dict[str, Quantizer]:
    return {n.removesuffix("_quantizer"): m for n, m in net.named_modules() if isinstance(m, Quantizer)}


@pytest.mark.parametrize("name", CASES)
def test_all_weights_have_quantizers_with_bits_for_each_channel(name: str) -> None:
    make, inputs, expected = CASES[name]
    model, x = make(), inputs()
    net = fxc.compress(model, x)
    assert net.unquantized() == ()
    found = quantizers(net)
    layouts = {n: (q.bits.numel(), q.channel_dim, q.batch_dims) for n, q in found.items() if n in expected}
    assert layouts == expected
    assert float(net.size("eq4").detach()) == pytest.approx(8.0)
    assert difference(model.eval()(x), net.eval()(x)) < 0.05


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", CASES)
def test_what_is_trained_small_computes_the_same_when_it_is_cut_saved_and_loaded(name: str, tmp_path: Path) -> None:
    make, inputs, expected = CASES[name]
    model, x = make(), inputs()
    fresh = copy.deepcopy(model)
    net = fxc.compress(model, x, bits=2.0)
    optimizer = torch.optim.Adam(net.param_groups(lr=1e-2, bits_lr=0.05))
    start = sum(q.bits.numel() for name, q in quantizers(net).items() if name in expected)
    for step in range(60):
        optimizer.zero_grad()
        (1e-2 * net(x).square().mean() + net.size()).backward()
        optimizer.step()
        net.step()
        if step % 20 == 10:
            before, size = net.eval()(x), float(net.size().detach())
            net.prune(optimizer)
            assert difference(before, net(x)) <= 1e-9
            assert float(net.size().detach()) == pytest.approx(size, rel=1e-9)
            net.train()
    assert sum(q.bits.numel() for name, q in quantizers(net).items() if name in expected) < start
    final = net.eval().finalize()
    assert difference(net(x), final(x)) <= 1e-9
    fxc.save(final, tmp_path / "net.fxc")
    loaded = fxc.load(tmp_path / "net.fxc", fresh, x)
    assert torch.equal(loaded.eval()(x), final(x))
    assert {n: tuple(p.shape) for n, p in loaded.named_parameters()} == {
        n: tuple(p.shape) for n, p in final.named_parameters()
    }


@pytest.mark.parametrize("name", ["experts, bmm", "positions, added", "heads"])
def test_they_compile_without_a_break(name: str) -> None:
    make, inputs, _ = CASES[name]
    x = inputs()
    net = fxc.compress(make(), x)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    assert difference(net(x), compiled(x)) <= 1e-12


def test_one_output_left_of_weights_that_are_mixed() -> None:
    """Its inputs, which lay behind those of other outputs, have labels of their own then, and nobody cut them."""
    net, x = Reshaped("mixed"), row()
    with torch.no_grad():
        net.weight[:, 1:] = 0.0
    pruned = fxc.prune(net, x).module
    assert tuple(pruned.get_parameter("weight").shape) == (E, 1, D)
    assert difference(net(x), pruned(x)) <= 1e-12


def test_what_went_when_one_entry_was_left_goes_again_when_it_is_loaded(tmp_path: Path) -> None:
    """The inner of two dims that became one goes once the outer one has a single entry, and not before."""

    class Contracted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.last = weight(4, E, H), nn.Linear(E * H, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.einsum("nd,deh->neh", x, self.weight).relu().flatten(1))  # type: ignore[no-any-return]

    net, x = Contracted(), row()
    with torch.no_grad():
        net.weight[:, 1:] = 0.0
        net.weight[:, :, [0, 4]] = 0.0
    first = fxc.prune(net, x).module
    pruned = fxc.prune(first, x).module
    shapes = [tuple(each.get_parameter("weight").shape) for each in (first, pruned)]
    assert shapes == [(4, 1, H), (4, 1, H - 2)]
    assert difference(net(x), pruned(x)) <= 1e-12
    fxc.save(pruned, tmp_path / "net.fxc")
    assert torch.equal(fxc.load(tmp_path / "net.fxc", Contracted(), x)(x), pruned.eval()(x))


def test_sizes_and_multiply_adds_of_experts_by_hand() -> None:
    x = row()
    net = fxc.compress(Experts("bmm"), x, objective="eq4")
    widths = {"first.weight": 4 * D, "gate.weight": D * E, "last.weight": D * 2, "up": E * D * H, "down": E * H * D}
    assert net.weights == sum(widths.values())
    assert net.settings.start_costs.macs == len(x) * sum(widths.values())
    assert net.settings.start_costs.activations == len(x) * (D + E + 2)
    bits = {name: quantizer.bits for name, quantizer in quantizers(net).items()}
    with torch.no_grad():
        bits["up"][H : 2 * H] = 3.0  # of the second expert
        bits["down"][:] = 5.0
        for name in ("up", "down"):  # a hidden unit of one expert, and an output of all of them, which others make too
            bits[name].view(E, -1)[1 if name == "up" else slice(None), 0] = 0.0
    net.step()
    mean = {name: float(b.detach().mean()) for name, b in bits.items()}
    assert float(net.size().detach()) == pytest.approx(sum(mean[n] * widths[n] for n in widths) / net.weights)
    assert net.channels_left() == sum(b.numel() for b in bits.values())  # none can go


def test_a_hidden_unit_goes_when_it_is_dead_in_all_experts() -> None:
    x = row()
    net = fxc.compress(Experts("bmm"), x)
    bits = quantizers(net)["up"].bits
    for expert in range(E):
        with torch.no_grad():
            bits.view(E, H)[expert, 2] = 0.0
        net.step()
        before = net(x)
        shapes = [tuple(net.get_parameter(n).shape) for n in ("up", "up_quantizer.bits", "down")]
        assert shapes == [(E, D, H), (E * H,), (E, H, D)]
        net.prune()
        assert difference(before, net(x)) <= 1e-9
    shapes = [tuple(net.get_parameter(n).shape) for n in ("up", "up_quantizer.bits", "down")]
    assert shapes == [(E, D, H - 1), (E * (H - 1),), (E, H - 1, D)]


def test_units_of_experts_are_listed_in_the_graph() -> None:
    graph = fxc.ChannelGraph.of(Chosen(), row())
    assert graph.share > 0.9
    (bundle,) = [bundle for bundle in graph.bundles if bundle.removable and bundle.tensors]
    assert (len(bundle.groups), bundle.tensors) == (H, ("up", "down"))
    assert "held by up, down" in str(graph)


def test_channels_of_a_sum_live_until_the_positions_are_zero_too() -> None:
    """As floats they never were, and nothing that they are added to could go."""
    x = torch.randn(2, 3, 6, 6)
    net = fxc.compress(Maps(), x)
    found = quantizers(net)
    for name in ("first.weight", "pos"):
        assert net.first.weight.shape[0] == D
        with torch.no_grad():
            found[name].bits[[1, 4]] = 0.0
            net.get_parameter("first.bias")[[1, 4]] = 0.0
        net.step()
        before = net(x)
        net.prune()
        assert difference(before, net(x)) <= 1e-9
    assert (net.first.weight.shape[0], net.pos.shape, net.last.weight.shape[1]) == (D - 2, (1, D - 2, 6, 6), D - 2)


class Odd(nn.Module):
    """Reads a parameter in a way that is not linear in it, or not alone."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.first, self.last, self.odd = way, nn.Linear(4, D), nn.Linear(D, 2), weight(T, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(ODD[self.way](self.first(x), self.odd))  # type: ignore[no-any-return]


ODD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "exp": lambda h, w: h * w.exp(),
    "softmax": lambda h, w: h * w.softmax(-1),
    "divided by": lambda h, w: h / (w.square() + 1),
    "squared": lambda h, w: h + w * w,
    "written": lambda h, w: h + w.data.clamp_(-1, 1),
    "norm": lambda h, w: h + F.layer_norm(w, (D,)),
    "largest": lambda h, w: h + w.amax(0),
    "length": lambda h, w: h + w.norm(dim=0),
}


@pytest.mark.parametrize("way", ODD)
def test_others_stay_floats(way: str) -> None:
    net = fxc.compress(Odd(way), sequence())
    assert [item.name for item in net.unquantized()] == ["odd"]
    assert "reads it" in net.unquantized()[0].reason


def test_parameters_of_a_dead_branch_lose_their_quantizers(tmp_path: Path) -> None:
    """Their names stay, as those of modules that something else uses."""
    x, model = row(), Experts("bmm")
    net = fxc.compress(model, x)
    optimizer = torch.optim.Adam(net.param_groups())
    with torch.no_grad():
        quantizers(net)["down"].bits.zero_()
    net.step()
    before = net.eval()(x)
    net.prune(optimizer)
    assert difference(before, net(x)) <= 1e-9
    assert set(quantizers(net)) == {"first.weight", "last.weight"}
    assert float(net.size("eq4").detach()) == pytest.approx(8 * (4 * D + 2 * D) / net.weights)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in net.parameters()}
    final = net.finalize()
    fxc.save(final, tmp_path / "net.fxc")
    assert torch.equal(fxc.load(tmp_path / "net.fxc", model, x).eval()(x), final(x))


class Table(nn.Module):
    """A table that is read in other ways as well, ``more`` says how."""

    def __init__(self, more: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.table, self.more, self.last = weight(7, D), more, nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.more(F.embedding(x, self.table), self.table, x))  # type: ignore[no-any-return]


BESIDE: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "its mean": lambda h, w, x: h + w.mean(0),
    "a layer": lambda h, w, x: F.linear(F.one_hot(x, D).to(h.dtype), w)[..., :1] * h + w.sum(),
    "a layer on what was looked up": lambda h, w, x: F.linear(h, w)[..., :1] * h + w.sum(),
}


@pytest.mark.parametrize("name", BESIDE)
def test_tables_that_something_else_reads_have_their_columns_as_channels_or_none(name: str) -> None:
    x = torch.randint(7, (3, 4))
    net = fxc.compress(Table(BESIDE[name]), x)
    found = quantizers(net).get("table")
    assert found is None or (found.channel_dim, found.bits.numel()) == (1, D)
    with torch.no_grad():
        for quantizer in quantizers(net).values():
            quantizer.bits[:3] = 0.0
    net.step()
    before = net.eval()(x)
    assert net.size("eq5").isfinite()
    net.prune()
    assert difference(before, net(x)) <= 1e-9
    assert difference(before, net.finalize()(x)) <= 1e-9


def test_training_that_was_interrupted_goes_on_as_if_it_was_not(tmp_path: Path) -> None:
    x, model = row(), Experts("bmm")
    ends = []
    for interrupted in (False, True):
        net = fxc.compress(copy.deepcopy(model), x, bits=2.0)
        optimizer = torch.optim.Adam(net.param_groups(lr=1e-2, bits_lr=0.05))
        for step in range(40):
            if step == 20:
                with torch.no_grad():
                    quantizers(net)["up"].bits.view(E, H)[:, :2] = 0.0
            if step == 25:
                net.prune(optimizer)
            if step == 30 and interrupted:
                fxc.save_checkpoint(tmp_path / "run.ckpt", net, optimizer)
                net = fxc.compress(copy.deepcopy(model), x, bits=2.0)
                optimizer = torch.optim.Adam(net.param_groups(lr=1e-2, bits_lr=0.05))
                fxc.load_checkpoint(tmp_path / "run.ckpt", net, optimizer)
            optimizer.zero_grad()
            (1e-2 * net(x).square().mean() + net.size()).backward()
            optimizer.step()
            net.step()
        ends.append({name: p.detach().clone() for name, p in net.named_parameters()})
    assert ends[0]["up_quantizer.bits"].numel() < E * H
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
