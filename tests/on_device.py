"""A network's life on a device that is not the CPU. Run by test_device.py, with the plugin pretend_device."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

import fxcompress as fxc
from fxcompress.training.history import EpochRecord
from tests.nets import Pick, ResidualNet, batch
from tests.pretend_device import NAME, copies_to_host, has_float64

CPU = torch.device("cpu")


class Attention(nn.Module):
    """Is traced by running: attention, norms, grouped convolutions, shapes that Python reads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.PReLU(8))
        self.grouped = nn.Conv2d(8, 16, 3, stride=2, groups=4)
        self.norm = nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.places = nn.Parameter(torch.randn(16, 16))
        self.head = nn.Sequential(nn.Linear(16, 12), nn.Sigmoid(), nn.Linear(12, 5))

    def forward(self, x: Tensor) -> Tensor:
        h = self.grouped(self.stem(x)).flatten(2).transpose(1, 2)
        h = self.norm(h + self.places[: h.shape[1]])
        h = h + self.attention(h, h, h, need_weights=False)[0]
        return self.head(h.mean(1))  # type: ignore[no-any-return]


NETWORKS: list[Callable[[], nn.Module]] = [ResidualNet, Attention, Pick]


@pytest.fixture(name="without_float64")
def _without_float64() -> Iterator[None]:
    has_float64(answer=False)
    yield
    has_float64(answer=True)


def data(size: int = 32) -> tuple[Tensor, Tensor]:
    """A batch in float32 on the device, and the labels."""
    with CPU:
        x, target = batch(size=size)
    return x.float().to(NAME), target.to(NAME)


def places(module: nn.Module) -> set[str]:
    return {tensor.device.type for tensor in (*module.parameters(), *module.buffers())}


def loses_thirds(model: nn.Module) -> nn.Module:
    """Every third row of all that has more than five of them becomes zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            if len(parameter) > 5:
                parameter[::3] = 0
    return model.eval()


def train(net: fxc.CompressedModule, optimizer: Optimizer, steps: int, gamma: float = 1.0) -> Iterator[int]:
    """Make steps of training; the number of each, as soon as it is made."""
    x, target = data()
    for step in range(steps):
        found = net(x)
        (F.cross_entropy(found, target[: len(found)]) + gamma * net.size()).backward()
        optimizer.step()
        optimizer.zero_grad()
        net.step()
        yield step


@pytest.mark.parametrize("make", NETWORKS)
def test_a_life_without_float64(make: Callable[[], nn.Module], tmp_path: Path, without_float64: None) -> None:
    """Compressed, trained, cut, finalized, saved and loaded where it lies, as a user of MPS does."""
    del without_float64
    x, _ = data()
    net = fxc.compress(make(), (x,), bits=2.0)
    optimizer = Adam(net.param_groups())
    assert places(net) == {NAME}
    sizes = []
    for step in train(net, optimizer, 16):
        sizes += [net.size().item(), net.size("macs").item(), net.stored_size(), net.weights_left()]
        if step % 5 == 4:
            net.prune(optimizer)
    assert sizes[-1] < 1
    net.eval()
    final = net.finalize()
    assert places(final) == {NAME}
    fxc.save(final, tmp_path / "net.fxc")
    loaded = fxc.load(tmp_path / "net.fxc", make().eval(), (x,))
    torch.testing.assert_close(final(x), net(x))
    assert torch.equal(loaded(x), final(x))
    on_host = fxc.load(tmp_path / "net.fxc", make().to(CPU).eval(), (x.cpu(),))
    torch.testing.assert_close(on_host(x.cpu()), final(x).cpu())


@pytest.mark.parametrize("make", NETWORKS)
def test_fit_and_its_checkpoints_without_float64(
    make: Callable[[], nn.Module], tmp_path: Path, without_float64: None
) -> None:
    """The loader gives batches on the host, as loaders do; an interrupted run ends as one that was not."""
    del without_float64
    x, target = (tensor.cpu() for tensor in data(4 if make is Pick else 32))
    loader = [(x, target)] * 4

    def loss(found: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(found, wanted[: len(found)])

    def stop(record: EpochRecord) -> None:
        if record.epoch == 2:
            raise KeyboardInterrupt

    results = []
    for path, on_epoch in ((tmp_path / "whole", None), (tmp_path / "parts", stop)):
        torch.manual_seed(0)
        model = make()
        run = partial(
            fxc.fit, model, loader, loss, epochs=4, target_size=0.05, checkpoint=path, progress=False, on_epoch=on_epoch
        )
        try:
            results.append(run())
        except KeyboardInterrupt:
            results.append(run(resume=True, on_epoch=None))
    (whole, parts) = results
    assert places(whole.module) == {NAME}
    assert whole.module.state_dict().keys() == parts.module.state_dict().keys()
    for name, value in whole.module.state_dict().items():
        assert torch.equal(value, parts.module.state_dict()[name]), name


@pytest.mark.parametrize("kind", [Adam, AdamW, RMSprop, SGD])
@pytest.mark.parametrize("make", [ResidualNet, Attention])
def test_a_training_step_never_waits(make: Callable[[], nn.Module], kind: type[Optimizer]) -> None:
    """Nothing is copied to the host after the first step: a device gets its work in advance."""
    net = fxc.compress(make(), (data()[0],))
    optimizer = kind(net.param_groups(lr=1e-3))  # type: ignore[call-arg]
    copies = [copies_to_host() for _ in train(net, optimizer, 4, gamma=0.1)]
    assert copies[0] == copies[-1]


@pytest.mark.parametrize("make", NETWORKS)
@pytest.mark.parametrize("fold", [False, True])
def test_the_same_goes_as_on_the_cpu(make: Callable[[], nn.Module], fold: bool, without_float64: None) -> None:  # noqa: FBT001
    del without_float64
    x, _ = data()
    model = loses_thirds(make())
    found = fxc.prune(model, (x,), fold=fold)
    result, wanted = found.module(x), model(x)
    expected = fxc.prune(model.to(CPU), (x.cpu(),), fold=fold)
    assert str(found.report) == str(expected.report)
    assert found.report.parameters[1] < found.report.parameters[0]
    assert found.module.state_dict().keys() == expected.module.state_dict().keys()
    for name, value in expected.module.state_dict().items():
        torch.testing.assert_close(found.module.state_dict()[name].cpu(), value)
    torch.testing.assert_close(result, wanted)


@pytest.mark.parametrize("make", NETWORKS)
def test_a_network_may_move(make: Callable[[], nn.Module], without_float64: None) -> None:
    """Compressed on the host, trained and cut on the device, and finished on the host."""
    del without_float64
    x, _ = data()
    net = fxc.compress(make().to(CPU), (x.cpu(),), bits=2.0).to(NAME)
    optimizer = Adam(net.param_groups())
    for step in train(net, optimizer, 10):
        if step == 4:
            net.prune(optimizer)
    assert places(net) == {NAME}
    final = net.eval().to(CPU).finalize()
    assert places(final) == {"cpu"}
    torch.testing.assert_close(final(x.cpu()), net(x.cpu()))
    again = fxc.compress(make().to(CPU), (x.cpu(),), bits=2.0)
    again.load_state_dict(net.to(NAME).state_dict())
    torch.testing.assert_close(again.eval()(x.cpu()), final(x.cpu()))
