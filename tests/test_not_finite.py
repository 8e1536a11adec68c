"""Zero times what is known to be infinite, or over what is known to be zero, is no zero."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress as fxc
from tests.exactness import compared_on

READS: dict[str, Callable[[Tensor], Tensor]] = {
    "over its length": lambda h: h / h.norm(dim=-1, keepdim=True),
    "over its sum": lambda h: h / h.sum(-1, keepdim=True),
    "over itself": lambda h: h / h,
    "over a deviation": lambda h: h / h.std(-1, keepdim=True),
    "over zero": lambda h: h / 0.0,
    "times a logarithm": lambda h: h * h.abs().log(),
    "times infinity": lambda h: h * math.inf,
    "times less than all": lambda h: torch.mul(-math.inf, h),
    "times nan": lambda h: h * math.nan,
}
FINITE: dict[str, Callable[[Tensor], Tensor]] = {
    "over a length with an eps": lambda h: h / (h.norm(dim=-1, keepdim=True) + 1e-6),
    "normalized": lambda h: F.normalize(h, dim=-1),
    "times a root": lambda h: h * (h.square().mean(-1, keepdim=True) + 1e-6).rsqrt(),
    "times a large number": lambda h: h * 1e300,
}


class Branch(nn.Module):
    """A sum with a branch of zeros, which may become anything but."""

    def __init__(self, read: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.dead, self.last = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)
        self.read = read
        for parameter in self.dead.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x) + self.read(self.dead(x)))  # type: ignore[no-any-return]


def check(read: Callable[[Tensor], Tensor]) -> bool:
    """Whether the branch goes, and the result is the same."""
    torch.manual_seed(0)
    net = Branch(read).double()
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in ((2, 5, 6), (1, 1, 6))]
    result = fxc.prune(net, inputs[0])
    assert compared_on(net, result.module, inputs) == len(inputs)
    return bool(result.report.branches)


@pytest.mark.parametrize("name", READS)
def test_a_branch_that_is_no_number_stays(name: str) -> None:
    assert not check(READS[name])


@pytest.mark.parametrize("name", FINITE)
def test_a_branch_of_zeros_goes(name: str) -> None:
    assert check(FINITE[name])
