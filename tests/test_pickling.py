"""Networks in training, and what comes of them, are pickled and go on: as ``torch.save(net)`` and new processes do."""

import copy
import io
import pickle
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.training.compressed import CompressedModule
from fxcompress.training.in_pieces import CompressedPieces
from tests.nets import Pick


class Twice(torch.autograd.Function):
    """Twice what it is given, with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ANN401
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ANN401
        return gradients[0]


class TwoGraphs(nn.Module):
    """Computes something else in training, and has a backward of its own; one layer has two names.

    Its graph holds whatever torch calls take that is no number: a dtype, a device, a layout, a memory format.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = self.again = nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 4)
        self.note = "kept"

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = Twice.apply(F.relu(self.norm(self.first(x))))
        found = found.contiguous(memory_format=torch.channels_last).to("cpu", torch.float32)
        found = found + torch.zeros(1, dtype=torch.float32, device=found.device, layout=torch.strided)
        if self.training:
            found = found * 2
        return self.head(self.again(found).mean((2, 3)))  # type: ignore[no-any-return]


class Loop(nn.Module):
    """Can only be traced by running it, and its graph holds checks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"for": nn.Linear(3, 8), "a b": nn.Linear(8, 4)})

    def forward(self, x: Tensor) -> Tensor:
        found = torch.stack([self.layers["for"](x[:, :, i].mean(-1)) for i in range(x.shape[2])])
        return self.layers["a b"](found.relu().sum(0))  # type: ignore[no-any-return]


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
MODELS: dict[str, Callable[[], nn.Module]] = {"two graphs": TwoGraphs, "loop": Loop, "pieces": Pick}


def _loaded(net: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
    "torch.save": _loaded,
    "to another process": lambda net: copy.deepcopy(
        pickle.loads(ForkingPickler.dumps(net))
    ),  # as it shares the tensors
}


def compressed(kind: str) -> CompressedModule:
    """A network that has lost a channel, and has another dead one."""
    torch.manual_seed(0)
    net = fxc.compress(MODELS[kind](), X).train()
    for count in (1, 2):
        first = next(name for name, _ in net.named_parameters() if name.endswith("weight_quantizer.bits"))
        with torch.no_grad():
            net.get_parameter(first)[:1] = 0
            net.get_parameter(first.replace("weight_quantizer.bits", "bias"))[:1] = 0
            for name, parameter in net.named_parameters():
                if name == "norm.bias":
                    parameter[:1] = 0
        net.step()
        if count == 1:
            assert net.prune().channels == 1
    return net


def trained(net: CompressedModule) -> tuple[CompressedModule, torch.optim.Optimizer]:
    """Three steps, a removal, and three more."""
    optimizer = torch.optim.Adam(net.param_groups(1e-3))
    for step in range(6):
        loss = net(X).square().mean() + 0.1 * net.size()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        net.step()
        if step == 3:
            net.prune(optimizer)
    return net, optimizer


@pytest.mark.cpu
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", MODELS)
def test_a_copy_goes_on_as_the_network_does(kind: str, how: str) -> None:
    net = compressed(kind)
    twin = COPIES[how](net)
    assert isinstance(twin, CompressedPieces if kind == "pieces" else CompressedModule)
    assert isinstance(twin, fxc.CompressedModule | fxc.CompressedPieces)
    assert [str(node.meta.get("stack_trace")) for part in twin.fxc_parts().values() for node in part.graph.nodes] == [
        str(node.meta.get("stack_trace")) for part in net.fxc_parts().values() for node in part.graph.nodes
    ]
    (net, _), (twin, _) = trained(net), trained(twin)  # type: ignore[arg-type]
    assert {k: tuple(v.shape) for k, v in net.named_parameters()} == {
        k: tuple(v.shape) for k, v in twin.named_parameters()
    }
    for mode in (True, False):
        assert torch.equal(net.train(mode)(X), twin.train(mode)(X))
    final = [one.finalize().eval() for one in (net, twin)]
    assert torch.equal(final[0](X), final[1](X))
    assert [type(m).__name__ for m in final[0].modules()] == [type(m).__name__ for m in final[1].modules()]
    assert getattr(twin, "note", "kept") == "kept"


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
@pytest.mark.parametrize("kind", ["two graphs", "loop"])
def test_a_result_is_pickled_with_both_of_its_graphs(kind: str, how: str) -> None:
    final = compressed(kind).finalize()
    twin = COPIES[how](final)
    for mode in (True, False):
        torch.manual_seed(0)
        expected = final.train(mode)(X)
        assert torch.equal(twin.train(mode)(X), expected)
    assert fxc.prune(twin, X).report.parameters == fxc.prune(final, X).report.parameters
    with pytest.raises(fxc.FxCompressError):
        fxc.prune(twin, X[:, :2])


def test_what_has_no_name_cannot_be_pickled() -> None:
    def local(x: Tensor) -> Tensor:
        return x

    net = compressed("two graphs")
    with net.graph.inserting_after(next(iter(net.graph.nodes))):
        net.graph.call_function(local, (next(iter(net.graph.nodes)),))
    with pytest.raises(pickle.PicklingError, match=r"the graph calls .*local.*save_checkpoint\(\)"):
        pickle.dumps(net)
