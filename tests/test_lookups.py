"""The code that runs finds modules quickly; the code that is shown is that of torch.fx, and means the same."""

import inspect
import traceback
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.trace.graph.lookups import module_at

X = torch.randn(2, 3, 8, 8)


class Deep(nn.Module):
    """Layers in containers, one under a name that is no word of Python, and a parameter in a container."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), nn.ReLU())
        self.named = nn.ModuleDict({"for": nn.Sequential(nn.Conv2d(8, 4, 1))})
        self.held = nn.ModuleList([nn.ParameterList([torch.full((1,), 2.0)])])

    def forward(self, x: Tensor) -> Tensor:
        held: Any = self.held[0]
        return self.named["for"](self.stages(x)) * held[0]  # type: ignore[no-any-return]


def made() -> fxc.CompressedModule:
    return fxc.compress(Deep(), X)


def test_what_is_shown_is_what_torch_fx_writes() -> None:
    final = made().finalize()
    assert "getattr(getattr(self.stages, '0'), '0')(x)" in final.code
    assert inspect.getsource(type(final).forward).strip() == final.code.strip()
    assert all(text.isprintable() for text in final.code.split("\n"))


def test_no_name_is_looked_up_in_the_wrong_place(monkeypatch: pytest.MonkeyPatch) -> None:
    final = made().finalize().eval()
    final(X)
    asked: list[str] = []
    plain = nn.Module.__getattr__

    def noted(self: nn.Module, name: str) -> Any:  # noqa: ANN401
        if name in {"stages", "named", "0", "1", "for"} and not isinstance(self, nn.ParameterList):
            asked.append(name)
        return plain(self, name)

    monkeypatch.setattr(nn.Module, "__getattr__", noted)
    final(X)
    assert not asked


def test_a_module_that_takes_the_place_of_another_one_is_called() -> None:
    final = made().finalize().eval()
    expected = final(X)
    final.set_submodule("named.for.0", nn.Sequential(final.get_submodule("named.for.0"), nn.Flatten()))
    assert torch.equal(final(X), expected.flatten(1))


class Wrapper(nn.Module):
    """Hands on what it is asked for, as those of torch do for compiled modules, checkpoints and shards."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["inner"], name)


def test_a_wrapper_that_hands_names_on_may_stand_around_a_container() -> None:
    final = made().finalize().eval()
    expected = final(X)
    final.stages = Wrapper(final.get_submodule("stages"))
    assert torch.equal(final(X), expected)
    assert module_at(final, ("stages", "0")) is final.get_submodule("stages.inner.0")


def test_errors_show_the_readable_line() -> None:
    final = made().finalize()
    try:
        final(torch.randn(2, 5, 8, 8))
    except RuntimeError:
        shown = traceback.format_exc()
    assert "getattr(getattr(self.stages, '0'), '0')(x)" in shown
    assert "_fxc_module_at" not in shown
