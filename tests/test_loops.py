"""What else a loop does: loss scaling, clipping, half precision, distillation, each with a removal in the middle.

Gradient accumulation is in test_training.py, moving averages are in test_averages.py.
"""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

import fxcompress as fxc
from fxcompress.errors import OptimizerError
from tests.nets import ResidualNet, batch, kill, set_bits

Step = Callable[[fxc.CompressedModule, Optimizer, int], None]
DIES, GOES, STEPS = 1, 3, 7


def compressed(dtype: torch.dtype = torch.float64) -> fxc.CompressedModule:
    torch.manual_seed(0)
    return fxc.compress(ResidualNet().to(dtype), torch.zeros(2, 3, 10, 10, dtype=dtype))


def task(net: nn.Module, number: int) -> Tensor:
    x, target = batch(seed=number, size=8)
    return F.cross_entropy(net(x.to(next(net.parameters()).dtype)), target)


def run(net: fxc.CompressedModule, step: Step, *, remove: bool) -> None:
    """Channels die after one step; if they are removed, it is two steps later."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for number in range(STEPS):
        optimizer.zero_grad()
        step(net, optimizer, number)
        net.step()
        if number == DIES:
            kill(net)
        if remove and number == GOES:
            assert net.prune(optimizer).branches
    if not remove:
        assert net.prune(optimizer).branches


def parameters_near(one: nn.Module, other: nn.Module, tolerance: float) -> None:
    pairs = dict(one.named_parameters()), dict(other.named_parameters())
    assert pairs[0].keys() == pairs[1].keys()
    for name, value in pairs[0].items():
        torch.testing.assert_close(value, pairs[1][name], rtol=tolerance, atol=tolerance, msg=name)


def both(step: Callable[[], Step], dtype: torch.dtype = torch.float64) -> list[fxc.CompressedModule]:
    """The network after a run with a removal in the middle, and after one with it at the end."""
    nets = [compressed(dtype) for _ in range(2)]
    for net, remove in zip(nets, (True, False), strict=True):
        run(net, step(), remove=remove)
    return nets


SCALES = [1024.0, 1024.0, 2048.0, 2048.0, 1024.0, 1024.0, 1024.0]
"""It grows after three steps that are made, and shrinks where one is skipped: the one right after the removal."""


def scaled() -> Step:
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALES[0], growth_interval=3)

    def step(net: fxc.CompressedModule, optimizer: Optimizer, number: int) -> None:
        loss = task(net, number)
        scaler.scale(loss * torch.inf if number == GOES + 1 else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == SCALES[number]

    return step


def clipped() -> Step:
    def step(net: fxc.CompressedModule, optimizer: Optimizer, number: int) -> None:
        task(net, number).backward()
        nn.utils.clip_grad_value_(net.parameters(), 0.01)
        optimizer.step()

    return step


def distilled() -> Step:
    torch.manual_seed(0)
    teacher = ResidualNet().double().eval()
    before = copy.deepcopy(teacher.state_dict())

    def step(net: fxc.CompressedModule, optimizer: Optimizer, number: int) -> None:
        x, target = batch(seed=number, size=8)
        with torch.no_grad():
            wanted = (teacher(x) / 2).softmax(1)
        output = net(x)
        soft = F.kl_div((output / 2).log_softmax(1), wanted, reduction="batchmean")
        (F.cross_entropy(output, target) + 4 * soft + 0.01 * net.size()).backward()
        optimizer.step()
        assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())

    return step


def penalised() -> Step:
    def step(net: fxc.CompressedModule, optimizer: Optimizer, number: int) -> None:
        squares = sum(p.square().sum() for p in net.parameters() if p.ndim > 1)
        (task(net, number) + 1e-2 * squares).backward()
        optimizer.step()

    return step


def operated() -> Step:
    """Gradient surgery: an entry moves where two tasks agree."""

    def step(net: fxc.CompressedModule, optimizer: Optimizer, number: int) -> None:
        x, target = batch(seed=number, size=8)
        output = net(x)
        trained = [p for p in net.parameters() if p.requires_grad]
        first, second = (
            torch.autograd.grad(loss, trained, retain_graph=True, materialize_grads=True)
            for loss in (F.cross_entropy(output, target), -output.square().mean())
        )
        for parameter, one, two in zip(trained, first, second, strict=True):
            parameter.grad = torch.where(one * two > 0, one + two, 0.0)
        optimizer.step()

    return step


def thawed() -> Step:
    """The stem is frozen while channels die and go, and trained after that."""

    def step(net: fxc.CompressedModule, optimizer: Optimizer, number: int) -> None:
        for name, parameter in net.named_parameters():
            parameter.requires_grad_(number > GOES + 1 or not name.startswith("stem"))
        task(net, number).backward()
        optimizer.step()

    return step


def against_a_critic() -> Step:
    """Two networks in turn, as in a GAN, with a penalty on the gradient of inputs."""
    torch.manual_seed(1)
    critic = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    own = torch.optim.Adam(critic.parameters(), lr=0.01)

    def step(net: fxc.CompressedModule, optimizer: Optimizer, number: int) -> None:
        x = batch(seed=number, size=8)[0].requires_grad_()
        (critic(net(x).detach()).mean() - critic(torch.ones(8, 5, dtype=x.dtype)).mean()).backward()
        own.step()
        own.zero_grad()
        critic.requires_grad_(False)
        optimizer.zero_grad()
        output = net(x)
        (slope,) = torch.autograd.grad(output.sum(), x, create_graph=True)
        (-critic(output).mean() + slope.square().mean()).backward()
        optimizer.step()
        critic.requires_grad_(True)

    return step


def after_a_target() -> Step:
    """A target network that takes the state of the trained one every other step, as in Q-learning."""
    target = compressed().eval()

    def step(net: fxc.CompressedModule, optimizer: Optimizer, number: int) -> None:
        if number % 2 == 0:
            target.load_state_dict(net.state_dict())
        x, _ = batch(seed=number, size=8)
        with torch.no_grad():
            wanted = 0.9 * target(x.flip(0))
        F.smooth_l1_loss(net(x), wanted).backward()
        optimizer.step()

    return step


def restored() -> Step:
    """A few steps are taken back, as by early stopping, and channels die in them."""

    def step(net: fxc.CompressedModule, optimizer: Optimizer, number: int) -> None:
        if number in {GOES - 1, GOES + 1}:
            state, moments = copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict())
            set_bits(net, "block1.conv1.weight", [1])
            nn.init.zeros_(net.get_parameter("block1.bn1.bias"))
            net.step()
            task(net, number + 50).backward()
            optimizer.step()
            net.step()
            net.load_state_dict(state)
            optimizer.load_state_dict(moments)
            optimizer.zero_grad()
        task(net, number).backward()
        optimizer.step()

    return step


LOOPS = [scaled, clipped, distilled, penalised, operated, thawed, against_a_critic, after_a_target, restored]


@pytest.mark.parametrize("step", LOOPS)
def test_a_removal_in_the_middle_changes_nothing(step: Callable[[], Step]) -> None:
    early, late = both(step)
    parameters_near(early, late, 1e-9)


def test_the_original_may_be_the_teacher_of_what_was_made_from_it() -> None:
    """They share no tensor: what the student loses and learns, the teacher keeps and does not."""
    torch.manual_seed(0)
    teacher = ResidualNet().double().eval()
    net = fxc.compress(teacher, torch.zeros(2, 3, 10, 10, dtype=torch.float64)).train()
    x, _ = batch(size=4)
    before = teacher(x)
    kill(net)
    net.prune()
    with torch.no_grad():
        torch._foreach_add_(list(net.parameters()), 1.0)
    assert torch.equal(teacher(x), before)
    assert not teacher.training


def test_a_removal_between_unscaling_and_the_step() -> None:
    """As when gradients are unscaled for clipping: the scaler has looked at them, and steps all the same."""
    nets = [compressed() for _ in range(2)]
    for net, remove in zip(nets, (True, False), strict=True):
        optimizer, scaler = torch.optim.SGD(net.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=64.0)
        kill(net)
        scaler.scale(task(net, 0)).backward()
        scaler.unscale_(optimizer)
        if remove:
            assert net.prune(optimizer).branches
        nn.utils.clip_grad_value_(net.parameters(), 0.01)
        scaler.step(optimizer)
        scaler.update()
        net.step()
        net.prune(optimizer)
    parameters_near(nets[0], nets[1], 1e-12)


def test_clipping_by_norm_sees_what_is_left() -> None:
    """Gradients of dead channels count until they are removed; after that the rest is clipped by its own norm."""
    net = compressed()
    kill(net)
    (100 * task(net, 0)).backward()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    whole = torch.nn.utils.get_total_norm([p.grad for p in net.parameters() if p.grad is not None])
    assert net.prune(optimizer).branches
    left = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    norm = nn.utils.clip_grad_norm_(net.parameters(), 0.5)
    assert 0.5 < norm < whole
    for gradient, clipped in zip(left, [p.grad for p in net.parameters() if p.grad is not None], strict=True):
        torch.testing.assert_close(clipped, gradient * 0.5 / norm)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    """In half precision sums are rounded in another order when channels go, so the runs are near and not the same."""

    def half() -> Step:
        scaler = torch.amp.GradScaler("cpu", init_scale=128.0, enabled=dtype == torch.float16)

        def step(net: fxc.CompressedModule, optimizer: Optimizer, number: int) -> None:
            with torch.autocast("cpu", dtype):
                loss = task(net, number)
            scaler.scale(loss + 0.01 * net.size()).backward()
            scaler.step(optimizer)
            scaler.update()

        return step

    early, late = both(half, torch.float32)
    assert {p.dtype for p in early.parameters()} == {torch.float32}
    parameters_near(early, late, 0.02)
    x = batch()[0].float()
    with torch.autocast("cpu", dtype):
        outputs = [net.eval()(x).float() for net in (early, late, compressed(torch.float32))]
    near, far = [(outputs[0] - other).abs().max() for other in outputs[1:]]
    assert near < 0.1 * far


def train_a_pair(*, joint: bool) -> tuple[list[fxc.CompressedModule], float]:
    """Two networks and a weight of the loss, trained by one optimizer, or by one each."""
    torch.manual_seed(0)
    nets = [fxc.compress(nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 4)).double()) for _ in range(2)]
    weight = nn.Parameter(torch.ones(4, dtype=torch.float64))
    groups = [*(net.param_groups(1e-3) for net in nets), [{"params": [weight]}]]
    optimizers = [torch.optim.Adam(part) for part in ([[g for part in groups for g in part]] if joint else groups)]
    x = torch.randn(5, 4, dtype=torch.float64)
    for step in range(4):
        for n, net in enumerate(nets):
            if step == 0:
                set_bits(net, "0.weight", [1, 4 + n])
                nn.init.zeros_(net.get_parameter("0.bias"))
            net.step()
            if step % 2:
                assert net.prune(optimizers[0 if joint else n]).modified == (step == 1)
        (nets[1](nets[0](x)) * weight).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    held = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in (*nets[0].parameters(), *nets[1].parameters(), weight)}
    return nets, (nets[1](nets[0](x)) * weight).sum().item()


def test_one_optimizer_may_train_two_networks_and_a_loss() -> None:
    """As for a generator and its critic, or a loss with weights of its own; the same as with one for each."""
    nets, result = train_a_pair(joint=True)
    assert nets[0].get_parameter("0.weight").shape[0] == 7
    assert result == train_a_pair(joint=False)[1]


def test_an_optimizer_that_lacks_parameters_and_holds_others_is_refused() -> None:
    """As one that was built before the network was compressed, or that missed a removal."""
    net = fxc.compress(nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 4)).double())
    optimizer = torch.optim.SGD(net.param_groups(1e-3))
    set_bits(net, "0.weight", [1])
    nn.init.zeros_(net.get_parameter("0.bias"))
    net.step()
    assert net.prune().modified
    with pytest.raises(OptimizerError, match="that are not the network's"):
        net.prune(optimizer)


@pytest.mark.cpu
@pytest.mark.parametrize("how", ["prune", "load", "average"])
def test_what_is_left_of_a_network_in_shared_memory_lies_there_too(how: str) -> None:
    """Processes that are started later see what this one trains."""
    net, other, private = compressed(), compressed(), compressed()
    if how == "prune":
        net.share_memory()
    other.share_memory()
    kill(net)
    optimizer = torch.optim.Adam(net.param_groups(), amsgrad=True)
    task(net, 0).backward()
    optimizer.step()
    if how == "prune":  # as a SharedAdam does
        for entry in optimizer.state.values():
            for value in entry.values():
                value.share_memory_()
    assert net.prune(optimizer, averages=[other] if how == "average" else []).branches
    if how == "prune":
        assert all(value.is_shared() for entry in optimizer.state.values() for value in entry.values())
    if how == "load":
        other.load_state_dict(net.state_dict())
    shared = net if how == "prune" else other
    tensors = [*shared.parameters(), *shared.buffers()]
    assert all(tensor.is_shared() for tensor in tensors)
    assert sum(t.numel() for t in tensors) < sum(t.numel() for t in [*private.parameters(), *private.buffers()])
    kill(private)
    private.prune()
    assert not any(p.is_shared() for p in private.parameters())
