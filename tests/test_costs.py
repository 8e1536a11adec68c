"""Multiply-adds and activations: counts by hand, gradients, what falls, and what training makes of them."""

import copy
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.objectives import OBJECTIVES, SizeTerms
from fxcompress.report.measure import multiply_adds
from tests.nets import quantizer, set_bits
from tests.test_objectives import Attention, Concat, Residual, chain, compressed


class Twice(nn.Module):
    """One layer at two resolutions: conv1(conv0(pool(conv0(x)))), each with its own positions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.conv1 = nn.Conv2d(3, 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1(self.conv0(F.avg_pool2d(self.conv0(x), 2)))  # type: ignore[no-any-return]


class Auxiliary(nn.Module):
    """A second head that runs in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, bias=False)
        self.head, self.other = (nn.Conv2d(4, 2, 1, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.head(y) + self.other(y) if self.training else self.head(y)  # type: ignore[no-any-return]


class Dying(nn.Module):
    """A branch that can go: y + conv2(conv1(y)) with y = conv0(x), and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(3, 4, 3, bias=False)
        self.conv1 = nn.Conv2d(4, 5, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(5, 4, 3, padding=1, bias=False)
        self.head = nn.Conv2d(4, 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv0(x)
        return self.head(y + self.conv2(self.conv1(y)))  # type: ignore[no-any-return]


def grouped() -> nn.Sequential:
    """A plain, a depthwise, a grouped, a grouped transposed convolution, and a linear layer on what is flattened."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 1, bias=False),
        nn.Conv2d(4, 4, 3, groups=4, bias=False),
        nn.Conv2d(4, 6, 3, stride=2, groups=2, bias=False),
        nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2, bias=False),
        nn.Flatten(),
        nn.Linear(64, 2, bias=False),
    )


NETS: dict[str, Callable[[], nn.Module]] = {
    "chain": chain, "residual": Residual, "concat": Concat, "grouped": grouped, "twice": Twice, "attention": Attention,
    "auxiliary": Auxiliary,
}  # fmt: skip
ALL = sorted(OBJECTIVES)


def costs(net: fxc.CompressedModule) -> tuple[float, float]:
    """Multiply-adds and activations times bits, not divided by those of the start."""
    start = net.settings.start_costs
    return net.size("macs").item() * start.macs, net.size("activations").item() * start.activations


def double(net: fxc.CompressedModule) -> fxc.CompressedModule:
    """The network in float64 with bits that differ, none of them near a threshold."""
    for parameter in net.double().parameters():
        if parameter.ndim == 1:
            parameter.data.copy_(1 + 7 * torch.rand_like(parameter))
    return net


def test_chain() -> None:
    net = compressed(chain(), **{"0": [8.0, 4.0, 2.0, 1.0], "2": [3.0, 5.0]})
    start = net.settings.start_costs
    assert (start.macs, start.activations) == (36 * 108 + 16 * 72, 36 * 4 + 16 * 2)
    macs = 36 * 27 * 15 + 16 * 9 * (4 * 8 + 2 * 15)
    assert costs(net) == pytest.approx((macs, 36 * 15 + 16 * 8))


def test_residual() -> None:
    bits0, bits1, bits2 = [8.0, 4.0, 2.0, 1.0], [2.0, 4.0, 0.0, 3.0], [3.0, 5.0]
    net = compressed(Residual(), conv0=bits0, conv1=bits1, conv2=bits2)
    # All layers at 6x6; what conv2 reads counts with the mean of the bits that feed it: 5, 4, 2, 2.
    macs = 36 * (27 * 15 + 9 * (4 * 9 + 3 * 15) + (4 * 8 + 2 * 13))
    assert costs(net) == pytest.approx((macs, 36 * (15 + 9 + 8)))


def test_concat() -> None:
    net = compressed(Concat(), conv0=[2.0, 0.0], conv1=[4.0, 3.0, 1.0], conv2=[1.0, 2.0, 3.0, 4.0])
    macs = 36 * (27 * 2 + 27 * 8 + 4 * 10 + 4 * (2 + 8))
    assert costs(net) == pytest.approx((macs, 36 * (2 + 8 + 10)))


def test_grouped_and_transposed() -> None:
    bits: dict[str, list[float]] = {
        "0": [1.0, 2.0, 3.0, 4.0],
        "1": [5.0, 6.0, 7.0, 8.0],
        "2": [1.0, 1.0, 2.0, 2.0, 3.0, 3.0],
        "3": [1.0, 2.0, 3.0, 4.0],
        "5": [2.0, 4.0],
    }
    net = compressed(grouped(), **bits)
    depthwise = 36 * 9 * (1 * 5 + 2 * 6 + 3 * 7 + 4 * 8 - 5 - 12 - 21 - 32 + 26 + 10)
    group = 4 * 9 * ((2 * 4 + 3 * 11) + (2 * 8 + 3 * 15))
    # A transposed convolution multiplies at each of its 2x2 inputs and writes 4x4.
    transposed = 4 * 4 * ((3 * 3 + 2 * 4) + (3 * 7 + 2 * 8))
    linear = 64 * 6 + 2 * 16 * 10
    macs = 64 * 3 * 10 + depthwise + group + transposed + linear
    assert costs(net) == pytest.approx((macs, 64 * 10 + 36 * 26 + 4 * 12 + 16 * 10 + 6))


def test_a_layer_that_is_called_twice_works_twice() -> None:
    net = compressed(Twice(), conv0=[1.0, 2.0, 4.0], conv1=[3.0, 5.0])
    once = 64 * 9 * 3 * 7
    again = 16 * 9 * (3 * 7 + 3 * 7)
    assert costs(net) == pytest.approx((once + again + 16 * (3 * 8 + 2 * 7), 80 * 7 + 16 * 8))
    assert net.size("eq4").item() * net.weights == pytest.approx(27 * 7 + 3 * 8)


def test_what_runs_in_training_alone_costs_nothing() -> None:
    net = compressed(Auxiliary(), stem=[1.0, 2.0, 3.0, 4.0], head=[1.0, 2.0], other=[5.0, 6.0])
    assert costs(net) == pytest.approx((36 * (27 * 10 + 4 * 3 + 2 * 10), 36 * (10 + 3)))
    assert net.size("eq4").item() * net.weights == pytest.approx(270 + 4 * 3 + 4 * 11)


@pytest.mark.parametrize("name", sorted(set(NETS) - {"attention"}))
def test_starting_multiply_adds_are_those_that_torch_counts(name: str) -> None:
    model = NETS[name]().eval()
    x = torch.zeros(2, 3, 8, 8)
    assert fxc.compress(model, x).settings.start_costs.macs == multiply_adds(model, x)


@pytest.mark.parametrize("name", NETS)
def test_scale_at_the_start(name: str) -> None:
    net = compressed(NETS[name]())
    assert net.size("activations").item() == pytest.approx(8.0)
    # Each weight counts once for its row, and once more for what feeds it, if that has bits.
    assert 8.0 < net.size("macs").item() < 16.0
    assert 8.0 < net.size("eq5").item() < 16.0


@pytest.mark.parametrize("objective", ALL)
def test_the_batch_does_not_matter(objective: str) -> None:
    values = []
    for batch in (1, 5):
        net = fxc.compress(Residual(), torch.zeros(batch, 3, 8, 8))
        set_bits(net, "conv1.weight", [1, 2], 3.0)
        values.append(net.size(objective).item())
    assert values[0] == pytest.approx(values[1])


@pytest.mark.parametrize("objective", ALL)
def test_removal_copies_and_checkpoints_keep_the_value(objective: str) -> None:
    bits = {"conv0": [8.0, 0.0, 2.0, 1.0], "conv1": [2.0, 0.0, 0.0, 3.0], "conv2": [3.0, 5.0]}
    net = compressed(Residual(), **bits)
    before = net.size(objective).item()
    fresh = fxc.compress(Residual(), torch.zeros(1, 3, 8, 8))
    fresh.load_state_dict(net.state_dict())
    assert fresh.size(objective).item() == pytest.approx(before)
    assert net.prune().modified
    assert net.size(objective).item() == pytest.approx(before)
    assert copy.deepcopy(net).size(objective).item() == pytest.approx(before)


@pytest.mark.parametrize("objective", ALL)
def test_a_dead_branch_costs_nothing(objective: str) -> None:
    net = fxc.compress(Dying(), torch.zeros(1, 3, 8, 8))
    set_bits(net, "conv2.weight", [0, 1, 2, 3])
    net.step()
    net.size(objective).backward()
    for layer in ("conv1", "conv2"):
        grad = quantizer(net, f"{layer}.weight").bits.grad
        assert grad is None or not grad.any()
    alone = net.size(objective).item()
    set_bits(net, "conv1.weight", [0, 1, 2, 3, 4], 3.0)
    assert net.size(objective).item() == alone


@pytest.mark.parametrize("objective", ALL)
@pytest.mark.parametrize("name", NETS)
def test_gradients_are_those_of_finite_differences(name: str, objective: str) -> None:
    net = double(fxc.compress(NETS[name](), torch.zeros(1, 3, 8, 8)))
    bits = torch.cat([p.detach() for p in net.liveness.bits]).requires_grad_()
    terms = net._size_terms(bits)
    assert torch.autograd.gradcheck(lambda b: OBJECTIVES[objective](terms, b), (bits,))


@pytest.mark.parametrize("objective", ALL)
@pytest.mark.parametrize("name", NETS)
@given(data=st.data())
@settings(max_examples=10)
def test_fewer_bits_never_cost_more(name: str, objective: str, data: st.DataObject) -> None:
    terms, count = terms_of(name)
    numbers = st.floats(0.25, 16, width=32)
    bits = torch.tensor(data.draw(st.lists(numbers, min_size=count, max_size=count)), dtype=torch.float64)
    at = data.draw(st.integers(0, count - 1))
    fewer = bits.clone()
    # To nothing as well, except in a sum: what is left of the mean may be above it.
    fewer[at] *= data.draw(st.floats(0.01 if name in {"residual", "twice"} else 0.0, 0.99))
    cost = OBJECTIVES[objective]
    assert float(cost(terms, fewer)) <= float(cost(terms, bits)) * (1 + 1e-12)
    assert float(cost(terms, torch.zeros_like(bits))) == 0.0


_TERMS: dict[str, tuple[SizeTerms, int]] = {}


def terms_of(name: str) -> tuple[SizeTerms, int]:
    """The terms of one of the networks, in float64, and how many bit depths it has."""
    if name not in _TERMS:
        net = fxc.compress(NETS[name](), torch.zeros(1, 3, 8, 8)).double()
        bits = torch.cat([p.detach() for p in net.liveness.bits])
        _TERMS[name] = net._size_terms(bits), len(bits)
    return _TERMS[name]


def test_any_function_of_terms_and_bits() -> None:
    def channels(terms: SizeTerms, bits: Tensor) -> Tensor:
        return bits.sum() / len(bits)

    net = fxc.compress(chain(), torch.zeros(1, 3, 8, 8), objective=channels)
    assert net.size().item() == 8.0
    assert net.size("eq4").item() == 8.0
    net.size().backward()
    grad = quantizer(net, "0.weight").bits.grad
    assert grad is not None
    torch.testing.assert_close(grad, torch.full((4,), 1 / 6))


def test_a_name_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OBJECTIVES, "half", lambda terms, bits: OBJECTIVES["eq4"](terms, bits) / 2)
    assert fxc.compress(chain(), torch.zeros(1, 3, 8, 8), objective="half").size().item() == 4.0


def test_bad_objectives() -> None:
    net = fxc.compress(chain(), torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"'macks' is none of eq4, eq5, macs, activations; pass one of these names"):
        net.size("macks")
    with pytest.raises(ValueError, match="objective=3 is none of"):
        fxc.compress(chain(), torch.zeros(1, 3, 8, 8), objective=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"returned shape \(6,\); it must return a scalar"):
        net.size(lambda terms, bits: bits)


class Narrowing(nn.Module):
    """A layer at 16x16, one at 4x4 with many more weights, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.early = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.late = nn.Conv2d(8, 24, 3, padding=1, bias=False)
        self.fc = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.late(F.max_pool2d(F.relu(self.early(x)), 4)))
        return self.fc(y.mean((2, 3)))  # type: ignore[no-any-return]


def early_share(objective: str) -> float:
    """Of the bits that both layers lose in a few dozen steps, in the mean of their channels: those of the early one."""
    generator = torch.Generator().manual_seed(1)
    target = torch.randint(4, (32,), generator=generator)
    x = torch.randn(4, 3, 16, 16, generator=generator)[target] + torch.randn(32, 3, 16, 16, generator=generator)
    torch.manual_seed(0)
    net = fxc.compress(Narrowing(), x[:1], objective=objective)
    optimizer = torch.optim.Adam(net.param_groups(lr=1e-3))
    for _ in range(40):
        loss = F.cross_entropy(net(x), target) + 0.005 * net.size()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        net.step()
    early, late = (8 - quantizer(net, f"{layer}.weight").bits.mean().item() for layer in ("early", "late"))
    return early / (early + late)


def test_an_early_layer_pays_for_its_resolution() -> None:
    size = early_share("eq5")
    assert size < 0.85
    assert early_share("macs") > size + 0.1
    assert early_share("activations") > size + 0.1


def test_the_example_of_the_docs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).resolve().parents[1] / "docs" / "training.md").read_text("utf-8")
    (code,) = (c for c in re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL) if "LatencyTable" in c)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert len(fxc.LatencyTable.load("latency.json").layers) == 3
