"""What is switched on around a call does not change what it makes: gradients, inference, default device and dtype."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress as fxc
from tests.nets import Pick, ResidualNet, batch

Surroundings = Callable[[], AbstractContextManager[object]]


@contextmanager
def default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SURROUNDINGS: dict[str, Surroundings] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "another default device": lambda: torch.device("meta"),
    "another default dtype": default_dtype,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


class Mixed(nn.Module):
    """Is traced by running: attention, a recurrent layer, grouped convolutions, shapes that Python reads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 8, 1)
        self.grouped = nn.ConvTranspose1d(8, 8, 3, padding=1, groups=4)
        self.rnn = nn.GRU(8, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = F.hardswish(self.grouped(torch.sigmoid(self.conv(x.flatten(2)))))
        if len(h.shape) > 2 and h.shape[-1] > 4:
            h = h[..., : h.shape[-1] // 2]
        h, _ = self.rnn(h.transpose(1, 2))
        h, _ = self.attention(h, h, h, need_weights=False)
        return self.head(h.mean(1))  # type: ignore[no-any-return]


@cache
def whole_life(make: Callable[[], nn.Module], around: Surroundings, path: Path) -> tuple[list[float], list[Tensor]]:
    """Every call of ours is made in the surroundings, training is not; sizes on the way, and what comes out."""
    torch.manual_seed(0)
    model, (x, target) = make().double(), batch(size=8)
    with around():
        net = fxc.compress(model, (x,), bits=2.0)
        if make is not Pick:
            fxc.ChannelGraph.of(model, x)
    optimizer = torch.optim.Adam(net.param_groups())
    sizes = []
    for step in range(16):
        found = net(x)
        (F.cross_entropy(found, target[: len(found)]) + net.size()).backward()
        optimizer.step()
        optimizer.zero_grad()
        with around():
            net.step()
            sizes += [net.size().item(), net.size("macs").item(), net.stored_size(), net.weights_left()]
            if step % 5 == 4:
                net.prune(optimizer)
                net.refresh()
    with around():
        final = net.finalize()
        fxc.save(final, path)
        loaded = fxc.load(path, model, (x,))
        pruned = fxc.prune(model, (x,)).module
    results = [net(x), final(x), loaded(x), pruned(x)]
    for result in results:
        result.sum().backward()
    return sizes, [result.detach() for result in results]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("make", [ResidualNet, Mixed, Pick])
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_surroundings_change_nothing(
    name: str, make: Callable[[], nn.Module], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    sizes, results = whole_life(make, SURROUNDINGS[name], tmp_path / "net.fxc")
    expected_sizes, expected = whole_life(make, nullcontext, tmp_path_factory.getbasetemp() / "plain.fxc")
    assert sizes == expected_sizes
    assert sizes[-1] < 1
    for found, wanted in zip(results, expected, strict=True):
        assert torch.equal(found, wanted)


def test_a_model_and_inputs_that_were_made_for_inference() -> None:
    with torch.inference_mode():
        model, x = ResidualNet(), torch.zeros(2, 3, 10, 10)
    net = fxc.compress(model, x)
    (net(torch.zeros(2, 3, 10, 10)).sum() + net.size()).backward()
    net.finalize()
    assert fxc.prune(model, x).module(torch.zeros(2, 3, 10, 10)).shape == (2, 5)
