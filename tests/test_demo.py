"""The demo from the command line, on two epochs: everything is written, and says what it should."""

import contextlib
import io
import json
import re
from pathlib import Path

import pytest
import torch

import fxcompress as fxc
from fxcompress.cli import main
from fxcompress.demo.digits import Batches, DigitsNet, load_digits, warp


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    threads, printed = torch.get_num_threads(), io.StringIO()
    torch.set_num_threads(4)
    try:
        with contextlib.redirect_stdout(printed):
            assert main(["demo", "--out", str(folder), "--epochs", "2"]) == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    (folder / "printed.txt").write_text(printed.getvalue(), "utf-8")
    return folder


def test_a_log_says_what_is_done(out: Path) -> None:
    lines = (out / "printed.txt").read_text("utf-8").splitlines()
    assert lines[:2] == [
        "training the float baseline: 2 epochs", "training the network that compresses itself: 2 epochs",
    ]  # fmt: skip
    assert "wrote report.html" in lines[-1]


def test_report_json(out: Path) -> None:
    report = json.loads((out / "report.json").read_text("utf-8"))
    for network in ("baseline", "compressed"):
        assert 0 <= report[network]["accuracy"] <= 1
        assert len(report[network]["history"]) == 2
    assert 0 < report["size"]["fractional"] < 0.25
    assert 0 < report["size"]["fractional"] < report["size"]["stored"] < 1
    assert report["size"]["fractional"] / 2 < report["size"]["file"] < 1
    assert 0 < report["weights"]["left"] <= 1
    assert report["seconds"]["total"] > report["seconds"]["baseline"] + report["seconds"]["compressed"]


def test_size_of_the_file_is_that_of_the_saved_network(out: Path) -> None:
    report = json.loads((out / "report.json").read_text("utf-8"))
    bits = 8 * (out / "net.fxc").stat().st_size
    assert report["size"]["file"] == pytest.approx(bits / (32 * report["weights"]["baseline"]))


def test_the_saved_network_loads_and_has_the_accuracy_of_the_report(out: Path) -> None:
    report = json.loads((out / "report.json").read_text("utf-8"))
    net = fxc.load(out / "net.fxc", model=DigitsNet())
    assert load_digits().accuracy(net) == pytest.approx(report["compressed"]["accuracy"])


def test_report_html_is_self_contained(out: Path) -> None:
    page = (out / "report.html").read_text("utf-8")
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 2
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "accuracy" in page
    assert "layer1.0" in page


def test_pictures(out: Path) -> None:
    for name in ("progress.png", "layers.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_the_test_images_are_never_trained_on() -> None:
    data, inner = load_digits(), load_digits(validation=100)
    assert len(data.x) + len(data.test_x) == 1797
    assert len(inner.x) + len(inner.test_x) == len(data.x)
    held_out = {tuple(x.flatten().tolist()) for x in data.test_x}
    seen = [tuple(x.flatten().tolist()) for x in torch.cat([inner.x, inner.test_x])]
    assert sum(x in held_out for x in seen) <= 2  # a few images occur twice in the data set


def test_batches_are_warped_images_of_the_same_range() -> None:
    data = load_digits()
    x, y = next(iter(Batches(data.x, data.y)))
    assert x.shape == (96, 1, 8, 8)
    assert y.shape == (96,)
    assert -1 <= x.min().item() < x.max().item() <= 1
    assert (warp(data.x[:8]) - data.x[:8]).abs().max().item() > 0.1
