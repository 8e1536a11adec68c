"""Which sign a zero has, the inputs decide: an op that tells -0.0 from 0.0 makes no constant of a zero."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from tests.exactness import TOLERANCE, difference, outputs
from tests.networks import randomise

C = 4
Op = Callable[..., Tensor]


def pointwise(tensors: int) -> list[Any]:
    """All ops of torch that take that many real tensors, and nothing else, entry by entry, and make one of them."""
    found = []
    for name in (each for each in dir(torch.ops.aten) if not each.endswith("_")):
        packet = getattr(torch.ops.aten, name)
        for overload in getattr(packet, "overloads", list)():
            op = getattr(packet, overload)
            kinds = [str(a.type) for a in op._schema.arguments]
            made = [str(r.type) for r in op._schema.returns]
            if torch.Tag.pointwise in op.tags and kinds == ["Tensor"] * tensors and made == ["Tensor"]:
                found.append(pytest.param(op, id=f"{name}.{overload}"))
    return found


class Net(nn.Module):
    """conv - times the inputs, which gives zeros a sign - the op - conv."""

    def __init__(self, op: Op) -> None:
        super().__init__()
        self.op = op
        self.first, self.last = nn.Conv2d(3, C, 1), nn.Conv2d(C, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        y: Tensor = self.last(self.op(h * x[:, :1], h * x[:, 1:2]))
        return y


def dead(op: Op) -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    net, x = Net(op).double().eval(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    randomise(net)
    with torch.no_grad():
        for parameter in net.first.parameters():
            parameter[:2] = 0
    return net, x


def is_finite(net: nn.Module, x: Tensor) -> bool:
    """Whether there is something to compare: not all ops take floats, nor zeros and negative numbers."""
    try:
        return bool(copy.deepcopy(net)(x).isfinite().any())
    except (RuntimeError, NotImplementedError):
        return False


def check(net: nn.Module, x: Tensor) -> None:
    for fold in (False, True):
        pruned = fxc.prune(net, x, fold=fold).module
        for inputs in (x, -x):
            assert difference(outputs(net, (inputs,)), outputs(pruned, (inputs,))) <= TOLERANCE


OF_COMPLEX: dict[str, Op] = {
    "angle": lambda a, b: torch.complex(a, b).angle(),
    "angle_of_a_product": lambda a, b: (torch.complex(a, a) * torch.complex(b, b + 1)).angle(),
    "log": lambda a, b: torch.log(torch.complex(a, b) + 0).imag,
    "sqrt": lambda a, b: torch.complex(a, b).sqrt().real,
    "phase": lambda a, b: torch.polar(torch.ones_like(a), torch.complex(a, b).angle()).real,
    "one": lambda a, b: torch.copysign(torch.ones_like(a), a) - 1,
    "bits": lambda a, b: a.view(torch.int64).to(a.dtype) * 1e-18,
    "bits there and back": lambda a, b: (a.view(torch.int64) & -2).view(torch.float64),
    "halves of bits": lambda a, b: a.view(torch.int32)[..., 1::2].to(a.dtype) * 1e-9,
    "pairs": lambda a, b: torch.stack([a, b], -1).view(torch.complex128).squeeze(-1).angle(),
    "no other type": lambda a, b: a.view(a.dtype) * b,
    "lengths": lambda a, b: torch.exp(-1 / a.clamp_max(0)),
}


@pytest.mark.parametrize("op", pointwise(1))
def test_ops_of_one_tensor(op: Op) -> None:
    net, x = dead(lambda a, b: op(a).to(a.dtype))
    if is_finite(net, x):
        check(net, x)


@pytest.mark.parametrize("op", pointwise(2))
def test_ops_of_two_tensors(op: Op) -> None:
    net, x = dead(lambda a, b: op(a, b).to(a.dtype))
    if is_finite(net, x):
        check(net, x)


@pytest.mark.parametrize("name", OF_COMPLEX)
def test_phases(name: str) -> None:
    check(*dead(OF_COMPLEX[name]))


def test_a_zero_that_an_op_leaves_zero_still_goes() -> None:
    net, x = dead(lambda a, b: a.sinh() + torch.complex(a, b).abs() + torch.copysign(a, b))
    assert fxc.prune(net, x).module.get_parameter("first.weight").shape[0] == C - 2
