"""Trained networks as `compress` takes them up, at 8 bits: what they lose before any training; and two fine-tuned down.

The data folder holds ``load.py`` and ``models.py`` with pretrained networks (see ``benchmarks/data.py``).
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress as fxc
from benchmarks.data import Cropped, cifar10, folder, module
from benchmarks.record import Claim, Column, Record, Table, write
from benchmarks.resnet9 import accuracy
from fxcompress.report.measure import sizes
from fxcompress.training.fit import FitResult

Measure = Callable[[nn.Module], float]
COLUMNS = (
    Column("network", "network"),
    Column("measure", "measure"),
    Column("before", "float", ".4f"),
    Column("after", "at 8 bits", ".4f"),
    Column("change", "change", "+.4f"),
    Column("agree", "same answers", ".1%"),
)
TUNED = (
    Column("target", "target", ".0%"),
    Column("bits", "bits left", ".2%"),
    Column("weights", "weights left", ".1%"),
    Column("file", "file, of 32 bits a weight", ".2%"),
    Column("file_evenly", "file, same bits everywhere", ".2%"),
    Column("before", "float accuracy", ".1%"),
    Column("at_once", "same bits everywhere, untrained", ".1%"),
    Column("evenly", "same bits everywhere, trained", ".1%"),
    Column("after", "accuracy", ".1%"),
    Column("others_before", "float accuracy, 10,000 others", ".1%"),
    Column("others_evenly", "same bits everywhere, trained, 10,000 others", ".1%"),
    Column("others_after", "accuracy, 10,000 others", ".1%"),
)
TOLD = (
    *TUNED[:5],
    Column("before", "float, nats a token", ".3f"),
    Column("at_once", "same bits everywhere, untrained", ".3f"),
    Column("evenly", "same bits everywhere, trained", ".3f"),
    Column("after", "nats a token", ".3f"),
)
LENGTH, BATCH, STEPS = 128, 16, 150
"""Tokens of a story, stories of a batch, and batches of an epoch, of the language model."""


def images(load: ModuleType, root: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs and labels by the network that takes them."""
    normalised = cifar10(root, "test", 1000)
    raw = torch.from_numpy(load.cifar10("test")[0]).permute(0, 3, 1, 2).float()
    sounds, words = load.keywords()
    return {
        "resnet20": normalised, "resnet56": normalised, "resnet8": (raw, normalised[1]),
        "dscnn": (torch.from_numpy(sounds), torch.from_numpy(words)),
    }  # fmt: skip


@torch.inference_mode()
def compare(name: str, net: nn.Module, x: Tensor, y: Tensor) -> dict[str, Any]:
    """One network before and after; logits (N, classes) or (N, T, classes)."""
    compressed = fxc.compress(net, x[:2]).eval()
    found = [torch.cat([m(part) for part in x.split(100)]).flatten(0, -2) for m in (net, compressed)]
    if name == "stories260k":
        measured = [float(F.cross_entropy(logits, y.flatten())) for logits in found]
    else:
        measured = [float((logits.argmax(1) == y).float().mean()) for logits in found]
    return {
        "network": name, "measure": "nats a token" if name == "stories260k" else "accuracy", "before": measured[0],
        "after": measured[1], "change": measured[1] - measured[0],
        "agree": float((found[0].argmax(1) == found[1].argmax(1)).float().mean()),
    }  # fmt: skip


def file_share(final: nn.Module) -> float:
    """The bytes of a finalized network's file over those of the original's weights as floats."""
    with tempfile.TemporaryDirectory() as place:
        return sizes(final, fxc.save(final, Path(place) / "net.fxc")).file


def at_once(net: nn.Module, x: Tensor, target: float, measure: Measure) -> float:
    """What a network measures that was only rounded, with the same bits in all channels, to a size."""
    return measure(fxc.compress(net.eval(), x[:2], bits=32 * target).eval())


def taught(output: Tensor, target: Tensor, answer: Tensor) -> Tensor:
    """The loss of the labels (N,), and that of the original's answers (N, classes) at temperature 2."""
    soft = F.kl_div((output / 2).log_softmax(1), (answer / 2).log_softmax(1), log_target=True, reduction="batchmean")
    return F.cross_entropy(output, target) + 4 * soft


def batches(root: Path, count: int = 10_000) -> Cropped:
    """To fine-tune on: images of CIFAR-10, the same in each run."""
    torch.manual_seed(0)
    return Cropped(*cifar10(root, "train", count), 128, torch.Generator().manual_seed(0))


def fine_tuned(net: nn.Module, root: Path, target: float, epochs: int) -> FitResult:
    """A network for CIFAR-10, trained on from its weights down to a target size."""
    x, y = cifar10(root, "test", 1000)
    return fxc.fit(
        net, batches(root), taught, teacher=net, epochs=epochs, target_size=target, fine_tune=True, lr=1e-3,
        validate=lambda found: accuracy(found, x, y), progress=False, on_epoch=lambda r: print(r, flush=True),
    )  # fmt: skip


def evenly(net: nn.Module, x: Tensor, target: float, loader: Any, loss: Any, epochs: int) -> nn.Module:  # noqa: ANN401
    """A network trained as long with the same bits in all channels, which stay as they are; exponents are trained."""
    compressed = fxc.compress(net.eval(), x[:2], bits=32 * target)
    for name, parameter in compressed.named_parameters():
        if name.endswith(".bits"):
            parameter.requires_grad_(False)
    return fxc.fit(
        compressed, loader, loss, teacher=net, epochs=epochs, gamma=0.0, fine_tune=True, lr=1e-3, progress=False,
    ).module  # fmt: skip


def tune(net: nn.Module, root: Path, target: float, epochs: int) -> dict[str, Any]:
    """What is left after fine-tuning, and the accuracies before and after.

    The 10,000 other images are no part of the fine-tuning. The float network was trained on them: they tell what it
    keeps, with less noise than 1,000 of the test.
    """
    result = fine_tuned(net, root, target, epochs)
    x, y = cifar10(root, "test", 1000)
    others = [part[10_000:] for part in cifar10(root, "train", 20_000)]
    same = evenly(net, x, target, batches(root), taught, epochs)
    last = result.history[-1]
    with torch.no_grad():
        rounded = at_once(net, x, target, lambda found: accuracy(found, x, y))
        found = {
            name: accuracy(module.eval(), *data)
            for data, kind in (((x, y), ""), (others, "others_"))
            for name, module in ((f"{kind}before", net), (f"{kind}evenly", same), (f"{kind}after", result.module))
        }
    files = {"file": file_share(result.module), "file_evenly": file_share(same)}
    return {"target": target, "bits": last.size, "weights": last.weights, **files, "at_once": rounded, **found}


@torch.no_grad()
def nats(net: nn.Module, tokens: Tensor) -> float:
    """The mean loss of a language model over tokens (N, T)."""
    logits = net.eval()(tokens[:, :-1])
    return float(F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))


def as_told(logits: Tensor, _: Tensor, answer: Tensor) -> Tensor:
    """The loss of the original's answers (N, T, tokens) alone: the few stories would be learnt by heart."""
    output, wanted = (values.flatten(0, 1).log_softmax(1) for values in (logits, answer))
    return F.kl_div(output, wanted, log_target=True, reduction="batchmean")


def tell(net: nn.Module, tokens: Tensor, target: float, epochs: int) -> dict[str, Any]:
    """The same with a language model: stories of its own kind, and the last ones for the test."""
    held = 128 * LENGTH
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(len(tokens) - held - LENGTH, (STEPS, BATCH), generator=generator)
    stories = tokens[starts[..., None] + torch.arange(LENGTH + 1)]
    test = tokens[-held:].view(-1, LENGTH)
    loader = [(story[:, :-1], story[:, 1:]) for story in stories]
    result = fxc.fit(
        net, loader, as_told, teacher=net, epochs=epochs, target_size=target, fine_tune=True, lr=1e-3,
        validate=lambda found: nats(found, test), progress=False, on_epoch=lambda r: print(r, flush=True),
    )  # fmt: skip
    last = result.history[-1]
    same = evenly(net, test[:, :-1], target, loader, as_told, epochs)
    return {
        "target": target, "bits": last.size, "weights": last.weights,
        "file": file_share(result.module), "file_evenly": file_share(same), "before": nats(net, test),
        "at_once": at_once(net, test[:, :-1], target, lambda found: nats(found, test)),
        "evenly": nats(same, test), "after": nats(result.module, test),
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.pretrained", description=__doc__)
    parser.add_argument("--data", help="the data folder (or the environment variable FXCOMPRESS_DATA)")
    parser.add_argument("--out", type=Path, help="folder for the results (benchmarks/results and docs/results)")
    parser.add_argument("--targets", type=float, nargs="+", default=[0.15, 0.08], help="to fine-tune to")
    parser.add_argument("--epochs", type=int, default=6, help="of fine-tuning; 0 for none")
    options = parser.parse_args(arguments)
    root = folder(options.data)
    sys.path.insert(0, str(root))  # its models.py and load.py import each other
    load, models = module(root, "load"), module(root, "models")
    rows = [compare(n, models.pretrained(n).eval(), *data) for n, data in images(load, root).items()]
    tokens = torch.from_numpy(load.stories()[: 64 * 256 + 1])
    rows.append(compare("stories260k", models.pretrained("stories260k").eval(), tokens[:-1].view(64, 256), tokens[1:]))
    for row in rows:
        print(row, flush=True)
    tables = [Table("As compress takes them up", COLUMNS, rows)]
    worst = max(-100 * row["change"] for row in rows[:-1])
    claims = [
        Claim("points of accuracy lost at 8 bits, at most (standard error of 1,000 images: 0.9)", worst, 0.9),
        Claim("nats a token lost at 8 bits", rows[-1]["change"], 0.005),
    ]
    if options.epochs:
        tuned = [tune(models.pretrained("resnet20"), root, target, options.epochs) for target in options.targets]
        title = f"resnet20, fine-tuned for {options.epochs} epochs of 10,000 images"
        tables.append(Table(title, TUNED, tuned))
        stories = torch.from_numpy(load.stories())
        told = [tell(models.pretrained("stories260k"), stories, target, options.epochs) for target in options.targets]
        title = f"stories260k, fine-tuned for {options.epochs} epochs of {STEPS} batches of {BATCH} x {LENGTH} tokens"
        tables.append(Table(title, TOLD, told))
    chosen = {"targets": options.targets, "epochs": options.epochs}
    targets = " ".join(map(str, options.targets))
    command = f"python -m benchmarks.pretrained --targets {targets} --epochs {options.epochs}"
    print(write(Record("pretrained", "From pretrained weights", command, chosen, tables, claims), options.out))


if __name__ == "__main__":
    main(sys.argv[1:])
