"""A branch of zeros goes where the sum has the shape of what is left for inputs of all sizes, and only there."""

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from tests.exactness import compared_on, difference, outputs
from tests.nets import lose

Shape = tuple[int, ...]
Shapes = Sequence[tuple[Shape, Shape]]
PAIRS: Shapes = (
    ((1, 1, 6), (1, 1, 6)),
    ((2, 5, 6), (2, 5, 6)),
    ((2, 1, 6), (2, 5, 6)),
    ((1, 5, 6), (3, 1, 6)),
    ((3, 5, 6), (3, 1, 6)),
    ((3, 1, 6), (1, 1, 6)),
)


class Two(nn.Module):
    """Joins what it makes of two inputs."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)
        self.join = join

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.last(self.join(self.first(x), self.second(y)))  # type: ignore[no-any-return]


JOINS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": torch.add,
    "sum of a mean": lambda a, b: a + b.mean(1, keepdim=True),
    "mean of a sum": lambda a, b: (a + b).mean(1),
    "difference": lambda a, b: a - b.tanh(),
    "method": lambda a, b: a.add(b * 2),
    "product in a sum": lambda a, b: a + a * b,
    "attention": lambda a, b: a + (a @ b.mT).softmax(-1) @ b,
    "sum of sums": lambda a, b: (a + b) + (a + b).cos() * b,
    "stack": lambda a, b: torch.stack(torch.broadcast_tensors(a, b)).sum(0) + b,
}


def dead(net: nn.Module, name: str) -> nn.Module:
    for parameter in net.get_submodule(name).parameters():
        nn.init.zeros_(parameter)
    return net.double()


def given(shapes: tuple[Shape, Shape]) -> tuple[Tensor, ...]:
    return tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("example", range(len(PAIRS)))
@pytest.mark.parametrize("which", ["first", "second"])
@pytest.mark.parametrize("name", JOINS)
def test_inputs_that_are_broadcast_against_each_other(name: str, which: str, example: int) -> None:
    torch.manual_seed(0)
    net = dead(Two(JOINS[name]), which)
    pruned = fxc.prune(net, given(PAIRS[example])).module
    for shapes in PAIRS:
        inputs = given(shapes)
        for training in (False, True):
            before = outputs(net, inputs, training=training)
            assert difference(before, outputs(pruned, inputs, training=training)) <= 1e-9


@pytest.mark.parametrize("example", range(len(PAIRS)))
def test_in_training(example: int) -> None:
    """Sizes count what prune takes out, and no more."""
    torch.manual_seed(0)
    net = fxc.compress(Two(JOINS["sum"]).double(), given(PAIRS[example]))
    for seed in range(3):
        lose(net, seed, 0.8)
        pruned = copy.deepcopy(net)
        pruned.prune()
        assert pruned.size().item() == pytest.approx(net.size().item())
        for shapes in PAIRS:
            inputs = given(shapes)
            assert difference(outputs(net, inputs), outputs(pruned, inputs)) <= 1e-9


class Positions(nn.Module):
    """A table beside a branch of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.branch, self.last = nn.Parameter(torch.randn(1, 4, 8)), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.table + self.branch(x))  # type: ignore[no-any-return]


class Pooled(nn.Module):
    """A map beside its mean, which has its shape where it has one pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.branch, self.whole, self.last = nn.Conv2d(3, 8, 3, stride=2), nn.Conv2d(3, 8, 1), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.branch(x)
        return self.last(h + self.whole(x.mean((2, 3), keepdim=True)))  # type: ignore[no-any-return]


OTHERS: dict[type[nn.Module], Sequence[Shape]] = {
    Positions: [(1, 4, 6), (2, 4, 6), (3, 4, 6)],
    Pooled: [(1, 3, 3, 3), (1, 3, 4, 4), (2, 3, 9, 9), (2, 3, 8, 11)],
}


@pytest.mark.parametrize(
    ("kind", "example"), [(kind, i) for kind, shapes in OTHERS.items() for i in range(len(shapes))]
)
def test_one_input_of_other_sizes(kind: type[nn.Module], example: int) -> None:
    torch.manual_seed(0)
    net = dead(kind(), "branch")
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in OTHERS[kind]]
    pruned = fxc.prune(net, inputs[example]).module
    assert compared_on(net, pruned, inputs) == len(inputs)


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (2, 3, 7, 9), (1, 3, 1, 1)])
def test_a_branch_of_the_same_shape_goes(shape: Shape) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.branch, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 2, 1)
            self.shift = nn.Parameter(torch.zeros(8, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.last(x + self.branch(x).tanh() + self.shift)  # type: ignore[no-any-return]

    net, x = dead(Residual(), "branch"), torch.randn(shape, dtype=torch.float64)
    result = fxc.prune(net, x)
    assert len(result.report.branches) == 2
    assert difference(outputs(net, (x,)), outputs(result.module, (x,))) <= 1e-9
