"""Code that computes with sizes by numpy, and counters that a network computes with."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.errors import TraceError

SCALES: dict[str, Callable[[Tensor], float]] = {
    "channels": lambda h: 1 / np.sqrt(h.shape[-1]),
    "samples": lambda h: np.sqrt(h.shape[0]),
    "logarithm": lambda h: np.log(h.size(0) + 1),
    "power": lambda h: np.power(h.shape[0], 0.5),
    "exponential": lambda h: np.exp(-h.shape[0]),
}


class Scaled(nn.Module):
    def __init__(self, scale: Callable[[Tensor], float]) -> None:
        super().__init__()
        self.made, self.out, self.scale = nn.Linear(4, 6), nn.Linear(6, 3), scale

    def forward(self, x: Tensor) -> Tensor:
        h = self.made(x)
        result: Tensor = self.out(h * self.scale(h))
        return result


@pytest.mark.parametrize("name", SCALES)
def test_a_scale_follows_the_sizes(name: str) -> None:
    """And those that are of channels stay what they were, as channels go."""
    net = Scaled(SCALES[name]).double()
    with torch.no_grad():
        net.made.weight[:2] = 0
        net.made.bias[:2] = 0
    small = fxc.prune(net, torch.randn(2, 4, dtype=torch.float64)).module
    assert small.get_parameter("made.weight").shape[0] == 4
    for count in (2, 5):
        x = torch.randn(count, 4, dtype=torch.float64)
        torch.testing.assert_close(small(x), net(x))


NUMBERS = {
    "double": np.sqrt(2.0),
    "float": np.float32(0.1),
    "half": np.float16(0.1),
    "integer": np.int64(3),
    "byte": np.uint8(3),
}


@pytest.mark.parametrize("by_running", [False, True])
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_the_model_holds(name: str, by_running: bool) -> None:  # noqa: FBT001 - a parameter
    """As an operand, as an argument and by name."""

    class Net(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            if by_running and x.shape[-1] != 4:
                raise ValueError("four")
            h = super().forward(x)
            return torch.add(h, h, alpha=held) + torch.fmod(h, held)

    held = NUMBERS[name]
    net = Net(lambda h: held).double()
    with torch.no_grad():
        net.made.weight[:2] = 0
        net.made.bias[:2] = 0
    small = fxc.prune(net, torch.randn(2, 4, dtype=torch.float64)).module
    assert small.get_parameter("made.weight").shape[0] == 4
    x = torch.randn(5, 4, dtype=torch.float64)
    torch.testing.assert_close(small(x), net(x), rtol=1e-12, atol=1e-12)


class Counting(Scaled):
    steps = 0

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        result: Tensor = self.out(self.made(x) * self.steps)
        return result


def test_a_count_that_is_computed_with_is_named() -> None:
    with pytest.raises(TraceError, match="it sets its attribute steps while it runs, and the next run may read it"):
        fxc.prune(Counting(SCALES["samples"]), torch.randn(2, 4))
