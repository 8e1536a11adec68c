"""What self-compression adds to a step of training, and what removal gives back."""

import argparse
import copy
import gc
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import fxcompress as fxc
from benchmarks.record import Claim, Column, Record, Table, command, parser, settings, write
from benchmarks.resnet9 import ResNet9
from benchmarks.timing import Stopwatch, keep_memory, medians, paired_ratio, rotated, settle, threads
from fxcompress.quantizer import Quantizer, compile_quantizers, quantize_reference

PAPER = (30, 102, 112, 364, 101, 58)
"""Widths that the paper's example ends with: prep, layers 1 to 3, inside the first and the last residual branch."""
KEEP = {
    "prep.0": 30, "layer1.0": 102, "branch1.0.0": 101, "branch1.1.0": 102, "layer2.0": 112, "layer3.0": 364,
    "branch3.0.0": 58, "branch3.1.0": 364,
}  # fmt: skip
"""The same by layer."""
KEPT = "memory kept between steps"
COLUMNS = (
    Column("what", "what"),
    Column("threads", "threads", "d"),
    Column("seconds", "seconds", ".4f"),
    Column("against", "against"),
    Column("ratio", "ratio", ".3f"),
)
Run = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Contest:
    """Things that are timed in turn.

    Attributes:
        title: of the table.
        runs: what is timed; the first is what the others are compared with.
        prepare: what is done before, and not timed.
    """

    title: str
    runs: dict[str, Run]
    prepare: dict[str, Run] = field(default_factory=dict)


def contest(found: Contest, repeats: int, used: int) -> list[dict[str, Any]]:
    """Time all in turn, each round another one first."""
    names = list(found.runs)
    for name in names * 2:
        found.prepare.get(name, settle)()
        found.runs[name]()
    rounds: dict[str, list[Stopwatch]] = {name: [] for name in names}
    for turn in range(repeats):
        for name in rotated(names, turn):
            found.prepare.get(name, settle)()
            settle()
            watch = Stopwatch()
            with watch.phase("all"):
                found.runs[name]()
            rounds[name].append(watch)
    seconds = {name: [watch.laps["wall"]["all"] for watch in watches] for name, watches in rounds.items()}
    return [
        {
            "contest": found.title, "what": name, "threads": used, "seconds": medians(rounds[name], "wall")["all"],
            "against": names[0], "ratio": paired_ratio(seconds[name], seconds[names[0]]),
        }
        for name in names
    ]  # fmt: skip


class Encoder(nn.Module):
    """Six transformer layers of width 256 with four heads, on tokens; the mean over them is classified."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, 256)
        layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self.head = nn.Linear(256, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (N, 10) of tokens (N, T)."""
        result: Tensor = self.head(self.layers(self.embedding(tokens)).mean(1))
        return result


@dataclass(slots=True)
class Training:
    """A network in training, and one step of it."""

    net: nn.Module
    inputs: Tensor
    target: Tensor
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        net = self.net
        groups = net.param_groups(1e-4, bits_lr=1e-3) if isinstance(net, fxc.CompressedModule) else net.parameters()
        self.optimizer = torch.optim.Adam(groups, lr=1e-4, fused=True)

    def __call__(self) -> None:
        """One step."""
        loss = F.cross_entropy(self.net(self.inputs), self.target)
        if isinstance(self.net, fxc.CompressedModule):
            loss = loss + 1e-4 * self.net.size()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if isinstance(self.net, fxc.CompressedModule):
            self.net.step()


def quantizers(seed: int, *, compiled: bool) -> Contest:
    """Forward and backward of all weights of resnet18, by four quantizers."""
    torch.manual_seed(seed)
    weights = [p.detach().clone().requires_grad_() for p in torchvision.models.resnet18().parameters() if p.ndim > 1]
    modules = [Quantizer.for_weight(weight, bits=4.0) for weight in weights]
    fast = dict(zip(modules, copy.deepcopy(modules), strict=True))
    grads = [torch.randn_like(weight) for weight in weights]

    def run(function: Callable[[Tensor, Quantizer], Tensor]) -> Run:
        def call() -> None:
            results = [function(w, q) for w, q in zip(weights, modules, strict=True)]
            torch.autograd.backward(results, grads)
            for owner in [*modules, *fast.values()]:
                owner.zero_grad()
            for weight in weights:
                weight.grad = None

        return call

    def rows(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Tensor, Quantizer], Tensor]:
        return lambda w, q: function(w.flatten(1), q.bits[:, None], q.exponent[:, None]).view_as(w)

    def fake(weight: Tensor, quantizer: Quantizer) -> Tensor:
        zero = torch.zeros(len(weight), dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight, quantizer.exponent.detach().exp2(), zero, 0, -8, 7)

    runs = {"composition of torch operations": run(rows(quantize_reference)), "ours": run(lambda w, q: q(w))}
    runs["fake quantize of torch, which learns nothing"] = run(fake)
    if compiled:
        compile_quantizers(nn.ModuleList(fast.values()))
        runs["ours, compiled"] = run(lambda w, q: fast[q](w))
    return Contest("Quantizing the weights of resnet18, forward and backward", runs)


def overhead(title: str, model: nn.Module, inputs: Tensor, target: Tensor, *, compiled: bool) -> Contest:
    """A step of a network with quantizers, nothing removed, against one of the plain network."""
    plain = Training(copy.deepcopy(model).train(), inputs, target)
    runs: dict[str, Run] = {"float": plain}
    for kind in ("with quantizers", *(["with compiled quantizers"] if compiled else [])):
        net = fxc.compress(model, inputs[:2])
        if "compiled" in kind:
            net.compile_quantizers()
        runs[kind] = Training(net.train(), inputs, target)
    return Contest(f"A step of training: {title}", runs)


def shrunk(seed: int) -> Contest:
    """A step of the paper's network once it has shrunk, against one of a network built at that size."""
    torch.manual_seed(seed)
    x, y = torch.randn(128, 3, 32, 32), torch.randint(10, (128,))
    net = fxc.compress(ResNet9.of_width(64), x[:2])
    training = Training(net, x, y)
    training()
    narrow(net)
    net.prune(training.optimizer)
    assert [net.get_parameter(f"{name}.weight").shape[0] for name in KEEP] == list(KEEP.values())
    built = Training(fxc.compress(ResNet9(*PAPER), x[:2]), x, y)
    return Contest("A step of ResNet-9 at the widths of the paper's example", {"built": built, "shrunk": training})


def odd_widths(seed: int) -> Contest:
    """The same network with its widths rounded up to multiples of 8."""
    torch.manual_seed(seed)
    x, y = torch.randn(128, 3, 32, 32), torch.randint(10, (128,))
    rounded = [-(-width // 8) * 8 for width in PAPER]
    runs: dict[str, Run] = {
        name: Training(ResNet9(*widths), x, y)
        for name, widths in {"widths as they come": PAPER, "rounded up to multiples of 8": rounded}.items()
    }
    return Contest("A step of the float ResNet-9: odd widths", runs)


def removal(seed: int) -> Contest:
    """Taking an eighth of the inner channels out of ResNet-9 at width 16, against a step at batch 256."""
    torch.manual_seed(seed)
    x, y = torch.randn(256, 3, 32, 32), torch.randint(10, (256,))
    training = Training(fxc.compress(ResNet9.of_width(16), x[:2]), x, y)
    training()
    ready: list[Training] = []

    def prepare() -> None:
        again = Training(copy.deepcopy(training.net), x, y)
        again()
        assert isinstance(again.net, fxc.CompressedModule)
        for owner in ("branch1.0", "branch3.0"):
            kill(again.net, f"{owner}.0", again.net.get_parameter(f"{owner}.1.bias").numel() * 7 // 8)
        again.net.step()
        ready[:] = [again]

    def remove() -> None:
        found = ready.pop()
        assert isinstance(found.net, fxc.CompressedModule)
        assert found.net.prune(found.optimizer).modified

    runs: dict[str, Run] = {"step": training, "removal": remove}
    return Contest("One removal against a step at batch 256, ResNet-9 of width 16", runs, {"removal": prepare})


def kill(net: nn.Module, conv: str, keep: int) -> None:
    """Leave no bits and no bias to all channels of a convolution but the first ``keep``; its batch norm follows it."""
    with torch.no_grad():
        net.get_parameter(f"{conv}.weight_quantizer.bits")[keep:] = 0
        net.get_parameter(f"{conv.rpartition('.')[0]}.1.bias")[keep:] = 0


def narrow(net: fxc.CompressedModule) -> None:
    """Bring ResNet-9 to the widths of the paper's example, but for the removal."""
    for conv, keep in KEEP.items():
        kill(net, conv, keep)
    net.step()


def memory(seed: int) -> dict[str, Any]:
    """Bytes of all parameters, gradients and state of Adam before and after a removal."""
    torch.manual_seed(seed)
    x, y = torch.randn(8, 3, 32, 32), torch.randint(10, (8,))
    net = fxc.compress(ResNet9.of_width(64), x[:2])
    training = Training(net, x, y)
    training()
    settle()
    before, weights = _bytes(), net.weights
    narrow(net)
    net.prune(training.optimizer)
    settle()
    left = net.weights_left()
    return {"weights left": left, "bytes before": before, "bytes after": _bytes(), "weights before": weights}


def _bytes() -> int:
    """Of all tensors with a gradient that are alive, their gradients, and all tensors of the size of a weight."""
    storages = {}
    for found in gc.get_objects():
        if issubclass(type(found), Tensor):
            storages[found.untyped_storage().data_ptr()] = found.untyped_storage().nbytes()
            if found.is_leaf and found.grad is not None:
                storages[found.grad.untyped_storage().data_ptr()] = found.grad.untyped_storage().nbytes()
    return sum(storages.values())


def contests(options: argparse.Namespace) -> Iterator[Contest]:
    """All of them, each made when the one before is done."""
    torch.manual_seed(options.seed)
    yield quantizers(options.seed, compiled=options.compile)
    model = torchvision.models.resnet18(num_classes=10)
    image, label = torch.randn(32, 3, 64, 64), torch.randint(10, (32,))
    yield overhead("resnet18 at 3 x 64 x 64, batch 32", model, image, label, compiled=options.compile)
    tokens, kind = torch.randint(1000, (16, 128)), torch.randint(10, (16,))
    yield overhead(
        "six transformer layers of width 256, 16 x 128 tokens", Encoder(), tokens, kind, compiled=options.compile
    )
    yield shrunk(options.seed)
    yield odd_widths(options.seed)
    yield removal(options.seed)
    if keep_memory():
        title = f"resnet18 at 3 x 64 x 64, batch 32, {KEPT}"
        yield overhead(title, model, image, label, compiled=options.compile)


def claims(rows: list[dict[str, Any]], freed: dict[str, Any]) -> list[Claim]:
    """What the numbers are measured for."""
    ratio = {(row["contest"].partition(":")[2] or row["contest"], row["what"]): row["ratio"] for row in rows}
    first = next(row["contest"] for row in rows)
    ours = ratio[first, "ours"]
    fake = ratio[first, "fake quantize of torch, which learns nothing"]
    found = [
        Claim("the quantizer over the composition of torch operations", ours, 1 / 3),
        Claim("the quantizer over torch's fake quantize", ours / fake, 1.0),
    ]
    for (contest, what), value in ratio.items():
        if what == "with quantizers":
            limit = 1.10 if "resnet18" in contest else 1.15
            found.append(Claim(f"step with quantizers over float:{contest}", value, limit))
        elif what == "with compiled quantizers":
            limit = 1.05 if "resnet18" in contest else 1.15
            found.append(Claim(f"step with compiled quantizers over float:{contest}", value, limit))
        elif what == "shrunk":
            found.append(Claim("step of a network that has shrunk over one built at that size", value, 1.05))
        elif what == "removal":
            found.append(Claim("a removal, in steps at batch 256", value, 3.0))
    share = freed["bytes after"] / freed["bytes before"]
    return [*found, Claim("memory left over weights left", share / freed["weights left"], 1.1)]


def main(arguments: list[str] | None = None) -> None:
    options_parser = parser("step", __doc__, repeats=15)
    options_parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="needs a compiler"
    )
    options = options_parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    freed = memory(options.seed)
    print(freed, flush=True)
    for count in options.threads[-1:]:
        with threads(count) as used:
            for found in contests(options):
                rows += contest(found, options.repeats, used)
                for row in rows[-len(found.runs) :]:
                    print({key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()}, flush=True)
    titles = list(dict.fromkeys(row["contest"] for row in rows))
    tables = [Table(title, COLUMNS, [row for row in rows if row["contest"] == title]) for title in titles]
    columns = tuple(Column(key, key, ".3f" if "left" in key else ",d") for key in freed)
    tables.append(Table("Memory of parameters, gradients and the state of Adam", columns, [freed]))
    record = Record(
        "step", "A step of training", command("step", options), settings(options), tables, claims(rows, freed), rows
    )
    print(write(record, options.out))


if __name__ == "__main__":
    main(sys.argv[1:])
