"""The Trainer's loop with the callback does what the documented loop does, and the example runs."""

import copy
import json
import os
import runpy
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import fxcompress as fxc
from fxcompress.adapters.huggingface import SelfCompressionCallback, TrainerModel
from fxcompress.errors import OptimizerError, UnsupportedModelError
from fxcompress.quantizer import Quantizer
from tests.ranks import launch
from tests.test_target_latency import Counted, counted

# The libraries warn of what is theirs: pinned memory without a GPU, their own deprecations.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.cpu]

__all__ = ["counted"]
EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "huggingface_digits.py"
GAMMA, CLIP = 3.0, 0.5
NEVER = 10**9


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("huggingface")
    return runpy.run_path(str(EXAMPLE))["main"](6, str(folder))


def test_example_shrinks_and_learns(run: Any) -> None:
    logged = [entry for entry in run.state.log_history if "size/fractional" in entry]
    assert logged[0]["size/fractional"] > 0.15
    assert logged[-1]["size/fractional"] < 0.06
    assert logged[-1]["size/weights"] < 0.8
    assert sum(p.numel() for p in run.model.parameters() if p.ndim > 1) < 9000
    assert [e["eval_accuracy"] for e in run.state.log_history if "eval_accuracy" in e][-1] > 0.7


def test_example_finalizes_to_the_same_function(run: Any) -> None:
    net = copy.deepcopy(run.model.net).eval()
    inputs = {"pixel_values": torch.randn(7, 1, 8, 8), "labels": torch.arange(7)}
    torch.testing.assert_close(net.finalize().eval()(**inputs).logits, net(**inputs).logits, rtol=1e-4, atol=1e-4)


def test_a_causal_model_generates_with_fewer_heads() -> None:
    """With its cache of keys and values, whose shape is another now, and methods that no graph has."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 50}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "v_proj" in name:
            nn.init.zeros_(parameter[:8])  # a head of values, which two heads of queries read
        elif "up_proj" in name:
            nn.init.zeros_(parameter[::2])
    ids = torch.randint(3, 50, (2, 6))
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    small: Any = fxc.prune(model, example, keep_code=True).module
    assert type(small) is LlamaForCausalLM
    assert small.model.layers[1].self_attn.k_proj.weight.shape == (8, 32)
    assert small.model.layers[1].mlp.up_proj.weight.shape == (32, 32)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    found = [
        cast("Any", net).generate(ids, attention_mask=example["attention_mask"], **options) for net in (model, small)
    ]
    assert found[0].shape == (2, 14)
    assert torch.equal(*found)


def test_a_trained_model_needs_no_labels_with_its_own_code() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model, ids = BertForMaskedLM(BertConfig(**sizes, vocab_size=40)), torch.randint(3, 40, (2, 6))
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    net = TrainerModel(fxc.compress(model, example, keep_code=True)).net.eval()
    final = net.finalize().eval()
    assert type(final) is BertForMaskedLM
    logits = final(ids, example["attention_mask"]).logits
    torch.testing.assert_close(logits, net(**example).logits, rtol=1e-4, atol=1e-5)


class Classifier(nn.Module):
    """Returns what models of the library return."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def network() -> fxc.CompressedModule:
    example = {"x": torch.zeros(2, 5, dtype=torch.float64), "labels": torch.tensor([0, 1])}
    return fxc.compress(Classifier().double(), example)


def samples(dtype: torch.dtype = torch.float64) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(192, 5, dtype=torch.float64, generator=generator).to(dtype)
    labels = torch.randint(0, 3, (192,), generator=generator)
    return [{"x": a, "labels": b} for a, b in zip(x, labels, strict=True)]


def adam(net: fxc.CompressedModule) -> torch.optim.Optimizer:
    return torch.optim.Adam(net.param_groups(lr=1e-2))


class InOrder(Trainer):
    """Without shuffling."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trainer(
    net: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, *callbacks: TrainerCallback, **options: Any
) -> Trainer:
    settings = {"per_device_train_batch_size": 8, "num_train_epochs": 2, "lr_scheduler_type": "constant"}
    settings |= {"save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    settings |= {"remove_unused_columns": False, "max_grad_norm": 0.0, "logging_steps": 5}
    arguments = TrainingArguments(output_dir=str(folder), **(settings | options))
    dtype = next(net.parameters()).dtype
    return InOrder(
        model=net, args=arguments, train_dataset=samples(dtype), optimizers=(optimizer, None), callbacks=list(callbacks)
    )


def steps() -> Iterator[list[tuple[Tensor, Tensor]]]:
    """The batches of each optimizer step: two epochs, two batches a step."""
    data = samples()
    x, y = torch.stack([s["x"] for s in data]).split(8), torch.stack([s["labels"] for s in data]).split(8)
    pairs = list(zip(x, y, strict=True)) * 2
    yield from (pairs[i : i + 2] for i in range(0, len(pairs), 2))


class Recorder(TrainerCallback):
    """A logger that comes after the callback."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(dict(kwargs["logs"]))


def test_trains_as_by_hand_with_accumulation_and_clipping(tmp_path: Path) -> None:
    net = network()
    twin = copy.deepcopy(net)
    callback, recorder = SelfCompressionCallback(gamma=GAMMA, prune=5), Recorder()
    run = trainer(
        TrainerModel(net), adam(net), tmp_path, callback, recorder, gradient_accumulation_steps=2, max_grad_norm=CLIP
    )
    run.train()

    optimizer = adam(twin)
    for number, pair in enumerate(steps(), 1):
        optimizer.zero_grad()
        for x, y in pair:
            (twin(x=x, labels=y)["loss"] / 2).backward()
        nn.utils.clip_grad_norm_(twin.parameters(), CLIP)
        (GAMMA * twin.size()).backward()
        optimizer.step()
        twin.step()
        if number % 5 == 0:
            twin.prune(optimizer)
    twin.prune(optimizer)

    assert run.state.global_step == 24
    assert callback.reports
    for (name, ours), theirs in zip(net.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)
    columns = {"size/fractional", "size/weights", "size/channels", "size/gamma"}
    assert [columns & entry.keys() for entry in recorder.seen[:4]] == [columns] * 4
    assert columns < run.state.log_history[0].keys()


def trained(folder: Path, batch: int) -> tuple[list[Tensor], int]:
    net, callback = network(), SelfCompressionCallback(gamma=GAMMA, prune=fxc.PrunePolicy(cost=0.2))
    run = trainer(TrainerModel(net), adam(net), folder, callback, per_device_train_batch_size=batch, num_train_epochs=3)
    run.train()
    return [p.detach() for p in net.parameters()], len(callback.reports)


def in_processes(rank: int, folder: Path) -> tuple[list[Tensor], int]:
    """What the Trainer finds under torchrun."""
    warnings.simplefilter("ignore")
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "ACCELERATE_USE_CPU": "1"}
    torch.manual_seed(rank)
    return trained(folder, batch=4)


def test_two_processes_train_as_one_on_the_whole_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    expected, removals = trained(tmp_path, batch=8)
    assert removals
    outcomes = launch(2, in_processes, tmp_path)
    assert [(o.error, o.message) for o in outcomes] == [("", "")] * 2
    for outcome in outcomes:
        assert outcome.value[1] == removals
        for ours, theirs in zip(outcome.value[0], expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_gpu": 2}, "2 devices by one process.*torchrun --nproc-per-node 2"),
        ({"fsdp": True}, r"sharded over processes \(fsdp=\)"),
        ({"deepspeed": "ds.json"}, r"sharded over processes \(deepspeed=\)"),
    ],
)
def test_devices_that_cannot_follow_are_refused(options: dict[str, Any], message: str) -> None:
    arguments: Any = SimpleNamespace(**({"n_gpu": 0, "fsdp": None, "deepspeed": None} | options))
    nothing: Any = None
    with pytest.raises(UnsupportedModelError, match=message):
        SelfCompressionCallback(gamma=GAMMA).on_init_end(arguments, nothing, nothing, model=TrainerModel(network()))


@pytest.mark.parametrize("restore", [False, True])
def test_resumed_training_goes_on_where_it_stopped(tmp_path: Path, restore: bool) -> None:  # noqa: FBT001
    fresh = network()
    nets = [copy.deepcopy(fresh), copy.deepcopy(fresh)]
    runs = [
        trainer(
            TrainerModel(net), adam(net), tmp_path, SelfCompressionCallback(target_size=0.1, prune=NEVER),
            save_strategy="epoch", restore_callback_states_from_checkpoint=restore,
        )
        for net in nets
    ]  # fmt: skip
    runs[0].train()
    runs[1].train(resume_from_checkpoint=str(tmp_path / "checkpoint-24"))
    for (name, ours), theirs in zip(nets[1].named_parameters(), nets[0].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


def test_a_callback_may_be_used_for_several_trainings(tmp_path: Path) -> None:
    fresh, callback = network(), SelfCompressionCallback(target_size=0.1)
    nets = [copy.deepcopy(fresh) for _ in range(2)]
    for net in nets:
        trainer(TrainerModel(net), adam(net), tmp_path, callback).train()
    for (name, first), second in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(first, second, msg=name)


@pytest.mark.parametrize("steps", [3, 240])
def test_a_target_that_was_missed_is_told(steps: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    net = network()
    trainer(TrainerModel(net), adam(net), tmp_path, SelfCompressionCallback(target_size=0.1), max_steps=steps).train()
    assert ("the target of 0.1 of the bits was not reached" in caplog.text) is (steps == 3)


def test_a_target_above_the_present_size_is_refused(tmp_path: Path) -> None:
    net = network()
    run = trainer(TrainerModel(net), adam(net), tmp_path, SelfCompressionCallback(target_size=0.4))
    with pytest.raises(ValueError, match=r"target_size=0.4 is more than the network's present size of 0.25"):
        run.train()


def test_a_shrunk_network_is_resumed(tmp_path: Path) -> None:
    fresh = network()
    whole, model = copy.deepcopy(fresh), TrainerModel(copy.deepcopy(fresh))
    callbacks = [SelfCompressionCallback(gamma=20.0, prune=5) for _ in range(2)]
    options = {"num_train_epochs": 4, "save_strategy": "epoch"}
    trainer(TrainerModel(whole), adam(whole), tmp_path, callbacks[0], **options).train()
    checkpoint = tmp_path / "checkpoint-72"
    model.load_state_dict(load_file(checkpoint / "model.safetensors"))  # before the optimizer is built
    assert model.net.get_parameter("net.2.weight").numel() < 48
    run = trainer(model, adam(model.net), tmp_path, callbacks[1], **options)
    run.train(resume_from_checkpoint=str(checkpoint))
    for (name, ours), theirs in zip(model.net.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


def test_mixed_precision_does_not_keep_the_code_from_before_a_removal(tmp_path: Path) -> None:
    net = network().float()
    weights = net.channels_left()
    callback = SelfCompressionCallback(gamma=GAMMA, prune=4)
    run = trainer(TrainerModel(net), adam(net), tmp_path, callback, bf16=True)
    run.train()
    assert callback.reports
    assert net.channels_left() < weights
    assert "forward" not in net.__dict__
    inputs = {"x": torch.randn(3, 5), "labels": torch.tensor([0, 1, 2])}
    with torch.autocast("cpu", torch.bfloat16):
        expected = net(**inputs)["logits"].float()
    torch.testing.assert_close(run.model(**inputs)["logits"], expected)


def test_a_language_model_that_reads_dtypes_trains_in_bfloat16(tmp_path: Path) -> None:
    """Its norms cast back to the dtype that they were given, which is another one under autocast."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 20, "head_dim": 8}
    config = Qwen3Config(**sizes, num_attention_heads=2, num_key_value_heads=1, use_cache=False)
    model = Qwen3ForCausalLM(config)
    ids = torch.randint(0, 20, (24, 6))
    net = fxc.compress(model, {"input_ids": ids[:2], "labels": ids[:2]})
    before = net.size().item()
    data = [{"input_ids": row, "labels": row} for row in ids]
    settings = TrainingArguments(
        str(tmp_path), bf16=True, use_cpu=True, num_train_epochs=3, report_to="none", remove_unused_columns=False
    )
    callback = SelfCompressionCallback(gamma=GAMMA, prune=4)
    run = Trainer(TrainerModel(net), settings, train_dataset=data, optimizers=(adam(net), None), callbacks=[callback])
    run.train()
    assert all(torch.isfinite(parameter).all() for parameter in net.parameters())
    assert net.size() < before
    final = net.eval().finalize()
    with torch.no_grad():
        expected = final(input_ids=ids, labels=ids).logits
        half = final.to(torch.bfloat16)(input_ids=ids, labels=ids).logits
    assert half.dtype == torch.bfloat16
    assert (half - expected).abs().max() < 0.1 * expected.abs().max()


def test_tied_weights_are_saved(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=12, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=8,
    )  # fmt: skip
    ids = torch.randint(0, 12, (2, 8))
    net = fxc.compress(BertForMaskedLM(config), {"input_ids": ids, "labels": ids})
    run = trainer(TrainerModel(net), adam(net), tmp_path, SelfCompressionCallback(gamma=GAMMA))
    run.save_model()
    assert (tmp_path / "model.safetensors").stat().st_size > 0


def test_a_gamma_that_is_a_function_is_not_restored_from_a_file() -> None:
    callback = SelfCompressionCallback(gamma=lambda progress, _: progress)
    with pytest.raises(ValueError, match="a checkpoint cannot hold a gamma that is a function"):
        SelfCompressionCallback.from_state(callback.state())


def test_network_without_wrapper_is_refused(tmp_path: Path) -> None:
    net = network()
    with pytest.raises(UnsupportedModelError, match=r"model is a Classifier; give it Trainer\(model=TrainerModel"):
        trainer(net, adam(net), tmp_path, SelfCompressionCallback(gamma=GAMMA))


def test_plain_network_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="net is a Classifier, not a network from fxcompress"):
        TrainerModel(Classifier())  # type: ignore[arg-type]


def test_bits_in_the_group_of_weights_are_refused(tmp_path: Path) -> None:
    net = network()
    run = trainer(
        TrainerModel(net), torch.optim.Adam(net.parameters()), tmp_path, SelfCompressionCallback(gamma=GAMMA)
    )  # fmt: skip
    with pytest.raises(OptimizerError, match="holds bits together with weights"):
        run.train()
    assert all(module.bits.grad is None for module in net.modules() if isinstance(module, Quantizer))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"remove_unused_columns": True}, "set remove_unused_columns=False"),
        ({"load_best_model_at_end": True}, "set load_best_model_at_end=False"),
        ({"label_smoothing_factor": 0.1}, "set label_smoothing_factor=0: the Trainer would keep the labels from"),
        ({"gradient_checkpointing": True}, "set gradient_checkpointing=False, and switch it on in the model before"),
    ],
)
def test_arguments_that_would_break_it_are_refused(tmp_path: Path, option: dict[str, Any], message: str) -> None:
    net = network()
    callback = SelfCompressionCallback(gamma=GAMMA)
    with pytest.raises(ValueError, match=message):
        trainer(TrainerModel(net), adam(net), tmp_path, callback, **option)


@pytest.mark.parametrize("restore", [False, True])
def test_a_share_of_the_multiply_adds_and_a_training_taken_up(tmp_path: Path, restore: bool) -> None:  # noqa: FBT001
    """In the middle of the path, when channels have been chosen and none has gone."""
    torch.manual_seed(0)
    fresh = network()
    nets = [copy.deepcopy(fresh), copy.deepcopy(fresh)]
    runs = [
        trainer(
            TrainerModel(net), adam(net), tmp_path, SelfCompressionCallback(target_macs=0.5, prune=NEVER),
            save_strategy="epoch", restore_callback_states_from_checkpoint=restore, num_train_epochs=6,
        )
        for net in nets
    ]  # fmt: skip
    runs[0].train()
    runs[1].train(resume_from_checkpoint=str(tmp_path / "checkpoint-48"))
    for (name, ours), theirs in zip(nets[1].named_parameters(), nets[0].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)
    assert 0.3 < nets[0].macs_left() <= 0.5
    assert runs[0].state.log_history[-2]["size/macs"] <= 0.5

    optimizer = adam(fresh)
    fxc.select_channels(fresh, optimizer, steps=144, target_macs=0.5)
    pairs = [pair for two in steps() for pair in two][:24] * 6
    for x, y in pairs:
        optimizer.zero_grad()
        fresh(x=x, labels=y)["loss"].backward()
        optimizer.step()
        fresh.step()
    fresh.prune(optimizer)
    for (name, ours), theirs in zip(fresh.named_parameters(), nets[0].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


def test_a_share_of_the_latency_is_measured(tmp_path: Path, counted: Counted) -> None:
    net = network()
    callback = SelfCompressionCallback(target_latency=0.7)
    trainer(TrainerModel(net), adam(net), tmp_path, callback, num_train_epochs=6).train()
    assert callback.lead.metrics()["size/latency"] <= 0.75
    assert counted.calls == 1
    assert json.loads(json.dumps(callback.state()))["attributes"]["chosen"]["table"]["layers"]
