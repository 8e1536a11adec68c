"""A batch of one sample: what strides tell of larger ones, they do not tell of it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.channels.prepare import prepare
from tests.exactness import difference

Lay = Callable[[Tensor], Tensor]


class Expanded(nn.Module):
    """A matrix as a batch of one, as some releases of torch run a linear layer that reads part of a tensor."""

    def __init__(self, lay: Lay) -> None:
        super().__init__()
        self.first, self.lay, self.last = nn.Linear(5, 6), lay, nn.Linear(7, 3)
        self.matrix = nn.Parameter(torch.randn(6, 7))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        return self.last(torch.relu(torch.bmm(h, self.lay(self.matrix))))  # type: ignore[no-any-return]


LAYS: dict[str, Lay] = {
    "unsqueeze": lambda w: w.unsqueeze(0),
    "view": lambda w: w.view(1, 6, 7),
}


@pytest.mark.parametrize("lay", LAYS)
def test_a_matrix_that_became_a_batch_is_a_weight(lay: str) -> None:
    model = Expanded(LAYS[lay]).double().eval()
    x = torch.randn(1, 4, 5, dtype=torch.float64)
    assert {site.weight_name for site in prepare(model, x).sites} == {"first.weight", "matrix", "last.weight"}
    with torch.no_grad():
        assert model.first.bias is not None
        model.first.weight[2], model.first.bias[2], model.matrix[:, 3] = 0, 0, 0
    result = fxc.prune(model, x).module
    assert result.get_parameter("matrix").shape == (5, 6)
    assert difference(result(x), model(x)) <= 1e-9


def test_matrices_of_the_samples_are_no_weight() -> None:
    """With one sample as well: those that the network computes are another one for each."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.last = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.bmm(self.left(x), self.right(x).mT))  # type: ignore[no-any-return]

    model, x = Own().double().eval(), torch.randn(1, 4, 5, dtype=torch.float64)
    with torch.no_grad():
        for layer in (model.left, model.right):
            assert layer.bias is not None
            layer.weight[2], layer.bias[2] = 0, 0
    result = fxc.prune(model, x).module
    assert result.get_parameter("left.weight").shape == (5, 5)
    other = torch.randn(3, 4, 5, dtype=torch.float64)
    assert difference(result(other), model(other)) <= 1e-9
