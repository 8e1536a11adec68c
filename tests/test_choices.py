"""Where it does not matter which of several channels stay, no more of them do than must: a second run finds none."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from tests.exactness import TOLERANCE, difference, outputs


class Pieces(nn.Module):
    """Pieces that nobody reads keep a channel each, and one channel lies in several of them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 7, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        pieces = torch.cat([y, y], 1).split(2, 1)  # 01 23 45 60 12 34 56
        return torch.cat([pieces[-1], pieces[0]], 1)


class Groups(nn.Module):
    """Of the groups only number 1 is read, and a layer keeps two; of the piece (3, 2), which is unread, one stays."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up = nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 4, 2, groups=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.conv(x)).flip(1).split(2, 1)[1][:, :1]  # type: ignore[no-any-return]


class Readers(nn.Module):
    """Two layers read channels that are zero: all of them, and the second half."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.upper, self.all = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 2, 1), nn.Conv2d(8, 2, 1)
        with torch.no_grad():
            for parameter in self.conv.parameters():
                parameter.zero_()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.upper(y[:, 4:]) * self.all(y)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("make", "name", "left"), [(Pieces, "conv.weight", 5), (Groups, "up.weight", 2), (Readers, "conv.weight", 1)]
)
def test_one_choice_serves_what_another_chose_before(make: Callable[[], nn.Module], name: str, left: int) -> None:
    net, x = make().double().eval(), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    result = fxc.prune(net, x).module
    assert difference(outputs(net, (x,)), outputs(result, (x,))) <= TOLERANCE
    assert result.get_parameter(name).shape[0] == left
    assert not fxc.prune(result, x).report.modified


class ConstantReaders(nn.Module):
    """An attention reads channels that are constant, and a layer before it the second half of them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.upper = nn.Conv2d(3, 8, 1), nn.Linear(4, 2)
        self.qkv, self.out = nn.Linear(8, 12), nn.Linear(4, 2)
        nn.init.zeros_(self.conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.conv(x).flatten(2).mT
        y = self.upper(tokens[..., 4:])
        q, k, v = (part.unflatten(-1, (2, 2)).transpose(1, 2) for part in self.qkv(tokens).chunk(3, -1))
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        return y * self.out(attended.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def test_a_constant_that_another_choice_kept_is_all_that_stays() -> None:
    net, x = ConstantReaders().double().eval(), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    result = fxc.prune(net, x, fold=True).module
    assert difference(outputs(net, (x,)), outputs(result, (x,))) <= TOLERANCE
    assert result.get_parameter("conv.weight").shape[0] == 1
    assert not fxc.prune(result, x, fold=True).report.folded


class UnreadBranch(nn.Module):
    """A product multiplies channel 1 of a sum by zero, whose other channels are zero in the branch."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.conv, self.branch = nn.Conv2d(3, 2, 1), nn.Conv2d(2, 2, 1)
        self.weight = nn.Parameter(torch.randn(3, 2, 4))  # of experts: (E, C, O)
        self.form = form
        with torch.no_grad():
            for parameter in self.branch.parameters():
                parameter[0] = 0
            self.weight[:, 1] = 0

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y = (y + self.branch(y)).flatten(2).mT
        if self.form == "einsum":
            return torch.einsum("npc,eco->nepo", y, self.weight)
        return y.unsqueeze(1) @ self.weight.mT.mT  # type: ignore[no-any-return]


@pytest.mark.parametrize("form", ["matmul", "einsum"])
def test_a_branch_that_a_product_does_not_read_goes_at_once(form: str) -> None:
    net, x = UnreadBranch(form).double().eval(), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    first = fxc.prune(net, x)
    assert difference(outputs(net, (x,)), outputs(first.module, (x,))) <= TOLERANCE
    assert first.report.branches == ("eval:add",)
    assert not fxc.prune(first.module, x).report.modified


class Cancelled(nn.Module):
    """Two tables add up to zero where a layer reads them: that is no reason to leave one of them out."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.other = nn.Parameter(torch.randn(4, 1, 1)), nn.Parameter(torch.zeros(4, 1, 1))
        self.conv, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
        with torch.no_grad():
            self.other[1] = -self.table[1]

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.conv(x) * (self.table + self.other))  # type: ignore[no-any-return]


def test_what_adds_up_to_zero_stays() -> None:
    net, x = Cancelled().double().eval(), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    result = fxc.prune(net, x)
    assert difference(outputs(net, (x,)), outputs(result.module, (x,))) <= TOLERANCE
    assert result.module.get_parameter("table").shape[0] == 3
