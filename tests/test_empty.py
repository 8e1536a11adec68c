"""Tensors without entries: a batch of no samples, slices of nothing."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress as fxc
from tests.exactness import TOLERANCE, difference

NOTHING: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "rows": lambda last, h: last(h[:0]),
    "product": lambda last, h: last(h) + (h[:, :0] @ torch.ones(0, 3, dtype=h.dtype)),
    "sum": lambda last, h: last(h) + last(h[:0]).sum(0),
    "reshape": lambda last, h: last(h[:0].reshape(0, 2, 4).flatten(1)),
    "joined": lambda last, h: last(torch.cat([h, h[:0]])),
    "norm": lambda last, h: last(F.layer_norm(h[:0], (8,))),
    "batched": lambda last, h: last(torch.bmm(h[:0, None], h[:0, :, None]).expand(-1, -1, 8).squeeze(1)),
}


class Net(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.first, self.last = how, nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.first(x).relu()
        return NOTHING[self.how](self.last, h), self.last(h)


@pytest.mark.parametrize("count", [0, 4])
@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("how", NOTHING)
def test_what_has_no_entries_reads_nothing(how: str, fold: bool, count: int) -> None:  # noqa: FBT001
    torch.manual_seed(0)
    net = Net(how).double().eval()
    with torch.no_grad():
        net.first.weight[2:5] = 0
        net.first.bias[2:5] = 1.0 if fold else 0.0
    pruned = fxc.prune(net, torch.randn(count, 5, dtype=torch.float64), fold=fold).module
    for size in (count, 3):
        x = torch.randn(size, 5, dtype=torch.float64)
        for a, b in zip(pruned(x), net(x), strict=True):
            assert a.shape == b.shape
            assert not a.numel() or difference(a, b) <= TOLERANCE
