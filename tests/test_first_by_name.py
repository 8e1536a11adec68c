"""What a function of torch works on may be given by its name: as much goes as where it is given by its place."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress as fxc
from tests.exactness import TOLERANCE, difference, outputs

D = 16


class Net(nn.Module):
    """A function between two layers, with weights of its own."""

    def __init__(self, between: Callable[["Net", Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.between = nn.Linear(4, D), nn.Linear(D, 3), between
        self.scale, self.shift = nn.Parameter(torch.rand(D)), nn.Parameter(torch.rand(D))
        dead = [1, 3, 9, 11]  # of both heads, groups and halves
        with torch.no_grad():
            for tensor in (self.first.weight, self.first.bias, self.scale, self.shift):
                tensor[dead] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self, self.first(x)))  # type: ignore[no-any-return]


def heads(h: Tensor) -> Tensor:
    return h.unflatten(-1, (2, D // 2)).transpose(1, 2)  # type: ignore[no-any-return]


BETWEEN: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "attention": lambda net, h: (
        F.scaled_dot_product_attention(query=heads(h), key=heads(h), value=heads(h), scale=None)
        .transpose(1, 2)
        .flatten(2)
    ),
    "mean": lambda net, h: h * torch.mean(input=h, dim=-1, keepdim=True),
    "var": lambda net, h: h * torch.var(input=h, dim=-1, keepdim=True),
    "amax": lambda net, h: h * torch.amax(input=h, dim=-1, keepdim=True),
    "layer_norm": lambda net, h: F.layer_norm(input=h, normalized_shape=(D,), weight=net.scale, bias=net.shift),
    "group_norm": lambda net, h: F.group_norm(input=h.mT, num_groups=4, weight=net.scale, bias=net.shift).mT,
    "pad": lambda net, h: F.pad(input=h, pad=(0, D))[..., :D],
    "narrow": lambda net, h: torch.narrow(input=h, dim=-1, start=0, length=D // 2).repeat(1, 1, 2),
    "split": lambda net, h: torch.cat(tensors=torch.split(tensor=h, split_size_or_sections=[4, 12], dim=-1), dim=-1),
    "reshape": lambda net, h: torch.reshape(input=h, shape=(h.shape[0], -1, 2, D // 2)).flatten(2),
    "unflatten": lambda net, h: torch.unflatten(input=h, dim=-1, sizes=(2, D // 2)).flatten(-2),
    "broadcast_to": lambda net, h: h * torch.broadcast_to(input=h[:, :1], size=(h.shape[0], 6, D)),
    "conv1d": lambda net, h: F.conv1d(input=h.mT, weight=net.scale[:, None, None], groups=D).mT,
}


@pytest.mark.parametrize("name", BETWEEN)
def test_channels_go_where_the_first_argument_has_its_name(name: str) -> None:
    net, x = Net(BETWEEN[name]).double().eval(), torch.randn(3, 6, 4, dtype=torch.float64)
    result = fxc.prune(net, x)
    assert [kept.reason for kept in result.report.kept] == []
    assert result.module.get_parameter("first.weight").shape[0] <= D - 4
    assert difference(outputs(net, (x,)), outputs(result.module, (x,))) <= TOLERANCE
