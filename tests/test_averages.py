"""Moving averages of a network that loses channels: removed or not, the channels that stay have the same average."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import fxcompress as fxc
from fxcompress.errors import AverageError, CheckpointError
from fxcompress.training.fit import FitResult
from fxcompress.training.history import EpochRecord
from fxcompress.training.restore import RECORD
from tests.nets import ResidualNet, batch, kill, quantizer, set_bits

Average = Callable[[nn.Module], AveragedModel]

AVERAGES: dict[str, Average] = {
    "exponential": lambda net: AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
    "exponential, buffers too": lambda net: AveragedModel(
        net, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True
    ),
    "stochastic weight averaging": AveragedModel,
}


def compressed() -> fxc.CompressedModule:
    torch.manual_seed(0)
    return fxc.compress(ResidualNet().double(), torch.zeros(2, 3, 10, 10, dtype=torch.float64))


def train(net: fxc.CompressedModule, average: AveragedModel, *, remove: bool) -> int:
    """Channels die when the average has known them for a while; how often something was removed."""
    optimizer = torch.optim.Adam(net.param_groups(2e-3, bits_lr=1e-4))
    removals = 0
    for step in range(12):
        x, target = batch(seed=step)
        optimizer.zero_grad()
        F.cross_entropy(net(x), target).backward()
        optimizer.step()
        net.step()
        if step == 3:
            kill(net)
        if step == 6:
            set_bits(net, "block1.conv1.weight", [-1])
            with torch.no_grad():
                net.get_parameter("block1.bn1.bias")[-1] = 0.0
            net.step()
        average.update_parameters(net)
        if remove and step in {4, 8}:
            removals += net.prune(optimizer, averages=[average]).modified
    return removals


def values(average: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in average.state_dict().items() if not name.endswith(RECORD)}


def finalized(average: AveragedModel) -> nn.Module:
    assert isinstance(average.module, fxc.CompressedModule)
    return average.module.finalize().eval()


def assert_near(first: nn.Module, second: nn.Module, tolerance: float = 1e-9) -> None:
    one, other = values(first), values(second)
    assert list(one) == list(other)
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("make", AVERAGES.values(), ids=AVERAGES.keys())
def test_what_stays_has_the_average_that_it_would_have_without_removal(make: Average) -> None:
    """With removals along the way, and with one at the end, in float64."""
    often = compressed()
    never = copy.deepcopy(often)
    averages = [make(net) for net in (often, never)]
    assert train(often, averages[0], remove=True) == 2
    assert train(never, averages[1], remove=False) == 0
    whole = averages[1].module.get_parameter("block1.conv1.weight")
    never.prune(averages=[averages[1]])
    assert_near(averages[0], averages[1])
    assert (len(whole), len(averages[0].module.get_parameter("block1.conv1.weight"))) == (8, 5)
    assert not torch.equal(quantizer(often, "fc.weight").bits, quantizer(averages[0].module, "fc.weight").bits)


def test_the_values_of_what_stays_are_not_touched_and_the_network_is_right() -> None:
    net = compressed()
    average = AVERAGES["exponential"](net)
    average.update_parameters(net)
    kill(net)
    average.update_parameters(net)  # the average still has bits where the network has none
    before = copy.deepcopy(average)
    assert net.prune(averages=[average]).branches
    cut = {name: value for name, value in values(average).items() if value.shape != values(before)[name].shape}
    assert cut.keys() >= {"module.block1.conv1.weight", "module.block1.conv1.weight_quantizer.bits"}
    same = [torch.equal(value, values(before)[name]) for name, value in values(average).items() if name not in cut]
    assert all(same)
    kept = [1, 2, 4, 5, 6, 7]
    bits = "module.block1.conv1.weight_quantizer.bits"
    assert torch.equal(cut[bits], values(before)[bits][kept])
    assert average.module.code == net.code
    x, _ = batch()
    by_hand = copy.deepcopy(net)
    by_hand.load_state_dict(average.module.state_dict())
    torch.testing.assert_close(average.eval()(x), by_hand.eval()(x), rtol=0, atol=0)
    torch.testing.assert_close(finalized(average)(x), average(x))


def test_the_average_forgets_a_dead_channel() -> None:
    """Averaging on until nothing of it is left, and removing it then, ends at the same function."""
    now = compressed()
    averages = [AVERAGES["exponential"](now)]
    averages[0].update_parameters(now)
    kill(now)
    later = copy.deepcopy(now)
    averages.append(copy.deepcopy(averages[0]))
    now.prune(averages=averages[:1])
    outputs: list[list[Tensor]] = []
    for steps in (1, 400):
        for _ in range(steps):
            for net, average in zip((now, later), averages, strict=True):
                average.update_parameters(net)
        outputs.append([average.eval()(batch()[0]) for average in averages])
    difference = [(first - second).abs().max() for first, second in outputs]
    assert difference[0] > 1e-4
    assert difference[1] < 1e-9


def test_statistics_can_be_taken_anew() -> None:
    net = compressed()
    average = AVERAGES["exponential"](net)
    train(net, average, remove=True)
    before = average.module.get_buffer("block1.bn1.running_mean").clone()
    update_bn([batch(seed=n)[0] for n in range(3)], average)
    assert not torch.equal(before, average.module.get_buffer("block1.bn1.running_mean"))


def test_a_copy_in_another_module_and_several_averages_follow() -> None:
    net = compressed()
    plain, holder = copy.deepcopy(net), nn.Sequential(nn.Identity(), copy.deepcopy(net))
    kill(net)
    net.prune(averages=[plain, holder])
    shapes = [[tuple(p.shape) for p in module.parameters()] for module in (net, plain, holder)]
    assert shapes[0] == shapes[1] == shapes[2]


def test_without_averages_the_average_is_stuck_with_an_error() -> None:
    net = compressed()
    average = AVERAGES["exponential"](net)
    average.update_parameters(net)
    kill(net)
    net.prune()
    with pytest.raises(RuntimeError):
        average.update_parameters(net)


def wrong(net: fxc.CompressedModule) -> dict[str, list[Any]]:
    behind = copy.deepcopy(net)
    kill(behind)
    behind.prune()
    twice = copy.deepcopy(net)
    other = fxc.compress(ResidualNet(4).double(), torch.zeros(2, 3, 10, 10, dtype=torch.float64))
    shape = "the parameter block1.bn1.bias is not the same"
    return {
        r"holds the network itself, and no copy": [nn.Sequential(net)],
        r"this AveragedModel holds no compressed network": [AveragedModel(ResidualNet())],
        r"this Sequential holds 2 compressed networks": [nn.Sequential(copy.deepcopy(net), twice)],
        r"this OrderedDict holds no compressed network": [net.state_dict()],
        r"averages\[1\] is given twice": [twice, twice],
        r"averages\[1\] cannot follow the network: it has not lost what the network has lost": [twice, behind],
        shape: [other],
    }


def test_what_is_no_average_of_the_network_is_refused_and_nothing_changes() -> None:
    net = compressed()
    cases = wrong(net)
    kill(net)
    before = copy.deepcopy(net.state_dict())
    for message, averages in cases.items():
        with pytest.raises(AverageError, match=message):
            net.prune(averages=averages)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert cases[r"averages\[1\] is given twice"][0].get_parameter("stem.0.weight").shape == (8, 3, 3, 3)


# fit


def fit(net: fxc.CompressedModule, average: AveragedModel | None, **options: Any) -> FitResult:  # noqa: ANN401
    optimizer = torch.optim.Adam(net.param_groups(2e-3, bits_lr=0.3))
    loader = [batch(seed=seed, size=8) for seed in range(3)]
    return fxc.fit(
        net, loader, F.cross_entropy, epochs=4, gamma=0.5, prune=4, progress=False, optimizer=optimizer,
        average=average, **options,
    )  # fmt: skip


def test_fit_keeps_the_average_up_to_date_and_a_stopped_run_goes_on_with_it(tmp_path: Path) -> None:
    nets = [compressed() for _ in range(3)]
    averages = [AVERAGES["exponential"](net) for net in nets]
    kill(nets[0])
    kill(nets[1])
    result = fit(nets[0], averages[0])
    assert result.reports
    assert averages[0].n_averaged == 12
    path = tmp_path / "run.pt"

    def stop(record: EpochRecord) -> None:
        if record.epoch == 4:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        fit(nets[1], averages[1], on_epoch=stop, checkpoint=path)
    assert fxc.load_checkpoint(path, compressed(), random=False)["fit"]["reports"]
    with pytest.raises(CheckpointError, match="needs average= to go on"):
        fit(compressed(), None, resume=True, checkpoint=path)
    fit(nets[2], averages[2], resume=True, checkpoint=path)
    assert_near(averages[0], averages[2], 0.0)
    x, _ = batch()
    torch.testing.assert_close(finalized(averages[2])(x), averages[2].eval()(x))


def test_fit_refuses_an_average_of_something_else() -> None:
    net = compressed()
    with pytest.raises(AverageError, match=r"average= is of a ResidualNet; net = compress"):
        fit(net, AveragedModel(ResidualNet().double()))
