"""Dims that an einsum would lay one behind the other lose entries each for itself."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from tests.exactness import difference

pytestmark = pytest.mark.usefixtures("double")

N, T, D, H, K, O = 3, 5, 8, 2, 4, 6


class Net(nn.Module):
    """A linear layer, an einsum with a weight, and a layer on the sum over all dims but the first and the last."""

    def __init__(self, run: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.run, self.first = run, nn.Linear(4, D)
        self.weight = nn.Parameter(torch.randn(shape))
        self.last = nn.Linear(run(torch.zeros(N, T, D), self.weight).shape[-1], 2)

    def forward(self, x: Tensor) -> Tensor:
        made = self.run(self.first(x), self.weight).tanh()
        while made.ndim > 2:
            made = made.sum(1)
        return self.last(made)  # type: ignore[no-any-return]


Case = tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...], tuple[int, ...]]
GRID = torch.linspace(-1, 1, K, dtype=torch.float64)
CASES: dict[str, Case] = {
    "two that the weight has alone": (lambda h, w: torch.einsum("ntd,hdk->nthk", h, w), (H, D, K), (0, 1, 2)),
    "in another order": (lambda h, w: torch.einsum("hkd,ntd->nhtk", w, h), (H, K, D), (0, 1, 2)),
    "without an arrow": (lambda h, w: torch.einsum("abd,dyz", h, w), (D, H, K), (0, 1, 2)),
    "ellipsis": (lambda h, w: torch.einsum("...d,dhk->...hk", h, w), (D, H, K), (0, 1, 2)),
    "a list": (lambda h, w: torch.einsum("ntd,dhk->nthk", [h, w]), (D, H, K), (0, 1, 2)),
    "summed in the weight": (lambda h, w: torch.einsum("ntd,dhk->ntk", h, w), (D, H, K), (0, 1, 2)),
    "two sums": (lambda h, w: torch.einsum("nthk,hko->nto", h.unflatten(2, (H, K)), w), (H, K, O), (2,)),
    "KAN": (lambda h, w: torch.einsum("ntdk,odk->nto", (h[..., None] - GRID).square(), w), (O, D, K), (0, 1)),
    "diagonal": (lambda h, w: torch.einsum("ntd,dkk->ntk", h, w), (D, K, K), (0,)),
    "three": (lambda h, w: torch.einsum("ntd,dhk,k->nthk", h, w, GRID), (D, H, K), (0, 1)),
    "three, without an arrow": (lambda h, w: torch.einsum("abd,k,dkz", h, GRID, w), (D, K, O), (0, 2)),
    "heads": (lambda h, w: torch.einsum("nshk,nts,hko->nto", h.unflatten(2, (H, K)), h @ h.mT, w), (H, K, O), (2,)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", range(3))
def test_dead_entries_of_each_dim_go(name: str, seed: int) -> None:
    run, shape, dims = CASES[name]
    torch.manual_seed(seed)
    net, x = Net(run, *shape), torch.randn(N, T, 4)
    with torch.no_grad():
        for dim in dims:
            net.weight.select(dim, int(torch.randint(shape[dim], ()))).zero_()
    pruned = fxc.prune(net, x).module
    expected = [n - (d in dims) for d, n in enumerate(shape)]
    assert list(pruned.get_parameter("weight").shape) == expected
    for other in (x, torch.randn(N + 2, T + 1, 4)):
        assert difference(net(other), pruned(other)) <= 1e-12
    again = fxc.prune(net, x, fold=True).module
    assert difference(net(x), again(x)) <= 1e-12


def test_one_head_left_with_three_operands() -> None:
    """Whatever is left of other dims, one entry of the outer of two that are summed over."""

    def run(h: Tensor, w: Tensor) -> Tensor:
        return torch.einsum("nshk,nts,hko->nto", h.unflatten(2, (H, K)), torch.eye(T).expand(len(h), T, T), w)

    net, x = Net(run, H, K, O), torch.randn(N, T, 4)
    with torch.no_grad():
        net.weight[0] = net.weight[:, 2] = 0.0
    pruned = fxc.prune(net, x).module
    assert list(pruned.get_parameter("weight").shape) == [1, 3, O]
    assert difference(net(x), pruned(x)) <= 1e-12


@pytest.mark.parametrize("name", CASES)
def test_entries_that_are_read_stay(name: str) -> None:
    """Zeros in one place of an entry only."""
    run, shape, _ = CASES[name]
    net, x = Net(run, *shape), torch.randn(N, T, 4)
    with torch.no_grad():
        net.weight.flatten()[torch.rand(net.weight.numel()) < 0.6] = 0.0
    pruned = fxc.prune(net, x).module
    assert difference(net(x), pruned(x)) <= 1e-12


@pytest.mark.parametrize("name", CASES)
def test_they_train_their_bits(name: str) -> None:
    run, shape, _ = CASES[name]
    x = torch.randn(N, T, 4)
    net = fxc.compress(Net(run, *shape), x, bits=2.0)
    optimizer = torch.optim.Adam(net.param_groups(lr=1e-2, bits_lr=0.05))
    for step in range(50):
        optimizer.zero_grad()
        (1e-2 * net(x).square().mean() + net.size()).backward()
        optimizer.step()
        net.step()
        if step % 10 == 9:
            size = float(net.size("eq4").detach())
            before = net.eval()(x)
            net.prune(optimizer)
            assert difference(before, net.train()(x)) <= 1e-9
            assert float(net.size("eq4").detach()) <= size * (1 + 1e-9)  # what goes together may take more with it
    assert difference(net.eval()(x), net.finalize()(x)) <= 1e-9


class Local(nn.Module):
    """Heads that look at the two words before: heads and words are a batch for torch, and so are the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.last = nn.Linear(4, H * K), nn.Linear(4, H * K), nn.Linear(H * 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k = (layer(x).unflatten(-1, (H, K)).transpose(1, 2) for layer in (self.query, self.key))
        windows = nn.functional.pad(k, (0, 0, 2, 0)).unfold(2, 3, 1)
        return self.last(torch.einsum("bhtd,bhtdw->bthw", q, windows).flatten(2))  # type: ignore[no-any-return]


class Read(nn.Module):
    """The state of each channel, read out as each sample says."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.last = nn.Linear(4, D), nn.Linear(4, K), nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        k, steps = self.key(x), []
        for step, weight in zip(self.query(x).unbind(1), k.unbind(1), strict=False):
            steps.append(torch.einsum("bdn,bn->bd", step.unsqueeze(-1) * k.mean(1, keepdim=True), weight))
        return self.last(torch.stack(steps, 1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize(("kind", "left"), [(Local, H * (K - 1)), (Read, D - 2)])
def test_a_batch_of_one_sample_is_a_batch(kind: type[Local | Read], left: int, samples: int) -> None:
    torch.manual_seed(0)
    net, x = kind(), torch.randn(samples, T, 4)
    with torch.no_grad():
        for parameter in net.query.parameters():
            parameter[0], parameter[K] = 0, 0
    pruned = fxc.prune(net, x).module
    assert len(pruned.get_parameter("query.weight")) == left
    for count in (1, 2, 3):
        other = torch.randn(count, T, 4)
        assert difference(net(other), pruned(other)) <= 1e-12
