"""Products of two operands whose channels lie along several dims: what both have been viewed to.

The family: whatever makes the operands, and whatever contracts them, nobody may think that nothing reads them.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxcompress as fxc
from tests.exactness import TOLERANCE, difference

Made = Callable[[Any, Tensor], Tensor]
FLAT: dict[str, Made] = {
    "layer": lambda net, x: net.made(x),
    "first": lambda net, x: net.made(x)[:1],
    "scaled": lambda net, x: net.made(x) * 2,
    "weight": lambda net, x: net.made.weight.sum(1)[None],
}
KERNELS: dict[str, Made] = {
    "parameter": lambda net, x: net.flat,
    "scaled": lambda net, x: net.flat * net.scale,
    "matrix": lambda net, x: net.matrix,
    "turned": lambda net, x: net.matrix.t(),
    "layer": lambda net, x: net.made.weight[:, :1].repeat(1, 2),
    "computed": lambda net, x: net.other(x)[0],
}
CONTRACTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "conv2d": lambda a, w: F.conv2d(a.reshape(-1, 3, 2, 2), w.reshape(2, 3, 2, 2)).flatten(1),
    "conv1d": lambda a, w: F.conv1d(a.reshape(-1, 3, 4), w.reshape(2, 3, 4)).flatten(1),
    "strided": lambda a, w: F.conv1d(a.reshape(-1, 3, 4), w.reshape(4, 3, 2), stride=2).flatten(1),
    "grouped": lambda a, w: F.conv1d(a.reshape(-1, 6, 2), w.reshape(6, 2, 2), groups=3).flatten(1),
    "transposed": lambda a, w: F.conv_transpose1d(a.reshape(-1, 3, 4), w.reshape(3, 2, 4)).flatten(1),
    "linear": lambda a, w: F.linear(a.reshape(-1, 3, 4), w.reshape(6, 4)).flatten(1),
    "linear, flat": lambda a, w: F.linear(a.reshape(-1, 4), w.reshape(6, 4)),
    "matmul": lambda a, w: a.reshape(-1, 3, 4) @ w.reshape(4, 6),
    "batched": lambda a, w: torch.bmm(a.reshape(-1, 3, 4), w.reshape(1, 4, 6).expand(len(a), 4, 6)).flatten(1),
    "gram": lambda a, w: (a.reshape(-1, 3, 4).transpose(1, 2) @ a.reshape(-1, 3, 4)).flatten(1),
    "outer": lambda a, w: (a.reshape(-1, 3, 4) @ a.reshape(-1, 4, 3)).flatten(1),
    "of one": lambda a, w: a[0].reshape(3, 4) @ w.reshape(4, 6),
    "einsum": lambda a, w: torch.einsum("nij,jk->nik", a.reshape(-1, 3, 4), w.reshape(4, 6)).flatten(1),
    "tensordot": lambda a, w: torch.tensordot(a.reshape(-1, 3, 4), w.reshape(2, 3, 4), ([1, 2], [1, 2])),
}


class Net(nn.Module):
    def __init__(self, flat: str, kernel: str, contraction: str) -> None:
        super().__init__()
        self.made, self.other = nn.Linear(4, 12), nn.Linear(4, 24)
        self.flat, self.matrix = nn.Parameter(torch.randn(24)), nn.Parameter(torch.randn(12, 2))
        self.scale = nn.Parameter(torch.randn(24))
        self.how = flat, kernel, contraction

    def forward(self, x: Tensor) -> Tensor:
        flat, kernel, contraction = self.how
        return CONTRACTIONS[contraction](FLAT[flat](self, x), KERNELS[kernel](self, x))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(FLAT)),
    st.sampled_from(sorted(KERNELS)),
    st.sampled_from(sorted(CONTRACTIONS)),
    st.sampled_from([1, 2]),
    st.sampled_from(["nothing", "rows", "a slice", "half of the kernel", "all but one"]),
    st.integers(0, 2**31),
)
def test_nothing_goes_that_is_read(
    flat: str, kernel: str, contraction: str, samples: int, dead: str, seed: int
) -> None:
    torch.manual_seed(seed)
    net = Net(flat, kernel, contraction).double()
    rows = {"rows": slice(0, 12, 3), "a slice": slice(4, 8), "all but one": slice(1, 12)}.get(dead, slice(0, 0))
    with torch.no_grad():
        net.made.weight[rows] = 0
        net.made.bias[rows] = 0
        if dead == "half of the kernel":
            net.flat[:12] = 0
            net.matrix[:6] = 0
    x = torch.randn(samples, 4, dtype=torch.float64)
    small = fxc.prune(net, x).module
    for count in (samples, 1, 3):
        y = torch.randn(count, 4, dtype=torch.float64)
        try:
            expected = net(y)
        except RuntimeError:  # a batch that the kernel of another size does not take
            continue
        assert difference(small(y), expected) < TOLERANCE


@pytest.mark.parametrize("contraction", ["conv2d", "linear", "of one"])
def test_training_removes_nothing_either(contraction: str) -> None:
    torch.manual_seed(0)
    net, x = Net("layer", "parameter", contraction), torch.randn(2, 4)
    compressed = fxc.compress(net, x).eval()
    before = compressed(x)
    assert not compressed.prune().modified
    assert torch.equal(compressed(x), before)
