"""Models that save memory by torch.utils.checkpoint: both ways to trace take the code inside as it is, and say so."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxcompress as fxc
from fxcompress.channels.prepare import prepare

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Blocks(nn.Module):
    """Checkpoints a module and a method in training; with a loop over a size, no symbols can trace it."""

    def __init__(self, *, reentrant: bool, loop: bool) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 2)
        self.run = partial(checkpoint, use_reentrant=reentrant)  # as Hugging Face holds it
        self.loop = loop

    def tail(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(x.relu(), 0.5, self.training))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(x.shape[1] // 4 if self.loop else 2):
            x = self.run(self.block, x) if self.training else self.block(x)
        return self.run(self.tail, x) if self.training else self.tail(x)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("loop", [True, False])
def test_outputs_and_gradients_are_those_of_the_model(
    reentrant: bool,  # noqa: FBT001
    loop: bool,  # noqa: FBT001
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.manual_seed(0)
    model = Blocks(reentrant=reentrant, loop=loop).double().train()
    traced = prepare(model, X).module
    assert caplog.text.count("saves memory by torch.utils.checkpoint at ") == 1
    assert "test_checkpointing.py:" in caplog.text
    found = []
    for net in (model, traced):
        net.zero_grad()
        torch.manual_seed(1)
        output = net(X)
        output.square().sum().backward()
        found.append([output.detach(), *(p.grad for p in model.parameters())])
    assert all(grad is not None for grad in found[0])
    torch.testing.assert_close(found[1], found[0])


def test_a_model_without_checkpoints_is_traced_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    prepare(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)).double(), X)
    assert not caplog.text
    output = checkpoint(torch.relu, X.clone().requires_grad_(), use_reentrant=True)
    assert "CheckpointFunction" in type(output.grad_fn).__name__  # torch's own is back


def test_a_network_with_checkpoints_is_compressed_and_cut() -> None:
    torch.manual_seed(0)
    net = fxc.compress(Blocks(reentrant=True, loop=False), X.float()).train()
    with torch.no_grad():
        net.get_parameter("block.0.weight_quantizer.bits")[:3] = 0
        net.get_parameter("block.0.bias")[:3] = 0
    net.step()
    assert net.prune().channels == 3
    net(X.float()).sum().backward()
    assert all(p.grad is not None for name, p in net.named_parameters() if name.endswith("weight"))
