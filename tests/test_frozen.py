"""What is frozen, or trained again, in the middle of a training is so after a checkpoint as well."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.errors import CheckpointError
from fxcompress.storage.states import read_states, write_states
from fxcompress.training.fit import FitResult
from fxcompress.training.history import EpochRecord
from fxcompress.training.in_pieces import Compressed
from fxcompress.training.interrupt import TrainingInterrupted
from tests.nets import set_bits
from tests.test_compress_pieces import plain
from tests.test_pieces import image

STEPS, CHANGE = 12, 4
Change = Callable[[Compressed], None]


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 8, generator=generator), torch.randint(4, (16,), generator=generator)


def graph() -> fxc.CompressedModule:
    """With a layer in front that was frozen before."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    model[0].requires_grad_(False)
    return fxc.compress(model, torch.zeros(2, 8), bits=4.0)


def loss_of(net: Compressed, step: int) -> Tensor:
    if isinstance(net, fxc.CompressedModule):
        x, target = batch(step)
        return F.cross_entropy(net(x), target) + 0.1 * net.size()
    result: Tensor = net(image(step))
    return result + 0.1 * net.size()


def freezing(*ends: str) -> Change:
    def change(net: Compressed) -> None:
        found = [p for name, p in net.named_parameters() if name.endswith(ends)]
        assert found
        for parameter in found:
            parameter.requires_grad_(False)

    return change


def unfreezing(net: Compressed) -> None:
    found = [p for p in net.parameters() if not p.requires_grad]
    assert found
    for parameter in found:
        parameter.requires_grad_(True)


def optimizer_of(net: Compressed) -> torch.optim.Optimizer:
    """Of all parameters, also of those that are frozen at the start."""
    groups = net.param_groups(1e-2)
    held = {id(p) for group in groups for p in group["params"]}
    return torch.optim.Adam([*groups, {"params": [p for p in net.parameters() if id(p) not in held], "lr": 1e-2}])


def loop(net: Compressed, optimizer: torch.optim.Optimizer, steps: range, change: Change) -> None:
    net.train()
    for step in steps:
        optimizer.zero_grad()
        loss_of(net, step).backward()
        optimizer.step()
        net.step()
        if step == CHANGE:
            change(net)
            if isinstance(net, fxc.CompressedModule):
                set_bits(net, "2.weight", [1, 3])
                nn.init.zeros_(net.get_parameter("2.bias"))
                net.step()
            net.prune(optimizer)


def state_of(net: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    return net.state_dict(), [name for name, p in net.named_parameters() if not p.requires_grad]


def assert_same(a: nn.Module, b: nn.Module) -> None:
    """Bit for bit, and with the same parameters frozen."""
    (first, frozen), (second, other) = state_of(a), state_of(b)
    assert frozen == other
    assert first.keys() == second.keys()
    assert [name for name, value in first.items() if not torch.equal(value, second[name])] == []


@pytest.mark.sampled(2)
@pytest.mark.parametrize("build", [graph, plain], ids=["a graph", "pieces"])
@pytest.mark.parametrize(
    "change", [freezing("weight"), freezing("bits", "exponent"), freezing(".bits"), unfreezing],
    ids=["weights", "formats", "bits", "all are trained again"],
)  # fmt: skip
@pytest.mark.parametrize("stop", [CHANGE, CHANGE + 1, CHANGE + 4])
def test_a_loop_goes_on_with_what_was_frozen(
    build: Callable[[], Compressed], change: Change, stop: int, tmp_path: Path
) -> None:
    def start() -> tuple[Compressed, torch.optim.Optimizer]:
        net = build()
        if build is plain and change is unfreezing:
            freezing("bias")(net)
        return net, optimizer_of(net)

    whole, optimizer = start()
    loop(whole, optimizer, range(STEPS), change)
    part, optimizer = start()
    loop(part, optimizer, range(stop), change)
    fxc.save_checkpoint(tmp_path / "run.pt", part, optimizer)
    resumed, optimizer = start()
    fxc.load_checkpoint(tmp_path / "run.pt", resumed, optimizer)
    assert_same(part, resumed)
    loop(resumed, optimizer, range(stop, STEPS), change)
    assert_same(whole, resumed)


@pytest.mark.parametrize("build", [graph, plain], ids=["a graph", "pieces"])
def test_fit_goes_on_with_what_was_frozen(build: Callable[[], Compressed], tmp_path: Path) -> None:
    def train(stop: int = 0, **options: Any) -> FitResult:  # noqa: ANN401
        def on_epoch(record: EpochRecord) -> None:
            if record.epoch == 2:
                freezing("weight", "exponent")(net)
            if record.epoch == stop:
                signal.raise_signal(signal.SIGINT)

        net = build()
        graphed = isinstance(net, fxc.CompressedModule)
        loader = [batch(i) if graphed else (image(i), torch.zeros(())) for i in range(3)]
        return fxc.fit(
            net, loader, F.cross_entropy if graphed else lambda y, _: y, epochs=5, gamma=0.3, progress=False,
            on_epoch=on_epoch, **options,
        )  # fmt: skip

    whole = train()
    with pytest.raises(TrainingInterrupted):
        train(3, checkpoint=tmp_path / "run.pt")
    assert_same(whole.net, train(checkpoint=tmp_path / "run.pt", resume=True).net)


def test_a_file_that_says_nothing_of_it_changes_nothing(tmp_path: Path) -> None:
    """Those of earlier versions."""
    net = graph()
    fxc.save_checkpoint(tmp_path / "run.pt", net)
    states = read_states(tmp_path / "run.pt")
    del states["frozen"]
    write_states(tmp_path / "run.pt", states)
    other = graph()
    freezing("4.bias")(other)
    fxc.load_checkpoint(tmp_path / "run.pt", other)
    assert state_of(other)[1] == ["0.weight", "0.bias", "4.bias"]


def test_a_file_that_does_not_fit_freezes_nothing(tmp_path: Path) -> None:
    net = graph()
    freezing("weight")(net)
    fxc.save_checkpoint(tmp_path / "run.pt", net)
    other = graph()
    before = state_of(other)[1]
    with pytest.raises(CheckpointError, match="holds no optimizer"):
        fxc.load_checkpoint(tmp_path / "run.pt", other, optimizer_of(other))
    assert state_of(other)[1] == before
