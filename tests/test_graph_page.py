"""The graph as a page: complete, well-formed, safe with any name, and in need of nothing else."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.cli import main
from tests.nets import ResidualNet

EMPTY = {"meta", "input"}
NASTY = "</script><b title='x'>&amp;\u2028"  # torch.fx itself fails on double quotes


class Page(HTMLParser):
    """Reads a page: its text, what is in its scripts, and whether every tag is closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.scripts: list[str] = []
        self.text = ""
        self.source = path.read_text("utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.open += [] if tag in EMPTY else [tag]
        self.scripts += [""] if tag == "script" else []

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        else:
            self.text += data

    @property
    def data(self) -> Any:  # noqa: ANN401 - JSON
        return json.loads(self.scripts[0])


def page_of(model: nn.Module, folder: Path) -> Page:
    path = folder / "graph.html"
    fxc.ChannelGraph.of(model, torch.zeros(2, 3, 10, 10)).save_html(path)
    return Page(path)


def test_header(tmp_path: Path) -> None:
    text = page_of(ResidualNet(8), tmp_path).text
    assert "Channels of ResidualNet" in text
    assert "(2, 3, 10, 10) float32" in text
    assert re.search(r"removable\s*24", text)


def test_layers_in_the_order_of_the_network(tmp_path: Path) -> None:
    layers = page_of(ResidualNet(8), tmp_path).data["layers"]
    names = [layer["name"] for layer in layers]
    assert names == ["stem.0", "block1.conv1", "block1.conv2", "block2.conv1", "block2.conv2", "fc"]
    assert layers[0]["shape"] == [8, 3, 3, 3]


def test_bundles(tmp_path: Path) -> None:
    data = page_of(ResidualNet(8), tmp_path).data
    trunk = next(b for b in data["bundles"] if b["groups"] == 8 and len(b["made"]) == 3)
    names = [layer["name"] for layer in data["layers"]]
    assert [names[i] for i in trunk["made"]] == ["stem.0", "block1.conv2", "block2.conv2"]
    assert [names[i] for i in trunk["read"]] == ["block1.conv1", "block2.conv1", "fc"]
    assert "block1.bn2.weight" in trunk["with"]
    assert trunk["range"] == "0-7"
    assert trunk["kept"] == []
    outputs = next(b for b in data["bundles"] if [names[i] for i in b["made"]] == ["fc"])
    assert outputs["kept"] == ["it is an output of the network"]


def test_an_op_without_a_rule_is_named(tmp_path: Path) -> None:
    class Scattered(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            y = self[0](x)
            return self[1](y.masked_scatter(y > 0, y))  # type: ignore[no-any-return]

    page = page_of(Scattered(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)), tmp_path)
    assert "no rule for aten.masked_scatter.default: it keeps " in page.text


def test_names_are_escaped(tmp_path: Path) -> None:
    model = nn.Sequential()
    model.add_module(NASTY, nn.Conv2d(3, 8, 3))
    model.add_module("TITLE /*DATA*/ <!--HEADER-->", nn.Conv2d(8, 4, 3))
    model.__class__ = type(NASTY, (nn.Sequential,), {})
    plain, nasty = page_of(ResidualNet(8), tmp_path), page_of(model, tmp_path)
    assert nasty.tags == plain.tags
    assert NASTY in nasty.text
    assert [layer["name"] for layer in nasty.data["layers"]] == [NASTY, "TITLE /*DATA*/ <!--HEADER-->"]


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    page = page_of(ResidualNet(8), tmp_path)
    assert not {"link", "img", "iframe"} & set(page.tags)
    assert re.findall(r"\b(?:src|href)\s*=|url\(|@import|\bfetch\(|\bimport\(", page.source) == []
    assert set(re.findall(r"https?://[^\"\s]+", page.source)) == {"http://www.w3.org/2000/svg"}  # a name, not a place


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_script_is_sound(tmp_path: Path) -> None:
    script = tmp_path / "script.js"
    script.write_text(page_of(ResidualNet(8), tmp_path).scripts[1], "utf-8")
    run = subprocess.run(["node", "--check", str(script)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "graph.html"
    assert main(["inspect", "tests.nets:ResidualNet", "--input", "2,3,10,10", "--html", str(path)]) == 0
    assert "removable" in capsys.readouterr().out
    assert "Channels of ResidualNet" in Page(path).text


def test_a_file_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "nowhere" / "graph.html"
    assert main(["inspect", "tests.nets:ResidualNet", "--input", "2,3,10,10", "--html", str(path)]) == 1
    assert "No such file" in capsys.readouterr().err
