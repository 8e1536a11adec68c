"""The weights of recurrent layers have quantizers; their inputs and units die, go, and are stored like any channels."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fxcompress as fxc
from fxcompress.quantizer import Quantizer

pytestmark = pytest.mark.usefixtures("double")

I, H, CLASSES = 6, 8, 3
KINDS: dict[str, tuple[Any, int, int]] = {
    "LSTM": (nn.LSTM, 4, 2), "GRU": (nn.GRU, 3, 2), "RNN": (nn.RNN, 1, 0),
    "LSTMCell": (nn.LSTMCell, 4, 2), "GRUCell": (nn.GRUCell, 3, 2), "RNNCell": (nn.RNNCell, 1, 0),
}  # fmt: skip
"""The layer or cell, its gates, and which of them makes the candidate."""


class Reader(nn.Module):
    """A recurrent layer, or a cell in a loop, between others; ``packed`` runs sequences of several lengths."""

    def __init__(self, kind: str, *, packed: bool = False, **options: Any) -> None:  # noqa: ANN401
        super().__init__()
        self.first, self.packed = nn.Linear(4, I), packed
        self.layer = KINDS[kind][0](I, H, **options)
        width = (options.get("proj_size") or H) * (2 if options.get("bidirectional") else 1)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.packed:
            lengths = torch.tensor([5, 4, 2])
            made, _ = self.layer(pack_padded_sequence(h, lengths.cpu(), batch_first=self.layer.batch_first))
            made, _ = pad_packed_sequence(made, batch_first=self.layer.batch_first)
        elif isinstance(self.layer, nn.RNNCellBase):
            state, hidden = None, []
            for step in h:
                state = self.layer(step, state)
                hidden.append(state[0] if isinstance(state, tuple) else state)
            made = torch.stack(hidden)
        else:
            made, _ = self.layer(h)
        return self.head(made)  # type: ignore[no-any-return]


CASES: dict[str, dict[str, Any]] = {
    **{kind: {"kind": kind} for kind in KINDS},
    "two layers": {"kind": "LSTM", "num_layers": 2, "dropout": 0.2},
    "both ways": {"kind": "GRU", "bidirectional": True, "batch_first": True},
    "projection": {"kind": "LSTM", "proj_size": 4},
    "no bias": {"kind": "RNN", "bias": False, "nonlinearity": "relu"},
    "packed": {"kind": "GRU", "packed": True, "batch_first": True},
    "cell, no bias": {"kind": "LSTMCell", "bias": False},
}


def sequences() -> Tensor:
    return torch.randn(3, 5, 4)


def kill(net: fxc.CompressedModule, kind: str, units: int) -> None:
    """No bits for the candidates of the first units of each layer and direction, and no biases."""
    gates, candidate = KINDS[kind][1:]
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            rows = parameter.shape[0] // gates
            if "layer.weight_ih" in name or "layer.weight_hh" in name:
                if name.endswith(".bits"):
                    parameter[candidate * rows : candidate * rows + units] = 0
            elif name.startswith("layer.bias"):
                parameter[candidate * rows : candidate * rows + units] = 0
    net.step()


@pytest.mark.parametrize("name", CASES)
def test_dead_units_and_inputs_go_and_nothing_changes(name: str, tmp_path: Path) -> None:
    options, x = CASES[name], sequences()
    model = Reader(**options)
    net = fxc.compress(model, x)
    assert net.unquantized() == ()
    optimizer = torch.optim.Adam(net.param_groups(lr=1e-3))
    for left in (H - 3, H - 5):
        optimizer.zero_grad()
        (net(x).square().mean() + net.size()).backward()
        optimizer.step()
        net.step()
        kill(net, options["kind"], 3 if left == H - 3 else 2)
        with torch.no_grad():
            net.get_parameter("first.weight_quantizer.bits")[:2] = 0
            net.get_parameter("first.bias")[:2] = 0
        net.step()
        before = net.eval()(x)
        assert net.prune(optimizer).modified
        torch.testing.assert_close(net(x), before, rtol=1e-9, atol=1e-12)
        net.train()
        layer = net.get_submodule("layer")
        assert isinstance(layer, nn.RNNBase | nn.RNNCellBase)
        assert (layer.hidden_size, layer.input_size) == (left, I - 2 if left == H - 3 else I - 4)
    finished = net.eval().finalize()
    assert torch.equal(finished(x), net(x))
    assert type(finished.get_submodule("layer")) is KINDS[options["kind"]][0]
    assert set(dict(finished.named_parameters())) == set(dict(model.named_parameters()))
    fxc.save(finished, tmp_path / "net.fxc")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as that the graph is another one
        loaded = fxc.load(tmp_path / "net.fxc", model=Reader(**options))
    assert torch.equal(loaded(x), finished(x))
    assert finished(torch.randn(3, 5, 4)).shape == (3, 5, CLASSES)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", CASES)
def test_pressure_takes_units(name: str) -> None:
    options, x = CASES[name], sequences()
    net = fxc.compress(Reader(**options), x, bits=1.0, bias_shrink=0.05)
    optimizer = torch.optim.Adam(net.param_groups(lr=1e-4, bits_lr=0.05))
    for _ in range(100):
        optimizer.zero_grad()
        (1e-3 * net(x).square().mean() + net.size()).backward()
        optimizer.step()
        net.step()
        before = net.eval()(x)
        net.prune(optimizer)
        torch.testing.assert_close(net(x), before, rtol=1e-9, atol=1e-12)
        net.train()
    layer = net.get_submodule("layer")
    assert isinstance(layer, nn.RNNBase | nn.RNNCellBase)
    assert layer.hidden_size < H
    assert layer.input_size < I


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", KINDS)
def test_removal_as_it_goes_and_at_the_end_train_alike(kind: str) -> None:
    x, target, model = sequences(), torch.randint(CLASSES, (3, 5)), Reader(kind)
    outputs = []
    for often in (True, False):
        net = fxc.compress(copy.deepcopy(model), x, bits=2.0)
        optimizer = torch.optim.Adam(net.param_groups(lr=1e-2, bits_lr=0.03))
        for _ in range(120):
            optimizer.zero_grad()
            (F.cross_entropy(net(x).flatten(0, 1), target.flatten()) + 0.3 * net.size()).backward()
            optimizer.step()
            net.step()
            if often:
                net.prune(optimizer)
        net.prune(optimizer)
        outputs.append((net.eval()(x), net.get_submodule("layer").hidden_size))
    torch.testing.assert_close(outputs[0][0], outputs[1][0], rtol=1e-7, atol=1e-9)
    assert outputs[0][1] == outputs[1][1]


@pytest.mark.parametrize(("kind", "bias"), [("LSTM", "bias_ih_l0"), ("LSTMCell", "bias_ih")])
def test_the_biases_of_gates_are_left_alone(kind: str, bias: str) -> None:
    x = sequences()
    net = fxc.compress(Reader(kind), x)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "layer" in name and name.endswith(".bits"):
                parameter.zero_()
    before = net.get_parameter(f"layer.{bias}").detach().clone()
    for _ in range(3):
        net.step()
    changed = (net.get_parameter(f"layer.{bias}") != before).view(4, H)
    assert changed.any(1).tolist() == [False, False, True, False]


def test_sizes_by_hand() -> None:
    x = sequences()
    net = fxc.compress(Reader("LSTM"), x)
    rows: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, module in net.named_modules():
            if isinstance(module, Quantizer):
                module.bits.copy_(torch.rand(module.bits.shape) * 4 + 0.5)
                rows[name.removesuffix("_quantizer")] = module.bits
    net.step()
    first, head = rows["first.weight"], rows["head.weight"]
    ih, hh = rows["layer.weight_ih_l0"], rows["layer.weight_hh_l0"]
    own = 4 * first.sum() + I * ih.sum() + H * hh.sum() + H * head.sum()
    candidates = (ih.view(4, H)[2] + hh.view(4, H)[2]) / 2  # without them a unit is zero
    read = 4 * H * first.sum() + CLASSES * candidates.sum()
    recurrent = H * hh.sum()  # whose inputs nothing is known to feed
    weights = 4 * I + 4 * H * (I + H) + CLASSES * H
    assert net.weights == weights
    torch.testing.assert_close(net.size(objective="eq4"), own / weights)
    assert recurrent > 0
    torch.testing.assert_close(net.size(objective="eq5"), (own + read) / weights)
    steps = 3 * 5
    torch.testing.assert_close(net.size(objective="macs"), steps * (own + read) / (steps * weights))


def test_frozen_weights_of_a_layer_have_none() -> None:
    model = Reader("GRU")
    model.layer.weight_hh_l0.requires_grad_(False)
    net = fxc.compress(model, sequences())
    (found,) = net.unquantized()
    assert found.name == "layer.weight_hh_l0"
    assert "frozen" in found.reason
    assert net(sequences()).shape == (3, 5, CLASSES)


def test_a_layer_that_is_called_with_a_state_and_in_two_places() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.LSTM(4, H, batch_first=True), nn.Linear(H, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            _, state = self.layer(x)
            made, _ = self.layer(x.flip(1), state)
            return self.head(made)  # type: ignore[no-any-return]

    x, model = sequences(), Twice().eval()
    net = fxc.compress(model, x)
    assert net.unquantized() == ()
    net.train()(x).sum().backward()
    assert net.get_parameter("layer.weight_hh_l0_quantizer.bits").grad is not None
    finished = net.eval().finalize()
    assert torch.equal(finished(x), net(x))
    again = copy.deepcopy(model)
    again.load_state_dict(finished.state_dict())
    torch.testing.assert_close(again(x), finished(x))
