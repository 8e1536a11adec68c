"""Recurrent layers: dead inputs, dead hidden units and unread ones go, and the output stays, at any length."""

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_packed_sequence

import fxcompress as fxc
from fxcompress.channels.prepare import prepare
from fxcompress.passes.rewrite import carry_out
from tests.exactness import (
    TOLERANCE,
    Fingerprint,
    atoms_of,
    difference,
    forced,
    kill,
    outputs,
    removable_units,
    tensors,
)
from tests.nets import set_bits

I, H = 7, 8


class Net(nn.Module):
    """linear - a recurrent layer - linear; the last states are outputs of the network through a layer as well.

    Args:
        layer: (N, T, 7) or (T, N, 7) in.
        states: whether the last states are read.
    """

    def __init__(self, layer: nn.RNNBase, *, states: bool = True) -> None:
        super().__init__()
        self.first, self.layer, self.states = nn.Linear(3, I), layer, states
        width = layer.proj_size or layer.hidden_size
        self.read = nn.Linear(width * (1 + layer.bidirectional), 4)
        if states:
            self.last = nn.Linear(width, 2)
        if states and isinstance(layer, nn.LSTM):
            self.cells = nn.Linear(layer.hidden_size, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        result = self.layer(self.first(x))
        out = self.read(result[0])
        if not self.states:
            return (out,)
        if isinstance(self.layer, nn.LSTM):
            return out, self.last(result[1][0]), self.cells(result[1][1])
        return out, self.last(result[1])


def new(kind: type[nn.RNNBase], *, states: bool = True, **options: object) -> Net:
    torch.manual_seed(0)
    return Net(kind(I, H, **options), states=states).double().eval()  # type: ignore[arg-type]


def sequence(seed: int = 0, first: int = 2, second: int = 5) -> Tensor:
    return torch.randn(first, second, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def size(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@dataclass(frozen=True)
class Form:
    kind: type[nn.RNNBase]
    layers: int = 1
    bidirectional: bool = False
    batch_first: bool = True
    bias: bool = True
    proj: int = 0
    relu: bool = False
    states: bool = True
    dropout: float = 0.0

    def new(self) -> Net:
        options: dict[str, object] = {"num_layers": self.layers, "bidirectional": self.bidirectional}
        options |= {"batch_first": self.batch_first, "bias": self.bias, "dropout": self.dropout}
        options |= {"proj_size": self.proj} if self.proj else {}
        options |= {"nonlinearity": "relu"} if self.relu else {}
        return new(self.kind, states=self.states, **options)


FORMS = {
    "lstm": Form(nn.LSTM),
    "lstm, time first": Form(nn.LSTM, batch_first=False, states=False),
    "lstm, no bias": Form(nn.LSTM, bias=False),
    "lstm, 3 layers": Form(nn.LSTM, layers=3, dropout=0.5),
    "lstm, both ways": Form(nn.LSTM, bidirectional=True),
    "lstm, 2 layers both ways": Form(nn.LSTM, layers=2, bidirectional=True, batch_first=False, states=False),
    "lstm, projected": Form(nn.LSTM, proj=5),
    "lstm, projected, 2 layers both ways": Form(nn.LSTM, layers=2, bidirectional=True, proj=5),
    "gru": Form(nn.GRU),
    "gru, 2 layers both ways": Form(nn.GRU, layers=2, bidirectional=True, bias=False),
    "gru, time first": Form(nn.GRU, batch_first=False),
    "rnn": Form(nn.RNN),
    "rnn, relu": Form(nn.RNN, relu=True, layers=2),
    "rnn, both ways": Form(nn.RNN, bidirectional=True, states=False),
}


@pytest.mark.parametrize("share", [0.1, 0.4])
@pytest.mark.parametrize("name", FORMS)
def test_what_is_dead_goes(name: str, share: float) -> None:
    net = FORMS[name].new()
    analysis = prepare(net, sequence())
    assert analysis.trails["eval"].unknown == {}
    units = removable_units(analysis)
    chosen = np.random.default_rng(1).choice(units, max(1, round(share * len(units))), replace=False)
    kill(analysis, atoms_of(analysis, chosen))
    optimizer = torch.optim.Adam(net.parameters())
    torch.stack([y.square().sum() for y in tensors(net(sequence()))]).sum().backward()
    optimizer.step()
    kill(analysis, atoms_of(analysis, chosen))
    visit = Fingerprint(net)
    result = fxc.prune(net, sequence(), optimizer)
    visit.check()
    module = result.module
    assert size(module) < size(net)
    assert list(module.state_dict()) == list(net.state_dict())
    for x in (sequence(), sequence(1, 1, 9), sequence(2, 3, 1)):
        assert difference(outputs(net, (x,)), outputs(module, (x,))) <= TOLERANCE
    optimizer.zero_grad()
    torch.stack([y.square().sum() for y in tensors(module(sequence()))]).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    optimizer.step()
    assert not fxc.prune(result.module, sequence()).report.modified


@pytest.mark.parametrize("name", FORMS)
def test_what_is_alive_is_missed(name: str) -> None:
    """The negative control."""
    net = FORMS[name].new()
    analysis = prepare(net, sequence())
    for unit in removable_units(analysis)[::4]:
        module = carry_out(analysis, forced(analysis, np.array([unit]))).module
        assert size(module) < size(net)
        assert difference(outputs(net, (sequence(),)), outputs(module, (sequence(),))) > 1e-6


def rows(layer: nn.RNNBase, index: int, suffix: str = "_l0") -> list[Tensor]:
    """The rows of one gate's block in each parameter, as views: 0, 1, 2, ... for i, f, g, o or r, z, n."""
    found = [p for n, p in layer.named_parameters() if n.endswith(suffix) and "hr" not in n]
    return [p.data.unflatten(0, (-1, layer.hidden_size))[index] for p in found]


def check(net: nn.Module, *inputs: Tensor, longer: tuple[Tensor, ...] = ()) -> nn.Module:
    """The network, pruned, once it is seen that nothing else has changed."""
    module = fxc.prune(net, inputs).module
    for given in (inputs, longer or inputs):
        assert difference(outputs(net, given), outputs(module, given)) <= TOLERANCE
    return module


def hidden(module: nn.Module) -> int:
    """The hidden size; all that torch.nn remembers of sizes must agree with the parameters."""
    layer = module.get_submodule("layer")
    assert isinstance(layer, nn.RNNBase)
    fresh = copy.deepcopy(layer)
    gates = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}[type(layer)]
    for name, p in fresh.named_parameters():
        if "hr" not in name:
            assert p.shape[0] == gates * layer.hidden_size
        if "weight_hh" in name:
            assert p.shape[1] == (layer.proj_size or layer.hidden_size)
    assert all(a is b for a, b in zip(fresh._flat_weights, fresh.parameters(), strict=True))
    return int(layer.hidden_size)


@pytest.mark.parametrize(("kind", "candidate"), [(nn.LSTM, 2), (nn.GRU, 2), (nn.RNN, 0)])
def test_a_unit_goes_when_its_candidate_is_zero(kind: type[nn.RNNBase], candidate: int) -> None:
    """Whatever its gates do: they multiply zeros."""
    net = new(kind)
    for tensor in rows(net.layer, candidate):
        tensor[[1, 4]] = 0
    assert hidden(check(net, sequence(), longer=(sequence(1, 3, 11),))) == H - 2


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("gate", [0, 1])
def test_a_unit_stays_when_only_its_gates_are_zero(kind: type[nn.RNNBase], gate: int) -> None:
    net = new(kind)
    for tensor in rows(net.layer, gate):
        tensor[[1, 4]] = 0
    assert hidden(check(net, sequence())) == H


@pytest.mark.parametrize(("kind", "candidate"), [(nn.LSTM, 2), (nn.GRU, 2), (nn.RNN, 0)])
@pytest.mark.parametrize("length", [1, 5])
def test_zero_units_are_found_by_induction(kind: type[nn.RNNBase], candidate: int, length: int) -> None:
    """A ring of units that read each other goes; one that reads a live unit stays, however short the input."""
    net = new(kind)
    weights, recurrent, *biases = rows(net.layer, candidate)
    for tensor in (weights, *biases):
        tensor[:4] = 0
    recurrent[:4] = 0
    recurrent[0, 1] = recurrent[1, 2] = recurrent[2, 0] = 1.0
    recurrent[3, 5] = 1.0
    assert hidden(check(net, sequence(0, 2, length), longer=(sequence(1, 2, 7),))) == H - 3


@pytest.mark.parametrize("index", [0, 1])
def test_a_bias_alone_keeps_a_unit(index: int) -> None:
    net = new(nn.GRU)
    for tensor in rows(net.layer, 2):
        tensor[1] = 0
    rows(net.layer, 2)[2 + index][1] = 0.5
    assert hidden(check(net, sequence())) == H


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("length", [1, 5])
def test_a_unit_that_nobody_reads_goes(kind: type[nn.RNNBase], length: int) -> None:
    """Units 1 and 2 are read by each other and themselves alone; 3 is read by a unit that is alive."""
    net = new(kind, states=False)
    with torch.no_grad():
        net.read.weight[:, 1:4] = 0
        recurrent = net.layer.get_parameter("weight_hh_l0").unflatten(0, (-1, H))
        keep = recurrent[:, [1, 2], 1:3].clone()
        recurrent[:, :, 1:3] = 0
        recurrent[:, [1, 2], 1:3] = keep
    module = check(net, sequence(0, 2, length), longer=(sequence(1, 2, 7),))
    assert hidden(module) == H - 2
    assert difference(outputs(net, (sequence(3),)), outputs(module, (sequence(3),))) <= TOLERANCE


def test_dead_inputs_go() -> None:
    net = new(nn.LSTM, num_layers=2, bidirectional=True)
    with torch.no_grad():
        net.first.weight[2], net.first.bias[2] = 0, 0
        for name in ("weight_ih_l0", "weight_ih_l0_reverse"):  # and one that is not read
            net.layer.get_parameter(name)[:, 5] = 0
    module = check(net, sequence())
    layer = module.get_submodule("layer")
    assert hidden(module) == H
    assert layer.input_size == I - 2
    assert [layer.get_parameter(f"weight_ih_{n}").shape[1] for n in ("l0", "l0_reverse", "l1")] == [5, 5, 2 * H]


def test_each_layer_may_lose_other_units_but_as_many() -> None:
    """A module has one hidden size; of what a layer could lose beyond the others, the first units stay."""
    net = new(nn.LSTM, num_layers=2, bidirectional=True, states=False)
    dead = {"_l0": [0, 3], "_l0_reverse": [1, 2, 5], "_l1": [7, 6], "_l1_reverse": [2, 4, 6, 7]}
    for suffix, units in dead.items():
        for tensor in rows(net.layer, 2, suffix):
            tensor[units] = 0
    module = check(net, sequence(), longer=(sequence(1, 3, 8),))
    assert hidden(module) == H - 2
    report = fxc.prune(net, sequence()).report
    assert not report.unknown_ops


def test_nothing_goes_where_one_layer_is_alive() -> None:
    net = new(nn.GRU, num_layers=2)
    for tensor in rows(net.layer, 2):
        tensor[3] = 0
    assert hidden(check(net, sequence())) == H


def test_one_unit_stays() -> None:
    net = new(nn.LSTM)
    with torch.no_grad():
        for parameter in net.layer.parameters():
            parameter.zero_()
    module = check(net, sequence())
    assert hidden(module) == 1
    assert not fxc.prune(module, sequence()).report.modified
    check(module, sequence(1, 3, 8))


@pytest.mark.parametrize("left", [1, 4, 5])
def test_units_do_not_become_as_few_as_their_projection(left: int) -> None:
    """Torch takes a layer with as many units as outputs for one without a projection."""
    net = new(nn.LSTM, proj_size=4)
    for tensor in rows(net.layer, 2):
        tensor[left:] = 0
    with torch.no_grad():
        net.layer.get_parameter("weight_hr_l0")[left:] = 0
    check(net, sequence())


class Given(nn.Module):
    """A recurrent layer with an initial state that the network makes in some way."""

    def __init__(self, make: Callable[["Given", Tensor], Tensor]) -> None:
        super().__init__()
        self.make, self.first, self.layer = make, nn.Linear(3, I), nn.GRU(I, H, batch_first=True)
        self.start, self.init, self.read = nn.Parameter(torch.randn(1, 1, H)), nn.Linear(3, H), nn.Linear(H, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.layer(self.first(x), self.make(self, x))[0])  # type: ignore[no-any-return]


STARTS: dict[str, tuple[Callable[[Given, Tensor], Tensor], int]] = {
    "zeros of a fixed size": (lambda net, x: torch.zeros(1, x.shape[0], H, dtype=x.dtype), H - 3),
    "ones of a fixed size": (lambda net, x: x.new_ones(1, x.shape[0], H), H),
    "learned": (lambda net, x: net.start.expand(-1, x.shape[0], -1), H - 2),
    "computed": (lambda net, x: net.init(x[:, 0])[None], H - 2),
}


@pytest.mark.parametrize("name", STARTS)
def test_an_initial_state_goes_with_the_units(name: str) -> None:
    """The one that was zero goes; one whose candidate is zero, but not its initial state, stays."""
    torch.manual_seed(0)
    make, left = STARTS[name]
    net = Given(make).double().eval()
    for tensor in rows(net.layer, 2):
        tensor[[1, 4, 6]] = 0
    with torch.no_grad():
        net.first.weight[2], net.first.bias[2] = 0, 0
        for tensor in (net.start[0, 0], net.init.weight, net.init.bias):
            tensor[[1, 4]] = 0
    module = check(net, sequence(), longer=(sequence(1, 4, 8),))
    assert hidden(module) == left
    assert module.get_submodule("layer").input_size == I - 1


def test_an_initial_state_that_is_an_input_keeps_the_units() -> None:
    class Input(Net):
        def forward(self, x: Tensor, h: Tensor) -> Tensor:  # type: ignore[override]
            return self.read(self.layer(self.first(x), h)[0])  # type: ignore[no-any-return]

    torch.manual_seed(0)
    net = Input(nn.GRU(I, H, batch_first=True), states=False).double().eval()
    for tensor in rows(net.layer, 2):
        tensor[1] = 0
    with torch.no_grad():
        net.first.weight[2], net.first.bias[2] = 0, 0
    module = check(net, sequence(), torch.randn(1, 2, H, dtype=torch.float64))
    assert hidden(module) == H
    assert module.get_submodule("layer").input_size == I - 1


class Translator(nn.Module):
    """An encoder whose last states start a decoder, both ways in the encoder alone."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.LSTM(3, H, 2, batch_first=True), nn.LSTM(3, H, 2, batch_first=True)
        self.read = nn.Linear(H, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = self.encode(x)[1]
        return self.read(self.decode(x.flip(1), state)[0])  # type: ignore[no-any-return]


def test_states_tie_the_units_of_an_encoder_and_a_decoder() -> None:
    torch.manual_seed(0)
    net = Translator().double().eval()
    for layer in (net.encode, net.decode):
        for suffix in ("_l0", "_l1"):
            for tensor in rows(layer, 2, suffix):
                tensor[[1, 4]] = 0
    for tensor in rows(net.decode, 2, "_l0"):
        tensor[5] = 0
    module = check(net, sequence(), longer=(sequence(1, 1, 9),))
    assert [module.get_submodule(n).hidden_size for n in ("encode", "decode")] == [H - 2, H - 2]


class Cells(nn.Module):
    """Cells in a loop of a fixed length."""

    def __init__(self, cell: nn.RNNCellBase) -> None:
        super().__init__()
        self.first, self.cell, self.read = nn.Linear(3, I), cell, nn.Linear(H, 2)

    def forward(self, x: Tensor) -> Tensor:
        x, state = self.first(x), None
        for step in range(3):
            state = self.cell(x[:, step], state)
        return self.read(state[0] if isinstance(self.cell, nn.LSTMCell) else state)  # type: ignore[index,no-any-return]


@pytest.mark.parametrize(
    ("cell", "candidate"),
    [
        (lambda: nn.LSTMCell(I, H), 2),
        (lambda: nn.GRUCell(I, H), 2),
        (lambda: nn.RNNCell(I, H), 0),
        (lambda: nn.RNNCell(I, H, nonlinearity="relu", bias=False), 0),
        (lambda: nn.LSTMCell(I, H, bias=False), 2),
    ],
)
def test_cells(cell: Callable[[], nn.RNNCellBase], candidate: int) -> None:
    torch.manual_seed(0)
    net = Cells(cell()).double().eval()
    with torch.no_grad():
        net.first.weight[2], net.first.bias[2] = 0, 0
        for parameter in net.cell.parameters():
            parameter.unflatten(0, (-1, H))[candidate, [1, 4]] = 0
    module = check(net, sequence(), longer=(sequence(1, 3, 3),))
    found = module.get_submodule("cell")
    assert [found.input_size, found.hidden_size] == [I - 1, H - 2]
    analysis = prepare(net, sequence())
    unit = removable_units(analysis)[-1:]
    cut = carry_out(analysis, forced(analysis, unit)).module
    assert difference(outputs(net, (sequence(),)), outputs(cut, (sequence(),))) > 1e-6


class Own(nn.LSTM):
    """A subclass, with nothing of its own."""


class Doubled(nn.LSTM):
    """A subclass with a forward of its own, which torch.fx cannot trace."""

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:  # type: ignore[override]  # noqa: A002 - torch's name
        return super().forward(2 * input, hx)


@pytest.mark.parametrize(("kind", "left"), [(Own, H - 2), (Doubled, H - 2)])
def test_subclasses(kind: type[nn.LSTM], left: int) -> None:
    """Where their code is traced, the size of the initial state is a number in the graph, and goes with the units."""
    net = new(kind, states=False)
    with torch.no_grad():
        net.first.weight[2], net.first.bias[2] = 0, 0
    for tensor in rows(net.layer, 2):
        tensor[[1, 4]] = 0
    module = check(net, sequence(), longer=(sequence(1, 2, 9),))
    assert module.get_parameter("layer.weight_ih_l0").shape == (4 * left, I - 1)


def test_a_network_that_must_be_run_to_be_traced() -> None:
    class Branches(Net):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return super().forward(x[:, :100] if x.shape[1] > 100 else x)

    torch.manual_seed(0)
    net = Branches(nn.GRU(I, H, 2, batch_first=True)).double().eval()
    for suffix in ("_l0", "_l1"):
        for tensor in rows(net.layer, 2, suffix):
            tensor[[1, 4]] = 0
    assert hidden(check(net, sequence(), longer=(sequence(1, 2, 9),))) == H - 2


def test_a_single_sequence() -> None:
    net = new(nn.LSTM)
    for tensor in rows(net.layer, 2):
        tensor[1] = 0
    assert hidden(check(net, sequence()[0], longer=(sequence(1, 1, 9)[0],))) == H - 1


def test_channels_that_a_layer_takes_as_time_steps_stay() -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.layer, self.read = nn.Conv1d(3, 5, 1), nn.GRU(6, H, batch_first=True), nn.Linear(H, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.read(self.layer(self.conv(x))[0][:, -1])  # type: ignore[no-any-return]

    torch.manual_seed(0)
    net = Steps().double().eval()
    with torch.no_grad():
        net.conv.weight[2], net.conv.bias[2] = 0, 0  # type: ignore[index]
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    module = check(net, x)
    assert module.get_parameter("conv.weight").shape[0] == 5
    assert "a recurrent layer runs along this dim" in fxc.ChannelGraph.of(net, x).explain("conv", 2)


class Packed(nn.Module):
    """Sequences of different lengths, in any order; the lengths belong to the network, or are an input."""

    lengths: Tensor

    def __init__(self, layer: nn.RNNBase, *, ordered: bool) -> None:
        super().__init__()
        self.first, self.layer, self.ordered = nn.Linear(3, I), layer, ordered
        self.read, self.last = nn.Linear(H * (1 + layer.bidirectional), 2), nn.Linear(H, 2)
        self.register_buffer("lengths", torch.tensor([5, 3] if ordered else [3, 5]))

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        lengths = self.lengths if lengths is None else lengths
        packed = nn.utils.rnn.pack_padded_sequence(
            self.first(x), lengths.cpu(), batch_first=True, enforce_sorted=self.ordered
        )
        out, state = self.layer(packed)
        padded, _ = pad_packed_sequence(out, batch_first=True)
        return self.read(padded), self.last(state[0][-1] if isinstance(self.layer, nn.LSTM) else state[-1])


READS: dict[str, Callable[[Tensor], Tensor]] = {
    "the last layer": lambda h: h[-1],
    "both directions of the last layer": lambda h: torch.cat([h[-2], h[-1]], 1),
    "all": lambda h: h.transpose(0, 1).flatten(1),
    "all of the first sequence": lambda h: h[:, 0].reshape(1, -1),
    "by direction": lambda h: h.view(2, 2, h.shape[1], -1)[-1].permute(1, 0, 2).flatten(1),
    "the mean": lambda h: h.mean(0),
}


class Classifier(nn.Module):
    """Reads the last states of two layers, both ways."""

    def __init__(self, read: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.pick = nn.LSTM(3, H, 2, bidirectional=True, batch_first=True), read
        width = read(torch.zeros(4, 2, H)).shape[1]
        self.fc, self.cells = nn.Linear(width, 2), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        _, (h, c) = self.layer(x)
        return self.fc(self.pick(h)) + self.cells(self.pick(c))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", READS)
def test_the_last_states_are_read_in_many_ways(name: str) -> None:
    torch.manual_seed(0)
    net = Classifier(READS[name]).double().eval()
    dead = {"_l0": [0, 3], "_l0_reverse": [1, 2, 5], "_l1": [7, 6], "_l1_reverse": [2, 4, 6, 7]}
    for suffix, units in dead.items():
        for tensor in rows(net.layer, 2, suffix):
            tensor[units] = 0
    module = check(net, sequence(), longer=(sequence(1, 2, 9),))
    assert hidden(module) == (H if name == "the mean" else H - 2)
    analysis = prepare(net, sequence())
    for unit in removable_units(analysis)[:2]:
        cut = carry_out(analysis, forced(analysis, np.array([unit]))).module
        assert difference(outputs(net, (sequence(),)), outputs(cut, (sequence(),))) > 1e-6


class Mixed(nn.Module):
    """conv - LSTM - linear: what is compressed feeds what is not, and the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer = nn.Conv1d(3, I, 3, padding=1), nn.LSTM(I, H, batch_first=True)
        self.read = nn.Linear(H, 6)
        self.last = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.layer(self.first(x).relu().transpose(1, 2))
        return self.last(self.read(out).relu())  # type: ignore[no-any-return]


def test_a_network_that_compresses_itself() -> None:
    """The inputs of a recurrent layer go with the channels of what is before it, in training."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6)
    net = fxc.compress(Mixed(), x)
    set_bits(net, "first.weight", [1, 4])
    with torch.no_grad():
        net.get_parameter("first.bias")[[1, 4]] = 0
    net.step()
    optimizer = torch.optim.Adam(net.param_groups(lr=1e-3))
    (net(x).square().mean() + net.size()).backward()
    optimizer.step()
    net.step()
    before = net.eval()(x)
    net.prune(optimizer)
    assert difference(before, net(x)) <= 1e-6
    assert net.get_submodule("layer").input_size == I - 2
    (net.train()(x).square().mean() + net.size()).backward()
    optimizer.step()
    net.step()
    final = net.finalize()
    assert difference(net.eval()(x), final.eval()(x)) <= 1e-6
    file = io.BytesIO()
    torch.save(final.state_dict(), file)


def test_a_pruned_network_is_saved_and_loaded(tmp_path: Path) -> None:
    net = new(nn.LSTM, num_layers=2, bidirectional=True, proj_size=5)
    fresh = copy.deepcopy(net)
    analysis = prepare(net, sequence())
    kill(analysis, atoms_of(analysis, removable_units(analysis)[::3]))
    module = fxc.prune(net, sequence()).module
    fxc.save(module, tmp_path / "net.fxc")
    loaded = fxc.load(tmp_path / "net.fxc", model=fresh)
    assert difference(outputs(module, (sequence(),)), outputs(loaded, (sequence(),))) <= TOLERANCE


def test_constants_into_a_recurrent_layer_are_kept() -> None:
    """They are not folded, and the report says so."""
    torch.manual_seed(0)
    net = Mixed().double().eval()
    with torch.no_grad():
        net.first.weight[2] = 0
        net.get_parameter("first.bias")[2] = 0.5
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    result = fxc.prune(net, x, fold=True)
    assert difference(net(x), result.module(x)) <= TOLERANCE
    assert result.module.get_submodule("layer").input_size == I
    assert "not as a layer does" in result.report.unfolded["layer.weight_ih_l0"]


PACKED: dict[str, tuple[Callable[[], nn.RNNBase], int]] = {
    "lstm": (lambda: nn.LSTM(I, H, batch_first=True), 2),
    "gru, 2 layers both ways": (lambda: nn.GRU(I, H, 2, bidirectional=True), 2),
    "rnn": (lambda: nn.RNN(I, H), 0),
}


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("name", PACKED)
def test_packed_sequences(name: str, *, ordered: bool, given: bool) -> None:
    torch.manual_seed(0)
    make, candidate = PACKED[name]
    net = Packed(make(), ordered=ordered).double().eval()
    with torch.no_grad():
        net.first.weight[2], net.first.bias[2] = 0, 0
    for suffix in {n.partition("hh")[2] for n, _ in net.layer.named_parameters() if "weight_hh" in n}:
        for tensor in rows(net.layer, candidate, suffix):
            tensor[[1, 4]] = 0
    lengths = (net.lengths,) if given else ()
    other = (torch.tensor([4, 2, 1]),) if given else ()
    module = check(net, sequence(), *lengths, longer=(sequence(1, 3 if given else 2, 5), *other))
    assert hidden(module) == H - 2
    assert module.get_submodule("layer").input_size == I - 1
    analysis = prepare(net, (sequence(), *lengths))
    assert all(trail.unknown == {} for trail in analysis.trails.values())
    cut = carry_out(analysis, forced(analysis, removable_units(analysis)[-1:])).module
    inputs = (sequence(), *lengths)
    assert difference(outputs(net, inputs), outputs(cut, inputs)) > 1e-6


class Speech(nn.Module):
    """Channels and rows of an image as the features of a recurrent layer, both directions of which are added."""

    def __init__(self, kind: type[nn.LSTM | nn.GRU | nn.RNN], *, added: bool) -> None:
        super().__init__()
        self.conv, self.added = nn.Conv2d(1, 4, 3, padding=1), added
        self.first = kind(4 * 6, 5, bidirectional=True)
        self.second = kind(5 if added else 10, 5)
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        h = h.view(h.shape[0], h.shape[1] * h.shape[2], h.shape[3]).permute(2, 0, 1).contiguous()
        h, _ = self.first(h)
        if self.added:
            h = h.view(h.shape[0], h.shape[1], 2, -1).sum(2).view(h.shape[0], h.shape[1], -1)
        h, _ = self.second(h)
        words, samples = h.shape[0], h.shape[1]
        return self.last(h.view(words * samples, -1)).view(words, samples, -1)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("added", [True, False])
def test_rows_of_an_image_beside_the_channels_that_a_recurrent_layer_is_given(
    kind: type[nn.LSTM | nn.GRU | nn.RNN], *, added: bool
) -> None:
    """It multiplies them by its weight: what it makes has nothing to do with the size of the image any more."""
    net = Speech(kind, added=added).double()
    x = torch.randn(2, 1, 6, 7, dtype=torch.float64)
    analysis = fxc.ChannelGraph.of(net, x).analysis
    units = np.unique(analysis.units[analysis.atoms["first.weight_hh_l0"][1].numpy()])
    assert not analysis.unit_pinned[np.isin(np.arange(len(analysis.units)), units)].any()
    kill(analysis, atoms_of(analysis, units[:2]))
    pruned = fxc.prune(net, x).module
    assert pruned.get_parameter("first.weight_hh_l0").shape[1] == 3
    for size in ((2, 1, 6, 7), (1, 1, 6, 9)):
        other = torch.randn(size, dtype=torch.float64)
        assert difference(outputs(net, (other,)), outputs(pruned, (other,))) <= TOLERANCE
