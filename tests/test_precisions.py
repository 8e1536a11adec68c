"""Models that ask for dtypes, traced in float32 and used under autocast or in half: one graph computes what they do."""

import contextlib
import copy
import os
from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.errors import PathError
from tests.exactness import difference

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
PRECISIONS: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
    "float32": contextlib.nullcontext,
    "bfloat16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "float16": lambda: torch.autocast("cpu", dtype=torch.float16),
}


class Base(nn.Module):
    """Asks for a size, so that it is traced by running it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        self.scale = nn.Parameter(torch.rand(8) + 0.5)

    def start(self, x: Tensor) -> Tensor:
        """The first layer."""
        if x.shape[1] != 6:
            raise ValueError
        return self.first(x).relu()  # type: ignore[no-any-return]


class Norm(Base):
    """Computes in float32, and casts back."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.start(x)
        dtype = h.dtype
        h = h.to(torch.float32)
        h = self.scale * (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)).to(dtype)
        return self.third(self.second(h).relu().to(dtype))  # type: ignore[no-any-return]


class Mask(Base):
    """Hides entries by the least number that there is."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(self.start(x))
        least = torch.full((4, 8), torch.finfo(h.dtype).min, dtype=h.dtype, device=h.device)
        h = torch.where(h > 0, h, least[: h.shape[0]])
        return self.third(h.softmax(-1).to(h.dtype) * torch.finfo(h.dtype).eps)  # type: ignore[no-any-return]


class Meets(Base):
    """Casts one operand where the other has another dtype."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.start(x)
        gate = (
            (h.float() @ self.scale.diag()).sigmoid() if h.dtype != torch.float32 else (h @ self.scale.diag()).sigmoid()
        )
        if gate.dtype != self.scale.dtype:
            gate = gate.to(self.scale.dtype)
        return self.third(self.second(gate.float().log()).float())  # type: ignore[no-any-return]


class Kept(Base):
    """Keeps an operand in the dtype of a weight."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(self.start(x)).relu()
        if h.dtype != self.scale.dtype:
            h = h.to(self.scale.dtype)
        return self.third(torch.special.expm1(h))  # type: ignore[no-any-return]


class InTraining(Base):
    """Asks in training alone."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(self.start(x))
        if self.training:
            h = (h.float() + 1 / 3).to(h.dtype)
        return self.third(h)  # type: ignore[no-any-return]


class Loops(Base):
    """Asks in a loop over a size, so that the batch is no part of the path."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.start(x)
        for _ in range(h.shape[1] // 4):
            h = self.second(h.float()).to(h.dtype).relu()
        if h.shape[0] != x.shape[0]:
            h = h.expand(x.shape[0], -1)
        return self.third(h)  # type: ignore[no-any-return]


NETS: dict[str, type[Base]] = {kind.__name__: kind for kind in (Norm, Mask, Meets, Kept, InTraining, Loops)}


def made(kind: type[Base]) -> Base:
    torch.manual_seed(3)
    return kind().eval()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", NETS)
def test_one_graph_for_all_precisions(name: str, precision: str) -> None:
    model = made(NETS[name])
    graph = fxc.prune(model, X).module
    for training in (False, True):
        with PRECISIONS[precision](), torch.no_grad():
            assert torch.equal(graph.train(training)(X), model.train(training)(X))
            assert torch.equal(graph(X[:2]), model(X[:2]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["Norm", "Mask", "Kept", "InTraining"])  # the others cast what layers refuse
def test_one_graph_for_tensors_in_half(name: str, dtype: torch.dtype) -> None:
    model = made(NETS[name])
    graph, model, x = fxc.prune(model, X).module.to(dtype), model.to(dtype), X.to(dtype)
    with torch.no_grad():
        assert torch.equal(graph(x), model(x))
        final = fxc.compress(made(NETS[name]), X).eval().finalize().to(dtype)
        assert difference(final(x).float(), model(x).float()) < 5e-2


@pytest.mark.parametrize("name", NETS)
def test_training_under_autocast(name: str) -> None:
    net = fxc.compress(made(NETS[name]), X)
    optimizer = torch.optim.Adam(net.param_groups(lr=1e-2))
    for _ in range(3):
        with PRECISIONS["bfloat16"]():
            loss = net(X).square().mean()
        (loss + 0.1 * net.size()).backward()
        optimizer.step()
        net.step()
        optimizer.zero_grad()
    assert torch.isfinite(loss)
    final, net = net.eval().finalize(), net.eval()
    with torch.no_grad():
        assert difference(final(X), net(X)) < 1e-5


@pytest.mark.parametrize("name", NETS)
def test_dead_units_go(name: str) -> None:
    model = made(NETS[name])
    with torch.no_grad():
        model.first.weight[:3], model.first.bias[:3] = 0, 0
    result = fxc.prune(model, X).module
    with torch.no_grad():
        assert difference(result(X), model(X)) < 1e-5
        with PRECISIONS["bfloat16"]():
            assert difference(result(X).float(), model(X).float()) < 2e-2


class Decides(Base):
    """Goes another way in half precision."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.start(x)
        if h.dtype == torch.float16:
            h = h.clamp(max=1.0)
        return self.third(self.second(h))  # type: ignore[no-any-return]


class Numbers(Base):
    """Takes another number in half precision."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.start(x)
        return self.third(self.second(h * (2.0 if h.dtype == torch.float32 else 1.0)))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("kind", "refused"), [(Decides, "float16"), (Numbers, "bfloat16")])
def test_another_path_is_refused(kind: type[Base], refused: str) -> None:
    model = made(kind)
    graph = fxc.prune(model, X).module
    for name, precision in PRECISIONS.items():
        with precision(), torch.no_grad():
            if name == refused:
                with pytest.raises(PathError, match=rf"(?s)test_precisions\.py.*{refused}|{refused}.*traced"):
                    graph(X)
            elif name == "float32" or kind is Decides:
                assert torch.equal(graph(X), model(X))


def test_dtypes_that_no_trace_has_seen_together_are_refused() -> None:
    graph = fxc.prune(made(Norm), X).module
    with pytest.raises(PathError, match=r"(?s)float64, and was .*trace the network again in this precision"):
        graph.double()(X.double())


class Random(nn.Module):
    """A random program of layers, casts, limits and regions."""

    def __init__(self, steps: list[tuple[str, int, int]]) -> None:
        super().__init__()
        self.steps = steps
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in steps)

    def forward(self, x: Tensor) -> Tensor:
        pool = [x, self.layers[0](x)][: x.shape[0]]  # a decision on a size
        for place, (kind, i, j) in enumerate(self.steps):
            pool.append(STEPS[kind](self.layers[place], pool[i % len(pool)], pool[j % len(pool)]))
        return sum((t.float() for t in pool[1:]), torch.zeros_like(x))


def _off(layer: nn.Module, a: Tensor, _b: Tensor) -> Tensor:
    on = torch.is_autocast_enabled("cpu")
    with torch.autocast("cpu", enabled=False) if on else contextlib.nullcontext():
        return layer(a.float())  # type: ignore[no-any-return]


STEPS: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
    "layer": lambda layer, a, _: layer(a),
    "float": lambda _, a, __: a.float(),
    "like": lambda _, a, b: (a.float() / 3).to(b.dtype),
    "limit": lambda _, a, b: a.clamp(min=torch.finfo(b.dtype).eps),
    "full": lambda _, a, b: torch.full_like(a, torch.finfo(b.dtype).tiny, dtype=b.dtype) + a,
    "meet": lambda _, a, b: (a.to(b.dtype) if a.dtype != b.dtype else a) * b,
    "off": _off,
    "half": lambda _, a, __: a.to(torch.bfloat16) * 3,
    "decide": lambda _, a, __: a + 1 if a.dtype == torch.float32 else a - 1,
}


@settings(max_examples=20_000 if os.environ.get("FXCOMPRESS_FUZZ") == "1" else 30)
@given(
    st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=7)
)
def test_random_programs(steps: list[tuple[str, int, int]]) -> None:
    torch.manual_seed(0)
    model = Random(steps).eval()
    inputs = dict.fromkeys(PRECISIONS, X) | {f"all {d}": X.to(d) for d in (torch.bfloat16, torch.float16)}
    expected = {}
    for name, x in inputs.items():
        with PRECISIONS.get(name, contextlib.nullcontext)(), torch.no_grad(), contextlib.suppress(RuntimeError):
            expected[name] = copy.deepcopy(model).to(x.dtype)(x)  # layers refuse what is not of their dtype
    assume("float32" in expected)
    graph = fxc.prune(model, X).module
    for name, result in expected.items():
        refused = contextlib.suppress(*[PathError] * (name != "float32"))
        with PRECISIONS.get(name, contextlib.nullcontext)(), torch.no_grad(), refused:
            found = copy.deepcopy(graph).to(inputs[name].dtype)(inputs[name])
            assert torch.equal(found, result), (name, graph)
