"""Numbers in the graph that name channels: after a cut they name the same ones, or the cut is refused."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress as fxc
from tests.exactness import difference, outputs


class Net(nn.Module):
    """A convolution (3 -> 8), read once as a whole and once through ``pick(h, x)``."""

    def __init__(self, pick: Callable[[Tensor, Tensor], Tensor], dead: tuple[int, ...] = (1,)) -> None:
        super().__init__()
        self.pick = pick
        self.conv, self.whole = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)
        with torch.no_grad():
            self.conv.weight[list(dead)] = 0
            self.conv.bias[list(dead)] = 0  # type: ignore[index]
        picked = pick(torch.zeros(2, 8, 6, 6), torch.zeros(2, 3, 6, 6))
        self.part = nn.Conv2d(picked.shape[1], 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        result: Tensor = self.whole(h) + self.part(self.pick(h, x[:, :, 1:-1, 1:-1]))
        return result


def left(pick: Callable[[Tensor, Tensor], Tensor], dead: tuple[int, ...] = (1,)) -> int:
    """How many channels are left; the output must be the same."""
    net, x = Net(pick, dead).double(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    pruned = fxc.prune(net, x).module
    assert difference(outputs(net, (x,)), outputs(pruned, (x,))) <= 1e-12
    return int(pruned.get_parameter("conv.weight").shape[0])


def rolled_pixels(h: Tensor, x: Tensor) -> Tensor:
    """A roll by two pixels, written as a number of entries: 16 of 8 channels."""
    flat = h.permute(0, 2, 3, 1).flatten(1)
    return flat.roll(16, 1).view(h.shape[0], 6, 6, -1).permute(0, 3, 1, 2)


def later_pixel(h: Tensor, x: Tensor) -> Tensor:
    """The first channel of the third pixel, by its number among all entries: only its label is that of others too."""
    return h.permute(0, 2, 3, 1).flatten(1)[:, 16:18].view(-1, 2, 1, 1)


FOLLOWED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a number": lambda h, x: h[:, 3].unsqueeze(1),
    "a negative number": lambda h, x: h[:, -2].unsqueeze(1),
    "select": lambda h, x: h.select(1, 3).unsqueeze(1),
    "a slice of one": lambda h, x: h[:, 3:4],
    "a slice": lambda h, x: h[:, 2:6],
    "narrow": lambda h, x: h.narrow(1, 3, 2),
    "a list": lambda h, x: h[:, [5, 2, 2]],
    "a tuple of dims": lambda h, x: h[..., 2:5, :, :],
    "a new axis": lambda h, x: h[:, None, 2:5].squeeze(1),
    "chunk": lambda h, x: h.chunk(3, 1)[2],
    "split": lambda h, x: torch.split(h, [3, 5], 1)[1],
    "inputs behind it": lambda h, x: torch.cat([h, x], 1)[:, 8:10],
    "inputs behind it, listed": lambda h, x: torch.cat([h, x], 1)[:, [10, 8]],
    "padding behind it": lambda h, x: F.pad(F.pad(h, (0, 0, 0, 0, 0, 2), value=1.0), (0, 0, 0, 0, 0, 2))[:, 8:11],
    "roll": lambda h, x: h.roll(2, 1),
    "steps": lambda h, x: h[:, ::2],
}
REFUSED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a tensor of numbers": lambda h, x: h[:, torch.tensor([3, 2])],
    "roll over inputs": lambda h, x: torch.cat([x, h], 1).roll(8, 1),
    "pixels rolled": rolled_pixels,
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_followed(name: str) -> None:
    assert left(FOLLOWED[name]) == 7


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    assert left(REFUSED[name], (1, 5)) == 8


def test_the_entries_of_one_label_are_told_apart() -> None:
    assert left(later_pixel, (1, 2, 3)) in {5, 8}


def test_a_slice_that_takes_all_that_is_left() -> None:
    assert left(lambda h, x: h[:, :6], (6, 7)) == 6


@pytest.mark.parametrize("groups", [2, 4, 8])
def test_a_grouped_convolution_keeps_two_groups(groups: int) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, groups=groups), nn.Conv2d(8, 2, 1)).double()
    for parameter in net[:2].parameters():
        nn.init.zeros_(parameter)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    result = fxc.prune(net, x)
    assert result.module.get_submodule("1").groups == 2
    assert difference(outputs(net, (x,)), outputs(result.module, (x,))) <= 1e-12
    assert any("keeps at least two groups" in kept.reason for kept in result.report.kept)
    assert not fxc.prune(result.module, x).report.modified


def test_one_channel_of_a_layer_stays() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1)).double()
    for parameter in net[0].parameters():
        nn.init.zeros_(parameter)
    result = fxc.prune(net, torch.zeros(2, 3, 4, 4, dtype=torch.float64))
    assert result.module.get_parameter("0.weight").shape[0] == 1
    assert [str(kept) for kept in result.report.kept][:1] == [
        "0.weight[0] stays: a layer keeps at least one channel (Conv2d 2)"
    ]
