"""Networks that keep the class and the code of their model: random ones, and what in the code holds a channel."""

import copy
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import fxcompress as fxc
from fxcompress.channels.prepare import prepare
from fxcompress.errors import UnsupportedModelError
from tests.deployed import Run
from tests.exactness import TOLERANCE, Fingerprint, difference, make_constant, outputs, runs_on
from tests.nets import ResidualNet, lose, set_bits
from tests.networks import Example, RandomNet, examples

FUZZ = os.environ.get("FXCOMPRESS_FUZZ") == "1"
CASES = settings(
    max_examples=20_000 if FUZZ else 20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def parameters_of(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def check_loads(net: nn.Module, original: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Saved and loaded into a fresh original it is of the same class, and computes the same bit for bit."""
    with TemporaryDirectory() as folder:
        fxc.save(net, Path(folder) / "net.fxc")
        loaded = fxc.load(Path(folder) / "net.fxc", original)
    assert type(loaded) is type(original)
    assert difference(outputs(net, inputs), outputs(loaded, inputs)) == 0


@CASES
@given(examples(), st.sampled_from([0.3, 0.6, 0.9]), st.booleans())
def test_random_networks_keep_their_code(example: Example, share: float, fold: bool) -> None:  # noqa: FBT001
    net, seed = example.net, example.seed
    assume(runs_on(net, example.inputs))
    analysis = prepare(net, example.inputs)
    make_constant(analysis, np.random.default_rng(seed).random(analysis.space.size) < share)
    fresh, visit = copy.deepcopy(net), Fingerprint(net)
    result = fxc.prune(net, example.inputs, fold=fold, keep_code=True)
    visit.check()
    event("smaller" if result.report.modified else "nothing removed")
    event(f"held by code: {any('number' in kept.reason for kept in result.report.kept)}")
    assert type(result.module) is RandomNet
    assert result.module.ops == net.ops
    assert not result.report.branches
    runs = [example.inputs, example.other_inputs(3, 0)]
    runs += [] if example.fixed or not runs_on(net, example.other_inputs(1, 4)) else [example.other_inputs(1, 4)]
    for inputs in runs:
        assert difference(outputs(net, inputs), outputs(result.module, inputs)) <= TOLERANCE
    check_loads(result.module, fresh, example.inputs)


@CASES
@given(examples())
def test_random_networks_in_training_keep_their_code(example: Example) -> None:
    try:
        net = fxc.compress(example.net, example.inputs, keep_code=True)
    except UnsupportedModelError:
        assume(False)
        raise
    assume(runs_on(example.net, example.inputs))
    lose(net, example.seed, 0.5)
    whole: Any = net.finalize(prune=False)
    event("smaller" if net.prune().modified else "nothing removed")
    final: Any = net.finalize()
    assert type(whole) is type(final) is RandomNet
    assert difference(outputs(whole, example.inputs), outputs(final, example.inputs)) <= TOLERANCE
    check_loads(final, example.net, example.inputs)


class Attention(nn.Module):
    """Four heads of six dims, as people write them.

    Args:
        code: how the heads are told apart.
    """

    def __init__(self, code: str) -> None:
        super().__init__()
        self.code, self.heads = code, 4
        self.qkv, self.out = nn.ModuleList(nn.Linear(10, 24) for _ in range(3)), nn.Linear(24, 10)

    def split(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        if self.code == "dims":
            return x.view(b, t, -1, 6).transpose(1, 2)
        if self.code == "joined":
            return x.view(x.size()[:-1] + (self.heads, -1)).transpose(1, 2)  # noqa: RUF005 - as people write it
        if self.code in {"heads", "decided"}:
            return x.view(b, t, self.heads, -1).transpose(1, 2)
        if self.code == "four":
            return x.view(b, t, 4, -1).transpose(1, 2)
        return x.view(b, t, self.heads, x.shape[-1] // self.heads).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.split(layer(x)) for layer in self.qkv)
        if self.code == "decided" and self.heads > 3:
            v = v * 2
        return self.out(F.scaled_dot_product_attention(q, k, v, scale=6**-0.5).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def zero_values(net: Attention, channels: list[int]) -> Attention:
    """Let these channels of the values be zero."""
    with torch.no_grad():
        for parameter in net.qkv[2].parameters():
            parameter[channels] = 0
    return net


HEAD = list(range(6, 12))  # the second one
DIMS = [0, 6, 12, 18]  # the first of each


@pytest.mark.parametrize(
    ("code", "dead", "left"),
    [
        ("dims", HEAD, 18),
        ("dims", DIMS, 24),
        ("heads", HEAD, 18),
        ("heads", DIMS, 20),
        ("joined", HEAD, 18),
        ("joined", DIMS, 20),
        ("four", HEAD, 24),
        ("four", DIMS, 20),
        ("size", HEAD, 24),
        ("decided", HEAD, 24),
    ],
)
def test_what_no_number_in_the_code_stands_for_goes(code: str, dead: list[int], left: int) -> None:
    torch.manual_seed(0)
    net, x = zero_values(Attention(code).double(), dead), torch.randn(2, 5, 10, dtype=torch.float64)
    result = fxc.prune(net, x, keep_code=True)
    assert type(result.module) is Attention
    assert result.module.get_parameter("qkv.2.weight").shape[0] == left
    assert result.module.heads == (3 if code in {"heads", "joined"} and dead == HEAD else 4)
    assert net.heads == 4
    assert difference(outputs(net, (x,)), outputs(result.module, (x,))) <= TOLERANCE
    check_loads(result.module, Attention(code).double(), (x,))
    free = fxc.prune(net, x)
    assert free.module.get_parameter("qkv.2.weight").shape[0] < 24
    held = [kept.reason for kept in result.report.kept if kept.tensor == "qkv.2.weight"]
    assert len(held) == (len(dead) if left == 24 else 0)
    assert all("the model's code would need another number: view" in why and "test_own_code.py" in why for why in held)


class Between(nn.Module):
    """Something between two layers that has a number in its code, or works one out of how many channels there are."""

    def __init__(self, what: Callable[[Tensor], Tensor], out: int = 12) -> None:
        super().__init__()
        self.first, self.what, self.last = nn.Conv2d(3, 12, 3), what, nn.Conv2d(out, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.what(self.first(x)))  # type: ignore[no-any-return]


def decides(x: Tensor) -> Tensor:
    """Takes another path on fewer channels."""
    return x * 2 if x.shape[1] > 11 else x * 3


def rms(x: Tensor) -> Tensor:
    """Divides by how many there are."""
    return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6)


NUMBERS: dict[str, Between] = {
    "view": Between(lambda x: x.view(x.shape[0], 3, 4, *x.shape[2:]).flip(1).flatten(1, 2)),
    "slice": Between(lambda x: torch.relu(x[:, 3:11]), 8),
    "split": Between(lambda x: torch.cat([part.sigmoid() - 0.5 for part in x.split([5, 7], 1)][::-1], 1)),
    "index": Between(lambda x: x[:, [11, 3, 4, 0]], 4),
    "narrow": Between(lambda x: x.narrow(1, 2, 9), 9),
    "decision": Between(decides),
    "mean": Between(rms),
    "size as a value": Between(lambda x: x * x.shape[1] ** -0.5),
    "norm": Between(lambda x: F.group_norm(x, 3)),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_channels_that_a_number_in_the_code_stands_for_stay(name: str) -> None:
    """And they go where the code may change, so it is the number that keeps them."""
    torch.manual_seed(0)
    net, x = copy.deepcopy(NUMBERS[name]).double().eval(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    dead = [0, 1, 2, 3, 4]
    with torch.no_grad():
        for parameter in net.first.parameters():
            parameter[dead] = 0
    result, free = fxc.prune(net, x, keep_code=True), fxc.prune(net, x)
    assert difference(outputs(net, (x,)), outputs(result.module, (x,))) <= TOLERANCE
    assert isinstance(result.module, Between)
    assert parameters_of(free.module) < parameters_of(result.module)
    assert result.module.first.weight.shape[0] == 12


class Decides(nn.Module):
    """Adds where sizes agree.

    Args:
        decision: of what is added, and to what.
    """

    def __init__(self, decision: Callable[[Tensor, Tensor], bool]) -> None:
        super().__init__()
        self.decision = decision
        self.first, self.middle, self.last = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 12, 1), nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        y = self.middle(h)
        return self.last(y + h if self.decision(h, y) else y)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("decision", "left"),
    [
        (lambda h, y: h.shape == y.shape, 7),
        (lambda h, y: h.shape[1] == y.size(1), 7),
        (lambda h, y: h.shape[1] > 6, 7),
        (lambda h, y: h.shape[1] > 7, 12),
        (lambda h, y: h.shape[1] > h.shape[2], 12),
    ],
)
def test_a_decision_that_comes_out_the_same_for_all_inputs_holds_nothing(
    decision: Callable[[Tensor, Tensor], bool], left: int
) -> None:
    """The last one comes out the same for this image, but not for one of ten rows."""
    torch.manual_seed(0)
    net, x = Decides(decision).double().eval(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        for layer in (net.first, net.middle):
            for parameter in layer.parameters():
                parameter[:5] = 0
    result: Any = fxc.prune(net, x, keep_code=True).module
    assert result.first.out_channels == left
    for inputs in (x, torch.randn(1, 3, 12, 6, dtype=torch.float64)):
        assert difference(outputs(net, (inputs,)), outputs(result, (inputs,))) <= TOLERANCE
    check_loads(result, Decides(decision).double(), (x,))


def test_what_layers_of_torch_know_of_themselves_is_no_code_of_the_models() -> None:
    """Groups of a norm and of convolutions, in a network as it stands and in one with quantizers."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 12, 3), nn.GroupNorm(4, 12), nn.ReLU(), nn.Conv2d(12, 12, 3, groups=4), nn.Conv2d(12, 2, 1)
    net, x = nn.Sequential(*layers).double(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    compressed = fxc.compress(net, x, keep_code=True)
    for each in (net, compressed):
        for name, parameter in each.named_parameters():
            if name.startswith(("0.", "1.", "3.")) and "exponent" not in name:
                parameter.data[:3] = 0  # the first group
    result = fxc.prune(net, x, keep_code=True).module
    compressed.refresh()
    compressed.step()
    compressed.prune()
    for small in (result, compressed.finalize()):
        assert isinstance(small, nn.Sequential)
        assert (small.get_parameter("0.weight").shape[0], small.get_parameter("3.weight").shape[0]) == (9, 9)
        layers_left: Any = small
        assert (layers_left[1].num_groups, layers_left[3].groups) == (3, 3)
    assert difference(outputs(net, (x,)), outputs(result, (x,))) <= TOLERANCE


class Columns(nn.Module):
    """A layer like those of GPT-2, which knows how many outputs it has."""

    def __init__(self, inputs: int, out: int) -> None:
        super().__init__()
        self.out, self.weight, self.bias = out, nn.Parameter(torch.randn(inputs, out)), nn.Parameter(torch.randn(out))

    def forward(self, x: Tensor) -> Tensor:
        sizes = x.size()[:-1] + (self.out,)  # noqa: RUF005 - as people write it
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(sizes)


def test_attributes_that_are_sizes_follow_in_training_as_well(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Columns(4, 12), nn.ReLU(), Columns(12, 3)), torch.randn(2, 5, 4)
    net = fxc.compress(model, x, keep_code=True)
    for name, parameter in net.named_parameters():
        if name.startswith("0.") and "exponent" not in name:
            parameter.data[..., :7] = 0
    net.refresh()
    net.step()
    net.prune()
    net = pickle.loads(pickle.dumps(net))
    final: Any = net.finalize()
    assert (final[0].out, final[2].out, final[0].weight.shape) == (5, 3, (4, 5))
    assert model.get_submodule("0").out == 12
    torch.testing.assert_close(final(x), net(x), rtol=1e-4, atol=1e-5)
    check_loads(final, model, (x,))


def test_a_branch_stays_with_a_channel() -> None:
    torch.manual_seed(0)
    net, x = ResidualNet().double().eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    blocks = [name for name, module in net.named_modules() if type(module).__name__ == "Block"]
    with torch.no_grad():
        for parameter in net.get_submodule(blocks[0]).parameters():
            parameter.zero_()
    free, result = fxc.prune(net, x), fxc.prune(net, x, keep_code=True)
    assert free.report.branches
    assert not result.report.branches
    assert type(result.module) is ResidualNet
    assert parameters_of(free.module) < parameters_of(result.module) < parameters_of(net)
    assert difference(outputs(net, (x,)), outputs(result.module, (x,))) <= TOLERANCE


class Classifier(nn.Module):
    """Has methods, attributes and an argument that only training needs."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16, bias=False), nn.BatchNorm1d(16))
        self.head, self.settings, self.names = nn.Linear(16, 3), {"lr": 0.1}, ["a", "b", "c"]

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:  # noqa: ANN401 - one or two
        logits = self.head(torch.relu(self.body(x)))
        return logits if y is None else (logits, F.cross_entropy(logits, y))

    def predict(self, x: Tensor) -> list[str]:
        return [self.names[i] for i in self(x).argmax(1).tolist()]


def trained(steps: int = 60) -> tuple[fxc.CompressedModule, Tensor]:
    torch.manual_seed(0)
    x, y = torch.randn(64, 6), torch.randint(3, (64,))
    net = fxc.compress(Classifier(), (x[:4], y[:4]), keep_code=True)
    optimizer = torch.optim.Adam(net.param_groups(lr=1e-2))
    for step in range(steps):
        loss = net(x, y)[1] + 0.03 * net.size()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        net.step()
        if step % 10 == 9:
            net.prune(optimizer)
    return net, x


def test_a_trained_network_has_its_class_and_methods_again(tmp_path: Path) -> None:
    net, x = trained()
    before = net.state_dict()
    final: Any = net.finalize().eval()
    assert type(final) is Classifier
    assert not isinstance(final, fx.GraphModule)
    assert parameters_of(final) < parameters_of(Classifier())
    assert final.settings == {"lr": 0.1}  # a name that a network in training has of its own
    logits = net.eval()(x, torch.zeros(64, dtype=torch.int64))[0]
    torch.testing.assert_close(final(x), logits, rtol=1e-4, atol=1e-5)  # without what only training needs
    assert final.predict(x) == [final.names[i] for i in logits.argmax(1)]
    for copied in (copy.deepcopy(final), pickle.loads(pickle.dumps(final))):
        fxc.save(copied, tmp_path / "net.fxc")
        loaded = fxc.load(tmp_path / "net.fxc", Classifier())
        assert type(loaded) is Classifier
        assert torch.equal(loaded(x), final(x))
    fresh = fxc.compress(Classifier(), (x[:4], torch.zeros(4, dtype=torch.int64)), keep_code=True)
    fresh.load_state_dict(before)
    assert torch.equal(fresh.finalize().eval()(x), final(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_network_that_was_converted_is_loaded_into_a_model_that_was_not(dtype: torch.dtype, tmp_path: Path) -> None:
    """Sizes decide in its code, which is run on what is loaded."""
    x = torch.randn(2, 3, 11, 11)
    final = fxc.compress(Run(), x, keep_code=True).finalize().eval().to(dtype)
    fxc.save(final, tmp_path / "net.fxc")
    loaded = fxc.load(tmp_path / "net.fxc", Run())
    assert type(loaded) is Run
    assert torch.equal(loaded(x.to(dtype)), final(x.to(dtype)))


def test_what_the_code_holds_counts_as_left_once_a_removal_has_found_out() -> None:
    """Else a policy would try again and again; and the size is the same before and after."""
    torch.manual_seed(0)
    model, x = Attention("dims"), torch.randn(2, 5, 10)
    net = fxc.compress(model, x, keep_code=True)
    set_bits(net, "qkv.2.weight", DIMS)
    nn.init.zeros_(net.get_parameter("qkv.2.bias"))
    net.step()
    sizes = [net.size(objective).item() for objective in ("eq4", "eq5", "macs")]
    assert net.removable() > 0
    assert not net.prune().modified
    assert net.removable() == 0
    assert net.weights_left() == 1
    set_bits(net, "qkv.2.weight", HEAD)
    net.step()
    assert net.removable() > 0
    assert net.prune().modified
    net.prune()
    assert net.removable() == 0
    assert 0 < net.weights_left() < 1
    assert [net.size(objective).item() for objective in ("eq4", "eq5", "macs")] < sizes


def test_own_code_is_asked_for_each_time() -> None:
    net, x = trained()
    final: Any = net.finalize().eval()
    again = fxc.prune(final, x, keep_code=True)
    assert type(again.module) is Classifier
    assert not again.report.modified
    assert isinstance(fxc.prune(final, x).module, fx.GraphModule)
    compressed: Any = fxc.compress(final, x, keep_code=True).finalize()
    assert type(compressed) is Classifier
    assert isinstance(fxc.compress(final, x).finalize(), fx.GraphModule)
    graph = fxc.prune(Classifier(), x).module
    assert isinstance(fxc.prune(graph, x, keep_code=True).module, fx.GraphModule)  # its graph is its code
    with pytest.raises(ValueError, match="narrow makes other sums"):
        net.finalize(narrow=True)
    with pytest.raises(ValueError, match="narrow makes other sums"):
        fxc.prune(Classifier(), x, narrow=True, keep_code=True)
    with pytest.raises(UnsupportedModelError, match=r"said at the start: compress\(\.\.\., keep_code=True\)"):
        fxc.prune(net, x, keep_code=True)


def test_modes_and_the_optimizer_follow() -> None:
    torch.manual_seed(0)
    net, x = Classifier(), torch.randn(8, 6)
    first = net.get_submodule("body.0")
    net.get_submodule("body.3").eval()
    optimizer = torch.optim.Adam(net.parameters())
    net(x).sum().backward()
    optimizer.step()
    with torch.no_grad():
        for parameter in first.parameters():
            parameter[:5] = 0
    result = fxc.prune(net, x, optimizer, keep_code=True).module
    assert isinstance(result, Classifier)
    weight = result.get_parameter("body.0.weight")
    assert weight.shape == (11, 6)
    assert result.training
    assert not result.get_submodule("body.3").training
    assert [p for group in optimizer.param_groups for p in group["params"]] == list(result.parameters())
    assert optimizer.state[weight]["exp_avg"].shape == (11, 6)


class Standardised(nn.Conv2d):
    """Computes its weight anew in each call."""

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        std = self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / (std + 1e-5), self.bias)


def test_weights_that_the_code_computes_go_on_being_computed() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(Standardised(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).double(), torch.randn(1, 3, 7, 7)
    final: Any = fxc.compress(net, x.double(), keep_code=True).finalize()
    assert type(final[0]) is Standardised
    assert difference(outputs(net, (x.double(),)), outputs(final, (x.double(),))) < 0.1
    assert fxc.prune(net, x.double(), keep_code=True).module.state_dict().keys() == net.state_dict().keys()


def test_weight_norm_gives_way_to_plain_weights() -> None:
    torch.manual_seed(0)
    wrap = nn.utils.parametrizations.weight_norm
    net, x = nn.Sequential(wrap(nn.Conv2d(3, 8, 3)), nn.ReLU(), nn.Conv2d(8, 4, 3)).double(), torch.randn(1, 3, 7, 7)
    with torch.no_grad():
        net.get_parameter("2.weight")[:, 3] = 0
    result = fxc.prune(net, x.double(), keep_code=True).module
    assert result.get_parameter("0.weight").shape == (7, 3, 3, 3)
    assert difference(outputs(net, (x.double(),)), outputs(result, (x.double(),))) <= TOLERANCE


def test_attention_of_torch_keeps_its_class_and_loses_heads() -> None:
    torch.manual_seed(0)
    net = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).double().eval()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    with torch.no_grad():
        net.linear1.weight[:9], net.linear1.bias[:9] = 0, 0
        net.self_attn.in_proj_weight[36:40], net.self_attn.in_proj_bias[36:40] = 0, 0  # the values of a head
    result = fxc.prune(net, x, keep_code=True).module
    assert isinstance(result, nn.TransformerEncoderLayer)
    assert isinstance(result.self_attn, nn.MultiheadAttention)
    assert result.linear1.out_features == 23
    assert result.self_attn.num_heads == 3
    assert difference(outputs(net, (x,)), outputs(result, (x,))) <= TOLERANCE


class AsksForBias(nn.Module):
    """Doubles what a layer without a bias returns."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(6, 12), nn.Linear(12, 8, bias=False), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, middle = self.middle(torch.sigmoid(self.first(x))), cast("Any", self.middle)
        return self.last(torch.sigmoid(y * 2 if middle.bias is None else y))  # type: ignore[no-any-return]


def test_nothing_is_folded_where_the_code_asks_for_the_bias() -> None:
    torch.manual_seed(0)
    net, x = AsksForBias().double().eval(), torch.randn(4, 6, dtype=torch.float64)
    with torch.no_grad():
        net.first.weight[:7] = 0  # constants behind the sigmoid
        net.first.weight[7], net.first.bias[7], net.middle.weight[:, 7] = 0, 0, 0
    result = fxc.prune(net, x, fold=True, keep_code=True)
    small: Any = result.module
    assert isinstance(small, AsksForBias)
    assert small.first.out_features == 11
    assert small.state_dict().keys() == net.state_dict().keys()
    assert "middle.weight" in str(result.report)
    assert "it may ask whether a layer has a bias" in str(result.report)
    assert difference(outputs(net, (x,)), outputs(result.module, (x,))) <= TOLERANCE
    check_loads(result.module, AsksForBias().double(), (x,))
    compressed = fxc.compress(net, x, keep_code=True)
    with torch.no_grad():
        compressed.get_parameter("first.weight_quantizer.bits")[:7] = 0
    compressed.step()
    final: Any = compressed.finalize()
    assert type(final) is AsksForBias
    assert difference(outputs(compressed.finalize(prune=False), (x,)), outputs(final, (x,))) <= TOLERANCE


def test_norms_have_their_class_again() -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 1), nn.GroupNorm(4, 8), nn.Conv2d(8, 6, 1), nn.LayerNorm((6, 4, 4)), nn.RMSNorm(4)
    net, x = nn.Sequential(*layers).double(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        for parameter in (*net[0].parameters(), *net[1].parameters()):
            parameter[:2] = 0
    result: Any = fxc.prune(net, x, keep_code=True).module
    assert [type(layer) for layer in result] == [type(layer) for layer in layers]
    assert (result[1].num_groups, result[1].num_channels) == (3, 6)
    assert difference(outputs(net, (x,)), outputs(result, (x,))) <= TOLERANCE


class Reads(nn.Module):
    """Has no graph: it reads a value."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(h) if h.sum() > 0 else h  # type: ignore[no-any-return]


@pytest.mark.parametrize("call", [fxc.prune, fxc.compress])
def test_a_model_without_a_graph_is_told(call: Callable[..., object]) -> None:
    net = Reads()
    visit = Fingerprint(net)
    with pytest.raises(UnsupportedModelError, match="needs the graph of all of Reads"):
        call(net, torch.ones(1, 4), keep_code=True)
    visit.check()


@pytest.mark.parametrize("keep_code", [False, True])
def test_a_method_that_a_network_in_training_lacks_is_told(keep_code: bool) -> None:  # noqa: FBT001
    class Policy(nn.Sequential):
        temperature = 2.0

        def act(self, x: Tensor) -> Tensor:
            return self(x).argmax(1)  # type: ignore[no-any-return]

    net = fxc.compress(Policy(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.ones(2, 4), keep_code=keep_code)
    for name in ("act", "temperature"):
        assert not hasattr(net, name)
        with pytest.raises(AttributeError, match=rf"(?s)no attribute '{name}': this network runs .*call the network"):
            getattr(net, name)
    assert hasattr(net.finalize(), "act") == keep_code
    assert getattr(net, "_unknown", None) is None
    assert isinstance(copy.deepcopy(net), fxc.CompressedModule)
