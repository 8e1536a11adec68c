"""Weights without a quantizer are named, with the reason, and a warning says when they are many."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress as fxc

D = 8


class Words(nn.Module):
    """A table, something between, and a layer."""

    def __init__(self, between: nn.Module | None = None, **options: Any) -> None:  # noqa: ANN401
        super().__init__()
        self.table, self.between = nn.Embedding(20, D, **options), between or nn.Identity()
        self.last = nn.Linear(D, 20, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.table(x)))  # type: ignore[no-any-return]


class OwnLayer(nn.GRU):
    """A recurrent layer with a class of its own, which may compute anything."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)[0] * 2


class Wide(nn.Module):
    """A layer that is large beside what has no quantizer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.other = nn.Linear(D, 200), nn.Linear(200, 2), nn.Parameter(torch.randn(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu()) + self.other.prod(0)  # type: ignore[no-any-return]


class Regularized(Words):
    """The table is read beside its lookups."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.table.weight.prod()


def frozen() -> nn.Module:
    net = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, 2))
    net[0].requires_grad_(False)
    return net


class Both(nn.Module):
    """One kernel, read in both directions, in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.last = nn.Parameter(torch.randn(D, D // 2, 1)), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = F.conv1d(x, self.weight, groups=2)
        return self.last(F.conv_transpose1d(h, self.weight, groups=2))  # type: ignore[no-any-return]


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.aside = nn.Linear(D, 3), nn.Linear(D, 30)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x)  # type: ignore[no-any-return]


TOKENS, ROW = torch.randint(20, (2, 5)), torch.randn(2, D)
CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, dict[str, str]]] = {
    "sparse": (
        lambda: Words(sparse=True), TOKENS, {"table.weight": "a table with sparse gradients, reads it"},
    ),
    "norm": (
        lambda: Words(max_norm=1.0), TOKENS,
        {"table.weight": "Embedding table, a table whose lookups restore a norm, reads it"},
    ),
    "beside": (Regularized, TOKENS, {"table.weight": "prod at tests/test_unquantized.py:"}),
    "frozen": (frozen, ROW, {"0.weight": "it is frozen; set requires_grad=True"}),
    "both": (Both, torch.randn(2, D, 4), {"weight": "share it take its outputs in different groups"}),
    "unused": (Unused, ROW, {"aside.weight": "nothing in the graph reads it"}),
    "an op": (Wide, ROW, {"other": "prod at tests/test_unquantized.py:"}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_reasons(name: str, caplog: pytest.LogCaptureFixture) -> None:
    make, x, expected = CASES[name]
    model = make()
    with caplog.at_level(logging.WARNING, "fxcompress"):
        net = fxc.compress(model, x)
    found = {item.name: item for item in net.unquantized()}
    for weight, reason in expected.items():
        assert reason in found[weight].reason
        assert found[weight].elements == model.get_parameter(weight).numel()
    quantized = {n.removesuffix("_quantizer.bits") for n, _ in net.named_parameters() if n.endswith("_quantizer.bits")}
    weights = {n for n, p in model.named_parameters() if p.ndim > 1}
    assert quantized | set(found) == weights
    assert not quantized & set(found)
    if name == "an op":
        assert caplog.text == ""
    else:
        assert (
            f"{net.weights:,} of its {net.weights + sum(i.elements for i in found.values()):,} weights" in caplog.text
        )
        assert next(iter(expected)) in caplog.text


class Careful(nn.Module):
    """Asks a weight for its kind, as models do that may run in half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.last.weight.dtype != x.dtype:
            x = x.to(self.last.weight.dtype)
        h = self.first(x).to(self.last.weight.dtype)
        return self.last(h.to(self.last.weight.device))  # type: ignore[no-any-return]


def test_who_asks_a_weight_for_its_kind_reads_no_value() -> None:
    net = fxc.compress(Careful(), ROW)
    assert net.unquantized() == ()
    assert torch.equal(net.finalize()(ROW), net.eval()(ROW))


def test_recurrent_layers_with_a_class_of_their_own_are_quantized() -> None:
    net = fxc.compress(Words(OwnLayer(D, D)), TOKENS)
    assert net.unquantized() == ()
    before = net.eval()(TOKENS)
    assert torch.equal(net.finalize()(TOKENS), before)


def test_all_of_an_ordinary_network_is_quantized(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2))
    net = fxc.compress(model, torch.randn(2, 3, 8, 8))
    assert net.unquantized() == ()
    assert caplog.text == ""
