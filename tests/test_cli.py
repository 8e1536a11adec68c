"""The command line: what it prints, and what it says when it cannot."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fxcompress.cli import main

ROOT = Path(__file__).resolve().parents[1]
NET = "tests.nets:ResidualNet"


def test_inspect_prints_the_graph(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", NET, "--input", "2,3,10,10"]) == 0
    printed = capsys.readouterr().out
    assert "32 of them removable" not in printed.splitlines()[0]
    assert "stem.0, block1.conv2 +1" in printed
    assert "it is an output of the network" in printed


def test_inspect_torchvision(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "torchvision:resnet18", "--input", "1,3,64,64"]) == 0
    assert "2,880 of them removable" in capsys.readouterr().out


def test_explain(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", NET, "--input", "2,3,10,10", "--explain", "block1.conv1", "3"]) == 0
    printed = capsys.readouterr().out
    assert "made by     block1.conv1.weight[3]" in printed
    assert "read by     block1.conv2.weight[3]" in printed


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["inspect", "resnet18"], "names no model"),
        (["inspect", "torchvision:resnet19"], "no model 'resnet19'; did you mean resnet18"),
        (["inspect", "torchvision:quxquux"], "no model 'quxquux'; see torchvision.models.list_models()"),
        (["inspect", "nowhere/nets.py:Net"], "there is no file nowhere/nets.py"),
        (["inspect", "tests.nets:__name__"], "tests.nets:__name__ is a str, not a torch.nn.Module"),
        (["inspect", "tests/nets.py"], "names a file and no model in it; write tests/nets.py:name"),
        (["inspect", "nowhere:Net"], "cannot build nowhere:Net"),
        (["inspect", "tests.nets:batch"], "not a torch.nn.Module"),
        (["inspect", NET, "--input", "1,3,x"], "write it as 1,3,224,224"),
        (["inspect", NET, "--input", "1,-3,4"], "write it as 1,3,224,224"),
        (["inspect", NET, "--input", "1,3,9,9:int65"], "torch has no dtype 'int65'"),
        (["inspect", NET, "--input", "1,4,10,10"], "does not run on the example inputs"),
        (["inspect", NET, "--input", "2,3,10,10", "--explain", "block9", "3"], "no module or parameter 'block9'"),
        (["inspect", NET, "--input", "2,3,10,10", "--explain", "fc", "77"], "no channel 77"),
        (["demo", "--epochs", "0"], "must be at least 1"),
    ],
)
def test_errors_are_a_line_and_an_exit_code(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    assert text in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out.startswith("fxcompress 0.")


OWN = """
import torch
from torch import nn

class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(10, 8), nn.Linear(8, 3)

    def forward(self, ids, scale):
        return self.out(self.table(ids) * scale)

words = Words()
"""


@pytest.mark.parametrize(
    "name", ["own_words:Words", "own_words.py:Words", "{folder}/own_words.py:Words", "own_words:words"]
)
def test_a_model_of_ones_own(name: str, tmp_path: Path) -> None:
    """A command does not look for modules where it is called, as ``python -m`` does."""
    (tmp_path / "own_words.py").write_text(OWN, "utf-8")
    command = [sys.executable, "-c", "import sys; sys.path.pop(0); from fxcompress.cli import main; sys.exit(main())"]
    inputs = ["--input", "2,5:int64", "--input", "2,5,8"]
    run = subprocess.run(
        [*command, "inspect", name.format(folder=tmp_path), *inputs],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "Words on (2, 5) int64, (2, 5, 8) float32" in run.stdout


def test_a_file_may_have_the_name_of_another_module(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("types.py", "test_cli.py"):
        (tmp_path / name).write_text(OWN, "utf-8")
        assert main(["inspect", f"{tmp_path}/{name}:Words", "--input", "2,5:int64", "--input", "2,5,8"]) == 0
        assert "Words on (2, 5) int64, (2, 5, 8) float32" in capsys.readouterr().out


def test_what_is_missing_is_told_as_the_command_takes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "two_inputs.py").write_text(OWN, "utf-8")
    assert main(["inspect", f"{tmp_path}/two_inputs.py:Words"]) == 1
    assert "--input 1,3,224,224 (or 1,16:int64), once for each argument of forward" in capsys.readouterr().err


def test_a_file_in_a_package(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "relative_words.py").write_text("from .words import Words\n", "utf-8")
    assert main(["inspect", f"{tmp_path}/relative_words.py:Words"]) == 1
    assert "name it as a module of its package, package.module:name" in capsys.readouterr().err
