"""The README says what is so: its example runs as pasted, its links lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")
MOST_LINES = 15


def example() -> str:
    """The only Python block of the README."""
    (code,) = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return str(code)


def test_example_is_short() -> None:
    lines = [line for line in example().splitlines() if line.strip()]
    assert len(lines) <= MOST_LINES
    assert max(map(len, lines)) <= 100


def test_example_runs_as_pasted(tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text(example(), "utf-8")
    run = subprocess.run([sys.executable, script.name], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert not run.stderr  # no warnings
    assert " -> " in run.stdout
    assert (tmp_path / "net.fxc").stat().st_size > 0


def test_relative_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#\s]+)", README)
    local = [link for link in links if "://" not in link]
    assert local
    assert [link for link in local if not (ROOT / link).exists()] == []
