"""Lightning's loop with the callback does what the documented loop does, and the example runs."""

import copy
import csv
import os
import runpy
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import fxcompress as fxc
from fxcompress.adapters.lightning import SelfCompression
from fxcompress.errors import OptimizerError, UnsupportedModelError
from tests.ranks import launch
from tests.test_target_latency import Counted, counted

# Lightning warns of what it is not asked for: few workers, no logger, its own deprecations.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.cpu]

__all__ = ["counted"]
EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "lightning_digits.py"
EPOCHS = 8
GAMMA, CLIP = 3.0, 0.5
NEVER = 10**9


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, list[dict[str, str]]]:
    folder = tmp_path_factory.mktemp("lightning")
    trainer, model = runpy.run_path(str(EXAMPLE))["main"](EPOCHS, str(folder))
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return trainer, model, list(csv.DictReader(file))


def test_example_shrinks_and_learns(run: tuple[Any, Any, list[dict[str, str]]]) -> None:
    trainer, model, _ = run
    assert model.net.fractional_size() < 0.05
    assert model.net.channels_left() < 24 + 32 + 32 + 10
    assert model.net.get_submodule("3").weight.shape[0] < 32
    assert trainer.callback_metrics["val/accuracy"] > 0.7


def test_example_logs_to_csv(run: tuple[Any, Any, list[dict[str, str]]]) -> None:
    _, model, rows = run
    columns = {"train/loss", "val/accuracy", "size/fractional", "size/weights", "size/channels", "size/gamma"}
    assert columns <= set(rows[0])
    channels = [float(row["size/channels"]) for row in rows if row["size/channels"]]
    assert len(channels) > EPOCHS
    assert all(before >= after for before, after in pairwise(channels))
    assert channels[-1] == model.net.channels_left()


def test_example_finalizes_to_the_same_function(run: tuple[Any, Any, list[dict[str, str]]]) -> None:
    net = copy.deepcopy(run[1].net).double().eval()
    x = torch.randn(7, 1, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(net.finalize().eval()(x), net(x))


def network(bits: float = 8.0) -> fxc.CompressedModule:
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    return fxc.compress(model, torch.zeros(2, 5, dtype=torch.float64), bits=bits)


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(24, 8, 5, dtype=torch.float64, generator=generator)
    return list(zip(x, torch.randint(0, 3, (24, 8), generator=generator), strict=True))


class Model(L.LightningModule):
    """As a user would write it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = self.net.param_groups(lr=1e-2) if isinstance(self.net, fxc.CompressedModule) else self.parameters()
        return torch.optim.Adam(groups)


def fit(
    model: L.LightningModule,
    *callbacks: L.Callback,
    ckpt_path: str | None = None,
    batch_size: int = 8,
    **options: Any,
) -> L.Trainer:
    x, y = map(torch.cat, zip(*batches(), strict=True))
    settings = {"max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    settings |= {"enable_model_summary": False, "enable_checkpointing": False, "barebones": False}
    trainer = L.Trainer(callbacks=list(callbacks), **(settings | options))
    data = TensorDataset(x, y)
    sampler: Any = DistributedSampler(data, shuffle=False) if dist.is_initialized() else None
    trainer.fit(model, DataLoader(data, batch_size=batch_size, sampler=sampler), ckpt_path=ckpt_path)
    return trainer


def steps() -> Iterator[list[tuple[Tensor, Tensor]]]:
    """The batches of each optimizer step: two epochs, two batches a step."""
    data = batches() * 2
    yield from (data[i : i + 2] for i in range(0, len(data), 2))


def test_trains_as_by_hand_with_accumulation_and_clipping() -> None:
    net = network()
    twin = copy.deepcopy(net)
    callback = SelfCompression(gamma=GAMMA, prune=5)
    fit(Model(net), callback, accumulate_grad_batches=2, gradient_clip_val=CLIP)

    optimizer = torch.optim.Adam(twin.param_groups(lr=1e-2))
    for number, pair in enumerate(steps(), 1):
        loss = sum((F.cross_entropy(twin(x), y) / 2 for x, y in pair), GAMMA * twin.size())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(twin.parameters(), CLIP)
        optimizer.step()
        twin.step()
        if number % 5 == 0:
            twin.prune(optimizer)
    twin.prune(optimizer)

    assert callback.done == 24
    assert callback.reports
    for (name, ours), theirs in zip(net.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


def test_resumed_training_goes_on_where_it_stopped(tmp_path: Path) -> None:
    fresh = network()
    whole, resumed = copy.deepcopy(fresh), copy.deepcopy(fresh)
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    first = SelfCompression(target_size=0.1, prune=NEVER)
    fit(Model(whole), first, keep, enable_checkpointing=True)
    second = SelfCompression(target_size=0.1, prune=NEVER)
    fit(Model(resumed), second, ckpt_path=str(tmp_path / "epoch=0.ckpt"))
    assert second.state_dict() == first.state_dict()
    assert second.done == 48
    for (name, ours), theirs in zip(resumed.named_parameters(), whole.named_parameters(), strict=True):
        torch.testing.assert_close(ours, theirs[1], msg=name)


def test_a_callback_may_be_used_for_several_trainings() -> None:
    """A second one begins anew; but one that its trainer makes longer goes on."""
    fresh, callback = network(), SelfCompression(target_size=0.1)
    nets = [copy.deepcopy(fresh) for _ in range(2)]
    for net in nets:
        trainer = fit(Model(net), callback)
        assert callback.done == 48
    for (name, first), second in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(first, second, msg=name)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(Model(nets[1]), DataLoader(TensorDataset(*map(torch.cat, zip(*batches(), strict=True))), batch_size=8))
    assert callback.done == 72


def test_a_shrunk_network_is_resumed(tmp_path: Path) -> None:
    fresh = network()
    whole, resumed = copy.deepcopy(fresh), copy.deepcopy(fresh)
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    options: dict[str, Any] = {"max_epochs": 4, "enable_checkpointing": True, "default_root_dir": tmp_path}
    fit(Model(whole), SelfCompression(gamma=20.0, prune=5), keep, **options)
    kept = torch.load(tmp_path / "epoch=2.ckpt", weights_only=True)["state_dict"]
    assert kept["net.2.weight"].numel() < 48
    fit(Model(resumed), SelfCompression(gamma=20.0, prune=5), ckpt_path=str(tmp_path / "epoch=2.ckpt"), **options)
    for (name, ours), theirs in zip(resumed.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


def test_the_optimizer_is_left_alone_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    net = network()
    trainer = fit(Model(net), SelfCompression(gamma=GAMMA), max_steps=2)
    calls: list[int] = []
    monkeypatch.setattr(type(net), "step", lambda _: calls.append(1))
    trainer.optimizers[0].step()
    assert not calls


def test_plain_network_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"Model\.net is a Linear.* compress it before the optimizer"):
        fit(Model(nn.Linear(5, 3).double()), SelfCompression(gamma=GAMMA))


def in_processes(rank: int) -> tuple[list[Tensor], int]:
    """What the strategy of Lightning finds under torchrun."""
    warnings.simplefilter("ignore")
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "TORCHELASTIC_RUN_ID": "0", "GROUP_RANK": "0"}
    torch.manual_seed(rank)
    return trained(devices=2, strategy="ddp", batch_size=4, use_distributed_sampler=False)


class Slow(Model):
    """At the paper's learning rate of bits rounding grows until two runs part."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        assert isinstance(self.net, fxc.CompressedModule)
        return torch.optim.Adam(self.net.param_groups(lr=1e-3, bits_lr=0.06))


def trained(batch_size: int = 8, **options: Any) -> tuple[list[Tensor], int]:
    net, callback = network(2.0), SelfCompression(gamma=GAMMA, prune=fxc.PrunePolicy(cost=0.2))
    fit(Slow(net), callback, batch_size=batch_size, max_epochs=2, **options)
    return [p.detach() for p in net.parameters()], len(callback.reports)


def test_two_processes_train_as_one_on_the_whole_batch() -> None:
    torch.manual_seed(0)
    expected, removals = trained()
    assert removals
    outcomes = launch(2, in_processes)
    assert [(o.error, o.message) for o in outcomes] == [("", "")] * 2
    for outcome in outcomes:
        assert outcome.value[1] == removals
        for ours, theirs in zip(outcome.value[0], expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7)


def test_processes_that_do_not_use_ddp_are_refused() -> None:
    strategy = SimpleNamespace()
    trainer: Any = SimpleNamespace(world_size=2, strategy=strategy)
    with pytest.raises(UnsupportedModelError, match=r'2 processes under SimpleNamespace.*strategy="ddp"'):
        SelfCompression(gamma=GAMMA).setup(trainer, Model(network()), "fit")


@pytest.mark.parametrize(
    "averaging",
    [lambda: EMAWeightAveraging(decay=0.9), lambda: StochasticWeightAveraging([1e-2, 1e-2, 0.5, 0.05], 0.5)],
)
def test_callbacks_that_average_parameters_go_with_no_removal(averaging: Callable[[], L.Callback]) -> None:
    with pytest.raises(UnsupportedModelError, match=r"Averaging keeps a copy of all parameters.*prune=False"):
        fit(Model(network()), SelfCompression(gamma=GAMMA), averaging())
    net = network(bits=2.0)
    fit(Model(net), SelfCompression(gamma=GAMMA, prune=False), averaging(), max_epochs=8)
    final, x = net.finalize().eval(), torch.randn(4, 5, dtype=torch.float64)
    assert sum(p.numel() for p in final.parameters()) < sum(p.numel() for p in network().finalize().parameters())
    torch.testing.assert_close(final(x), net.eval()(x))


def test_wrong_name_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"there is no Model\.backbone; name the attribute"):
        fit(Model(network()), SelfCompression(gamma=GAMMA, net="backbone"))


def test_bits_in_the_group_of_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Model, "configure_optimizers", lambda self: torch.optim.Adam(self.parameters()))
    with pytest.raises(OptimizerError, match="holds bits together with weights"):
        fit(Model(network()), SelfCompression(gamma=GAMMA))


class ByHand(Model):
    """Manual optimization: so many batches a step, or steps a batch."""

    def __init__(self, net: nn.Module, batches: int, steps: int) -> None:
        super().__init__(net)
        self.automatic_optimization = False
        self.batches, self.steps = batches, steps

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        for _ in range(self.steps):
            self.manual_backward(super().training_step(batch, batch_idx) / self.batches)
            if (batch_idx + 1) % self.batches == 0:
                optimizer.step()
                optimizer.zero_grad()


@pytest.mark.parametrize("ends", [{"max_epochs": 5}, {"max_epochs": -1, "max_steps": 0}], ids=["epochs", "steps"])
@pytest.mark.parametrize(("of", "steps"), [(1, 1), (4, 1), (1, 3)])
def test_progress_is_that_of_the_trainer_whatever_a_step_is(of: int, steps: int, ends: dict[str, int]) -> None:
    """A callback that counted steps was at a quarter of its course when the training ended."""
    seen: list[float] = []

    def gamma(progress: float, size: float) -> float:
        seen.append(progress)
        return 0.0

    total = 5 * 24 * steps // of
    options: dict[str, Any] = {name: value or total for name, value in ends.items()}
    fit(ByHand(network(), of, steps), SelfCompression(gamma=gamma), **options)
    assert len(seen) == total
    assert seen == sorted(seen)
    assert seen == pytest.approx([n / total for n in range(total)], abs=max(of, steps) / total)


class Both(L.LightningModule):
    """Two networks, each with an optimizer of its own."""

    def __init__(self, nets: list[nn.Module]) -> None:
        super().__init__()
        self.first, self.second = nets
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        for net, optimizer in zip((self.first, self.second), optimizers, strict=True):
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(net(batch[0]), batch[1]))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(net.param_groups(lr=1e-2)) for net in (self.first, self.second)]  # type: ignore[operator]


class Wrapper(torch.optim.Optimizer):
    """Hands all on to the one that it holds; its own step hooks are never called, as it has not called ``__init__``."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.param_groups, self.state = optimizer, optimizer.param_groups, optimizer.state
        self.defaults = optimizer.defaults

    def zero_grad(self, set_to_none: bool = True) -> None:  # noqa: FBT001, FBT002
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)


class Wrapped(Model):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return Wrapper(super().configure_optimizers())


def test_an_optimizer_that_holds_another_one() -> None:
    """As Lookahead does: pressure, steps and removals are those of the optimizer that it holds."""
    nets = [network()]
    nets.append(copy.deepcopy(nets[0]))
    callbacks = [SelfCompression(gamma=GAMMA, prune=5) for _ in nets]
    for net, callback, kind in zip(nets, callbacks, (Wrapped, Model), strict=True):
        fit(kind(net), callback)
    assert [callback.done for callback in callbacks] == [48, 48]
    assert len(callbacks[0].reports) == len(callbacks[1].reports) > 0
    for (name, ours), theirs in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


def test_two_networks_of_one_module_have_a_callback_each(tmp_path: Path) -> None:
    model = Both([network(), network()])
    callbacks = [SelfCompression(target_size=t, net=n) for t, n in ((0.1, "first"), (0.2, "second"))]
    keep = ModelCheckpoint(tmp_path, filename="kept")
    run = fit(model, *callbacks, keep, max_epochs=10, enable_checkpointing=True)
    assert model.first.fractional_size() == pytest.approx(0.1, rel=0.25)  # type: ignore[operator]
    assert model.second.fractional_size() == pytest.approx(0.2, rel=0.25)  # type: ignore[operator]
    assert {"first/size/fractional", "second/size/fractional"} <= run.callback_metrics.keys()
    others = [SelfCompression(target_size=t, net=n) for t, n in ((0.1, "first"), (0.2, "second"))]
    fit(Both([network(), network()]), *others, ckpt_path=str(tmp_path / "kept.ckpt"), max_epochs=10)
    assert [callback.state_dict() for callback in others] == [callback.state_dict() for callback in callbacks]


@pytest.mark.parametrize("steps", [3, 240])
def test_a_target_that_was_missed_is_told(steps: int, caplog: pytest.LogCaptureFixture) -> None:
    fit(Model(network()), SelfCompression(target_size=0.1), max_epochs=-1, max_steps=steps)
    assert ("the target of 0.1 of the bits was not reached" in caplog.text) is (steps == 3)


def test_a_target_above_the_present_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"target_size=0.4 is more than the network's present size of 0.25"):
        fit(Model(network()), SelfCompression(target_size=0.4))


def test_target_size_needs_a_known_end() -> None:
    with pytest.raises(ValueError, match="set max_epochs or max_steps"):
        fit(Model(network()), SelfCompression(target_size=0.1), max_epochs=-1)


def selected(epochs: int) -> fxc.CompressedModule:
    """By hand."""
    net = network()
    optimizer = torch.optim.Adam(net.param_groups(lr=1e-2))
    fxc.select_channels(net, optimizer, steps=24 * epochs, target_macs=0.5)
    for x, y in batches() * epochs:

        def closure(x: Tensor = x, y: Tensor = y) -> float:  # as Lightning does
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            return float(loss)

        optimizer.step(closure)
        net.step()
    net.prune(optimizer)
    return net


@pytest.mark.parametrize("resumed", [False, True])
def test_a_share_of_the_multiply_adds_as_in_a_loop_of_ones_own(tmp_path: Path, resumed: bool) -> None:  # noqa: FBT001
    """And a training that is taken up in the middle of the path ends at the same network."""
    torch.manual_seed(0)
    expected = selected(6)
    assert expected.macs_left() <= 0.5
    options: dict[str, Any] = {"max_epochs": 6, "enable_checkpointing": True, "default_root_dir": tmp_path}
    for epoch in [None, "1", "2"] if resumed else [None]:
        torch.manual_seed(0)
        net, callback = network(), SelfCompression(target_macs=0.5, prune=False if epoch is None else 5)
        keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        path = None if epoch is None else str(tmp_path / f"epoch={epoch}.ckpt")
        trainer = fit(Model(net), callback, *([] if epoch else [keep]), ckpt_path=path, **options)
        assert trainer.callback_metrics["size/macs"] <= 0.5
        net.prune()
        for (name, ours), theirs in zip(net.named_parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, msg=name)


def test_a_share_of_the_latency_is_measured_and_kept(tmp_path: Path, counted: Counted) -> None:
    net, callback = network(), SelfCompression(target_latency=0.7)
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer = fit(Model(net), callback, keep, max_epochs=6, enable_checkpointing=True)
    assert trainer.callback_metrics["size/latency"] <= 0.75
    assert counted.calls == 1
    state = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["callbacks"]["SelfCompression"]
    assert set(state["lead"]["table"]["layers"]) == {"0.weight", "2.weight", "4.weight"}


def test_a_share_needs_a_known_end_and_something_left_to_save() -> None:
    with pytest.raises(ValueError, match="set max_epochs or max_steps"):
        fit(Model(network()), SelfCompression(target_macs=0.5), max_epochs=-1)
    with pytest.raises(ValueError, match=r"target_macs=0\.9 is more than the"):
        fit(Model(selected(6)), SelfCompression(target_macs=0.9))
    with pytest.raises(ValueError, match="either target_macs= or target_latency="):
        SelfCompression(target_macs=0.5, target_latency=0.5)


@pytest.mark.parametrize("of", [0, 1])
def test_a_share_is_reached_with_manual_optimization_too(of: int) -> None:
    """Whether a batch makes two steps, or two batches make one."""
    torch.manual_seed(0)
    net = network()

    class Manual(Model):
        automatic_optimization = False

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:  # type: ignore[override]
            optimizer: Any = self.optimizers()
            self.manual_backward(F.cross_entropy(self.net(batch[0]), batch[1]))
            for _ in range([2, batch_idx % 2][of]):
                optimizer.step()
                if of:
                    optimizer.zero_grad()
            if not of:
                optimizer.zero_grad()

    fit(Manual(net), SelfCompression(target_macs=0.5), max_epochs=8)
    assert net.macs_left() <= 0.51
