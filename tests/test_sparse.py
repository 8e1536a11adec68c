"""Networks on graphs, whose edges are a sparse matrix: a buffer or an input, in any layout that torch multiplies."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from tests.exactness import TOLERANCE, difference

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CS. tensor support")
NODES = 6


def edges(layout: torch.layout) -> Tensor:
    """An adjacency matrix, its rows made to sum to one."""
    generator = torch.Generator().manual_seed(0)
    matrix = (torch.rand(NODES, NODES, generator=generator) > 0.4).double() + torch.eye(NODES)
    return (matrix / matrix.sum(1, keepdim=True)).to_sparse(layout=layout)


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sparse.mm": torch.sparse.mm,
    "matmul": torch.matmul,
    "operator": lambda a, h: a @ h,
    "addmm": lambda a, h: torch.sparse.addmm(h, a, h, beta=0.5, alpha=2.0),
}


class GraphNet(nn.Module):
    """Two layers of messages along the edges."""

    own: Tensor | None

    def __init__(self, product: str, own: Tensor | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.product = product
        self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 3)
        self.register_buffer("own", own, persistent=False)

    def forward(self, x: Tensor, given: Tensor | None = None) -> Tensor:
        matrix = given if self.own is None else self.own
        assert matrix is not None
        along = PRODUCTS[self.product]
        return self.second(along(matrix, along(matrix, self.first(x)).relu()))  # type: ignore[no-any-return]


@pytest.mark.parametrize("layout", [torch.strided, torch.sparse_coo, torch.sparse_csr, torch.sparse_csc], ids=str)
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("kept", [False, True])
def test_channels_go_on_both_sides_of_the_edges(product: str, layout: torch.layout, kept: bool) -> None:  # noqa: FBT001
    matrix = edges(torch.sparse_coo).to_dense() if layout is torch.strided else edges(layout)
    net, x = GraphNet(product, matrix if kept else None).double(), torch.randn(NODES, 5, dtype=torch.float64)
    inputs = (x,) if kept else (x, matrix)
    try:
        net(*inputs)
    except RuntimeError:
        pytest.skip("torch does not multiply so")
    with torch.no_grad():
        net.first.weight[2:5] = 0
        net.first.bias[2:5] = 0
    pruned = fxc.prune(net, inputs).module
    assert pruned.get_parameter("first.weight").shape[0] == 5
    for scale in (1.0, -2.0):
        assert difference(pruned(scale * x, *inputs[1:]), net(scale * x, *inputs[1:])) <= TOLERANCE
    copy.deepcopy(pruned)
    compressed = fxc.compress(net, inputs)
    optimizer = torch.optim.Adam(compressed.param_groups(1e-3))
    (compressed(*inputs).square().mean() + 0.1 * compressed.size()).backward()
    optimizer.step()
    compressed.step()
    compressed.prune(optimizer)
    final = compressed.finalize().eval()
    assert difference(final(*inputs), compressed.eval()(*inputs)) <= TOLERANCE
