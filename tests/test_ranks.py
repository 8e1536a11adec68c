"""Tensors with another number of dims for inputs of other sizes, as ``squeeze`` makes them: a dim is another then."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.errors import PathError
from tests.exactness import compared_on, difference, outputs
from tests.nets import lose

SHAPES = ((1, 3, 1, 1), (1, 3, 4, 4), (2, 3, 5, 3), (3, 3, 1, 1), (8, 3, 2, 2))


class Squeezed(nn.Module):
    """Reads features that have as many dims as there are sizes other than one."""

    def __init__(self, read: "Callable[[Squeezed, Tensor, Tensor], Tensor]") -> None:
        super().__init__()
        self.first, self.other = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)
        self.hidden, self.last = nn.Linear(8, 6), nn.Linear(6, 3)
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self, self.first(x), self.other(x))


def head(net: Squeezed, h: Tensor) -> Tensor:
    return net.last(net.hidden(h).relu())  # type: ignore[no-any-return]


def pooled(h: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(h, 1)


READS: dict[str, Callable[[Squeezed, Tensor, Tensor], Tensor]] = {
    "layers": lambda net, h, _: head(net, pooled(h).squeeze()),
    "sum of two": lambda net, h, g: head(net, (pooled(h).squeeze() + pooled(g).squeeze()).tanh()),
    "last dim": lambda net, h, _: head(net, pooled(h).squeeze().softmax(-1)),
    "named dims": lambda net, h, _: head(net, pooled(h).squeeze(-1).squeeze(-1)),
    "sum over the first": lambda net, h, _: head(net, pooled(h).squeeze()).sum(0),
    "sum inside": lambda net, h, _: pooled(h).squeeze().sum(0),
    "softmax": lambda net, h, _: pooled(h).squeeze().relu().softmax(0),
    "softmax of layers": lambda net, h, _: head(net, pooled(h).squeeze()).softmax(0),
    "first": lambda net, h, _: net.hidden(pooled(h).squeeze())[0],
    "cat": lambda net, h, g: torch.cat([pooled(h).squeeze(), pooled(g).squeeze()]).norm(),
    "back": lambda net, h, _: pooled(h).squeeze().unsqueeze(0).mean(1),
    "images": lambda net, h, _: h.relu().squeeze().mean(0),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("example", range(len(SHAPES)))
@pytest.mark.parametrize("name", READS)
def test_other_sizes(name: str, example: int) -> None:
    torch.manual_seed(0)
    net = Squeezed(READS[name]).double()
    with torch.no_grad():
        for layer, dead in ((net.first, [0, 2, 5]), (net.other, [0, 5]), (net.hidden, [1, 3])):
            for parameter in layer.parameters():
                parameter[dead] = 0
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
    pruned = fxc.prune(net, inputs[example]).module
    assert compared_on(net, pruned, inputs) == len(inputs)
    compressed = fxc.compress(net, inputs[example])
    lose(compressed, example, 0.5)
    cut = copy.deepcopy(compressed)
    cut.prune()
    for x in inputs:
        try:
            found = outputs(cut, (x,))
        except PathError:
            continue
        assert difference(outputs(compressed, (x,)), found) <= 1e-9


@pytest.mark.parametrize("name", ["layers", "sum of two", "last dim", "named dims"])
def test_channels_go_where_they_are_last(name: str) -> None:
    net = Squeezed(READS[name]).double()
    for parameter in (*net.first.parameters(), *net.other.parameters()):
        parameter.data[1] = 0
    x = torch.randn(SHAPES[1], dtype=torch.float64)
    gone = [] if name == "last dim" else ["first.weight"]
    assert [cut for cut in fxc.prune(net, x).report.removed if cut == "first.weight"] == gone


def test_an_example_that_leaves_a_tensor_empty() -> None:
    """The differences of one entry are none; what is padded back says nothing of where it is from."""

    class Differences(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return self.last(h + F.pad(h.diff(dim=1), (0, 0, 1, 0)))  # type: ignore[no-any-return]

    for length in (1, 4):
        net = fxc.compress(Differences().double(), torch.randn(1, length, 6, dtype=torch.float64))
        lose(net, 0, 0.5)
        cut = copy.deepcopy(net)
        cut.prune()
        for shape in ((1, 1, 6), (2, 5, 6)):
            x = torch.randn(shape, dtype=torch.float64)
            assert difference(outputs(net, (x,)), outputs(cut, (x,))) <= 1e-9
