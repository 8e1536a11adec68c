"""The line that a long call draws on the terminal."""

import io
import time

import pytest
import torch
from rich.console import Console
from torch import nn

import fxcompress as fxc
from fxcompress import progress as shown
from fxcompress.progress import progress, stage


def terminal(*, is_one: bool = True) -> Console:
    return Console(file=io.StringIO(), force_terminal=is_one, width=120)


def drawn(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def wait_for(text: str, console: Console) -> None:
    end = time.monotonic() + 60
    while text not in drawn(console) and time.monotonic() < end:
        time.sleep(0.01)
    assert text in drawn(console)


def test_a_long_call_says_what_it_is_doing() -> None:
    console = terminal()
    with progress("pruning Net", console=console, patience=0):
        stage("analysis", 3, 120)
        wait_for("analysis", console)
    assert "pruning Net" in drawn(console)


def test_a_short_call_draws_nothing() -> None:
    console = terminal()
    with progress("pruning Net", console=console, patience=60):
        stage("analysis")
    assert not drawn(console).strip()


def test_where_there_is_no_terminal_nothing_is_written() -> None:
    console = terminal(is_one=False)
    with progress("pruning Net", console=console, patience=0):
        stage("analysis")
    assert not drawn(console)


def test_a_call_within_a_call_leaves_the_line_alone() -> None:
    outer, inner = terminal(), terminal()
    with progress("outer", console=outer, patience=0):
        with progress("inner", console=inner, patience=0):
            stage("rewrite")
        wait_for("rewrite", outer)
    assert not drawn(inner)


def test_the_line_goes_when_the_call_fails() -> None:
    console = terminal()
    with pytest.raises(ValueError, match="broken"), progress("pruning", console=console, patience=0):
        raise ValueError("broken")
    before = drawn(console)
    stage("rewrite")
    time.sleep(0.2)
    assert drawn(console) == before


def test_pruning_tells_its_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    for module in ("channels.prepare", "channels.interpret", "passes.rewrite"):
        monkeypatch.setattr(f"fxcompress.{module}.stage", lambda name, *_: told.append(name))
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 2))
    with torch.no_grad():
        model.get_parameter("0.weight")[1] = 0
    fxc.prune(model, torch.zeros(1, 2))
    assert list(dict.fromkeys(told)) == ["trace", "analysis", "rewrite", "check"]
    assert not shown._lines
