"""Code that switches gradients, and names that a graph cannot have."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.errors import StorageError, TraceError, UnsupportedModelError

X = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("last", torch.zeros(8))
        self.mean: Tensor
        self.last: Tensor


class Frozen(Base):
    """A part that takes no part in training, by a block, with a parameter that is used on both sides of it."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.second(self.first(x).relu()) * self.third.weight[0]
        return self.third(h + self.first(x))  # type: ignore[no-any-return]


class Decorated(Base):
    @torch.no_grad()
    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.first(x)
        return h.relu(), h.sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.features(x)
        return self.third(self.second(a * b))  # type: ignore[no-any-return]


class Averages(Base):
    """Buffers that follow activations while training."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(h.mean(0), alpha=0.1)
                self.last.copy_(h[0])
        return self.third(self.second(h - self.mean))  # type: ignore[no-any-return]


class Stopped(Base):
    """Gradients are turned on again inside of a block, and off by a call."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.first(x)
            with torch.enable_grad():
                k = self.second(h)
        with torch.set_grad_enabled(False):
            k = k * self.second(h).sigmoid()
        return self.third(k)  # type: ignore[no-any-return]


class Rounds(torch.autograd.Function):
    """A sign, whose gradient is that of the identity where the number is small."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: float) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(x)
        ctx.limit = limit
        return x.sign()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        (x,) = ctx.saved_tensors
        return gradients[0] * (x.abs() <= ctx.limit), None


class Straight(Base):
    """Gradients of a function of its own, of activations and of a weight."""

    def forward(self, x: Tensor) -> Tensor:
        h = Rounds.apply(self.first(x), 0.5)
        weight = Rounds.apply(self.second.weight, 0.2)
        return self.third(torch.nn.functional.linear(h, weight, self.second.bias))  # type: ignore[no-any-return]


class StraightByRunning(Straight):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if len(x) < 100 else x


class Follows(Base):
    """A part whose weights follow those of another one while training, as in momentum contrast."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        with torch.no_grad():
            if self.training:
                for own, other in zip(self.second.parameters(), self.third.parameters(), strict=True):
                    own[: len(other)].mul_(0.9)
                    own[: len(other)] += 0.1 * other
                for buffer in self.buffers():
                    buffer.mul_(0.9).add_(h.mean(0), alpha=0.1)
            k = self.second(h)
            k += self.mean
        return self.third(h.sigmoid() * k)  # type: ignore[no-any-return]


class Masked(Base):
    """A weight that is masked in place, and one that is another tensor after each call."""

    def forward(self, x: Tensor) -> Tensor:
        self.first.weight.data *= (self.first.weight > 0).double()
        if self.training:
            self.second.weight.data = self.second.weight.data.clamp(-0.3, 0.3)
        return self.third(self.second(self.first(x)))  # type: ignore[no-any-return]


class Doubled(Base):
    """A layer that is called with another weight than its own."""

    def forward(self, x: Tensor) -> Tensor:
        own = {name: 2 * parameter for name, parameter in self.second.named_parameters()}
        h = torch.func.functional_call(self.second, own, (self.first(x),))
        return self.third(self.second(h.relu()))  # type: ignore[no-any-return]


class Assigns(Base):
    """Replaces buffers while training, reads them before and after, and keeps one for the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x) * (1 + self.mean)
        if self.training:
            self.mean, old = 0.9 * self.mean + 0.1 * h.detach().mean(0), self.mean
            self.last = (self.mean - old).abs()
        with torch.no_grad():
            buffer = torch.empty_like(h)
            torch.mul(h, self.mean, out=buffer)
        return self.third(self.second(h - self.last) + buffer)  # type: ignore[no-any-return]


@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize(
    "kind", [Frozen, Decorated, Averages, Stopped, Straight, StraightByRunning, Follows, Masked, Doubled, Assigns]
)
def test_gradients_flow_where_they_did(kind: type[nn.Module], *, outer: bool) -> None:
    torch.manual_seed(0)
    model = kind().double().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.set_grad_enabled(outer):  # whether the caller wants gradients while we trace is another matter
        pruned = fxc.prune(model, X).module
        net = fxc.compress(model, X).train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for _ in range(3):
        for each in (model, pruned, net):
            each(X).square().sum().backward()
    reached = {name for name, p in net.named_parameters() if p.grad is not None}
    for (name, expected), found in zip(model.named_parameters(), pruned.parameters(), strict=True):
        assert (expected.grad is None) == (found.grad is None), name
        assert (name in reached) == (expected.grad is not None), name
        if expected.grad is not None and found.grad is not None:
            assert torch.allclose(expected.grad, found.grad, rtol=1e-9)
    for old, new in zip(model.buffers(), pruned.buffers(), strict=True):
        assert not new.requires_grad
        assert torch.allclose(old, new, rtol=1e-9)
    for old, new in zip(model.parameters(), pruned.parameters(), strict=True):
        assert torch.allclose(old, new, rtol=1e-9)
    final = net.eval().finalize()
    assert torch.allclose(final(X), net(X), rtol=1e-9)


class Gaussian(Base):
    """Distributions, which look at their values where they are told to check them."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.first(x)
        found = torch.distributions.Normal(self.second(h), h.exp())
        other = torch.distributions.Categorical(logits=self.third(found.mean))
        prior = torch.distributions.Normal(torch.zeros_like(h), torch.ones_like(h))
        return other.entropy(), torch.distributions.kl_divergence(found, prior).sum(1)


def test_distributions_are_traced_without_their_checks() -> None:
    torch.manual_seed(0)
    model, checks = Gaussian().double().train(), torch.distributions.Distribution._validate_args
    pruned, net = fxc.prune(model, X).module, fxc.compress(model, X).train()
    assert all(map(torch.equal, pruned(X[:3]), model(X[:3])))
    assert len(net.graphs) == 1
    assert torch.distributions.Distribution._validate_args == checks


class AssignsGradients(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        self.mean = self.mean + h.mean(0)
        return self.third(h)  # type: ignore[no-any-return]


class Swaps(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.mean, self.last = self.last, self.mean + 1
        return self.third(self.first(x) + self.last)  # type: ignore[no-any-return]


class ReturnsTheOld(Base):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        old, self.mean = self.mean, self.mean + 1
        return self.third(self.first(x)), old[:3]


class Grows(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.mean = torch.cat([self.mean, self.mean])
        return self.third(self.first(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [AssignsGradients, Swaps, ReturnsTheOld, Grows])
def test_a_buffer_is_replaced_by_what_nobody_else_has(kind: type[Base]) -> None:
    model = kind().double()
    before = model.mean
    with pytest.raises(TraceError, match="it sets its attribute mean while it runs, and the next run may read it"):
        fxc.prune(model, X)
    assert model.mean is before


class Named(nn.Module):
    """A module under a name of the caller's choice."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.add_module(name, nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)))
        self.name, self.last = name, nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(getattr(self, self.name)(x).relu())  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["code", "graph", "meta", "train_graph", "size", "step", "settings", "liveness"])
def test_any_name_works_or_is_refused(name: str) -> None:
    model = Named(name).double()
    pruned = fxc.prune(model, X).module
    assert torch.allclose(pruned(X), model(X))
    with suppress(UnsupportedModelError):
        net = fxc.compress(model, X)
        net.step()
        net.prune()
        assert torch.allclose(net.eval().finalize()(X), net(X))


def test_plain_attributes_give_way() -> None:
    class Sized(Base):
        size, step = 32, 0

        def __init__(self) -> None:
            super().__init__()
            self.prune, self.settings = "often", {"a": 1}

        def forward(self, x: Tensor) -> Tensor:
            return self.third(self.first(x).relu()) * self.size  # type: ignore[no-any-return]

    model = Sized().double()
    net = fxc.compress(model, X)
    assert net.size().item() > 0
    net.step()
    assert not net.prune().modified
    assert model.prune == "often"


def test_a_network_in_training_is_no_file(tmp_path: Path) -> None:
    net = fxc.compress(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)).double(), X)
    with pytest.raises(StorageError, match=r"save net\.finalize\(\)"):
        fxc.save(net, tmp_path / "net.fxc")
    assert not list(tmp_path.iterdir())
