"""Trains the float baseline, then the network that compresses itself, and reports on both."""

import copy
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.demo.digits import Batches, Digits, DigitsNet, load_digits
from fxcompress.report.comparison import Comparison, Network, as_json
from fxcompress.report.figures import draw_layers, draw_progress
from fxcompress.report.html import write_html
from fxcompress.report.layers import layer_widths
from fxcompress.report.measure import Sizes, compare_latency, multiply_adds, quantized_weights, sizes
from fxcompress.report.table import table
from fxcompress.training.fit import FitResult, train_plain
from fxcompress.training.history import EpochRecord
from fxcompress.training.schedule import cosine


@dataclass(frozen=True, slots=True)
class Recipe:
    """How both networks are trained.

    Attributes:
        epochs: of each.
        seed: of the weights, the order of the images and their warps.
        lr: of Adam on the weights; falls to 0 along half a cosine, and that of bits and exponents with it.
        gamma: pressure at the start; falls to 0 in a straight line: channels die while much can still be learnt.
        smoothing: of the labels.
        teacher: share of the compressed network's loss that asks for the baseline's answer in place of the label.
        temperature: of that answer.
        betas: of Adam. Its usual memory of a thousand steps is longer than the whole run.
    """

    epochs: int = 60
    seed: int = 0
    lr: float = 5e-3
    gamma: float = 0.5
    smoothing: float = 0.05
    teacher: float = 0.7
    temperature: float = 3.0
    betas: tuple[float, float] = (0.9, 0.99)

    def loss(self, output: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
        """Cross-entropy with the label, and with the answer of the teacher (Hinton et al., arXiv 1503.02531)."""
        labels, answer = target
        hard = F.cross_entropy(output, labels, label_smoothing=self.smoothing)
        t = self.temperature
        soft = F.kl_div(F.log_softmax(output / t, 1), F.softmax(answer / t, 1), reduction="batchmean") * t * t
        return (1 - self.teacher) * hard + self.teacher * soft


@dataclass(frozen=True, slots=True)
class Taught:
    """Batches whose target is the label together with what another network answers."""

    batches: Batches
    teacher: nn.Module

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor]]]:
        for x, y in self.batches:
            with torch.no_grad():
                answer = self.teacher(x)
            yield x, (y, answer)


NOTE = (
    "Both networks: Adam on the weights, label smoothing, images warped at random, learning rates down to 0 along a "
    "cosine. Compressed: taught by the baseline's answers as well as by the labels; bits and exponents at the paper's "
    "learning rate of 0.5 and eps of 1e-3; size by equation 5 of arXiv 2301.13142; pressure from gamma down to 0 in a "
    "straight line; dead channels are removed as soon as it pays."
)


def compare(recipe: Recipe, data: Digits, out: Path, console: Console) -> tuple[Comparison, FitResult]:
    """Train both networks and measure them; the compressed network is saved in ``out``."""
    start = time.perf_counter()
    loss = nn.CrossEntropyLoss(label_smoothing=recipe.smoothing)
    torch.manual_seed(recipe.seed)
    model = DigitsNet()
    _say(console, f"training the float baseline: {recipe.epochs} epochs")
    baseline, history = _baseline(recipe, data, model, loss, console)
    middle = time.perf_counter()
    _say(console, f"training the network that compresses itself: {recipe.epochs} epochs")
    result = _compressed(recipe, data, model, baseline, console)
    trained = time.perf_counter()
    _say(console, "measuring both")
    one, many = data.test_x[:1], data.test_x[:64]
    compressed = Network(
        data.accuracy(result.module),
        sizes(result.module, fxc.save(result.module, out / "net.fxc")),
        quantized_weights(result.module),
        multiply_adds(result.module, one),
        result.history,
    )
    comparison = Comparison(
        "Digits, 8 x 8 pixels: float baseline against the network that compressed itself",
        Network(
            data.accuracy(baseline), _float_sizes(model, result), result.net.weights, multiply_adds(model, one), history
        ),
        compressed,
        [compare_latency(baseline, result.module, inputs) for inputs in (one, many)],
        layer_widths(result.module, [name for name, _ in model.named_parameters()]),
        {
            "baseline": middle - start, "compressed": trained - middle,
            "measuring": time.perf_counter() - trained, "total": time.perf_counter() - start,
        },
        {"command": f"fxcompress demo --seed {recipe.seed} --epochs {recipe.epochs}", **_settings(recipe)},
    )  # fmt: skip
    return comparison, result


def _say(console: Console, line: str) -> None:
    """A line for logs and pipes, which have no progress bars: some minutes are long without a word."""
    if not console.is_terminal:
        console.print(line)


def _settings(recipe: Recipe) -> dict[str, Any]:
    return asdict(recipe)


def _baseline(
    recipe: Recipe, data: Digits, model: nn.Module, loss: nn.Module, console: Console
) -> tuple[nn.Module, list[EpochRecord]]:
    torch.manual_seed(recipe.seed)
    net, batches = copy.deepcopy(model), Batches(data.x, data.y)
    optimizer = torch.optim.Adam(net.parameters(), recipe.lr, recipe.betas)
    history = train_plain(
        net, batches, loss, epochs=recipe.epochs, optimizer=optimizer,
        scheduler=cosine(optimizer, recipe.epochs * len(batches), len(batches)), validate=data.accuracy,
        progress=console.is_terminal,
    )  # fmt: skip
    return net.eval(), history


def _compressed(recipe: Recipe, data: Digits, model: nn.Module, teacher: nn.Module, console: Console) -> FitResult:
    torch.manual_seed(recipe.seed)
    net = fxc.compress(model, data.x[:2])
    optimizer = torch.optim.Adam(net.param_groups(recipe.lr, exponents_lr=0.5), betas=recipe.betas)
    return fxc.fit(
        net, Taught(Batches(data.x, data.y), teacher), recipe.loss, epochs=recipe.epochs, optimizer=optimizer,
        validate=data.accuracy, gamma=lambda progress, _: recipe.gamma * (1 - progress), progress=console.is_terminal,
    )  # fmt: skip


def _float_sizes(model: nn.Module, result: FitResult) -> Sizes:
    """The baseline by the same measures: 32 bits a weight, and its parameters and buffers as they are."""
    content = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    return Sizes(1.0, 1.0, content / (4 * result.net.weights))


def run(out: str | Path, recipe: Recipe) -> dict[str, Any]:
    """The demo: train, print the table, and write report.json, report.html, pictures and the network into ``out``.

    Returns:
        the content of report.json.

    Raises:
        FxCompressError: a package of the extra ``demo`` is missing.
    """
    start = time.perf_counter()
    folder, console = Path(out), Console()
    data = load_digits()
    folder.mkdir(parents=True, exist_ok=True)
    comparison, _ = compare(recipe, data, folder, console)
    pictures = [("Size and accuracy over epochs", folder / "progress.png"), ("Layers", folder / "layers.png")]
    draw_progress(comparison, pictures[0][1])
    draw_layers(comparison.layers, pictures[1][1])
    comparison.seconds["total"] = time.perf_counter() - start
    report = as_json(comparison)
    (folder / "report.json").write_text(json.dumps(report, indent=1), "utf-8")
    write_html(comparison, pictures, folder / "report.html", NOTE)
    console.print(table(comparison))
    console.print(
        f"{comparison.seconds['total']:.0f} s; wrote report.html, report.json, pictures and net.fxc to {folder}",
        soft_wrap=True,
    )
    sys.stdout.flush()
    return report
