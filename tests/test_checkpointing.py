"""Models that save memory by torch.utils.checkpoint: what is made of them computes the same, and saves it as well."""

import copy
import pickle
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import fxcompress as fxc
from fxcompress.channels.prepare import prepare
from fxcompress.training.compressed import CompressedModule

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def directly(function: Callable[..., Tensor], *args: Tensor) -> Tensor:
    """No checkpoint."""
    return function(*args)


class Blocks(nn.Module):
    """Checkpoints a module and a method in training; with a loop over a size, no symbols can trace it."""

    def __init__(self, kind: str = "not reentrant", *, loop: bool = False, drop: float = 0.5) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        wide = [layer for _ in range(3) for layer in (nn.Linear(16, 16), nn.Tanh())]
        self.block = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), *wide, nn.Linear(16, 8))
        self.head = nn.Linear(8, 2)
        self.run = directly if kind == "none" else partial(checkpoint, use_reentrant=kind == "reentrant")  # held, as HF
        self.loop, self.drop = loop, drop

    def tail(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(x.relu(), self.drop, self.training))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(x.shape[1] // 4 if self.loop else 2):
            x = self.run(self.block, x) if self.training else self.block(x)
        return self.run(self.tail, x) if self.training else self.tail(x)


def saved(net: nn.Module, x: Tensor = X) -> int:
    """How many numbers a forward pass keeps for its gradients."""
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(0 if isinstance(tensor, nn.Parameter) else tensor.numel())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        net(x)
    return sum(sizes)


@pytest.mark.parametrize("kind", ["reentrant", "not reentrant"])
@pytest.mark.parametrize("loop", [True, False])
@pytest.mark.parametrize("drop", [0.5, 0.0])
def test_outputs_gradients_and_what_is_saved_are_those_of_the_model(
    kind: str,
    loop: bool,  # noqa: FBT001
    drop: float,
) -> None:
    torch.manual_seed(0)
    model = Blocks(kind, loop=loop, drop=drop).double().train()
    traced = prepare(model, X).module
    found = []
    for net in (model, traced):
        model.zero_grad()
        torch.manual_seed(1)
        output = net(X)
        output.square().sum().backward()
        found.append([output.detach(), *(p.grad for p in model.parameters())])
    assert all(grad is not None for grad in found[0])
    torch.testing.assert_close(found[1], found[0])
    plain = prepare(Blocks("none", loop=loop, drop=drop).double().train(), X).module
    assert saved(traced) < saved(plain) / 2
    with torch.no_grad():
        torch.testing.assert_close(traced.eval()(X), model.eval()(X))


def shrunk(kind: str) -> CompressedModule:
    """A network that has lost three channels inside of a checkpoint."""
    torch.manual_seed(0)
    net = fxc.compress(Blocks(kind), X.float()).train()
    with torch.no_grad():
        net.get_parameter("block.0.weight_quantizer.bits")[:3] = 0
        net.get_parameter("block.0.bias")[:3] = 0
    net.step()
    assert net.prune().channels == 3
    return net


def test_checkpoints_stay_when_a_network_is_compressed_cut_copied_and_finished() -> None:
    x = X.float()
    with_them, without = shrunk("reentrant"), shrunk("none")
    ways: list[Callable[[CompressedModule], nn.Module]] = [
        lambda net: net,
        copy.deepcopy,
        lambda net: pickle.loads(pickle.dumps(net)),
        lambda net: net.finalize().train(),
    ]
    for make in ways:
        nets = [make(net) for net in (with_them, without)]
        results = []
        for net in nets:
            torch.manual_seed(1)
            net(x).square().sum().backward()
            results.append({n: p.grad for n, p in net.named_parameters() if p.grad is not None})
            net.zero_grad()
        assert results[0].keys() == results[1].keys()
        torch.testing.assert_close(results[0], results[1])
        assert saved(nets[0], x) < saved(nets[1], x) / 2


class Pick(nn.Module):
    """Only its body has a graph."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.body = Blocks(kind)

    def forward(self, x: Tensor) -> Tensor:
        found = self.body(x)
        return found[found.sum(1) >= float(found.min())]  # type: ignore[no-any-return]


def test_checkpoints_stay_in_pieces() -> None:
    torch.manual_seed(0)
    results = [fxc.prune(Pick(kind).double().train(), X).module for kind in ("not reentrant", "none")]
    assert saved(results[0]) < saved(results[1]) / 2
    nets = [fxc.compress(Pick(kind).double(), X).train() for kind in ("not reentrant", "none")]
    assert saved(nets[0]) < saved(nets[1]) / 2


def test_torchs_own_checkpoint_is_back_after_tracing() -> None:
    prepare(Blocks().double(), X)
    output = checkpoint(torch.relu, X.clone().requires_grad_(), use_reentrant=True)
    assert "CheckpointFunction" in type(output.grad_fn).__name__
