"""The state_dict of a network that has shrunk loads into a fresh one, which becomes the same network."""

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.errors import CheckpointError
from fxcompress.provenance import Provenance, provenance_of
from fxcompress.quantizer import Quantizer
from fxcompress.training.record import decode, encode
from fxcompress.training.restore import RECORD
from tests.nets import Block, ResidualNet, batch, set_bits
from tests.networks import Example, examples

INPUTS = torch.zeros(2, 3, 10, 10, dtype=torch.float64)


@cache
def _fresh(seed: int) -> fxc.CompressedModule:
    torch.manual_seed(seed)
    return fxc.compress(ResidualNet().double(), INPUTS, bits=4.0)


def fresh(seed: int = 0) -> fxc.CompressedModule:
    return copy.deepcopy(_fresh(seed))


def kill(net: fxc.CompressedModule, generator: torch.Generator, share: float) -> None:
    """Take the bits of some channels, and the biases that keep them from being removed."""
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, Quantizer):
                module.bits[torch.rand(module.bits.shape, generator=generator) < share] = 0
        for name in net.liveness.census.biases:
            bias = net.get_parameter(name)
            bias[torch.rand(bias.shape, generator=generator) < share + 0.3] = 0
    net.step()


def shrunk() -> fxc.CompressedModule:
    """Without block1, and with fewer channels in block2, removed in two steps."""
    return copy.deepcopy(_shrunk())


@cache
def _shrunk() -> fxc.CompressedModule:
    net = fresh()
    set_bits(net, "block1.conv2.weight", list(range(8)))
    nn.init.zeros_(net.get_parameter("block1.bn2.bias"))
    set_bits(net, "block2.conv1.weight", [0, 3])
    net.step()
    net.prune()
    for name in ("block2.conv1.bias", "block2.bn1.bias"):
        nn.init.zeros_(net.get_parameter(name))
    net.step()
    net.prune()
    assert not hasattr(net, "block1")
    assert net.get_parameter("block2.conv1.weight").shape == (6, 8, 3, 3)
    return net


def assert_same(a: fxc.CompressedModule, b: fxc.CompressedModule) -> None:
    """Bit for bit: names, the order of parameters, values, and what the size is computed from."""
    assert [n for n, _ in a.named_parameters()] == [n for n, _ in b.named_parameters()]
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    assert [name for name, value in first.items() if not torch.equal(value, second[name])] == []
    assert a.size().item() == b.size().item()


def outputs(net: fxc.CompressedModule, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    found: Any = copy.deepcopy(net)(*copy.deepcopy(inputs))  # some networks write to them
    return [found] if isinstance(found, Tensor) else list(found.values() if isinstance(found, dict) else found)


@settings(max_examples=4, suppress_health_check=[HealthCheck.too_slow])
@given(examples(steps=4))
def test_a_fresh_network_becomes_the_one_that_shrank(example: Example) -> None:
    """Also one that has shrunk less; and both go on in the same way."""
    net, other = (fxc.compress(example.net, example.inputs) for _ in range(2))
    generator = torch.Generator().manual_seed(example.seed)
    kill(net, generator, 0.3)
    net.prune()
    between = copy.deepcopy(net)
    kill(net, generator, 0.5)
    net.prune()
    for loaded in (other, between):
        loaded.load_state_dict(net.state_dict())
        assert_same(net, loaded)
        for mode in (True, False):
            pairs = zip(*(outputs(n.train(mode), example.inputs) for n in (net, loaded)), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
    for same in (net, other):
        kill(same, torch.Generator().manual_seed(1), 0.5)
        same.prune()
    assert_same(net, other)


def by_torch(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    torch.save(state, path)
    return torch.load(path, weights_only=True)  # type: ignore[no-any-return]


def by_safetensors(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    save_file(state, path)
    return load_file(path)


@pytest.mark.parametrize("through", [by_torch, by_safetensors])
def test_files_of_tensors_hold_all_of_it(
    through: Callable[[dict[str, Tensor], Path], dict[str, Tensor]], tmp_path: Path
) -> None:
    net, other = shrunk(), fresh(1)
    other.load_state_dict(through(net.state_dict(), tmp_path / "file"))
    assert_same(net, other)


def test_as_a_part_of_another_module() -> None:
    class Wrapper(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net, self.scale = net, nn.Linear(5, 5)

    first, second = Wrapper(shrunk()), Wrapper(fresh())
    second.load_state_dict(first.state_dict())
    assert isinstance(first.net, fxc.CompressedModule)
    assert isinstance(second.net, fxc.CompressedModule)
    assert_same(first.net, second.net)
    assert torch.equal(first.scale.weight, second.scale.weight)


def test_what_was_not_cut_loads_as_ever() -> None:
    net, other = fresh(0), fresh(1)
    set_bits(net, "stem.0.weight", [2], 7.5)
    size = other.size().item()
    other.load_state_dict(net.state_dict())
    assert_same(net, other)
    assert other.size().item() != size


def test_a_loaded_network_finalizes_and_saves_like_the_original(tmp_path: Path) -> None:
    net, other = shrunk(), fresh(1)
    other.load_state_dict(net.state_dict())
    x, _ = batch()
    fxc.save(other.finalize(), tmp_path / "net.fxc")
    assert torch.equal(fxc.load(tmp_path / "net.fxc", ResidualNet().double())(x), net.finalize().eval()(x))


def test_a_network_that_was_pruned_before_it_was_compressed() -> None:
    def pruned() -> fxc.CompressedModule:
        torch.manual_seed(0)
        model = ResidualNet().double()
        with torch.no_grad():
            model.block1.conv1.weight[2] = 0
            model.block1.bn1.weight[2] = model.block1.bn1.bias[2] = 0
        return fxc.compress(fxc.prune(model, INPUTS).module, INPUTS)

    net, other = pruned(), pruned()
    kill(net, torch.Generator().manual_seed(0), 0.4)
    net.prune()
    before, after = (provenance.kept for provenance in map(provenance_of, (other, net)) if provenance is not None)
    assert before["block1.conv1.weight"] == {0: (0, 1, 3, 4, 5, 6, 7)}
    assert after != before
    other.load_state_dict(net.state_dict())
    assert_same(net, other)


# Errors: each must be told, and change nothing.


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("fc.", "head."): value for name, value in state.items()}


def halved(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return state | {"fc.weight": state["fc.weight"][:2]}


def without_record(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name != RECORD}


def other_model(_: dict[str, Tensor]) -> dict[str, Tensor]:
    return fxc.compress(ResidualNet(channels=6).double(), INPUTS).state_dict()


def other_depth(_: dict[str, Tensor]) -> dict[str, Tensor]:
    return fxc.compress(nn.Sequential(Block(3), Block(3)), torch.zeros(1, 3, 8, 8)).state_dict()


def frozen(_: dict[str, Tensor]) -> dict[str, Tensor]:
    model = ResidualNet().double()
    model.fc.weight.requires_grad_(False)
    return fxc.compress(model, INPUTS).state_dict()


def of_the_model(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return ResidualNet().state_dict()


def damaged(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return state | {RECORD: state[RECORD].flip(0)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (renamed, r"does not fit ResidualNet: it lacks fc\.bias, fc\.weight"),
        (of_the_model, r"it lacks .*; one without quantizers goes into the model, before compress\(\)"),
        (halved, r"does not fit ResidualNet: fc\.weight is \(2, 8\), not \(5, 8\)"),
        (without_record, r"block2\.bn1\.bias is \(6,\), not \(8,\),.*it has no _extra_state, which tells what was cut"),
        (other_model, r"of another network: its original had block1\.bn1\.bias of shape \(6,\), that of this Resid"),
        (other_depth, r"of another network: its original had 0\.bn1\.bias of shape \(3,\), that of .* no 0\.bn1\.bias"),
        (frozen, r"started with 2,520 quantized weights, this ResidualNet with 2,560"),
        (damaged, r"the record of what was cut is damaged: .*use another checkpoint"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str
) -> None:
    net = fresh(1)
    before = copy.deepcopy(net)
    strict = change is not without_record
    with pytest.raises(CheckpointError, match=message):
        net.load_state_dict(change(shrunk().state_dict()), strict=strict)
    assert_same(net, before)


def test_weights_without_their_formats_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    net, whole = fresh(), shrunk().state_dict()
    weights = {name: value for name, value in net.state_dict().items() if "_quantizer." not in name}
    bits = {name: value for name, value in net.state_dict().items() if "_quantizer." in name}
    net.load_state_dict(whole, strict=False)
    fresh().load_state_dict(bits, strict=False)
    assert not caplog.records
    fresh().load_state_dict(weights, strict=False)
    assert "block1.conv1.weight" in caplog.text
    assert "load it into the model, before compress()" in caplog.text


def test_what_is_gone_does_not_come_back() -> None:
    net, state = shrunk(), fresh().state_dict()
    before = copy.deepcopy(net)
    with pytest.raises(CheckpointError, match=r"it has lost the branch at eval:.* already; load it into a network fre"):
        net.load_state_dict(state)
    assert_same(net, before)
    channels = fresh()
    set_bits(channels, "block1.conv1.weight", [3])
    nn.init.zeros_(channels.get_parameter("block1.bn1.bias"))
    channels.step()
    channels.prune()
    with pytest.raises(RuntimeError, match=r"it has lost entry 3 of block1\.\S+ along dim \d already"):
        channels.load_state_dict(state)


def test_what_is_gone_does_not_come_back_where_one_channel_is_left() -> None:
    """Along a dim of size 1 there are no channels to compare."""
    net = fxc.compress(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
    state = net.state_dict()
    set_bits(net, "0.weight", [0, 2])
    nn.init.zeros_(net.get_parameter("0.bias"))
    net.step()
    net.prune()
    with pytest.raises(
        CheckpointError, match=r"0\.bias is \(3,\), not \(1,\), .* load it into one fresh from compress"
    ):
        net.load_state_dict(state)


def test_strict_means_what_it_means_elsewhere() -> None:
    net, state = fresh(1), shrunk().state_dict()
    kept = net.get_parameter("fc.bias").detach().clone()
    del state["fc.bias"]
    state["more"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"lacks fc\.bias"):
        net.load_state_dict(state)
    result = net.load_state_dict(state, strict=False)
    assert result.missing_keys == ["fc.bias"]
    assert result.unexpected_keys == ["more"]
    assert torch.equal(net.get_parameter("fc.bias"), kept)
    assert torch.equal(net.get_parameter("fc.weight"), state["fc.weight"])


def test_a_newer_record_is_told() -> None:
    import json
    import zlib

    newer = torch.frombuffer(bytearray(zlib.compress(json.dumps({"v": 99}).encode())), dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=r"made by a newer fxcompress .*version 99"):
        decode(newer)
    with pytest.raises(CheckpointError, match=r"must be a uint8 tensor, and is a str"):
        decode("x")


def test_record_round_trip() -> None:
    provenance = Provenance(
        {"a": (4, 3), "b": ()}, {"a": {0: (0, 2), 1: (1,)}}, (("eval:add", "x"),), weights=12, biases=("a",)
    )
    assert decode(encode(provenance)) == provenance


# The optimizer


def test_parameters_stay_the_same_objects() -> None:
    net = fresh(1)
    before = dict(net.named_parameters())
    net.load_state_dict(shrunk().state_dict())
    assert all(parameter is before[name] for name, parameter in net.named_parameters())
    assert len(list(net.parameters())) < len(before)


def test_an_optimizer_that_is_built_after_the_network_was_loaded() -> None:
    """Its groups are those that the old one has, also where one is left without a parameter."""

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block, self.last = (
                nn.Conv2d(3, 3, 1, bias=False),
                Block(3),
                nn.Conv2d(3, 2, 1, bias=False),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.block(self.stem(x)))  # type: ignore[no-any-return]

    def make(seed: int) -> tuple[fxc.CompressedModule, nn.Module]:
        torch.manual_seed(seed)
        model = Normed()
        return fxc.compress(model, torch.zeros(1, 3, 6, 6)), model

    net, _ = make(0)
    optimizer = torch.optim.Adam(net.param_groups())
    net(torch.ones(1, 3, 6, 6)).sum().backward()
    optimizer.step()
    set_bits(net, "block.conv2.weight", [0, 1, 2])
    nn.init.zeros_(net.get_parameter("block.bn2.bias"))
    net.step()
    net.prune(optimizer)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 0, 2, 2]
    other, _ = make(1)
    other.load_state_dict(net.state_dict())
    second = torch.optim.Adam(other.param_groups(5.0))
    second.load_state_dict(optimizer.state_dict())
    assert str(second.state_dict()) == str(optimizer.state_dict())


class TwoNames(nn.Module):
    """A layer that hangs on the network twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.again = self.second

    def forward(self, x: Tensor) -> Tensor:
        h = self.again(self.second(self.first(x).relu()).relu())
        result: Tensor = self.out(h.relu())
        return result


def test_a_layer_keeps_both_of_its_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, dtype=torch.float64)
    net = fxc.compress(TwoNames().double(), x)
    names = list(net.state_dict())
    with torch.no_grad():
        for name in ("first", "second"):
            set_bits(net, f"{name}.weight", [1, 4])
            net.get_parameter(f"{name}.bias")[[1, 4]] = 0
    net.step()
    net.step()
    assert net.prune().removed["first.weight"] == ((8, 5), (6, 5))
    assert list(net.state_dict()) == names
    assert net.get_submodule("again") is net.get_submodule("second")
    other = fxc.compress(TwoNames().double(), x)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x), net(x))
    final = net.finalize()
    fxc.save(final, tmp_path / "net.fxc")
    assert torch.equal(fxc.load(tmp_path / "net.fxc", model=TwoNames().double())(x), final(x))
