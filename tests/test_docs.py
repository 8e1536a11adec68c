"""The documentation says what is so: its examples run as pasted, and what it names is there."""

import ast
import importlib
import importlib.util
import re
import textwrap
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
import fxcompress.passes
from fxcompress.channels.rules import registry
from tests.exactness import difference
from tests.test_house import TRACE_LAYERS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.name: page.read_text("utf-8") for page in PAGES}
BLOCKS = [
    pytest.param(code, id=f"{name}-{number}")
    for name, text in TEXTS.items()
    for number, code in enumerate(re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
]
RUN_ELSEWHERE = ("init_process_group", "load_checkpoint", "LatencyTable", "half is brighter")
"""In other tests, with several processes, say, or more than once."""


@pytest.mark.cpu
@pytest.mark.parametrize("code", BLOCKS)
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")
def test_examples_run_as_pasted(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that import what they use; the others are parts of one, and are Python at least."""
    tree = ast.parse(code)
    if not isinstance(tree.body[0], ast.Import | ast.ImportFrom) or any(mark in code for mark in RUN_ELSEWHERE):
        return
    if "onnx" in code:
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    if "transformers" in code:
        pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(tree, "example", "exec"), {})


@torch.library.custom_op("mylib::my_activation", mutates_args=())
def _my_activation(x: Tensor) -> Tensor:
    return x / 2


@torch.library.custom_op("mylib::my_filter", mutates_args=())
def _my_filter(x: Tensor) -> Tensor:
    return x.flip(-1)


_my_activation.register_fake(torch.empty_like)
_my_filter.register_fake(torch.empty_like)


def test_the_rules_of_the_architecture_let_channels_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_RULES", registry.registered())
    text = TEXTS["architecture.md"]
    code = text[text.index("    from fxcompress.channels.rules import OpClass") : text.index("The label rule returns")]
    exec(textwrap.dedent(code), {"torch": torch})
    net = nn.Sequential(nn.Conv2d(3, 8, 3), Through(), nn.Conv2d(8, 4, 3)).double()
    with torch.no_grad():
        net.get_parameter("0.weight")[2] = net.get_parameter("0.bias")[2] = 0
    x = torch.randn(2, 3, 10, 10).double()
    result = fxc.prune(net, x)
    assert result.module.get_parameter("2.weight").shape == (4, 7, 3, 3)
    assert difference(net(x), result.module(x)) <= 1e-9


class Through(nn.Module):
    """Both ops of the example."""

    def forward(self, x: Tensor) -> Tensor:
        return _my_filter(_my_activation(x))  # type: ignore[no-any-return]


def _anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page.name]):
        if "://" in link:
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.exists(), link
        if anchor:
            assert anchor in _anchors(target.read_text("utf-8")), link


@pytest.mark.parametrize("name", TEXTS)
def test_files_that_are_named_are_there(name: str) -> None:
    for path in re.findall(r"`((?:\w+/)*\w+\.py)`", TEXTS[name]):
        if "/" in path and not path.startswith("path/"):
            assert (ROOT / path).exists() or (ROOT / "fxcompress" / path).exists(), path


@pytest.mark.parametrize("name", TEXTS)
def test_names_are_there(name: str) -> None:
    text = TEXTS[name]
    for public in re.findall(r"\bfxc\.([A-Za-z_]\w*)", text):
        assert hasattr(fxc, public), public
    for dotted in re.findall(r"`(fxcompress(?:\.\w+)+)", text):
        module, _, leaf = dotted.rpartition(".")
        assert importlib.util.find_spec(dotted) or hasattr(importlib.import_module(module), leaf), dotted
    for module in re.findall(r"python -m (benchmarks\.\w+)", text):
        assert importlib.util.find_spec(module), module


def test_layers_and_passes_of_the_architecture_are_there() -> None:
    text = TEXTS["architecture.md"]
    table = text[text.index("| layer |") : text.index("**Why the analysis")]
    for cell in re.findall(r"^\| (`[^|]+`) \|", table, re.MULTILINE):
        for layer in re.findall(r"`(\w+)`", cell):
            assert importlib.util.find_spec("fxcompress" if layer == "fxcompress" else f"fxcompress.{layer}"), layer
    rewrites = text[text.index("## The link `passes`") :]
    for cell in re.findall(r"^\| (`[A-Z][^|]+`) \|", rewrites, re.MULTILINE):
        for rewrite in re.findall(r"`(\w+)`", cell):
            assert hasattr(fxcompress.passes, rewrite), rewrite


@pytest.mark.parametrize("layer", ["channels", "passes", "training"])
def test_the_architecture_has_a_place_for_each_file(layer: str) -> None:
    text = TEXTS["architecture.md"]
    start = text.index(f"| in `{layer}/` |")
    table = text[start : text.index("\n\n", start)].partition("\n")[2]
    files = sorted(path.stem for path in (ROOT / "fxcompress" / layer).glob("*.py") if path.stem != "__init__")
    assert sorted(re.findall(r"`(\w+)`", table)) == files


def test_the_architecture_has_the_parts_of_trace_in_their_order() -> None:
    text = TEXTS["architecture.md"]
    start = text.index("| part of `trace/` |")
    rows = re.findall(r"^\| (`.*?`) \|", text[start : text.index("\n\n", start)], re.MULTILINE)
    named = [frozenset(part.removesuffix(".py").rstrip("/") for part in re.findall(r"`([^`]+)`", row)) for row in rows]
    assert named == [parts for parts, _ in TRACE_LAYERS]


def test_extras_that_are_named_are_there() -> None:
    declared = (ROOT / "pyproject.toml").read_text("utf-8")
    for text in TEXTS.values():
        for extra in re.findall(r"pip install \"(?:fxcompress|\.)\[(\w+)\]\"", text):
            assert re.search(rf"^{extra} = \[", declared, re.MULTILINE), extra


@pytest.mark.parametrize("name", fxc.__all__)
def test_public_names_say_what_they_are(name: str) -> None:
    found = getattr(fxc, name)
    assert found.__doc__
    if not isinstance(found, type):
        assert "Raises:" in found.__doc__
        for argument in re.findall(r"\b(\w+)\b", " ".join(found.__annotations__)):
            assert argument == "return" or f"{argument}:" in found.__doc__ or argument == "extra", argument
