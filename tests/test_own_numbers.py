"""Numbers that a model reads off its modules, where its code stays: which may change, and which hold channels."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.trace.graph.attribute_number import OwnNumber, ranges_tell
from tests.exactness import TOLERANCE, difference, outputs
from tests.nets import lose
from tests.test_own_code import check_loads

X = torch.randn(2, 5, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
OTHER = torch.randn(3, 7, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Use = Callable[["Blocks", Tensor], Tensor]


class Blocks(nn.Module):
    """Four blocks of six channels, all of which are turned around, and something that is done with the result."""

    def __init__(self, use: Use) -> None:
        super().__init__()
        self.use, self.blocks, self.first, self.last = use, 4, nn.Linear(10, 24), nn.Linear(24, 6)
        self.layers = nn.ModuleDict({str(i): nn.Linear(6, 6) for i in range(6)})
        self.parents, self.turn = [self], self.turned

    def turned(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.blocks, -1).flip(-1).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, self.last(self.turned(self.first(x))))


def dead(net: nn.Module, layer: str, channels: list[int]) -> nn.Module:
    """``net`` in float64, where these outputs of a layer are zero."""
    net = net.double()
    with torch.no_grad():
        for parameter in net.get_submodule(layer).parameters():
            parameter[channels] = 0
    return net


def check_same(net: nn.Module, result: nn.Module) -> None:
    """Of the same class, and the same function in both modes, of inputs of other sizes as well."""
    assert type(result) is type(net)
    for inputs in ((X,), (OTHER,)):
        for training in (False, True):
            assert difference(outputs(net, inputs, training=training), outputs(result, inputs, training=training)) <= (
                TOLERANCE
            )
    check_loads(result.eval(), copy.deepcopy(net), (X,))


def ranges(net: Blocks, y: Tensor) -> Tensor:
    for _ in range(net.blocks):
        y = torch.tanh(y)
    return y


def train_only(net: Blocks, y: Tensor) -> Tensor:
    return y * net.first.out_features if net.training else y


def asks_for_the_type(net: Blocks, y: Tensor) -> Tensor:
    assert type(net.blocks) is int
    return y * net.last.in_features


USES: dict[str, Use] = {
    "type": asks_for_the_type,
    "range": ranges,
    "int": lambda net, y: y * int(net.blocks),
    "abs": lambda net, y: y * abs(net.blocks),
    "or": lambda net, y: y * (net.blocks | 1),
    "str": lambda net, y: net.layers[str(net.blocks)](y),
    "format": lambda net, y: net.layers[f"{net.blocks}"](y),
    "value": lambda net, y: y * net.blocks,
    "features": lambda net, y: y * net.last.in_features**-0.5,
    "features, in training": train_only,
}


@pytest.mark.parametrize("name", USES)
def test_a_number_of_which_the_code_makes_something_holds_channels(name: str) -> None:
    torch.manual_seed(0)
    net = dead(Blocks(USES[name]), "first", list(range(6, 12)))
    result = fxc.prune(net, X, keep_code=True)
    small: Any = result.module
    check_same(net, small)
    assert (small.blocks, small.first.out_features) == (4, 24)
    held = [kept.reason for kept in result.report.kept if kept.tensor == "first.weight"]
    assert len(held) == 6
    assert all("the model's code would" in reason for reason in held)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", USES)
def test_and_does_so_in_training(name: str) -> None:
    torch.manual_seed(0)
    model = Blocks(USES[name]).double()
    net = fxc.compress(model, X, keep_code=True)
    for seed in range(3):
        lose(net, seed, 0.5)
        net.prune()
    final: Any = net.finalize()
    assert type(final) is Blocks
    assert difference(outputs(net.finalize(prune=False), (OTHER,)), outputs(final, (OTHER,))) <= TOLERANCE
    check_loads(final, model, (X,))


def same(net: Blocks, y: Tensor) -> Tensor:
    return y


def through_a_list(net: Blocks, y: Tensor) -> Tensor:
    return y.view(y.shape[0], -1, net.parents[0].last.out_features)


def bound(net: Blocks, y: Tensor) -> Tensor:
    return net.last(net.turn(net.first(y @ y.new_ones(6, 10))))  # type: ignore[no-any-return]


@pytest.mark.parametrize("use", [same, through_a_list, bound])
def test_what_holds_a_module_holds_one_of_the_result(use: Use) -> None:
    """A list with a parent, and a method of the module itself, read the attribute that has become another number."""
    torch.manual_seed(0)
    net = dead(Blocks(use), "first", list(range(6, 12)))
    result: Any = fxc.prune(net, X, keep_code=True).module
    check_same(net, result)
    assert (result.blocks, result.first.out_features) == (3, 18)
    assert result.parents[0] is result.turn.__self__ is result


class Sizes(nn.Module):
    """Views of the size that a layer of torch says it has."""

    def __init__(self, size: Callable[["Sizes"], int]) -> None:
        super().__init__()
        self.size, self.first, self.last, self.other = size, nn.Linear(10, 24), nn.Linear(24, 6), nn.Linear(10, 24)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x)).reshape(-1, self.size(self))
        return self.last(h).view(x.shape[0], -1, 6)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("size", "left"), [("first.out_features", 19), ("last.in_features", 19), ("other.out_features", 24)]
)
def test_a_size_that_a_layer_of_torch_says_it_has_follows_that_layer(size: str, left: int) -> None:
    torch.manual_seed(0)
    layer, _, name = size.partition(".")
    net = dead(Sizes(lambda net: getattr(net.get_submodule(layer), name)), "first", [1, 2, 3, 4, 9])
    result: Any = fxc.prune(net, X, keep_code=True).module
    check_same(net, result)
    assert result.first.out_features == left


class Steps(nn.Module):
    """A recurrent network whose first state is made in ``forward``, as people write it."""

    def __init__(self, cell: nn.Module, state: Callable[["Steps", Tensor], Tensor]) -> None:
        super().__init__()
        self.cell, self.state, self.hidden, self.last = cell, state, 12, nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.state(self, x)
        for t in range(3):
            h = self.cell(x[:, t], h)
        return self.last(h)  # type: ignore[no-any-return]


STATES: dict[str, tuple[Callable[[Steps, Tensor], Tensor], int]] = {
    "zeros": (lambda net, x: torch.zeros(x.shape[0], net.hidden, dtype=x.dtype), 9),
    "a tuple": (lambda net, x: torch.zeros((x.shape[0], net.hidden), dtype=x.dtype), 9),
    "new_zeros": (lambda net, x: x.new_zeros(x.size(0), net.hidden), 9),
    "the size of the cell": (lambda net, x: x.new_zeros(x.size(0), int_of(net.cell.hidden_size)), 9),
    "a number": (lambda net, x: x.new_zeros(x.size(0), 12), 12),
    "a value": (lambda net, x: x.new_zeros(x.size(0), net.hidden) + 0 * net.hidden, 12),
}


def int_of(value: object) -> int:
    """For the type checker: what a module has of that name."""
    assert isinstance(value, int)
    return value


@pytest.mark.parametrize("name", STATES)
def test_the_first_state_of_a_cell_follows(name: str) -> None:
    torch.manual_seed(0)
    state, left = STATES[name]
    net = Steps(nn.GRUCell(10, 12), state).double()
    with torch.no_grad():
        for parameter in net.cell.parameters():
            parameter[[25, 26, 30]] = 0  # their candidates
    result: Any = fxc.prune(net, X, keep_code=True).module
    check_same(net, result)
    assert result.cell.hidden_size == left
    assert result.hidden == (12 if name == "the size of the cell" else left)


@torch.fx.wrap
def split(x: Tensor, factor: int) -> Tensor:
    """No function of torch."""
    return x * factor


def test_a_function_that_is_called_like_one_of_torch_takes_no_sizes() -> None:
    torch.manual_seed(0)
    net = dead(Blocks(lambda net, y: split(y, net.blocks)), "first", list(range(6, 12)))
    result: Any = fxc.prune(net, X, keep_code=True).module
    check_same(net, result)
    assert result.blocks == 4


class ByMode(nn.Module):
    """One attribute is the number of blocks of one layer in evaluation, and of another one in training."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = 4
        self.a, self.b, self.c, self.d = nn.Linear(10, 24), nn.Linear(10, 24), nn.Linear(24, 6), nn.Linear(24, 6)

    def turn(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.blocks, -1).flip(-1).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        a, b = (a, self.turn(b)) if self.training else (self.turn(a), b)
        return self.c(a) + self.d(b)  # type: ignore[no-any-return]


def test_an_attribute_changes_to_one_number_for_all_modes() -> None:
    torch.manual_seed(0)
    net = dead(ByMode(), "a", list(range(6, 12)))
    result: Any = fxc.prune(net, X, keep_code=True).module
    check_same(net, result)
    assert (result.blocks, result.a.out_features) == (4, 24)
    both = dead(net, "b", list(range(12, 18)))
    result = fxc.prune(both, X, keep_code=True).module
    check_same(both, result)
    assert (result.blocks, result.a.out_features, result.b.out_features) == (3, 18, 18)


def test_what_nobody_can_see_is_found_before_anything_goes() -> None:
    """Python does not tell a number that it is an index of a list."""
    torch.manual_seed(0)
    model = Blocks(lambda net, y: y * [1, 2, 3, 5, 7][net.blocks]).double()
    net = fxc.compress(model, X, keep_code=True)
    with torch.no_grad():
        net.get_parameter("first.weight_quantizer.bits")[[*range(6, 12), 13, 14]] = 0
        net.get_parameter("first.bias")[[*range(6, 12), 13, 14]] = 0
    net.step()
    net.prune()
    assert net.get_parameter("first.weight").shape[0] == 24
    final: Any = net.finalize()
    assert final.blocks == 4
    assert difference(outputs(net.finalize(prune=False), (OTHER,)), outputs(final, (OTHER,))) <= TOLERANCE
    check_loads(final.eval(), model, (X,))
    result: Any = fxc.prune(dead(model, "first", list(range(6, 12))), X, keep_code=True).module
    check_same(model, result)
    assert (result.blocks, result.first.out_features) == (4, 24)


def test_numbers_tell_what_is_made_of_them() -> None:
    told = set[tuple[str, str]]()
    number = OwnNumber(4, ("", "blocks"), told)
    assert isinstance(range(2), range)
    with ranges_tell():
        assert isinstance(range(2), range)
        assert not told
        assert list(range(number)) == [0, 1, 2, 3]
    assert told
    for make in (int, abs, str, float, round, bool, lambda n: n // 2, lambda n: n in {4, 5}, lambda n: n.bit_length()):
        told.clear()
        make(number)
        assert told == {("", "blocks")}
    layers = OwnNumber(4, ("", "in_features"), told, of_layer=True)
    assert layers + 1 == 5
