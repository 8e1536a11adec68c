"""Networks that pick and write entries at places which they compute: graphs, experts, codebooks, dynamic weights."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.errors import StorageError
from tests.exactness import difference

WIDTH, DEAD, NODES = 12, [0, 3, 7], 6
EDGES = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 2], [1, 2, 3, 4, 5, 0, 3, 5]])


def messages(h: Tensor) -> Tensor:
    """Sums over the neighbours, by an index that is computed."""
    source, target = EDGES + 0 * h.sum(1).argmax()
    return torch.zeros(h.size(0), h.size(1), dtype=h.dtype).index_add_(0, target, F.relu(h[source]))


def scattered(h: Tensor) -> Tensor:
    target = h.sum(1).argsort()[:, None].expand_as(h)
    return torch.zeros_like(h).scatter_add(0, target, h) + h.gather(0, target.flip(0))


def repeated(h: Tensor) -> Tensor:
    """As masked autoencoders put their tokens in order."""
    order = h.sum(1).argsort().unsqueeze(-1)
    return torch.gather(h, 0, order[:4].repeat(1, h.shape[1])).mean(0) + h


GO: dict[str, Callable[[Tensor, "Net"], Tensor]] = {
    "messages": lambda h, net: messages(h) + h,
    "scatter and gather": lambda h, net: scattered(h),
    "repeat": lambda h, net: repeated(h),
    "nearest": lambda h, net: h[torch.cdist(h, h).topk(3, -1, largest=False)[1]].amax(1) - h,
    "distances": lambda h, net: torch.cdist(h, net.table) @ net.table * h,
    "other distances": lambda h, net: torch.cdist(h, net.table, p=1.0).mean(1, keepdim=True) * h,
    "topk": lambda h, net: h.topk(2, 0)[0].mean(0) + h,
    "a weight for each sample": lambda h, net: (net.maker(h).view(-1, 5, WIDTH) @ h[:, :, None]).sum(1) * h,
    "a map as wide": lambda h, net: h.mean(1, keepdim=True).expand_as(h) * h,
    "bilinear": lambda h, net: net.pair(h, h) * h.sum(1, keepdim=True) @ net.table,
}


class Net(nn.Module):
    table: nn.Parameter
    maker: nn.Linear
    pair: nn.Bilinear

    def __init__(self, between: Callable[[Tensor, "Net"], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.between = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 3), between
        self.table, self.maker = nn.Parameter(torch.randn(5, WIDTH)), nn.Linear(WIDTH, 5 * WIDTH)
        self.pair = nn.Bilinear(WIDTH, WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(torch.tanh(self.a(x)), self))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", GO)
def test_channels_go_along_the_other_dims(name: str) -> None:
    torch.manual_seed(0)
    net, x = Net(GO[name]).double().eval(), torch.randn(NODES, 4, dtype=torch.float64)
    with torch.no_grad():
        for parameter in net.a.parameters():
            parameter[DEAD] = 0
        net.table[:, DEAD] = 0
    module = fxc.prune(net, x).module
    assert module.get_parameter("a.weight").shape[0] == WIDTH - len(DEAD)
    assert difference(net(x), module(x)) <= 1e-9
    other = torch.randn(NODES, 4, dtype=torch.float64)
    assert difference(net(other), module(other)) <= 1e-9


@pytest.mark.parametrize("dim", [0, 1])
def test_what_is_indexed_keeps_its_size(dim: int) -> None:
    """Along the channels themselves nothing can be said."""
    torch.manual_seed(0)
    net = Net(lambda h, net: h.gather(1, h.argsort(1)) if dim else h[:, h.sum(0).argsort()]).double().eval()
    with torch.no_grad():
        for parameter in net.a.parameters():
            parameter[DEAD] = 0
    x = torch.randn(NODES, 4, dtype=torch.float64)
    result = fxc.prune(net, x)
    assert result.module.get_parameter("a.weight").shape[0] == WIDTH
    assert difference(net(x), result.module(x)) <= 1e-12


class Sparse(nn.Module):
    """Two layers of a graph network; the edges are a sparse matrix, which the model holds or is given."""

    adjacency: Tensor

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], *, persistent: bool = False) -> None:
        super().__init__()
        self.function, self.a, self.b = function, nn.Linear(4, WIDTH), nn.Linear(WIDTH, 3)
        edges = torch.zeros(NODES, NODES).index_put((EDGES[0], EDGES[1]), torch.ones(EDGES.shape[1]))
        self.register_buffer("adjacency", edges.to_sparse(), persistent=persistent)

    def forward(self, x: Tensor, adjacency: Tensor | None = None) -> Tensor:
        edges = self.adjacency if adjacency is None else adjacency
        h = self.function(edges, self.a(x)).relu()
        return self.function(edges, self.b(h))


def added(edges: Tensor, h: Tensor) -> Tensor:
    result: Tensor = torch.sparse.addmm(h, edges, h, beta=0.5, alpha=2.0)
    return result


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("function", [torch.sparse.mm, torch.mm, added])
def test_products_with_a_sparse_matrix(
    function: Callable[[Tensor, Tensor], Tensor],
    given: bool,  # noqa: FBT001 - whether it is an input
    tmp_path: Path,
) -> None:
    net = Sparse(function).double()
    with torch.no_grad():
        for tensor in (net.a.weight, net.a.bias):
            tensor[DEAD] = 0.0
    x = torch.randn(NODES, 4, dtype=torch.float64)
    inputs = (x, net.adjacency) if given else (x,)
    pruned = fxc.prune(net, inputs).module
    assert pruned.get_parameter("b.weight").shape == (3, WIDTH - len(DEAD))
    assert difference(net(*inputs), pruned(*inputs)) <= 1e-9
    final = fxc.compress(net, inputs).finalize()
    fxc.save(final, tmp_path / "net.fxc")
    loaded = fxc.load(tmp_path / "net.fxc", Sparse(function).double(), inputs)
    assert torch.equal(loaded(*inputs), final.eval()(*inputs))


def test_a_file_holds_no_sparse_matrix(tmp_path: Path) -> None:
    net = Sparse(torch.mm, persistent=True)
    with pytest.raises(StorageError, match=r"cannot save 'adjacency', .*persistent=False"):
        fxc.save(fxc.prune(net, torch.randn(NODES, 4)).module, tmp_path / "net.fxc")
