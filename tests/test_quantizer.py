"""The quantizer against plain torch operations, against the formulas written out in numpy, and on every layout."""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd

from fxcompress.errors import UnsupportedModelError
from fxcompress.quantizer import (
    Quantizer,
    arithmetic,
    code_bounds,
    code_count,
    from_rows,
    per_channel,
    quantize,
    quantize_reference,
    rows,
    split_groups,
    storage_bits,
)

LN2 = math.log(2.0)
Function = Callable[[Tensor, Tensor, Tensor], Tensor]


def value_and_grads(function: Function, x: Tensor, bits: Tensor, exponent: Tensor, grad: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (x, bits, exponent)]
    result = function(*leaves)
    return [result.detach(), *torch.autograd.grad(result, leaves, grad)]


def assert_same_as_reference(x: Tensor, bits: Tensor, exponent: Tensor) -> None:
    """With the bits of the paper, and with those of a grid whose range is kept."""
    grad = torch.randn(torch.broadcast_shapes(x.shape, bits.shape, exponent.shape), dtype=x.dtype)
    for keep_range in (False, True):
        ours = value_and_grads(partial(quantize, keep_range=keep_range), x, bits, exponent, grad)
        theirs = value_and_grads(partial(quantize_reference, keep_range=keep_range), x, bits, exponent, grad)
        assert torch.equal(ours[0], theirs[0])
        for mine, other, argument in zip(ours[1:], theirs[1:], (x, bits, exponent), strict=True):
            assert mine.shape == argument.shape
            assert mine.dtype == argument.dtype
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.floats(0, 9), st.floats(-6, 4)), min_size=1, max_size=5), st.integers(0, 2**31))
def test_values_and_gradients_equal_the_reference(formats: list[tuple[float, float]], seed: int) -> None:
    torch.manual_seed(seed)
    bits, exponent = torch.tensor(formats, dtype=torch.float64).T.reshape(2, -1, 1, 1)
    x = torch.randn(len(formats), 3, 7, dtype=torch.float64) * 2.0 ** (exponent + bits - 1)
    assert_same_as_reference(x, bits, exponent)


@pytest.mark.parametrize("bits", [0.0, 0.5, 1.0, 1.584, 2.0, 3.0])
def test_ties_and_bounds_equal_the_reference(bits: float) -> None:
    x = torch.arange(-12, 13, dtype=torch.float64)[None] / 2
    assert_same_as_reference(x, torch.full((1, 1), bits, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64))


@pytest.mark.parametrize(
    ("bits", "exponent"), [((), (3, 1)), ((3, 1), ()), ((3, 4), (3, 1)), ((4,), (3, 1)), ((1, 1), (1, 4))]
)
def test_any_broadcastable_shapes(bits: tuple[int, ...], exponent: tuple[int, ...]) -> None:
    x = torch.randn(3, 4, dtype=torch.float64) * 4
    assert_same_as_reference(x, 3 * torch.rand(bits, dtype=torch.float64), torch.rand(exponent, dtype=torch.float64))


def paper(x: float, b: float, e: float) -> tuple[float, float, float, float]:
    """Value and gradients with respect to x, b, e, case by case; numpy's rint rounds ties to even too."""
    scale, half, scaled = 2.0**e, 2.0 ** (b - 1), x * 2.0**-e
    if scaled > half - 1:
        code = float(np.rint(half - 1))
        return scale * code, 0.0, LN2 * scale * half, LN2 * scale * code
    if scaled < -half:
        code = float(np.rint(-half))
        return scale * code, 0.0, -LN2 * scale * half, LN2 * scale * code
    code = float(np.rint(scaled))
    return scale * code, 1.0, 0.0, LN2 * scale * (code - scaled)


@pytest.mark.parametrize("b", [0.0, 0.7, 1.0, 2.2, 5.0, 8.0])
@pytest.mark.parametrize("e", [-3.0, -0.4, 1.0])
def test_closed_forms_of_the_paper(b: float, e: float) -> None:
    for x in (-40.0, -1.0, -0.3, 0.0, 0.25, 0.5, 0.75, 3.0, 40.0):
        arguments = [torch.tensor(v, dtype=torch.float64) for v in (x, b, e)]
        found = value_and_grads(quantize, *arguments, torch.ones((), dtype=torch.float64))  # type: ignore[call-arg]
        assert [float(v) for v in found] == pytest.approx(paper(x, b, e), rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("b", [0.7, 2.0, 2.2, 5.0, 8.0])
def test_bits_at_a_fixed_range(b: float) -> None:
    """The gradient is that of both changes: a bit more, and an exponent that is one less."""
    for x in (-40.0, -1.0, -0.3, 0.25, 0.75, 3.0, 40.0):
        arguments = [torch.tensor(v, dtype=torch.float64) for v in (x, b, -0.4)]
        one = torch.ones((), dtype=torch.float64)
        found = value_and_grads(partial(quantize, keep_range=True), *arguments, one)  # type: ignore[call-arg]
        value, to_x, to_bits, to_exponent = paper(x, b, -0.4)
        expected = (value, to_x, to_bits - to_exponent if b > 2 else to_bits, to_exponent)
        assert [float(v) for v in found] == pytest.approx(expected, rel=1e-12, abs=1e-14)


def test_known_values_and_ties_to_even() -> None:
    x = torch.tensor([-9.0, -3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 9.0])
    expected = torch.tensor([-4.0, -4.0, -2.0, -2.0, 0.0, 0.0, 2.0, 2.0, 3.0])
    assert torch.equal(quantize(x, torch.tensor(3.0), torch.tensor(0.0)), expected)
    assert torch.equal(quantize(x / 8, torch.tensor(3.0), torch.tensor(-3.0)), expected / 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("exponent", [-20.3, -7.0, 0.0, 3.7])
def test_zero_bits_give_exactly_positive_zero(dtype: torch.dtype, exponent: float) -> None:
    x = torch.randn(999).to(dtype)
    result = quantize(x, torch.zeros(1), torch.tensor([exponent]))
    assert not result.any()
    assert not result.signbit().any()


@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 3, 2, 2), (0, 3), (5, 0)])
def test_rows_of_weights_of_any_rank(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    quantizer = Quantizer(torch.full(shape[:1], 3.0), torch.full(shape[:1], -1.0))
    result = quantizer(weight)
    formats = [p.detach().reshape(-1, *[1] * (len(shape) - 1)) for p in (quantizer.bits, quantizer.exponent)]
    assert torch.equal(result, quantize(weight.detach(), *formats))
    result.sum().backward()
    assert [p.grad is not None and p.grad.shape == p.shape for p in (weight, quantizer.bits, quantizer.exponent)] == [
        True
    ] * 3


def test_zero_bits_can_come_back() -> None:
    """What is above -0.5 gains from more bits in one direction, what is below in the other; weights get nothing."""
    x = torch.tensor([3.0, -3.0, -0.5])
    one = torch.ones(())
    grads = [value_and_grads(quantize, v, torch.zeros(()), torch.zeros(()), one)[1:3] for v in x]
    assert [float(grad_bits) for _, grad_bits in grads] == pytest.approx([LN2 / 2, -LN2 / 2, 0.0])
    assert [float(grad_x) for grad_x, _ in grads] == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    x = torch.randn(4, 50).to(dtype)
    bits, exponent = torch.full((4, 1), 7.3), torch.linspace(-7, -4, 4)[:, None]
    grad = torch.randn(4, 50).to(dtype)
    ours = value_and_grads(quantize, x, bits, exponent, grad)
    wide = value_and_grads(quantize, x.float(), bits, exponent, grad.float())
    assert [t.dtype for t in ours] == [dtype, dtype, torch.float32, torch.float32]
    assert torch.equal(ours[0], wide[0].to(dtype))
    for mine, other in zip(ours[1:], wide[1:], strict=True):
        assert torch.equal(mine, other.to(mine.dtype))


def test_autocast_changes_nothing() -> None:
    conv = nn.Conv2d(3, 4, 3)
    quantizer = Quantizer.for_weight(conv.weight)
    expected = quantizer(conv.weight)
    with torch.autocast("cpu", torch.bfloat16):
        found = quantizer(conv.weight)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    found.sum().backward()
    assert quantizer.bits.grad is not None


def test_second_derivative_is_refused() -> None:
    x = torch.randn(3, requires_grad=True)
    (grad,) = torch.autograd.grad(quantize(x, torch.ones(1), torch.zeros(1)).square().sum(), x, create_graph=True)
    with pytest.raises(
        RuntimeError, match=r"differentiate twice through a quantizer.*\(no create_graph=True for these\)"
    ):
        grad.sum().backward()


@pytest.mark.parametrize("which", [0, 1, 2])
def test_first_derivatives_with_a_graph_are_those_without(which: int) -> None:
    """One that nobody differentiates further is no error, as in a gradient penalty on inputs."""
    arguments = [torch.randn(3, 4), torch.full((3, 1), 3.0), torch.zeros(3, 1)]
    arguments[which].requires_grad_()
    loss = quantize(*arguments).square().sum()
    (plain,) = torch.autograd.grad(loss, arguments[which], retain_graph=True)
    (graph,) = torch.autograd.grad(loss, arguments[which], create_graph=True)
    assert torch.equal(plain, graph)
    with pytest.raises(RuntimeError, match="differentiate twice through a quantizer"):
        graph.sum().backward()


def test_backward_keeps_of_a_weight_the_argument_and_the_result_and_nothing_else() -> None:
    x, bits, exponent = torch.randn(4, 9, requires_grad=True), torch.ones(4, 1), torch.zeros(4, 1)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.numel() > bits.numel():
            kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = quantize(x, bits, exponent)
    assert kept == [t.data_ptr() for t in (x, result)]


LARGE: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = {
    "rows": ((70, 400, 3, 3), (70, 1, 1, 1), (70, 1, 1, 1)),
    "columns": ((300, 1000), (1, 1000), (1, 1000)),
    "groups": ((6, 50, 20, 30), (6, 1, 20, 1), (6, 1, 20, 1)),
    "one for all": ((300, 1000), (), ()),
    "fewer dims": ((300, 1000), (1000,), (300, 1)),
    "rows longer than a block": ((3, 200_000), (3, 1), (3, 1)),
}


@pytest.mark.parametrize("name", LARGE)
def test_large_weights_are_the_same_block_by_block(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "_BLOCK", 2**16)
    shape, bits, exponent = LARGE[name]
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    assert_same_as_reference(
        x, 4 * torch.rand(bits, dtype=torch.float64), torch.rand(exponent, dtype=torch.float64) - 2
    )


@pytest.mark.parametrize("block", [2**16, 2**19])
def test_layouts_in_memory_are_kept(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "_BLOCK", block)
    x = torch.randn(64, 300, 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    bits, exponent = torch.full((64, 1, 1, 1), 3.0), torch.full((64, 1, 1, 1), -1.0)
    result = quantize(x, bits, exponent)
    result.square().sum().backward()
    assert x.grad is not None
    for tensor in (result, x.grad):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(result, quantize(x.detach().contiguous(), bits, exponent))


def test_compiles_without_a_graph_break() -> None:
    """Into graphs that a compiler can fuse, and with the same numbers."""
    x, bits, exponent = torch.randn(5, 40), torch.full((5, 1), 2.5), torch.full((5, 1), -1.0)
    compiled = torch.compile(quantize, backend="aot_eager", fullgraph=True)
    grad = torch.randn(5, 40)
    for mine, other in zip(
        value_and_grads(compiled, x, bits, exponent, grad),
        value_and_grads(quantize, x, bits, exponent, grad),
        strict=True,
    ):
        torch.testing.assert_close(mine, other)


@pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd")
@pytest.mark.parametrize("dynamic", [False, True])
def test_passes_over_a_weight_compute_nothing_of_a_channel(*, dynamic: bool) -> None:
    """What belongs to a channel reaches them by views that a compiler puts into memory, forward and backward."""
    graphs: list[fx.GraphModule] = []

    def keep(graph: fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph

    compiled = torch.compile(quantize, backend=aot_autograd(fw_compiler=keep), fullgraph=True, dynamic=dynamic)
    value_and_grads(compiled, torch.randn(5, 40), torch.rand(5, 1), torch.rand(5, 1), torch.randn(5, 40))
    assert len(graphs) == 2
    for graph in graphs:
        passes = [n for n in graph.graph.nodes if n.op == "call_function" and _entries(n) == 200]
        read = [n for node in passes for n in node.all_input_nodes if _entries(n) == 5]
        assert read
        assert {str(n.target) for n in read} == {"aten.as_strided.default"}


def _entries(node: fx.Node) -> int:
    value = node.meta.get("val")
    return int(value.numel()) if isinstance(value, Tensor) else 0


def test_only_asked_gradients_are_computed() -> None:
    x, bits, exponent = torch.randn(4, 9), torch.ones(4, 1), torch.zeros(4, 1, requires_grad=True)
    quantize(x, bits, exponent).sum().backward()
    assert exponent.grad is not None
    assert x.grad is None
    assert bits.grad is None


def test_functional_transforms() -> None:
    x, bits, exponent = torch.randn(5, 4, 3), torch.full((4, 1), 2.0), torch.zeros(4, 1)
    stacked = torch.func.vmap(quantize, in_dims=(0, None, None))(x, bits, exponent)
    assert torch.equal(stacked, quantize(x, bits, exponent))


def test_several_gradients_at_once() -> None:
    arguments = [t.requires_grad_() for t in (torch.randn(4, 5), torch.full((4, 1), 2.0), torch.zeros(4, 1))]
    result, gradients = quantize(*arguments), torch.randn(3, 4, 5)
    stacked = torch.autograd.grad(result, arguments, gradients, is_grads_batched=True, retain_graph=True)
    for grad, *mine in zip(gradients, *stacked, strict=True):
        for one, other in zip(mine, torch.autograd.grad(result, arguments, grad, retain_graph=True), strict=True):
            torch.testing.assert_close(one, other)


THRESHOLDS = [(0.0, 1), (0.01, 2), (1.0, 2), (1.58, 2), (1.59, 4), (2.0, 4), (2.32, 4), (2.33, 6), (2.8, 6)]
THRESHOLDS += [(2.81, 8), (3.0, 8), (3.16, 8), (3.18, 10), (8.0, 256)]


@pytest.mark.parametrize(("bits", "count"), THRESHOLDS)
def test_code_count_and_storage_bits(bits: float, count: int) -> None:
    assert code_count(torch.tensor([bits])).tolist() == [count]
    assert storage_bits(torch.tensor([bits])).tolist() == [math.ceil(math.log2(count))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_code_count_agrees_with_what_is_emitted_around_the_thresholds(dtype: torch.dtype) -> None:
    around = torch.tensor([0.0, *(math.log2(n) for n in (3, 5, 7, 9, 11, 127))], dtype=dtype)
    above = torch.nextafter(around, torch.tensor(10.0, dtype=dtype))
    below = torch.nextafter(around, torch.tensor(0.0, dtype=dtype))
    bits = torch.cat([around, above, below])[:, None]
    codes = quantize(torch.linspace(-200, 200, 1601).expand(len(bits), -1), bits, torch.zeros(1))
    assert [len(row.unique()) for row in codes] == code_count(bits)[:, 0].tolist()
    lo, hi = code_bounds(bits)
    assert torch.equal(lo[:, 0], codes.amin(1).long())
    assert torch.equal(hi[:, 0], codes.amax(1).long())


LAYERS: dict[str, tuple[nn.Module, int, int]] = {
    "linear": (nn.Linear(5, 6), 0, 1),
    "conv1d": (nn.Conv1d(4, 6, 3), 0, 1),
    "conv2d": (nn.Conv2d(4, 6, 3), 0, 1),
    "conv2d grouped": (nn.Conv2d(4, 6, 3, groups=2), 0, 2),
    "conv2d channels last": (nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last), 0, 1),
    "conv3d": (nn.Conv3d(4, 6, (1, 2, 3)), 0, 1),
    "transposed 1d": (nn.ConvTranspose1d(4, 6, 3), 1, 1),
    "transposed 2d grouped": (nn.ConvTranspose2d(4, 6, 3, groups=2), 1, 2),
    "transposed 3d depthwise": (nn.ConvTranspose3d(6, 6, (1, 2, 3), groups=6), 1, 6),
}


@pytest.mark.parametrize(("layer", "channel_dim", "groups"), LAYERS.values(), ids=LAYERS.keys())
def test_module_quantizes_each_output_channel_alone(layer: nn.Module, channel_dim: int, groups: int) -> None:
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    quantizer = Quantizer.for_weight(weight, channel_dim=channel_dim, groups=groups)
    with torch.no_grad():
        quantizer.bits.copy_(torch.tensor([0.0, 1.0, 2.5, 3.0, 4.0, 8.0]))
        quantizer.exponent.add_(torch.linspace(0, 5, 6))
    result = quantizer(weight)
    assert result.shape == weight.shape
    expected = quantize(rows(weight, channel_dim, groups), quantizer.bits[:, None], quantizer.exponent[:, None])
    assert torch.equal(rows(result, channel_dim, groups), expected)
    assert torch.equal(quantizer.codes(weight) * quantizer.scale(weight), result)
    assert quantizer.codes(weight).dtype == torch.int32
    result.sum().backward()
    assert [p.grad is not None for p in (weight, quantizer.bits, quantizer.exponent)] == [True, True, True]


@pytest.mark.parametrize(("layer", "channel_dim", "groups"), LAYERS.values(), ids=LAYERS.keys())
def test_channels_are_those_of_the_layers_output(layer: nn.Module, channel_dim: int, groups: int) -> None:
    """A zeroed row of the weight must be a zeroed channel of the output, whatever the layout says."""
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    matrix = rows(weight.detach(), channel_dim, groups).clone()
    matrix[4] = 0
    changed = from_rows(matrix, weight.shape, channel_dim, groups)
    assert torch.equal(from_rows(rows(weight, channel_dim, groups), weight.shape, channel_dim, groups), weight)
    inputs = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    assert isinstance(inputs, int)
    x = torch.randn(2, inputs, *[5] * (weight.ndim - 2))
    out = torch.func.functional_call(layer, {"weight": changed, "bias": torch.zeros(6)}, (x,))
    assert out.transpose(0, 1).flatten(1).any(1).tolist() == [True, True, True, True, False, True]


@pytest.mark.parametrize("bits", [7.0, 8.0, 11.3])
def test_start_is_within_half_a_step_of_every_weight(bits: float) -> None:
    weight = torch.randn(16, 4, 3, 3, dtype=torch.float64) * torch.logspace(-3, 3, 16).reshape(-1, 1, 1, 1)
    quantizer = Quantizer.for_weight(weight, bits=bits)
    step = quantizer.scale(weight)
    assert bool(((quantizer(weight) - weight).abs() <= step / 2 * (1 + 1e-9)).all())
    span = step.flatten() * 2 ** (bits - 1)
    assert bool((span <= weight.flatten(1).abs().amax(1) * 1.02).all())


@pytest.mark.parametrize("bits", [2.0, 3.0, 4.5])
def test_start_with_few_bits_errs_less_than_a_grid_that_spans_all_weights(bits: float) -> None:
    weight = torch.randn(16, 40, 3, 3)
    quantizer = Quantizer.for_weight(weight, bits=bits)
    error = (quantizer(weight) - weight).square().sum()
    exponent = (weight.flatten(1).abs().amax(1) / (2 ** (bits - 1) - 1)).log2()
    spanning = quantize(weight.flatten(1), torch.tensor(bits), exponent[:, None])
    assert error < 0.8 * (spanning - weight.flatten(1)).square().sum()


def test_start_of_channels_without_weights_is_finite() -> None:
    weight = torch.randn(4, 5)
    weight[1], weight[2], weight[2, 0] = 0.0, 1e-40, 0.0
    quantizer = Quantizer.for_weight(weight)
    assert quantizer.exponent.isfinite().all()
    assert quantizer.exponent[1] == quantizer.exponent[[0, 3]].max()
    assert quantizer(weight).isfinite().all()
    assert Quantizer.for_weight(torch.zeros(2, 3)).exponent.tolist() == [-7.0, -7.0]


def test_cutting_channels_needs_only_shorter_parameters() -> None:
    layer = nn.ConvTranspose2d(6, 6, 3, groups=3)
    quantizer = Quantizer.for_weight(layer.weight, channel_dim=1, groups=3)
    whole = quantizer(layer.weight)
    kept = [0, 1, 4, 5]
    quantizer.bits = nn.Parameter(quantizer.bits.detach()[kept])
    quantizer.exponent = nn.Parameter(quantizer.exponent.detach()[kept])
    quantizer.groups = 2
    assert torch.equal(quantizer(layer.weight[kept]), whole[kept])
    assert repr(quantizer) == "Quantizer(channels=4, channel_dim=1, groups=2)"


def test_state_dict_names() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3))
            self.quantizer = Quantizer.for_weight(self.weight)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.quantizer(self.weight))

    net = Net()
    assert list(net.state_dict()) == ["weight", "quantizer.bits", "quantizer.exponent"]
    expected = net(torch.eye(3))
    assert torch.equal(expected.T, net.quantizer(net.weight))


@pytest.mark.parametrize(
    ("shape", "channel_dim", "batch_dims"), [((2, 5, 3), 2, (0,)), ((2, 3, 5), 1, (0,)), ((5, 3, 2), 1, (2,))]
)
def test_each_expert_has_channels_of_its_own(
    shape: tuple[int, ...], channel_dim: int, batch_dims: tuple[int, ...]
) -> None:
    weight = torch.randn(shape)
    quantizer = Quantizer.for_weight(weight, bits=3.0, channel_dim=channel_dim, batch_dims=batch_dims)
    with torch.no_grad():
        quantizer.bits.copy_(torch.tensor([0.0, 1.0, 2.5, 3.0, 4.0, 8.0]))
        quantizer.exponent.add_(torch.linspace(0, 5, 6))
    result = quantizer(weight)
    layout = channel_dim, 1, batch_dims
    expected = quantize(rows(weight, *layout), quantizer.bits[:, None], quantizer.exponent[:, None])
    assert torch.equal(rows(result, *layout), expected)
    assert torch.equal(quantizer.codes(weight) * quantizer.scale(weight), result)
    assert torch.equal(from_rows(rows(weight, *layout), shape, *layout), weight)
    dead = (result == 0).all(dim=shape.index(5)).reshape(-1)
    assert dead.tolist()[:2] == [True, False]
    assert repr(quantizer).endswith(f"channel_dim={channel_dim}, groups=1, batch_dims={batch_dims})")
    with pytest.raises(UnsupportedModelError, match="has 9 output channels"):
        quantizer(torch.randn([3 if size == 2 else size for size in shape]))


def test_split_groups_matches_per_channel() -> None:
    blocks = split_groups(torch.zeros(4, 3, 5), 1, 2) + per_channel(torch.arange(6), (4, 3, 5), 1, 2)
    assert blocks.shape == (2, 2, 3, 5)
    assert torch.equal(rows(blocks.reshape(4, 3, 5), 1, 2), torch.arange(6.0)[:, None].expand(6, 10))


@pytest.mark.parametrize(
    ("weight", "channel_dim", "groups", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), 0, 1, r"shape \(3,\) and dtype torch.int64: it must be float"),
        (torch.zeros(3), 1, 1, r"have a dim 1, which holds the output channels; leave this weight out"),
        (torch.zeros(3, 2), 1, 2, r"shape \(3, 2\) cannot have 2 groups along dim 0"),
    ],
)
def test_unfit_weights_are_refused(weight: Tensor, channel_dim: int, groups: int, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        Quantizer.for_weight(weight, channel_dim=channel_dim, groups=groups)


def test_weight_of_other_channels_is_refused() -> None:
    quantizer = Quantizer.for_weight(torch.randn(4, 3))
    with pytest.raises(UnsupportedModelError, match=r"shape \(5, 3\) has 5 output channels .* has 4 bit depths"):
        quantizer(torch.randn(5, 3))
