"""Reshapes that read channels and pixels in another order: which channel is where depends on the number of pixels.

``h.flatten(2).mT.reshape(h.shape)`` of 4 pixels and 16 channels has 4 of the channels in each row; of 9 it has others.
The sizes of an example may fit into each other as if the new dims were parts of the old ones.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from tests.exactness import TOLERANCE, compared_on, difference
from tests.networks import randomise

C = 16
EXAMPLES = ((2, 2, 2), (1, 2, 2), (4, 4, 4), (2, 2, 8), (2, 1, 1), (16, 2, 4), (3, 3, 5))
OTHERS = (*EXAMPLES, (1, 1, 1), (2, 3, 3), (3, 2, 6), (8, 1, 4), (5, 4, 8))


def pixels(h: Tensor) -> Tensor:
    return h.flatten(2).mT


OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "a picture": lambda h: pixels(h).reshape(h.shape[0], C, h.shape[2], h.shape[3]),
    "all sizes read": lambda h: pixels(h).reshape(h.shape),
    "like another": lambda h: pixels(h).contiguous().view_as(h),
    "reshaped like another": lambda h: pixels(h).reshape_as(h),
    "columns left open": lambda h: pixels(h).reshape(len(h), C, h.shape[2], -1),
    "rows left open": lambda h: pixels(h).reshape(len(h), C, -1, h.shape[3]),
    "channels left open": lambda h: pixels(h).reshape(len(h), -1, h.shape[2], h.shape[3]),
    "pixels left open": lambda h: pixels(h).reshape(len(h), C, -1).mean(2)[..., None, None],
    "channels twice": lambda h: pixels(h).reshape(len(h), 4, 4, *h.shape[2:]).flatten(1, 2),
    "samples and channels": lambda h: h.mean((2, 3)).reshape(C, -1).mT[..., None, None],
    "samples and channels, like another": lambda h: h.mean((2, 3)).reshape(C, len(h)).mT[..., None, None],
    "samples and pixels": lambda h: h.transpose(0, 1).reshape(h.shape),
}


class Net(nn.Module):
    """Channels 1, 2, 6 and 11 are dead at first; what is scrambled is read alone, or beside the channels."""

    def __init__(self, op: Callable[[Tensor], Tensor], *, beside: bool) -> None:
        super().__init__()
        self.op, self.beside = op, beside
        self.first, self.last = nn.Conv2d(3, C, 1), nn.Conv2d(C, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        y: Tensor = self.last(h + self.op(h) if self.beside else self.op(h))
        return y


def sample(shape: tuple[int, int, int]) -> Tensor:
    return torch.randn(shape[0], 3, *shape[1:], dtype=torch.float64)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("example", EXAMPLES)
@pytest.mark.parametrize("name", OPS)
def test_other_sizes(name: str, example: tuple[int, int, int], beside: bool) -> None:  # noqa: FBT001 - a parameter
    torch.manual_seed(0)
    net = randomise(Net(OPS[name], beside=beside).double()).eval()
    with torch.no_grad():
        for tensor in (net.get_parameter("first.weight"), net.get_parameter("first.bias")):
            tensor[[1, 2, 6, 11]] = 0
    for more in (False, True):
        pruned = fxc.prune(net, sample(example), fold=more, narrow=more).module
        assert compared_on(net, pruned, map(sample, OTHERS))


class Unpacked(nn.Module):
    """Takes sizes apart in one go, and lays out in space again what it has made flat."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).flatten(2)
        b, c = h.shape[:2]
        *_, height, width = x.shape
        return self.last(h.reshape((b, c) + (height, width)).tanh())  # type: ignore[no-any-return] # noqa: RUF005


@pytest.mark.parametrize("size", [(3, 5), (8, 8), (2, 4), (8, 1)])
def test_a_number_of_channels_that_is_read_with_others_follows_no_input(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    net = Unpacked().double()
    with torch.no_grad():
        for parameter in net.get_submodule("first").parameters():
            parameter[::3] = 0
    pruned = fxc.prune(net, torch.randn(2, 3, *size, dtype=torch.float64)).module
    assert pruned.get_parameter("first.weight").shape[0] == 5
    for shape in ((1, 3, 8, 4), (3, 3, 1, 8), (8, 3, 5, 5)):
        x = torch.randn(shape, dtype=torch.float64)
        assert difference(pruned(x), net(x)) <= TOLERANCE
