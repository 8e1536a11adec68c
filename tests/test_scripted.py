"""Models that call functions which torch.jit has compiled."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.errors import TraceError
from tests.exactness import difference

X = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def swish(x: Tensor, power: int = 1) -> Tensor:
    for _ in range(power):
        x = x * torch.sigmoid(x)
    return x


def halves(x: Tensor) -> Tensor:
    return x[: x.shape[0] // 2] if x.shape[0] > 2 else x


def compiled(function: Callable[..., Tensor], *example: Tensor) -> Callable[..., Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(function, example) if example else torch.jit.script(function)  # type: ignore[no-any-return]


FUNCTIONS = {
    "script": compiled(swish), "trace": compiled(swish, torch.ones(2)), "branch": compiled(halves, torch.ones(2, 8))
}  # fmt: skip
"""Not on the model, as torch cannot copy them."""


class Net(nn.Module):
    def __init__(self, name: str, *, looped: bool) -> None:
        super().__init__()
        self.name, self.looped = name, looped
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(x.shape[1] // 6) if self.looped else (0,):
            x = FUNCTIONS[self.name](self.first(x))
        return self.second(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("looped", [False, True])
@pytest.mark.parametrize("name", ["script", "trace"])
def test_compiled_functions_are_traced_in_their_code(name: str, looped: bool) -> None:  # noqa: FBT001
    torch.manual_seed(0)
    model = Net(name, looped=looped).double().eval()
    with torch.no_grad():
        model.first.weight[:3], model.first.bias[:3] = 0, 0
    result = fxc.prune(model, X).module
    assert result.get_parameter("first.weight").shape == (5, 6)
    assert difference(result(X), model(X)) < 1e-12
    net = fxc.compress(model.float(), X.float())
    net(X.float()).sum().backward()
    assert difference(net.finalize()(X.float()), net(X.float())) < 1e-5


def test_what_a_compiled_function_does_counts() -> None:
    """torch.jit.trace keeps the branch that its example has taken."""
    model = Net("branch", looped=True).double()
    assert len(model(X)) == len(X)
    with pytest.raises(TraceError, match=r"is compiled by torch\.jit, and computes something else"):
        fxc.prune(model, X)
