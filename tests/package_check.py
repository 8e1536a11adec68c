"""Build the package, install the wheel into a new environment, and import every module of it there.

Run as a script. The new environment holds exactly what the wheel asks for, without an extra, so an import that only
works with a test dependency around is found. Installing torch a second time would cost minutes and gigabytes; its
files are linked from the environment that runs this script instead, and pip, cut off from any index, must find every
requirement satisfied by them.
"""

import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Iterator
from email.parser import HeaderParser
from importlib import metadata
from pathlib import Path, PurePosixPath

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
IN_SDIST = ["CHANGELOG.md", "LICENSE", "Makefile", "README.md", "pyproject.toml"]
FOLDERS_IN_SDIST = ["benchmarks", "docs", "examples", "fxcompress", "tests"]
# Made of classes of another library; without it, the import must fail with the name of the extra.
NEED_AN_EXTRA = {
    "fxcompress.adapters.huggingface": "huggingface",
    "fxcompress.adapters.lightning": "lightning",
    "fxcompress.export.activations": "onnx",
    "fxcompress.export.graph": "onnx",
    "fxcompress.export.onnx_names": "onnx",
    "fxcompress.export.onnx_weights": "onnx",
}

IMPORT_ALL = """
import importlib, pathlib, sys
for name, extra in (argument.split("=") for argument in sys.argv[2:]):
    try:
        importlib.import_module(name)
    except ImportError as error:
        assert extra and f"fxcompress[{extra}]" in str(error), f"{name} does not import: {error}"
    else:
        assert not extra, f"{name} imports without {extra}"
where = pathlib.Path(sys.modules["fxcompress"].__file__).resolve()
assert where.is_relative_to(pathlib.Path(sys.argv[1]).resolve()), f"imported {where}, not the installed wheel"
"""


def main() -> None:
    """Run all checks; the first that fails ends the script with an error."""
    with tempfile.TemporaryDirectory(prefix="fxcompress-package-") as folder:
        work = Path(folder)
        run(sys.executable, "-m", "build", "--outdir", work / "dist", ROOT)  # the sdist, and from it the wheel
        (sdist,) = (work / "dist").glob("*.tar.gz")
        (wheel,) = (work / "dist").glob("*.whl")
        check_sdist(sdist)
        check_wheel(wheel)
        python = new_environment(work / "env", requirements_of(wheel))
        run(python, "-m", "pip", "install", "--quiet", "--no-index", wheel)
        names = sorted(modules_of(wheel))
        asked = [f"{name}={NEED_AN_EXTRA.get(name, '')}" for name in names]
        run(python, "-I", "-W", "error::SyntaxWarning", "-c", IMPORT_ALL, work / "env", *asked, cwd=work)
        run(python.with_name("fxcompress"), "--help", cwd=work)
    print(f"package check: {wheel.name} and {sdist.name} are complete; all {len(names)} modules import")


def run(*command: object, cwd: Path | None = None) -> None:
    """Run a command without a word; when it fails, print what it said and give up."""
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        sys.exit(f"package check: {' '.join(words[:4])} ... failed\n{done.stdout}")


def require(truth: object, message: str) -> None:
    """Give up with ``message`` unless ``truth``."""
    if not truth:
        sys.exit(f"package check: {message}")


def sources(folder: str) -> set[str]:
    """What somebody wrote below ``folder``, as paths relative to the top."""
    paths = (ROOT / folder).rglob("*")
    return {p.relative_to(ROOT).as_posix() for p in paths if p.is_file() and "__pycache__" not in p.parts}


def check_sdist(sdist: Path) -> None:
    """The sdist holds every source, and the link at the top neither as a link nor as a copy."""
    with tarfile.open(sdist) as archive:
        names = {"/".join(PurePosixPath(name).parts[1:]) for name in archive.getnames()}
    wanted = set(IN_SDIST).union(*map(sources, FOLDERS_IN_SDIST))
    require(wanted <= names, f"the sdist lacks {sorted(wanted - names)}")
    require(not any(name.split("/")[0] == "passes" for name in names), "the sdist holds the link at the top")


def check_wheel(wheel: Path) -> None:
    """The wheel holds the package, its marker for type checkers, its licence, and nothing else."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    package = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    require(package == sources("fxcompress"), f"wheel and source differ in {sorted(package ^ sources('fxcompress'))}")
    require("fxcompress/py.typed" in names, "the wheel lacks py.typed")
    require(any(name.endswith("LICENSE") for name in names), "the wheel lacks the licence")


def modules_of(wheel: Path) -> Iterator[str]:
    """The dotted name of every module in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        paths = [PurePosixPath(name) for name in archive.namelist() if name.endswith(".py")]
    for path in paths:
        yield ".".join(path.parent.parts if path.name == "__init__.py" else path.with_suffix("").parts)


def requirements_of(wheel: Path) -> list[Requirement]:
    """What the wheel needs on this machine, extras left out."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        headers = HeaderParser().parsestr(archive.read(name).decode())
    return [r for r in map(Requirement, headers.get_all("Requires-Dist", [])) if applies(r, set())]


def applies(requirement: Requirement, extras: set[str]) -> bool:
    """Whether a requirement of a distribution, asked for with ``extras``, counts on this machine."""
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in extras | {""})


def closure(requirements: list[Requirement]) -> dict[str, metadata.Distribution]:
    """The distributions that ``requirements`` lead to, directly or not."""
    found: dict[str, metadata.Distribution] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = list(requirements)
    while waiting:
        requirement = waiting.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        found[name] = metadata.distribution(name)
        waiting += [r for r in map(Requirement, found[name].requires or []) if applies(r, set(extras))]
    return found


def new_environment(folder: Path, requirements: list[Requirement]) -> Path:
    """Create an environment that holds ``requirements`` and what they need; returns its interpreter."""
    venv.create(folder, with_pip=True, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    for distribution in closure(requirements).values():
        # "..": scripts and data files, which no import needs.
        tops = {file.parts[0] for file in distribution.files or [] if file.parts[0] not in {"..", "__pycache__"}}
        for top in sorted(tops):
            link = packages / top
            if not link.exists():
                link.symlink_to(Path(str(distribution.locate_file(top))).resolve())
    return folder / "bin" / "python"


if __name__ == "__main__":
    main()
