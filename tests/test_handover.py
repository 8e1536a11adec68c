"""A removal may come at any point of a step, and takes what hangs on parameters along."""

import gc
import weakref
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

import fxcompress as fxc
from fxcompress.errors import OptimizerError
from fxcompress.training.handover import hand_over
from tests.nets import Pick, ResidualNet, batch, kill, set_bits
from tests.replacements import slice_parameter

Prune = Callable[[], object]
CONV = "block1.conv1.weight"


def dying() -> tuple[fxc.CompressedModule, Optimizer]:
    """A network that has made a step, channels of which have died since."""
    torch.manual_seed(0)
    net = fxc.compress(ResidualNet().double(), torch.zeros(2, 3, 10, 10, dtype=torch.float64))
    optimizer = Adam(net.param_groups())
    loss_of(net).backward()
    optimizer.step()
    kill(net)
    return net, optimizer


def loss_of(net: fxc.CompressedModule, seed: int = 0) -> Tensor:
    x, target = batch(seed=seed, size=8)
    return F.cross_entropy(net(x.double()), target) + 0.1 * net.size()


def after(loss: Tensor, prune: Prune, net: fxc.CompressedModule) -> None:
    loss.backward()
    prune()


def before(loss: Tensor, prune: Prune, net: fxc.CompressedModule) -> None:
    prune()
    loss.backward()


def amid(loss: Tensor, prune: Prune, net: fxc.CompressedModule) -> None:
    """When some parameters have their gradients, and others do not."""
    handle = net.get_parameter("block1.conv1.weight").register_hook(lambda _: [prune(), None][1])
    loss.backward()
    handle.remove()


Order = Callable[[Tensor, Prune, fxc.CompressedModule], None]


@pytest.mark.parametrize("waiting", [False, True])
@pytest.mark.parametrize(("order", "expected"), [(before, after), (amid, after)])
def test_gradients_do_not_depend_on_when_channels_go(order: Order, expected: Order, *, waiting: bool) -> None:
    """Neither do those that a first part of the step has left, where gradients are accumulated."""
    nets = []
    for each in (order, expected):
        net, optimizer = dying()
        optimizer.zero_grad()
        if waiting:
            loss_of(net, seed=1).backward()
        each(loss_of(net), partial(net.prune, optimizer), net)
        nets.append(net)
    left = [dict(net.named_parameters()) for net in nets]
    assert left[0].keys() == left[1].keys()
    for name, parameter in left[0].items():
        grad, wanted = parameter.grad, left[1][name].grad
        assert grad is not None, name
        assert wanted is not None, name
        torch.testing.assert_close(grad, wanted, rtol=1e-9, atol=1e-12, msg=name)


def test_what_is_gone_takes_no_gradient() -> None:
    net, optimizer = dying()
    optimizer.zero_grad()
    gone, cut = net.get_parameter("block2.conv2.weight"), net.get_parameter(CONV)
    before(loss_of(net), partial(net.prune, optimizer), net)
    assert net.get_parameter(CONV) is not cut
    assert [gone.grad, cut.grad] == [None, None]


def test_hooks_and_attributes_stay_with_a_parameter() -> None:
    net, optimizer = dying()
    optimizer.zero_grad()
    seen: list[int | Tensor] = []
    weight = net.get_parameter(CONV)
    weight.no_decay = True  # type: ignore[attr-defined]
    handles = [
        weight.register_hook(lambda grad: seen.append(grad.shape[0])),
        weight.register_post_accumulate_grad_hook(seen.append),
    ]
    before(loss_of(net), partial(net.prune, optimizer), net)
    small = net.get_parameter(CONV)
    assert seen == [8, small]
    assert small.no_decay  # type: ignore[attr-defined]
    seen.clear()
    loss_of(net).backward()
    assert seen == [6, small]
    seen.clear()
    for handle in handles:
        handle.remove()
    loss_of(net).backward()
    assert seen == []


def test_an_optimizer_in_the_backward_pass_goes_on() -> None:
    """One for each parameter, that steps as soon as the gradient is there."""
    moved = []
    for order in (before, after):
        net, _ = dying()
        optimizers = {name: torch.optim.SGD([p], lr=0.1, momentum=0.9) for name, p in net.named_parameters()}

        def step(parameter: Tensor, of: dict[str, torch.optim.SGD] = optimizers) -> None:
            for optimizer in of.values():
                if any(parameter is held for held in optimizer.param_groups[0]["params"]):
                    optimizer.step()
                    optimizer.zero_grad()

        for parameter in net.parameters():
            parameter.grad = None
            parameter.register_post_accumulate_grad_hook(step)
        order(loss_of(net), partial(net.prune, list(optimizers.values())), net)
        net.step()
        loss_of(net).backward()
        net.step()
        moved.append({name: p.detach() for name, p in net.named_parameters()})
    for name, value in moved[0].items():
        torch.testing.assert_close(value, moved[1][name], rtol=1e-9, atol=1e-9, msg=name)


def test_a_network_in_pieces() -> None:
    x, target = batch(size=8)
    net = fxc.compress(Pick().double(), (x,))
    optimizer = Adam(net.param_groups())
    set_bits(net, "body.0.weight", [2])
    nn.init.zeros_(net.get_parameter("body.0.bias"))
    net.step()
    found = net(x)
    assert net.prune(optimizer).modified
    F.cross_entropy(found, target[: len(found)]).backward()
    assert all(p.grad is not None for name, p in net.named_parameters() if name.endswith("weight"))


def test_a_parameter_that_is_cut_twice_hands_on_twice() -> None:
    first = nn.Parameter(torch.arange(8.0).reshape(4, 2))
    loss = first.square().sum()
    second = slice_parameter(first, {0: torch.tensor([0, 2, 3])})
    hand_over([second], wrapped=False)
    assert second.new is not None
    third = slice_parameter(second.new, {0: torch.tensor([1, 2]), 1: torch.tensor([1])})
    hand_over([third], wrapped=False)
    loss.backward()
    assert third.new is not None
    assert torch.equal(torch.as_tensor(third.new.grad), torch.tensor([[10.0], [14.0]]))
    assert [first.grad, second.new.grad] == [None, None]


def test_under_a_wrapper_a_late_gradient_is_an_error() -> None:
    """It would be averaged over processes by buckets that are no more."""
    parameter = nn.Parameter(torch.ones(4))
    loss = parameter.sum()
    hand_over([slice_parameter(parameter, {0: torch.tensor([1])})], wrapped=True)
    with pytest.raises(OptimizerError, match=r"shape \(4,\) as it was before prune.*call prune\(\) after backward"):
        loss.backward()


@pytest.mark.parametrize("waiting", [False, True])
def test_what_was_cut_is_freed(*, waiting: bool) -> None:
    """Parameters, gradients and the optimizer's state, once no backward pass is to come to them."""
    net, optimizer = dying()
    held = [p for p in net.parameters() if p.ndim > 1]
    old = [weakref.ref(p) for p in held] + [weakref.ref(optimizer.state[p]["exp_avg"]) for p in held]
    loss = loss_of(net) if waiting else None
    assert net.prune(optimizer).modified
    del held, loss
    kept = {id(p) for p in net.parameters()} | {id(optimizer.state[p]["exp_avg"]) for p in net.parameters()}
    gc.collect()
    assert len([ref for ref in old if id(ref()) in kept]) < len(old)
    assert [ref for ref in old if ref() is not None and id(ref()) not in kept] == []
