"""Layers whose op is known beforehand: the same lines on the tape as by way of their code."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.channels import direct, interpret
from fxcompress.channels.analysis import Analysis, analyse
from fxcompress.channels.values import Value, replace
from fxcompress.passes import cutting
from fxcompress.trace.inputs import ExampleInputs
from fxcompress.trace.tracer import trace

_IMAGE = (2, 8, 6, 6)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Conv1d": (lambda: nn.Conv1d(8, 4, 3, stride=2), (2, 8, 9)),
    "Conv1d of one sample": (lambda: nn.Conv1d(8, 4, 3), (8, 9)),
    "Conv2d": (lambda: nn.Conv2d(8, 4, 3, padding=(1, 0), dilation=2, bias=False), _IMAGE),
    "Conv2d with groups": (lambda: nn.Conv2d(8, 4, 3, groups=2), _IMAGE),
    "Conv2d that keeps the size": (lambda: nn.Conv2d(8, 4, 3, padding="same"), _IMAGE),
    "Conv2d with a border of its own": (lambda: nn.Conv2d(8, 4, 3, padding=1, padding_mode="reflect"), _IMAGE),
    "Conv3d": (lambda: nn.Conv3d(8, 4, 3, padding=1), (2, 8, 3, 6, 6)),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(8), (2, 8)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(8, affine=False), _IMAGE),
    "BatchNorm2d of the batch": (lambda: nn.BatchNorm2d(8, track_running_stats=False), _IMAGE),
    "BatchNorm2d that averages evenly": (lambda: nn.BatchNorm2d(8, momentum=None), _IMAGE),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(8, eps=1e-3), (2, 8, 3, 6, 6)),
    "ReLU": (nn.ReLU, _IMAGE),
    "ReLU in place": (lambda: nn.ReLU(inplace=True), _IMAGE),
    "ReLU6": (nn.ReLU6, _IMAGE),
    "Hardtanh": (lambda: nn.Hardtanh(-2, 3, inplace=True), _IMAGE),
    "SiLU": (nn.SiLU, _IMAGE),
    "Sigmoid": (nn.Sigmoid, _IMAGE),
    "Tanh": (nn.Tanh, _IMAGE),
    "Hardswish": (lambda: nn.Hardswish(inplace=True), _IMAGE),
    "Hardsigmoid": (nn.Hardsigmoid, _IMAGE),
    "Identity": (nn.Identity, _IMAGE),
    "Dropout": (nn.Dropout, _IMAGE),
    "Dropout1d": (nn.Dropout1d, (2, 8, 9)),
    "Dropout2d": (nn.Dropout2d, _IMAGE),
    "Dropout3d": (nn.Dropout3d, (2, 8, 3, 6, 6)),
}


def _shown(analysis: Analysis) -> list[Any]:
    """The tape, as what compares with ==."""

    def shown(value: Value) -> tuple[Any, ...]:
        return tuple(value.shape), value.meta.stride(), value.meta.dtype, [layer.tolist() for layer in value.layers]

    return [
        (
            step.op,
            step.node,
            str(step.call.func),
            replace(shown, Value, (step.call.args, step.call.kwargs, step.outputs)),
        )
        for step in analysis.trails["eval"].tape
    ]


def _analysed(layer: nn.Module, shape: tuple[int, ...]) -> Analysis:
    """Of a layer behind a convolution or, where its input is no batch, alone."""
    conv = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}.get(len(shape))
    net = nn.Sequential(conv(8, 8, 1), layer) if conv else nn.Sequential(layer)
    inputs = ExampleInputs.of(torch.randn(shape))
    return analyse(trace(net.eval(), inputs), inputs)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_writes_what_its_code_writes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, shape = LAYERS[name]
    layer = make()
    quick = _analysed(layer, shape)
    monkeypatch.setattr(interpret, "aten_call", lambda *_: None)
    slow = _analysed(layer, shape)
    assert _shown(quick) == _shown(slow)
    assert quick.component.tolist() == slow.component.tolist()
    assert [str(reason) for _, reason in quick.space.pins] == [str(reason) for _, reason in slow.space.pins]
    assert list(quick.trails["eval"].parameters) == list(slow.trails["eval"].parameters)


def test_each_layer_with_a_known_op_has_a_case() -> None:
    assert {kind.__name__ for kind in direct.KNOWN} == {name.split()[0] for name in LAYERS}


def test_a_subclass_runs_its_own_code() -> None:
    class Doubled(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as torch has it
            return super().forward(input).repeat(1, 2, 1, 1)

    Doubled.__module__ = "torch.nn.modules.conv"  # a leaf
    analysis = _analysed(Doubled(8, 4, 1), _IMAGE)
    assert analysis.trails["eval"].tape[-1].outputs[0].shape[1] == 8


@pytest.mark.parametrize("kind", ["StochasticDepth", "DropPath"])
def test_stochastic_depth_is_in_one_graph_and_stays_what_it_was_in_training(kind: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.drop, self.head = _drop_path(kind, 0.5), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).relu()
            return self.head(x + self.drop(self.second(x).relu()))  # type: ignore[no-any-return]

    net = Net().double()
    with torch.no_grad():
        for layer in (net.first, net.second):
            layer.weight[2:5], layer.bias[2:5] = 0, 0  # type: ignore[index]
    x = torch.randn(16, 3, 6, 6, dtype=torch.float64)
    assert trace(net).train_graph is None
    result = fxc.prune(net, x).module
    assert result.get_parameter("second.weight").shape[:2] == (5, 5)
    outputs = {}
    for training in (True, False):
        for module in (net, result):
            torch.manual_seed(0)
            outputs[module, training] = module.train(training)(x)
        torch.testing.assert_close(outputs[net, training], outputs[result, training])
    assert not torch.allclose(outputs[net, True], outputs[net, False])


def _drop_path(kind: str, share: float) -> nn.Module:
    if kind == "DropPath":
        return pytest.importorskip("timm.layers.drop").DropPath(share)  # type: ignore[no-any-return]
    return pytest.importorskip("torchvision.ops.stochastic_depth").StochasticDepth(share, "row")  # type: ignore[no-any-return]


@pytest.mark.parametrize("dims", [(0,), (1,), (0, 1), (0, 1, 2), (1, 2)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_large_tensors_are_cut_as_small_ones_are(
    dims: tuple[int, ...],
    channels_last: bool,  # noqa: FBT001 - a parameter of the test
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = torch.randn(30, 20, 5, 3)
    if channels_last:
        weight = weight.contiguous(memory_format=torch.channels_last)
    indices = {d: torch.randperm(weight.shape[d])[: weight.shape[d] // 2].sort().values for d in dims}
    expected = weight
    for dim, index in indices.items():
        expected = expected.index_select(dim, index)
    monkeypatch.setattr(cutting, "_BLOCK", 700)  # some rows at a time, and fewer at the end
    found = cutting._sliced(weight, indices)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert found.is_contiguous(memory_format=torch.channels_last) == channels_last
