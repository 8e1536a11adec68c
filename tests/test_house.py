"""The rules of the house: which layer imports which, what is public, what no file may contain."""

import ast
import functools
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fxcompress

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fxcompress"

# From low to high. A module may import from its own layer and from lower rows; the reason says why the row is where
# it is. docs/architecture.md explains the whole.
LAYERS: tuple[tuple[frozenset[str], str], ...] = (
    (frozenset({"errors"}), "what every layer raises"),
    (frozenset({"progress"}), "what a long call shows on a terminal: every layer may say what it is doing"),
    (frozenset({"provenance"}), "the record of a rewrite: written by passes, read by storage and report"),
    (frozenset({"quantizer"}), "a module like those of torch.nn, which the tracer must know as a leaf"),
    (frozenset({"trace"}), "from a model to its graph: the analysis needs a graph"),
    (frozenset({"channels"}), "what a graph's channels are: read only, so below all that rewrites"),
    (frozenset({"passes"}), "rewrites, driven by the analysis; they know nothing of training"),
    (frozenset({"export", "objectives", "report", "storage", "training"}), "what is done with a rewritten network"),
    (
        frozenset({"checkpoint", "compress", "loading", "pruning", "selecting"}),
        "each puts the layers together for one public call",
    ),
    (frozenset({"fitting"}), "compresses, then trains"),
    (frozenset({"searching"}), "trains several times"),
    (frozenset({"__init__"}), "hands the names on"),
    (frozenset({"adapters"}), "the loops of other libraries in place of ours; whoever wants one imports it by name"),
    (frozenset({"__main__", "cli", "demo"}), "users of the public names, like anyone else"),
)
# The same inside of fxcompress/trace, which is the largest layer; its folders and its files at the top.
TRACE_LAYERS: tuple[tuple[frozenset[str], str], ...] = (
    (frozenset({"basics"}), "knows nothing of tracing"),
    (frozenset({"code"}), "Python's view of the model's code"),
    (frozenset({"inputs"}), "what a model is called with"),
    (frozenset({"graph"}), "what stands in a graph"),
    (frozenset({"effects"}), "what a run leaves behind"),
    (frozenset({"model"}), "copies of the model that can be traced"),
    (frozenset({"traced", "verify"}), "a graph with what the model holds, and whether it computes what the model does"),
    (frozenset({"fingerprint", "weights"}), "read or rewrite a traced module, before anyone else does"),
    (frozenset({"forward_hooks"}), "tells the caller's hooks from those that compute weights"),
    (frozenset({"concrete", "support", "symbolic"}), "the two ways to get a graph, and who is refused at the door"),
    (frozenset({"paths"}), "several runs of the concrete way, joined"),
    (frozenset({"both_modes"}), "a graph for each mode, whichever way it is made"),
    (frozenset({"tracer"}), "chooses the way: what the rest of the package calls"),
    (frozenset({"pieces", "retrace"}), "trace more than once"),
)
# Layers of one row do not know each other, except: (who imports, what).
SIDEWAYS: dict[tuple[str, str], str] = {
    ("export", "storage"): "a file for another runtime holds the same integers",
    ("training", "objectives"): "a training loop adds the size to the loss",
    ("report", "objectives"): "a report states the sizes",
    ("report", "training"): "a report shows the history of a run",
    ("report", "storage"): "a report tells of a file as of a network",
    ("cli", "demo"): "`fxcompress demo`",
    ("__main__", "cli"): "`python -m fxcompress`",
}
RANK = {layer: rank for rank, (layers, _) in enumerate(LAYERS) for layer in layers}
TRACE_RANK = {part: rank for rank, (parts, _) in enumerate(TRACE_LAYERS) for part in parts}

PUBLIC = [
    "ChannelGraph",
    "CompressedModule",
    "CompressedPieces",
    "FxCompressError",
    "LatencyTable",
    "OnnxExport",
    "PrunePolicy",
    "PruneResult",
    "Summary",
    "compress",
    "cosine",
    "export_onnx",
    "fit",
    "fit_to_accuracy",
    "load",
    "load_checkpoint",
    "prune",
    "save",
    "save_checkpoint",
    "select_channels",
    "summary",
]
# Spelled in two pieces, or this file would find itself.
MACHINE_PATHS = ["/" + "work/", "/" + "root/"]
NOT_OURS = {".git", ".hypothesis", ".mypy_cache", ".pytest_cache", ".ruff_cache", "__pycache__", "build", "dist", "out"}


@functools.cache
def modules() -> dict[str, Path]:
    """The path of every module of the package by its dotted name; a package is ``fxcompress.x.__init__``."""
    paths = sorted(PACKAGE.rglob("*.py"))
    return {".".join(("fxcompress", *path.relative_to(PACKAGE).with_suffix("").parts)): path for path in paths}


@functools.lru_cache(maxsize=512)
def parsed(source: str) -> ast.Module:
    return ast.parse(source)


def imports(name: str, source: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of all that ``source`` imports, wherever in it the import stands.

    ``from a import b`` gives ``a.b``, which is right whether b is a module or not: only the first two parts count.
    """
    for node in ast.walk(parsed(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = name.split(".")[: -node.level] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{prefix}.{alias.name}") for alias in node.names)


def layer_of(name: str) -> str | None:
    """``trace`` for ``fxcompress.trace.tracer``, ``__init__`` for the package's own names, None for other packages."""
    first, _, rest = name.partition(".")
    if first != "fxcompress":
        return None
    layer = rest.partition(".")[0]
    is_module = (PACKAGE / layer).is_dir() or (PACKAGE / f"{layer}.py").is_file()
    return layer if layer and is_module else "__init__"


def violations(name: str, source: str) -> list[str]:
    """What the module ``name`` imports from layers that it must not know."""
    layer = name.split(".")[1]
    assert layer in RANK, f"{name} belongs to no layer: give it a row in LAYERS"
    found = []
    for line, target in imports(name, source):
        other = layer_of(target)
        if other in {None, layer} or (layer, other) in SIDEWAYS:
            continue
        if other not in RANK or RANK[other] >= RANK[layer]:
            found.append(f"{name}, line {line}: {layer} must not import {target}")
    return found


@pytest.mark.parametrize("name", modules())
def test_module_imports_only_lower_layers(name: str) -> None:
    assert violations(name, modules()[name].read_text("utf-8")) == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("fxcompress.trace.tracer", "from fxcompress.channels import graph"),
        ("fxcompress.trace.tracer", "import fxcompress.passes"),
        ("fxcompress.trace.__init__", "from ..passes import prune"),
        ("fxcompress.errors", "def f():\n    from fxcompress.trace import tracer"),
        ("fxcompress.channels.rules.pointwise", "if TYPE_CHECKING:\n    from ...training import loop"),
        ("fxcompress.passes.prune", "import fxcompress as fxc"),
        ("fxcompress.training.loop", "import fxcompress.report.text"),
    ],
)
def test_upward_import_is_found(name: str, source: str) -> None:
    assert len(violations(name, source)) == 1


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("fxcompress.trace.tracer", "import torch\nfrom fxcompress.errors import TraceError"),
        ("fxcompress.channels.rules.pointwise", "from fxcompress.channels import space\nfrom . import registry"),
        ("fxcompress.report.text", "from fxcompress.training import loop"),
        ("fxcompress.__init__", "from fxcompress.passes import prune"),
        ("fxcompress.cli", "import fxcompress as fxc"),
    ],
)
def test_downward_import_passes(name: str, source: str) -> None:
    assert violations(name, source) == []


def violations_in_trace(name: str, source: str) -> list[str]:
    """What the module ``name`` of ``fxcompress.trace`` imports from parts of it that it must not know."""
    part = name.split(".")[2]
    assert part in TRACE_RANK, f"{name} belongs to no part of trace: give it a row in TRACE_LAYERS"
    inside = [(n, other.split(".")[2]) for n, other in imports(name, source) if other.startswith("fxcompress.trace.")]
    return [
        f"{name}, line {line}: {part} must not import {other}"
        for line, other in inside
        if other != part and TRACE_RANK.get(other, len(TRACE_LAYERS)) >= TRACE_RANK[part]
    ]


@pytest.mark.parametrize(
    "name", [n for n in modules() if n.startswith("fxcompress.trace.") and not n.endswith("trace.__init__")]
)
def test_module_of_trace_imports_only_lower_parts(name: str) -> None:
    assert violations_in_trace(name, modules()[name].read_text("utf-8")) == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("fxcompress.trace.code.frames", "from fxcompress.trace.graph import calls"),
        ("fxcompress.trace.symbolic.graph", "from fxcompress.trace.concrete.writer import Writer"),
        ("fxcompress.trace.tracer", "from fxcompress.trace.pieces.find import find_pieces"),
        ("fxcompress.trace.model.lowering", "from ..traced import TracedModule"),
    ],
)
def test_upward_import_in_trace_is_found(name: str, source: str) -> None:
    assert len(violations_in_trace(name, source)) == 1


def test_module_without_a_layer_is_found() -> None:
    with pytest.raises(AssertionError, match=r"belongs to no layer: give it a row in LAYERS"):
        violations("fxcompress.passes_of_another_kind", "")


def test_passes_at_the_top_is_a_link() -> None:
    link = ROOT / "passes"
    if (ROOT / "PKG-INFO").exists():  # an unpacked sdist, which leaves the link out
        assert not link.exists()
    else:
        assert link.is_symlink()
        assert link.readlink() == Path("fxcompress/passes")
        assert link.resolve() == PACKAGE / "passes"


def test_importing_passes_from_the_top_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(PACKAGE)
    with pytest.raises(ImportError, match=r"import this package as fxcompress\.passes, not as 'passes'"):
        importlib.import_module("passes")


def test_public_names() -> None:
    assert list(fxcompress.__all__) == PUBLIC
    assert [name for name in PUBLIC if not hasattr(fxcompress, name)] == []


def test_changelog_starts_with_this_version() -> None:
    heading = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    assert heading is not None
    assert version is not None
    assert heading[1] == version[1]


def files() -> Iterator[Path]:
    """Every file of the checkout that somebody wrote."""
    for folder, names, filenames in os.walk(ROOT):
        here = Path(folder)
        names[:] = [n for n in names if n not in NOT_OURS and not (here / n / "pyvenv.cfg").exists()]
        yield from (here / filename for filename in filenames if filename not in NOT_OURS)


@pytest.mark.parametrize("needle", MACHINE_PATHS)
def test_no_file_names_a_path_of_somebodys_machine(needle: str) -> None:
    assert [str(path.relative_to(ROOT)) for path in files() if needle.encode() in path.read_bytes()] == []


def undocumented(name: str, source: str) -> list[str]:
    """The module, its public functions, its public classes: those that lack a docstring."""
    tree = parsed(source)
    found = [] if ast.get_docstring(tree) else [name]
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            public = not node.name.startswith("_")
            found += [f"{name}.{node.name}"] if public and not ast.get_docstring(node) else []
    return found


@pytest.mark.parametrize("name", modules())
def test_module_is_documented(name: str) -> None:
    assert undocumented(name, modules()[name].read_text("utf-8")) == []


def test_missing_docstrings_are_found() -> None:
    source = "def f(): ...\nclass C: ...\ndef _g(): ...\n"
    assert undocumented("m", source) == ["m", "m.f", "m.C"]


def test_import_leaves_optional_packages_alone() -> None:
    code = (
        "import sys, fxcompress, fxcompress.adapters.core; optional = {'accelerate', 'lightning', 'matplotlib', "
        "'safetensors', 'sklearn', 'torchvision', 'transformers'}; print(*optional & sys.modules.keys())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.split() == []


FACTORIES = frozenset(
    {
        "arange", "empty", "empty_strided", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm",
        "scalar_tensor", "tensor", "zeros", "Generator",
    }
)  # fmt: skip


def without_device(source: str) -> list[str]:
    """The tensors that code makes wherever the caller's default device happens to be."""
    calls = (node for node in ast.walk(parsed(source)) if isinstance(node, ast.Call))
    return [
        ast.unparse(call)
        for call in calls
        if isinstance(call.func, ast.Attribute)
        and call.func.attr in FACTORIES
        and ast.unparse(call.func.value) == "torch"
        and not any(keyword.arg == "device" for keyword in call.keywords)
    ]


# The demo is a user, whose network and data lie where the default is.
LIBRARY = sorted(path for path in PACKAGE.rglob("*.py") if "demo" not in path.relative_to(PACKAGE).parts)


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_tensors_are_made_on_a_device_that_is_named(path: Path) -> None:
    assert without_device(path.read_text("utf-8")) == []


def test_tensors_made_on_any_device_are_found() -> None:
    source = "x = torch.zeros(3)\ny = torch.zeros(3, device=x.device)\nz = x.new_zeros(3)\nr = torch.randn_like(x)"
    assert without_device(source) == ["torch.zeros(3)"]
