"""Models with functions and modules that torch.compile has compiled, and with what torch runs (torch.cond)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.channels.prepare import prepare
from fxcompress.errors import TraceError
from tests.exactness import Fingerprint, difference

X = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def refused(*_: object) -> Callable[..., Any]:
    """A backend of torch.compile that fails: nothing is compiled while a model is looked at."""
    raise AssertionError


def gated(x: Tensor, scale: Tensor) -> Tensor:
    return F.gelu(x) * torch.sigmoid(x * scale) * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1)


COMPILED: dict[str, Callable[..., Tensor]] = {
    "function": torch.compile(gated, backend=refused),
    "whole graph": torch.compile(gated, backend=refused, fullgraph=True, dynamic=True),
    "not compiled": torch.compiler.disable(gated),
}
GELU = torch.compile(F.gelu, backend=refused)


class Net(nn.Module):
    """Calls a compiled function on channels and a parameter; ``looks`` at sizes, or not."""

    def __init__(self, name: str, *, looks: bool) -> None:
        super().__init__()
        self.name, self.looks, self.act = name, looks, GELU
        self.first, self.scale, self.last = nn.Linear(6, 8), nn.Parameter(torch.ones(8)), nn.Linear(8, 3)

    @torch.compile(backend=refused)
    def head(self, h: Tensor) -> Tensor:
        return self.last(self.act(h))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        if self.looks and x.shape[0] > 100:
            return x
        return self.head(COMPILED[self.name](self.first(x), self.scale))


@pytest.mark.parametrize("looks", [False, True])
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_functions_are_traced_in_their_code(name: str, *, looks: bool) -> None:
    torch.manual_seed(0)
    model = Net(name, looks=looks).double().eval()
    with torch.no_grad():
        model.first.weight[:3], model.first.bias[:3] = 0, 0
    result = fxc.prune(model, X).module
    assert result.get_parameter("first.weight").shape == (5, 6)
    with torch.compiler.set_stance("force_eager"):
        assert difference(result(X[:3]), model(X[:3])) < 1e-12


def compiled(module: nn.Module) -> Any:  # noqa: ANN401 - torch.compile is not typed for modules
    return torch.compile(module, backend=refused, dynamic=True)


class Part(nn.Module):
    """A module that users compile."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer, self.width = nn.Linear(6, 8), nn.Linear(8, 6), 6

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(torch.relu(self.inner(x)))  # type: ignore[no-any-return]


class WithParts(nn.Module):
    """Holds modules that are compiled, each in another way, and reads through one of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = compiled(nn.Linear(6, 6))
        self.body = compiled(Part())
        self.blocks = nn.ModuleList([compiled(Part()), compiled(Part())])
        self.tied, self.inplace, self.last = self.blocks[1], Part(), nn.Linear(6, 3)
        self.inplace.compile(backend=refused)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if "inner" in name:
                    parameter[:3] = 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.inplace(self.body(self.stem(x)).view(-1, self.body.width))
        for block in self.blocks:
            x = block(x)
        return self.last(self.tied(x))  # type: ignore[no-any-return]


class CompiledForward(WithParts):
    """Compiles its own forward, as the instance is made."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = torch.compile(self.forward, backend=refused)  # type: ignore[method-assign]


@pytest.mark.parametrize("kind", [WithParts, CompiledForward])
@pytest.mark.parametrize("keep_code", [False, True])
def test_compiled_modules_are_traced_in_their_code(kind: type[nn.Module], tmp_path: Path, *, keep_code: bool) -> None:
    model = kind().double().eval()
    visit = Fingerprint(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    result = fxc.prune(model, X, optimizer, keep_code=keep_code).module
    visit.check()
    assert result.state_dict().keys() == model.state_dict().keys()
    for name in ("body._orig_mod", "blocks.0._orig_mod", "tied._orig_mod", "inplace"):
        assert result.get_parameter(f"{name}.inner.weight").shape == (5, 6)
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in result.parameters()}
    with torch.compiler.set_stance("force_eager"):
        assert difference(result(X[:3]), model(X[:3])) < 1e-12
    net = fxc.compress(model.float(), X.float(), keep_code=keep_code)
    net.load_state_dict(model.state_dict(), strict=False)
    final = net.finalize().eval()
    fxc.save(final, tmp_path / "net.fxc")
    assert torch.equal(fxc.load(tmp_path / "net.fxc", kind())(X.float()), final(X.float()))


def test_a_compiled_model_is_the_model(tmp_path: Path) -> None:
    model = WithParts().eval()
    whole = compiled(model)
    x = X.float()
    for result in (fxc.prune(whole, x).module, fxc.compress(whole).finalize().eval()):
        assert type(result).__name__ == "WithParts"
        assert result.state_dict().keys() == model.state_dict().keys()
        with torch.compiler.set_stance("force_eager"):
            assert difference(result(x), model(x)) < 1e-2
    assert str(fxc.ChannelGraph.of(whole, x)) == str(fxc.ChannelGraph.of(model, x))
    with pytest.raises(
        TypeError, match=r"what torch.compile returned.*save\(module, path\) with the.*\(module\._orig_mod\)"
    ):
        fxc.save(compiled(result), tmp_path / "net.fxc")
    fxc.save(result, tmp_path / "net.fxc")
    for target in (whole, model):
        assert torch.equal(fxc.load(tmp_path / "net.fxc", target)(x), result(x))


class Backbone(nn.Sequential):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))


class Conditional(nn.Module):
    """Goes one of two ways by the value of what its first part makes."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.last = Backbone(), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        return self.last(torch.cond(h.sum() > 0, torch.relu, torch.sigmoid, (h,)))  # type: ignore[no-any-return]


def test_a_choice_by_values_is_refused_and_its_parts_are_pruned() -> None:
    model = Conditional().double().eval()
    with pytest.raises(TraceError, match=r"it calls torch\.cond at .*, which runs functions as"):
        prepare(model, X)
    with torch.no_grad():
        for parameter in model.body[0].parameters():
            parameter[:3] = 0
    result = fxc.prune(model, X).module
    assert sum(p.numel() for p in result.parameters()) < sum(p.numel() for p in model.parameters())
    with torch.compiler.set_stance("force_eager"):  # or torch compiles for it
        assert difference(result(X), model(X)) < 1e-12


class ConditionalParts(nn.Module):
    """The same over a part that is compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.last = compiled(Part()), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        return self.last(h if bool(h.sum() > 0) else -h)  # type: ignore[no-any-return]


def test_compiled_pieces() -> None:
    model = ConditionalParts().double().eval()
    with torch.no_grad():
        for parameter in model.body.inner.parameters():
            parameter[:3] = 0
    result = fxc.prune(model, X)
    assert result.report.pieces == ("body._orig_mod",)
    assert result.module.get_parameter("body._orig_mod.inner.weight").shape == (5, 6)
    with torch.compiler.set_stance("force_eager"):
        assert difference(result.module(X), model(X)) < 1e-12
    net = fxc.compress(model, X)
    net(X).sum().backward()
    assert net.finalize().state_dict().keys() == model.state_dict().keys()
