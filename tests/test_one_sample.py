"""A batch of one sample: what strides tell of larger ones, they do not tell of it."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.channels.prepare import prepare
from tests.exactness import compared_on, difference

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


class Words(nn.Module):
    """Layers along words (N, T, 6), with another order of 8 channels and words between them."""

    def __init__(self, lay: Lay) -> None:
        super().__init__()
        self.first, self.lay, self.last = nn.Linear(6, 8), lay, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.lay(self.first(x)))  # type: ignore[no-any-return]


MIXED: dict[str, Lay] = {
    "channels first": lambda h: h.reshape(h.shape[0], 8, -1).mean(2),
    "channels first, one sample": lambda h: h.reshape(1, 8, -1).mean(2),
    "channels first, by view": lambda h: h.view(h.shape[0], 8, h.shape[1]).mean(2),
    "channels first, in heads": lambda h: h.reshape(h.shape[0], 2, 4, -1).flatten(1, 2).mean(2),
    "channels first, flat before": lambda h: h.flatten(1).view(h.shape[0], 8, -1).mean(2),
    "channels first, all flat before": lambda h: h.flatten().view(h.shape[0], 8, h.shape[1]).mean(2),
    "channels first, out of one dim": lambda h: h.flatten(1).unflatten(1, (8, -1)).mean(2),
    "channels last": lambda h: h.transpose(1, 2)[0].reshape(-1, 8),
    "channels first, of all by words": lambda h: h.flatten().view(h.shape[1], 8, h.shape[0]).mean(2),
    "words in heads": lambda h: h.flatten(1).view(h.shape[0], 2, h.shape[1], 4).mean(2).flatten(1),
    "turned, words first": lambda h: h.transpose(1, 2).flatten(1).view(h.shape[0], h.shape[1], 8).mean(1),
    "turned, words first, by the rest": lambda h: h.transpose(1, 2).flatten(1).view(h.shape[0], -1, 8).mean(1),
    "channels last, of all": lambda h: h.permute(2, 0, 1).reshape(h.shape[1], -1, 8).mean(0),
}
TURNED: dict[str, Lay] = {
    "turned before": lambda h: h.transpose(1, 2).reshape(h.shape[0], 8, -1).mean(2),
    "words of all samples": lambda h: h.reshape(-1, 8),
    "a dim of one": lambda h: h.mean(1).reshape(h.shape[0], 8, -1).mean(2),
    "a pixel": lambda h: h.mean(1)[:, :, None, None].reshape(h.shape[0], 8, -1).mean(2),
    "one word alone": lambda h: h.unflatten(2, (8, -1)).mean((1, 3)),
    "a pixel that is stated": lambda h: h.reshape(-1, 8, 1, 1).flatten(1),
}
SIZES = ((1, 1), (2, 5), (1, 4), (3, 1), (2, 2))


def dying(lay: Lay) -> Words:
    torch.manual_seed(0)
    net = Words(lay).double().eval()
    with torch.no_grad():
        net.first.weight[:3], net.first.bias[:3] = 0, 0
    return net


@pytest.mark.parametrize(("name", "example"), [
    *itertools.product(MIXED, SIZES[:4]),
    # As many words as another dim has entries, or part of the channels.
    *itertools.product(
        [name for name in MIXED if "one sample" not in name],
        [(2, 2), (8, 2), (4, 2), (2, 4), (4, 4)],
    ),
])  # fmt: skip
def test_channels_that_more_words_mix_stay_after_one_word(name: str, example: tuple[int, int]) -> None:
    net = dying(MIXED[name])
    pruned = fxc.prune(net, torch.randn(*example, 6, dtype=torch.float64)).module
    assert compared_on(net, pruned, [torch.randn(*size, 6, dtype=torch.float64) for size in SIZES])


@pytest.mark.parametrize("name", TURNED)
def test_channels_that_no_word_mixes_go_after_one_word(name: str) -> None:
    net = dying(TURNED[name])
    pruned = fxc.prune(net, torch.randn(1, 1, 6, dtype=torch.float64)).module
    assert pruned.get_parameter("first.weight").shape[0] == 5
    assert compared_on(net, pruned, [torch.randn(*size, 6, dtype=torch.float64) for size in SIZES]) == len(SIZES)
