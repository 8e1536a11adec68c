"""Hooks and parametrizations that somebody hangs on a network after it was compressed."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm
from torch.nn.utils.prune import random_unstructured

import fxcompress as fxc
from fxcompress.errors import UnsupportedModelError
from tests.exactness import difference
from tests.test_compress_pieces import adam, deaden
from tests.test_compress_pieces import plain as pieces
from tests.test_pieces import image

X = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double()
Hook = Callable[..., Any]


def dying() -> fxc.CompressedModule:
    """A network with channels that have just died."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4)
    )
    net = fxc.compress(model.double(), X[:2])
    with torch.no_grad():
        for name in ("0.weight_quantizer.bits", "0.bias", "1.bias"):
            net.get_parameter(name)[2:5] = 0
    return net


class Recorder:
    """Sees what passes; cannot be copied, as whatever writes to a file from a thread."""

    def __init__(self) -> None:
        self.lock, self.means = threading.Lock(), list[float]()

    def see(self, _: nn.Module, __: object, output: Tensor) -> None:
        self.means.append(float(output.detach().cpu().numpy().mean()))


@pytest.mark.parametrize("place", ["", "1", "2", "3", "4"])
def test_hooks_that_only_look_see_tensors_and_stay(place: str) -> None:
    net, recorder = dying(), Recorder()
    optimizer = torch.optim.Adam(net.param_groups())
    net.get_submodule(place).register_forward_hook(recorder.see)
    (net(X).square().mean() + net.size()).backward()
    net.step()
    assert len(recorder.means) == 1
    assert net.prune(optimizer).modified
    recorder.means.clear()
    net.eval()(X)
    assert len(recorder.means) == 1
    final = net.finalize().eval()
    recorder.means.clear()
    assert difference(net(X), final(X)) <= 1e-9
    assert len(recorder.means) == 1  # of the network's run; the result has none
    copy.deepcopy(final)


def test_each_hook_is_asked_once_for_the_module_that_it_hangs_on() -> None:
    net = dying()
    seen: list[nn.Module] = []
    module = net.get_submodule("3")
    module.register_forward_hook(lambda of, _, __: seen.append(of))
    module.register_forward_pre_hook(lambda of, _, __: seen.append(of), with_kwargs=True)
    for _ in range(3):
        net.step()
        net.prune()
    assert seen == [module, module]
    assert module.training


def doubled(_: nn.Module, __: object, output: Tensor) -> Tensor:
    return output * 2


def doubled_in_place(_: nn.Module, __: object, output: Tensor) -> None:
    output.mul_(2)


def the_same(_: nn.Module, __: object, output: Tensor) -> Tensor:
    return output


@pytest.mark.parametrize("hook", [doubled, doubled_in_place])
def test_hooks_that_change_something_are_refused(hook: Hook) -> None:
    net = dying()
    net.step()
    handle = net.get_submodule("3").register_forward_hook(hook)
    optimizer = torch.optim.Adam(net.param_groups())
    for call in (lambda: net.prune(optimizer), net.finalize):
        with pytest.raises(UnsupportedModelError, match=rf"module '3' \(AdaptiveAvgPool2d\).*{hook.__name__}"):
            call()
    handle.remove()
    assert net.prune(optimizer).modified


def test_a_hook_around_the_whole_network_may_change_it_until_it_is_finalized() -> None:
    net = dying()
    net.step()
    net.register_forward_hook(doubled)
    before = net.eval()(X)
    assert net.prune().modified
    assert difference(before, net(X)) <= 1e-9
    with pytest.raises(UnsupportedModelError, match="module '<root>'"):
        net.finalize()


def test_a_hook_may_return_what_it_was_given() -> None:
    net = dying()
    net.step()
    net.get_submodule("3").register_forward_hook(the_same)
    assert net.prune().modified


def test_hooks_on_pieces() -> None:
    net, recorder = pieces(), Recorder()
    deaden(net)
    for piece in net.pieces.values():
        piece.register_forward_hook(recorder.see)
    net.step()
    assert net.prune(adam(net)).modified
    assert recorder.means == []
    final = net.finalize().eval()
    recorder.means.clear()
    assert difference(net.eval()(image(7)), final(image(7))) <= 1e-9
    assert len(recorder.means) == len(net.pieces)
    next(iter(net.pieces.values())).register_forward_hook(doubled)
    with pytest.raises(UnsupportedModelError, match="module '<root>'"):
        net.finalize()


def test_a_network_with_hooks_takes_the_shape_of_a_state_dict() -> None:
    net, fresh, recorder = dying(), dying(), Recorder()
    fresh.get_submodule("3").register_forward_hook(recorder.see)
    net.step()
    net.prune()
    fresh.load_state_dict(net.state_dict())
    assert recorder.means == []
    assert difference(net.eval()(X), fresh.eval()(X)) == 0


@pytest.mark.parametrize(
    "change",
    [parametrizations.spectral_norm, weight_norm, lambda layer: random_unstructured(layer, "weight", 0.5)],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_parameter_that_something_computes_now_is_told(change: Callable[[nn.Module], object]) -> None:
    net = dying()
    change(net.get_submodule("0"))
    with pytest.raises(UnsupportedModelError, match=r"module '0'.*since compress"):
        net.size()


@pytest.mark.parametrize("call", ["size", "step", "prune", "finalize"])
def test_a_layer_that_was_put_in_place_of_another_is_told(call: str) -> None:
    """A head for another task, or an adapter around a layer, that comes too late: no quantizer is in it."""
    net = dying()
    net.add_module("5", nn.Linear(32, 2).double())
    with pytest.raises(
        UnsupportedModelError, match=r"module '5' is not what it was .*the graph calls 5.weight_quantizer"
    ):
        getattr(net, call)()
    final = dying().finalize()
    final.add_module("5", nn.Linear(20, 2).double())
    assert final(X).shape == (8, 2)
