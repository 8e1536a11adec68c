"""The examples in docstrings give what they say."""

import doctest
import importlib
from pathlib import Path

import pytest

import fxcompress as fxc

pytestmark = pytest.mark.cpu

PACKAGE = Path(fxc.__file__).resolve().parent
SOURCES = [path for path in sorted(PACKAGE.rglob("*.py")) if ">>> " in path.read_text("utf-8")]
# Shown by the calls that return or raise them.
NO_EXAMPLE = {"CompressedPieces", "FxCompressError", "OnnxExport", "PruneResult"}


def module_of(source: Path) -> str:
    return ".".join(source.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("name", [module_of(source) for source in SOURCES])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_examples(name: str) -> None:
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(verbose=False)
    report: list[str] = []
    for example in doctest.DocTestFinder(exclude_empty=True).find(module, name):
        runner.run(example, out=report.append)
    assert runner.tries
    assert not runner.failures, "".join(report)


@pytest.mark.parametrize("name", sorted(set(fxc.__all__) - NO_EXAMPLE))
def test_public_names_have_an_example(name: str) -> None:
    doc = getattr(fxc, name).__doc__
    assert ">>> " in doc or "::" in doc
