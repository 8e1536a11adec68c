"""What works on the CPU works on another device: the tests of on_device.py and some of the CPU's, on a pretended one.

In a process of their own, as torch never forgets a device. ``make device`` runs all other tests there as well.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pretend_device import compiler

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(compiler() is None, reason="the device is compiled, and there is no C++ compiler")
@pytest.mark.parametrize(
    "files", [("on_device.py", "test_prune_random.py"), ("test_exactness.py", "test_recurrent.py")]
)
def test_another_device(files: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "tests.pretend_device", "-p", "no:cacheprovider", "-q"]
    command += [f"tests/{name}" for name in files]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["FXCOMPRESS_AGAIN"] = "1"
    run = subprocess.run(command, capture_output=True, cwd=ROOT, env=environment, text=True, check=False)
    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr[-5_000:]
