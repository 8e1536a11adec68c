"""What a run shows while it goes on, and what its result says of it."""

import io

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.nn import functional as F

import fxcompress as fxc
from fxcompress.training.display import Display
from fxcompress.training.history import EpochRecord

RECORD = EpochRecord(10, 0.213, 0.9, 0.0846, 0.92, 562, 0.1, 1.3, "accuracy")
FIGURES = "epoch 10 loss 0.2130 accuracy 90.00% bits  8.46% weights 92.0% channels 562"


def shown(*, terminal: bool, enabled: bool = True) -> str:
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=terminal, color_system=None, force_jupyter=False)
    with Display("self-compressing", 10, enabled=enabled, console=console) as display:
        display.show(RECORD)
    return out.getvalue()


def test_a_terminal_of_80_columns_shows_all_figures() -> None:
    text = shown(terminal=True)
    assert "self-compressing" in text
    assert "10/10" in text
    assert FIGURES in text


def test_a_log_gets_a_line_for_each_epoch() -> None:
    assert shown(terminal=False) == f"{FIGURES}\n"


@pytest.mark.parametrize("terminal", [False, True])
def test_no_display(*, terminal: bool) -> None:
    assert shown(terminal=terminal, enabled=False) == ""


def test_results_are_printed_in_a_few_lines() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    loader = [(torch.randn(16, 4), torch.arange(16) % 2) for _ in range(3)]
    result = fxc.fit(model, loader, F.cross_entropy, epochs=2, gamma=0.01, progress=False)
    first, last, weights, macs, module = str(result).splitlines()
    assert first.startswith("FitResult after 2 epochs, ")
    assert last.strip() == str(result.history[-1])
    assert "of their bits as trained" in weights
    assert macs == "  multiply-adds of quantized layers, whatever the bits: 100.0%"
    assert module == "  .module: Sequential with 58 parameters, to be used and saved"
    pruned = fxc.prune(model, torch.zeros(2, 4))
    assert str(pruned) == f"PruneResult of a Sequential: {pruned.report}"
