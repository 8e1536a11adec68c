"""Tensors that a graph makes out of nothing follow the channels that they meet."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.channels.prepare import prepare
from tests.exactness import atoms_of, difference, kill, outputs, removable_units

HIDDEN = 12
Start = Callable[[Tensor], Tensor]


def by_keyword(x: Tensor) -> Tensor:
    return torch.zeros(size=(x.shape[0], HIDDEN, x.shape[3], x.shape[4]), dtype=x.dtype, device=x.device)


STARTS: dict[str, Start] = {
    "new_zeros": lambda x: x.new_zeros(x.shape[0], HIDDEN, x.shape[3], x.shape[4]),
    "zeros": by_keyword,
    "new_full": lambda x: x.new_full((x.shape[0], HIDDEN, *x.shape[3:]), 0.0),
    "full": lambda x: torch.full((x.shape[0], HIDDEN, *x.shape[3:]), 0.0, dtype=x.dtype),
    "new_ones": lambda x: x.new_ones((HIDDEN, 1, 1)).expand(x.shape[0], HIDDEN, x.shape[3], x.shape[4]),
}


class ConvGRU(nn.Module):
    """A convolutional cell that is unrolled over the frames (N, 3, 3, H, W), from a state of its own making."""

    def __init__(self, start: Start) -> None:
        super().__init__()
        self.gates = nn.Conv2d(3 + HIDDEN, 2 * HIDDEN, 3, padding=1)
        self.candidate = nn.Conv2d(3 + HIDDEN, HIDDEN, 3, padding=1)
        self.head = nn.Conv2d(HIDDEN, 2, 1)
        self.start = start

    def forward(self, x: Tensor) -> Tensor:
        state = self.start(x)
        for frame in range(x.shape[1]):
            both = torch.sigmoid(self.gates(torch.cat([x[:, frame], state], 1)))
            update, reset = both.chunk(2, 1)
            new = torch.tanh(self.candidate(torch.cat([x[:, frame], reset * state], 1)))
            state = (1 - update) * state + update * new
        result: Tensor = self.head(state)
        return result


@pytest.mark.parametrize("name", STARTS)
def test_the_state_of_a_cell_shrinks_with_the_cell(name: str, tmp_path: Path) -> None:
    x = torch.randn(2, 3, 3, 6, 6, dtype=torch.float64)
    net = ConvGRU(STARTS[name]).double().eval()
    analysis = prepare(net, x)
    units = removable_units(analysis)
    assert len(units) == HIDDEN
    kill(analysis, atoms_of(analysis, units[::3]))
    result = fxc.prune(net, x)
    other = torch.randn(3, 3, 3, 8, 5, dtype=torch.float64)
    for inputs in (x, other):
        assert difference(outputs(net, (inputs,)), outputs(result.module, (inputs,))) <= 1e-9
    # A state of ones fades away but never becomes zero: its channels must stay.
    left = HIDDEN if name == "new_ones" else 2 * HIDDEN // 3
    assert result.module.get_parameter("candidate.weight").shape[0] == left
    fxc.save(result.module, tmp_path / "net.fxc")
    loaded = fxc.load(tmp_path / "net.fxc", model=ConvGRU(STARTS[name]).double())
    assert torch.equal(loaded(x), result.module(x))


@pytest.mark.parametrize("left", [1, 2])
@pytest.mark.parametrize("name", ["new_zeros", "zeros", "full"])
def test_a_state_may_lose_all_but_one_channel_at_once(name: str, left: int) -> None:
    x = torch.randn(2, 3, 3, 6, 6, dtype=torch.float64)
    net = ConvGRU(STARTS[name]).double().eval()
    analysis = prepare(net, x)
    kill(analysis, atoms_of(analysis, removable_units(analysis)[left:]))
    result = fxc.prune(net, x).module
    assert difference(outputs(net, (x,)), outputs(result, (x,))) <= 1e-9
    assert result.get_parameter("candidate.weight").shape[0] == left
    again = fxc.prune(result, x).module
    assert difference(outputs(net, (x,)), outputs(again, (x,))) <= 1e-9


SHAPES: dict[str, Start] = {
    "shape": lambda x: x.new_zeros(x.shape),
    "size": lambda x: torch.zeros(x.size(), dtype=x.dtype),
    "keyword": lambda x: torch.zeros(size=x.shape, dtype=x.dtype),
    "unpacked": lambda x: torch.zeros(*x.shape, dtype=x.dtype),
    "full": lambda x: torch.full(x.shape, 0.0, dtype=x.dtype),
    "new_full": lambda x: x.new_full(x.size(), 0.0),
    "parts": lambda x: torch.zeros(x.shape[:1] + x.shape[1:], dtype=x.dtype),
}


class FromShape(nn.Module):
    """A state of the shape of what it is added to, which is read as a whole."""

    def __init__(self, start: Start) -> None:
        super().__init__()
        self.first, self.step, self.last = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.start = start

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        state = self.start(h)
        for _ in range(2):
            state = torch.tanh(self.step(state)) + h
        result: Tensor = self.last(state)
        return result


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_made_in_the_shape_of_a_tensor_follows_it(name: str) -> None:
    x = torch.randn(4, 5, dtype=torch.float64)
    net = FromShape(SHAPES[name]).double().eval()
    with torch.no_grad():
        for layer in (net.first, net.step):
            layer.weight[[0, 3, 4]] = 0
            layer.bias[[0, 3, 4]] = 0
    result = fxc.prune(net, x).module
    for inputs in (x, torch.randn(6, 5, dtype=torch.float64)):
        assert difference(outputs(net, (inputs,)), outputs(result, (inputs,))) <= 1e-9
    assert result.get_parameter("step.weight").shape == (5, 5)


def test_what_is_expanded_to_the_shape_of_a_tensor_follows_it() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x).relu()
            result: Tensor = self.last(h - x.sum(-1, keepdim=True).expand(h.shape).relu() * h)
            return result

    x = torch.randn(4, 5, dtype=torch.float64)
    net = Net().double().eval()
    with torch.no_grad():
        net.first.weight[[0, 3, 4]] = 0
        net.first.bias[[0, 3, 4]] = 0
    result = fxc.prune(net, x).module
    assert difference(outputs(net, (x,)), outputs(result, (x,))) <= 1e-9
    assert result.get_parameter("first.weight").shape == (5, 5)


class Heads(nn.Module):
    """Messages along the edges of a graph, two heads of three dims each, added up in zeros of a written size."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        h = self.first(x).view(-1, 2, 3)
        sums = torch.zeros(x.shape[0], 2, 3, dtype=x.dtype, device=x.device).index_add(0, edges[1], h[edges[0]])
        result: Tensor = self.last(sums.flatten(1))
        return result


@pytest.mark.parametrize("dead", [[0, 3], [1, 4], [2, 5], [1, 2, 4, 5], [3, 4, 5]])
def test_what_is_made_for_heads_is_cut_again_when_it_is_loaded(dead: list[int], tmp_path: Path) -> None:
    inputs = torch.randn(6, 5, dtype=torch.float64), torch.randint(6, (2, 12))
    net = Heads().double().eval()
    with torch.no_grad():
        net.first.weight[dead] = 0
        net.first.bias[dead] = 0
    result = fxc.prune(net, inputs).module
    assert difference(outputs(net, inputs), outputs(result, inputs)) <= 1e-9
    assert result.get_parameter("first.weight").shape[0] == 6 - len(dead)
    fxc.save(result, tmp_path / "net.fxc")
    loaded = fxc.load(tmp_path / "net.fxc", model=Heads().double())
    assert torch.equal(loaded(*inputs), result(*inputs))


class Weighted(Heads):
    """The same, each head weighted by the sum of its dims, over sums of these weights."""

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        h = self.first(x).view(-1, 2, 3)
        weights = h.sum(-1)[edges[1]].exp()
        total = torch.zeros(x.shape[0], 2, dtype=x.dtype, device=x.device).index_add(0, edges[1], weights)
        parts = (weights / total[edges[1]])[..., None] * h[edges[0]]
        result: Tensor = self.last(torch.zeros_like(h).index_add(0, edges[1], parts).flatten(1))
        return result


def test_zeros_for_sums_over_heads_are_cut_again_when_they_are_loaded(tmp_path: Path) -> None:
    inputs = torch.randn(6, 5, dtype=torch.float64), torch.randint(6, (2, 12))
    net = Weighted().double().eval()
    nn.init.zeros_(net.last.weight[:, :3])
    result = fxc.prune(net, inputs).module
    assert difference(outputs(net, inputs), outputs(result, inputs)) <= 1e-9
    assert result.get_parameter("first.weight").shape == (3, 5)
    fxc.save(result, tmp_path / "net.fxc")
    loaded = fxc.load(tmp_path / "net.fxc", model=Weighted().double())
    assert torch.equal(loaded(*inputs), result(*inputs))


def test_what_decides_on_its_values_is_left_alone() -> None:
    """Integers keep their values: they may be indices."""

    class Index(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.conv(x)[:, x.new_zeros(3, dtype=torch.int64)]
            return result

    net, x = Index().double().eval(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        net.conv.weight[0] = 0
    result = fxc.prune(net, x)
    assert difference(outputs(net, (x,)), outputs(result.module, (x,))) <= 1e-9


class Buffered(nn.Module):
    """Two layers write their results beside each other into one tensor, as networks that save memory do."""

    def __init__(self, *, by_method: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 4, 1)
        self.last, self.by_method = nn.Conv2d(12, 2, 1), by_method

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        both = x.new_empty(n, 12, h, w) if self.by_method else torch.empty((n, 12, h, w), dtype=x.dtype)
        both[:, :8] = self.first(x).relu()
        both[:, 8:] = self.second(x)
        return self.last(both)  # type: ignore[no-any-return]


@pytest.mark.parametrize("by_method", [False, True])
def test_what_is_written_into_a_tensor_that_nobody_has_filled(by_method: bool, tmp_path: Path) -> None:  # noqa: FBT001
    x, net = torch.randn(2, 3, 5, 4, dtype=torch.float64), Buffered(by_method=by_method).double()
    with torch.no_grad():
        for layer, dead in ((net.first, [1, 5]), (net.second, [0])):
            layer.weight[dead] = 0.0
            layer.get_parameter("bias")[dead] = 0.0
    result = fxc.prune(net, x).module
    assert result.get_parameter("last.weight").shape == (2, 9, 1, 1)
    for other in (x, x[:1, :, :3]):
        assert difference(outputs(net, (other,)), outputs(result, (other,))) <= 1e-9
    fxc.save(result, tmp_path / "net.fxc")
    loaded = fxc.load(tmp_path / "net.fxc", Buffered(by_method=by_method).double())
    assert torch.equal(loaded(x), result.eval()(x))


class Shifted(nn.Module):
    """Each frame takes some channels from its neighbours: slices of zeros that are written to in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x.flatten(0, 1)).relu().unflatten(0, x.shape[:2])
        out = x.new_zeros(x.shape[0], x.shape[1], 8, x.shape[3], x.shape[4])
        out[:, :-1, :2] = h[:, 1:, :2]
        out[:, 1:, 2:4] = h[:, :-1, 2:4]
        out[:, :, 4:] = h[:, :, 4:]
        result: Tensor = self.second(out.flatten(0, 1))
        return result


def test_parts_of_zeros_that_are_written_to() -> None:
    x = torch.randn(2, 4, 3, 6, 6, dtype=torch.float64)
    net = Shifted().double().eval()
    with torch.no_grad():
        for tensor in (net.first.weight, net.first.bias):
            assert tensor is not None
            tensor[[1, 3, 5]] = 0
    result = fxc.prune(net, x)
    assert difference(outputs(net, (x,)), outputs(result.module, (x,))) <= 1e-9


class Spectrum(nn.Module):
    """Channels are mixed among the low frequencies alone, as in a Fourier neural operator (N, 3, H, W)."""

    def __init__(self, make: Callable[[tuple[int, ...]], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.make = nn.Conv2d(3, 8, 1), nn.Conv2d(HIDDEN, 2, 1), make
        self.low, self.high = (nn.Parameter(torch.randn(8, HIDDEN, 3, 3, 2)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        found = torch.fft.rfft2(torch.tanh(self.first(x)))
        out = self.make((x.shape[0], HIDDEN, x.shape[2], x.shape[3] // 2 + 1))
        out[:, :, :3, :3] = self.mixed(found[:, :, :3, :3], self.low)
        out[:, :, -3:, :3] = self.mixed(found[:, :, -3:, :3], self.high)
        return self.last(torch.fft.irfft2(out, s=x.shape[2:]))  # type: ignore[no-any-return]

    def mixed(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch.einsum("bixy,ioxy->boxy", x, torch.view_as_complex(weight))


SPECTRA: dict[str, Callable[[tuple[int, ...]], Tensor]] = {
    "zeros": lambda shape: torch.zeros(shape, dtype=torch.complex128),
    "full": lambda shape: torch.full(shape, 0.0, dtype=torch.complex128),
    "ones": lambda shape: torch.ones(shape, dtype=torch.complex128),
    "twos": lambda shape: torch.full(shape, 2.0, dtype=torch.complex128),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_complex_zeros_that_a_part_of_a_spectrum_is_written_to(name: str) -> None:
    """Ones stay: all that nothing is written to is one, whatever has made the rest."""
    torch.manual_seed(0)
    net, x = Spectrum(SPECTRA[name]).double(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        for parameter in net.first.parameters():
            parameter[::4] = 0
        for weight in (net.low, net.high):
            weight[:, ::3] = 0
    module = fxc.prune(net, x).module
    left = 2 * HIDDEN // 3 if name in {"zeros", "full"} else HIDDEN
    assert module.get_parameter("low").shape == (6, left, 3, 3, 2)
    for size in ((2, 3, 8, 8), (1, 3, 12, 9)):
        other = torch.randn(size, dtype=torch.float64)
        assert difference(net(other), module(other)) <= 1e-9
