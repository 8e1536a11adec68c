"""Numbers that the graph holds as tensors, where channels that are zero meet them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from tests.exactness import TOLERANCE, difference, outputs

Number = Callable[[Tensor], Tensor]
Use = Callable[[Tensor, Tensor, Tensor], Tensor]
ZERO = torch.tensor(0.0)

ZEROS: dict[str, Number] = {
    "tensor": lambda h: torch.tensor(0.0, dtype=h.dtype),
    "tensor of one": lambda h: torch.tensor([0.0], dtype=h.dtype),
    "zeros": lambda h: torch.zeros((), dtype=h.dtype),
    "zeros of one": lambda h: torch.zeros(1, dtype=h.dtype),
    "full": lambda h: torch.full((1, 1), 0.0, dtype=h.dtype),
    "new_zeros": lambda h: h.new_zeros(()),
    "new_tensor": lambda h: h.new_tensor(0.0),
    "moved": lambda h: torch.zeros(1).to(h),
    "of another type": lambda h: torch.zeros(()),
    "held outside": lambda h: ZERO.to(h.dtype),
}
USES: dict[str, Use] = {
    "where": lambda h, c, n: torch.where(c, h, n),
    "where, the other side": lambda h, c, n: torch.where(c, n, h),
    "maximum": lambda h, c, n: torch.maximum(h, n.to(h.dtype)),
    "add": lambda h, c, n: h + n,
    "subtract": lambda h, c, n: n - h,
    "clamp": lambda h, c, n: h.clamp(min=n.to(h.dtype)),
}


class Net(nn.Module):
    """Two layers with an op between them that meets a number."""

    def __init__(self, number: Number, use: Use) -> None:
        super().__init__()
        self.first, self.last, self.number, self.use = nn.Linear(6, 16), nn.Linear(16, 4), number, use

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        y: Tensor = self.last(self.use(h, x.sum(-1, keepdim=True) < 0.5, self.number(h)))
        return y


def left(net: nn.Module, x: Tensor) -> int:
    """How many channels of the first layer stay, of 16 with 5 that are zero."""
    net = net.double().eval()
    with torch.no_grad():
        for parameter in net.get_submodule("first").parameters():
            parameter[2:7] = 0
    small = fxc.prune(net, (x,)).module
    for other in (x, x[:1], -x):
        for training in (False, True):
            for calls in (1, 2):
                expected = outputs(net, (other,), training=training, calls=calls)
                found = outputs(small, (other,), training=training, calls=calls)
                assert difference(expected, found) <= TOLERANCE
    return len(small.get_parameter("first.weight"))


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("number", ZEROS)
def test_zeros_stay_zeros_beside_a_zero_that_is_a_tensor(number: str, use: str) -> None:
    torch.manual_seed(0)
    assert left(Net(ZEROS[number], USES[use]), torch.randn(3, 5, 6).double()) == 11


OTHERS: dict[str, Number] = {
    "one": lambda h: torch.ones((), dtype=h.dtype),
    "written to": lambda h: h.new_zeros(()).add_(1),
    "written to later": lambda h: _written(torch.tensor(0.0, dtype=h.dtype)),
    "a view is written to": lambda h: _view_written(torch.zeros(1, dtype=h.dtype)),
    "of a size": lambda h: h.new_full((), h.shape[0] - 3),
}


def _written(number: Tensor) -> Tensor:
    number += 2
    return number


def _view_written(number: Tensor) -> Tensor:
    number.view(1, 1).fill_(2.0)
    return number


@pytest.mark.parametrize("number", OTHERS)
def test_numbers_that_are_none_or_change_keep_what_meets_them(number: str) -> None:
    def use(h: Tensor, c: Tensor, n: Tensor) -> Tensor:
        return torch.where(c, h, n)

    torch.manual_seed(0)
    assert left(Net(OTHERS[number], use), torch.randn(3, 5, 6).double()) == 16


class Counts(nn.Module):
    """A number on the module that changes with each call."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 4)
        self.number = torch.zeros(1, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        y: Tensor = self.last(torch.where(x.sum(-1, keepdim=True) < 0.5, h, self.number))
        self.number += 1
        return y


def test_a_number_that_the_next_run_finds_changed() -> None:
    torch.manual_seed(0)
    assert left(Counts(), torch.randn(3, 5, 6).double()) == 16
