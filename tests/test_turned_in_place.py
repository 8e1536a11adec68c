"""Ops that make a tensor another view of its own memory: ``transpose_``, ``unsqueeze_``, and ``stft`` in torch."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from tests.exactness import difference

WIDTH, DEAD = 8, [1, 4, 6]


def written_later(h: Tensor) -> Tensor:
    h = h.clone()
    h.transpose_(1, 3)
    h[:, 1:].mul_(2)
    return h.transpose(1, 3)


def beside_a_view(h: Tensor) -> Tensor:
    """Another tensor with the same memory keeps its shape, and sees what is written."""
    h = h.clone()
    other = h.view(h.shape)
    h.transpose_(1, 2)
    h.mul_(1.5)
    return other + h.transpose(1, 2).flip(3)


def strided(h: Tensor) -> Tensor:
    """Every other row."""
    h = h.contiguous().clone()
    n, c, height, width = h.shape
    return h.as_strided_((n, c, height // 2, width), (c * height * width, height * width, 2 * width, 1))


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "transpose_": lambda h: h.clone().transpose_(1, 2).transpose(1, 2),
    "swapaxes_": lambda h: h.clone().swapaxes_(0, 1).flip(1).transpose(0, 1),
    "swapdims_": lambda h: h.clone().swapdims_(1, -1).movedim(-1, 1),
    "t_": lambda h: h[0, :, 0].clone().t_().t()[None, :, None],
    "unsqueeze_": lambda h: h.clone().unsqueeze_(1).sum(1),
    "squeeze_": lambda h: h.unsqueeze(1).clone().squeeze_(1).flip(1),
    "a size of it": lambda h: h.clone().unsqueeze_(0)[0] * h.clone().unsqueeze_(0).shape[1],
    "the result is dropped": lambda h: (h := h.clone(), h.transpose_(2, 3))[0].flip(1),
    "written later": written_later,
    "beside a view": beside_a_view,
    "as_strided_": strided,
}


class Net(nn.Module):
    def __init__(self, way: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, WIDTH, 1), nn.Conv2d(WIDTH, 2, 1)
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.way(torch.tanh(self.first(x))))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", WAYS)
def test_dead_channels_go(name: str) -> None:
    torch.manual_seed(0)
    net, x = Net(WAYS[name]).double().eval(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        for parameter in net.first.parameters():
            parameter[DEAD] = 0
    module = fxc.prune(net, x).module
    assert difference(net(x), module(x)) <= 1e-9
    if name != "as_strided_":  # whose sizes are those of the memory
        assert module.get_parameter("first.weight").shape[0] == WIDTH - len(DEAD)
        other = torch.randn(3, 3, 8, 8, dtype=torch.float64)
        assert difference(net(other), module(other)) <= 1e-9


class Speech(nn.Module):
    """A spectrogram inside of the network."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(9, WIDTH), nn.Linear(WIDTH, 3)
        self.register_buffer("window", torch.hann_window(16))

    def forward(self, wave: Tensor) -> Tensor:
        found = torch.stft(wave, 16, 8, window=self.get_buffer("window"), return_complex=True).abs()
        return self.last(torch.relu(self.first(found.transpose(1, 2))))  # type: ignore[no-any-return]


def test_a_spectrogram() -> None:
    torch.manual_seed(0)
    net, x = Speech().double().eval(), torch.randn(2, 128, dtype=torch.float64)
    with torch.no_grad():
        for parameter in net.first.parameters():
            parameter[DEAD] = 0
    module = fxc.prune(net, x).module
    assert module.get_parameter("first.weight").shape[0] == WIDTH - len(DEAD)
    longer = torch.randn(3, 200, dtype=torch.float64)
    assert difference(net(longer), module(longer)) <= 1e-9
