"""An op that writes to its argument is analysed as the one that does not, which takes the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.channels.dispatch import _facts
from tests.exactness import TOLERANCE, difference, outputs
from tests.networks import randomise


def in_place() -> list[Any]:
    """All overloads of torch's ops that write to their first argument."""
    packets = [getattr(torch.ops.aten, name) for name in dir(torch.ops.aten) if name.endswith("_")]
    overloads = [
        getattr(packet, name) for packet in packets if hasattr(packet, "overloads") for name in packet.overloads()
    ]
    return [pytest.param(op, id=op.name()) for op in overloads]


def takes(op: Any) -> list[tuple[str, str]]:  # noqa: ANN401 - an op
    return [(argument.name, str(argument.type)) for argument in op._schema.arguments]


@pytest.mark.parametrize("op", in_place())
def test_what_stands_for_it_takes_the_same(op: Any) -> None:  # noqa: ANN401 - an op
    stands_for_it = _facts(op).functional
    assert stands_for_it is None or takes(stands_for_it) == takes(op)


def power(h: Tensor) -> Tensor:
    h **= 2
    return h


POWERS: dict[str, Callable[[Tensor], Tensor]] = {
    "pow_": lambda h: h.pow_(2),
    "pow_tensor": lambda h: h.pow_(torch.full_like(h, 2.0)),
    "square_": lambda h: h.square_(),
    "float_power_": lambda h: h.float_power_(3),
    "operator": power,
}


class Net(nn.Module):
    def __init__(self, op: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.op, self.first, self.last = op, nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.op(self.first(x)))
        return y


@pytest.mark.parametrize("name", POWERS)
def test_powers_in_place(name: str) -> None:
    net, x = randomise(Net(POWERS[name]).double()), torch.randn(4, 3, dtype=torch.float64)
    with torch.no_grad():
        for parameter in net.get_submodule("first").parameters():
            parameter[:2] = 0
    pruned = fxc.prune(net, x).module
    assert pruned.get_parameter("first.weight").shape[0] == 3
    assert difference(outputs(net, (x,)), outputs(pruned, (x,))) <= TOLERANCE


def _of_attribute(name: str, write: Callable[[Any], Any]) -> Callable[[Tensor], Tensor]:
    """Writes to what an attribute of a tensor is, which shares its memory."""

    def op(h: Tensor) -> Tensor:
        attribute = getattr(h, name)
        write(attribute)
        return h

    return op


def added(h: Any) -> None:  # noqa: ANN401 - a tensor, or what stands for it
    h += 1


def scaled(h: Any) -> None:  # noqa: ANN401 - a tensor, or what stands for it
    h *= 3


def masked(write: Callable[[Any], Any]) -> Callable[[Tensor], Tensor]:
    """Writes to flags under another name."""

    def op(h: Tensor) -> Tensor:
        flags = h > 0
        other = flags
        write(other)
        return torch.where(flags, h, h * 2 + 1)

    return op


def both(flags: Any) -> None:  # noqa: ANN401
    flags &= flags.flip(0)


def either(flags: Any) -> None:  # noqa: ANN401
    flags |= flags.flip(0)


def one_of(flags: Any) -> None:  # noqa: ANN401
    flags ^= True


def shifted(h: Tensor) -> Tensor:
    number = (h > 0).long()
    other = number
    other += 1
    other <<= 2
    other >>= 1
    return h + number


def entry(h: Tensor) -> Tensor:
    h.view(-1)[3] = 7.0
    return h


ATTRIBUTES = {f"{name}, {write.__name__}": _of_attribute(name, write)
              for name in ("data", "T", "mT", "real") for write in (added, scaled)}  # fmt: skip
ATTRIBUTES |= {write.__name__: masked(write) for write in (both, either, one_of)}
ATTRIBUTES |= {"shifted": shifted, "entry of the flat tensor": entry}


@pytest.mark.parametrize("name", ATTRIBUTES)
@pytest.mark.parametrize("keep_code", [False, True])
def test_writing_by_another_name_is_seen(name: str, keep_code: bool) -> None:  # noqa: FBT001
    torch.manual_seed(0)
    net = Net(ATTRIBUTES[name]).double()
    with torch.no_grad():
        net.first.weight[::3] = 0
        net.first.bias[::3] = 0
    small = fxc.prune(net, torch.randn(2, 3, dtype=torch.float64), keep_code=keep_code).module
    for count in (2, 5):
        x = torch.randn(count, 3, dtype=torch.float64)
        assert difference(small(x), net(x)) < TOLERANCE


class IntoOut(nn.Module):
    """Writes results into tensors that it names, one of them a buffer."""

    def __init__(self, op: Callable[["IntoOut", Tensor], Tensor]) -> None:
        super().__init__()
        self.op, self.first, self.last = op, nn.Linear(3, 8), nn.Linear(8, 2)
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():  # with gradients, torch refuses to write so
            h = self.first(x)
        return self.last(self.op(self, h))  # type: ignore[no-any-return]


def into_fresh(net: IntoOut, h: Tensor) -> Tensor:
    found = torch.empty_like(h)
    torch.mul(h, 2.0, out=found)
    return found


def into_itself(net: IntoOut, h: Tensor) -> Tensor:
    torch.add(h, h, out=h)
    return h


def into_the_buffer(net: IntoOut, h: Tensor) -> Tensor:
    torch.sum(h, 0, out=net.seen)
    return h + net.seen


def result_of_the_buffer(net: IntoOut, h: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.nn.functional.normalize(net.first.weight.sum(1), dim=0, out=net.seen) * h


@pytest.mark.parametrize("write", [into_fresh, into_itself, into_the_buffer, result_of_the_buffer])
def test_a_result_is_written_into_a_tensor(write: Callable[[IntoOut, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    net = IntoOut(write).double()
    with torch.no_grad():
        net.first.weight[::3] = 0
        net.first.bias[::3] = 0
    pruned = fxc.prune(net, torch.randn(2, 3, dtype=torch.float64)).module
    assert pruned.get_parameter("first.weight").shape[0] == 5
    for count in (2, 5):
        x = torch.randn(count, 3, dtype=torch.float64)
        assert difference(pruned(x), net(x)) < TOLERANCE
        if write in {into_the_buffer, result_of_the_buffer}:
            assert difference(pruned.get_buffer("seen"), net.seen[[1, 2, 4, 5, 7]]) < TOLERANCE
