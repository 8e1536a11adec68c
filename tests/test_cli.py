"""The command line: what it prints, and what it says when it cannot."""

import pytest

from fxcompress.cli import main

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
        (["inspect", "torchvision:resnet19"], "no model 'resnet19'"),
        (["inspect", "nowhere:Net"], "cannot build nowhere:Net"),
        (["inspect", "tests.nets:batch"], "not a torch.nn.Module"),
        (["inspect", NET, "--input", "1,3,x"], "write it as 1,3,224,224"),
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
