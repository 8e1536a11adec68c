"""Nothing stays in memory of a model that nobody holds any more, however it was traced and whatever came of it."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.errors import FxCompressError
from tests.nets import Pick


class Looping(nn.Module):
    """Is traced by running it: a branch on a size."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.first(x)).relu()
        return self.second(h * 2 if h.shape[0] > 100 else h)  # type: ignore[no-any-return]


class Casting(Looping):
    """And reads dtypes, so it is recorded in several precisions."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


class Refused(Looping):
    """Reads values: no graph."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * float(x.sum()))


class Straight(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))


class Functional(Looping):
    """Calls functions of torch, which torch.fx asks about."""

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))  # type: ignore[no-any-return]


X = torch.randn(2, 3, 8, 8)


def train(model: nn.Module) -> None:
    net = fxc.compress(model, X)
    optimizer = torch.optim.Adam(net.param_groups(1e-3))
    for _ in range(2):
        (net(X).square().mean() + net.size()).backward()
        optimizer.step()
        optimizer.zero_grad()
        net.step()
        net.prune(optimizer)
    net.finalize()


USES: dict[str, Callable[[nn.Module], object]] = {
    "prune": lambda model: fxc.prune(model, X),
    "fold": lambda model: fxc.prune(model.eval(), X, fold=True, narrow=True),
    "own code": lambda model: fxc.prune(model, X, keep_code=True),
    "graph": lambda model: str(fxc.ChannelGraph.of(model, X)),
    "training": train,
}


@pytest.mark.parametrize("kind", [Straight, Looping, Casting, Refused, Pick])
def test_a_model_is_freed(kind: type[nn.Module]) -> None:
    def held(use: str) -> list[weakref.ref[Tensor]]:
        model = kind()
        try:
            USES[use](model)
        except FxCompressError:
            assert kind in {Refused, Pick}
        return [weakref.ref(parameter) for parameter in model.parameters()]

    for use in USES:
        held(use)  # what is kept once and for all: caches of code
    gc.collect()
    fakes = _fakes()
    left = {use: held(use) for use in USES}
    gc.collect()  # once for all uses, as it looks at everything that a worker holds
    assert not [use for use, references in left.items() if any(reference() is not None for reference in references)]
    assert _fakes() <= fakes


@pytest.mark.parametrize("kind", [Straight, Looping, Casting, Functional])
def test_the_first_model_of_a_process_is_freed_too(kind: type[nn.Module]) -> None:
    """What torch keeps of its own functions when it is first asked for them has none of those that trace a model."""
    for function in vars(torch.overrides).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()
    model = kind()
    references = [weakref.ref(parameter) for parameter in model.parameters()]
    fxc.prune(model, X)
    del model
    gc.collect()
    assert not [reference for reference in references if reference() is not None]


def _fakes() -> int:
    """How many tensors without values there are."""
    return sum(type(thing).__name__ in {"FakeTensor", "LabelTensor"} for thing in gc.get_objects())
