"""A device that is not the CPU, for machines that have no other, so that CUDA's and MPS's users meet no surprise.

As a plugin of pytest, all that tests make lies on it::

    python -m pytest -p tests.pretend_device tests/test_prune_random.py

Tests that are about the CPU itself are marked ``cpu`` and skipped there.
"""

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils.backend_registration import generate_methods_for_privateuse1_backend, rename_privateuse1_backend

NAME = "pretend"
SOURCE = Path(__file__).with_suffix(".cpp")


def compiler() -> str | None:
    """The path of a C++ compiler, or None."""
    return shutil.which(os.environ.get("CXX", "c++"))


@functools.cache
def install() -> None:
    """Make the device known to torch, for as long as the process lives; compiles it where that was not done before."""
    torch.ops.load_library(str(_library()))
    rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _module())
    generate_methods_for_privateuse1_backend(for_storage=True)


def copies_to_host() -> int:
    """How often numbers went from the device to the host so far: each time, a real device would be waited for."""
    return int(torch.ops.pretend_device.copies_to_host())


def has_float64(*, answer: bool) -> None:
    """Whether the device has float64; at first it does."""
    torch.ops.pretend_device.has_float64(answer)


def _library() -> Path:
    about = SOURCE.read_bytes() + torch.__version__.encode()
    result = Path(tempfile.gettempdir()) / f"pretend_device_{hashlib.sha256(about).hexdigest()[:16]}.so"
    if not result.exists():
        command = [str(compiler()), "-shared", "-fPIC", "-std=c++20", "-O0", "-w"]
        torch_at = Path(torch.__file__).parent
        command += [f"-isystem{torch_at / 'include'}", f"-isystem{torch_at / 'include/torch/csrc/api/include'}"]
        command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}", str(SOURCE)]
        command += [f"-L{torch_at / 'lib'}", "-lc10", "-ltorch_cpu"]
        with tempfile.TemporaryDirectory(dir=result.parent) as folder:
            made = Path(folder) / result.name
            subprocess.run([*command, "-o", str(made)], check=True)
            made.replace(result)  # at once, as several processes may be at it
    return result


def _module() -> ModuleType:
    """What torch asks of a device in Python."""

    def device(_: object) -> AbstractContextManager[None]:
        return nullcontext()

    module = ModuleType(f"torch.{NAME}")
    answers = {
        "is_available": True, "is_initialized": True, "_is_in_bad_fork": False, "device_count": 1, "current_device": 0,
        "get_amp_supported_dtype": [torch.float16, torch.bfloat16], "manual_seed_all": None, "synchronize": None,
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(module, name, lambda *_, answer=answer, **__: answer)
    # Its kernels are the CPU's, and so are its random numbers.
    module.__dict__.update(
        device=device,
        get_rng_state=lambda *_: torch.get_rng_state(),
        set_rng_state=lambda state, *_: torch.set_rng_state(state),
        get_rng_state_all=lambda: [torch.get_rng_state()],
        set_rng_state_all=lambda states: torch.set_rng_state(states[0]),
    )
    return module


def pytest_configure(config: pytest.Config) -> None:
    """Before any test is looked at, as some make tensors then."""
    del config
    install()
    torch.set_default_device(NAME)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is about the CPU."""
    for item in items:
        if item.get_closest_marker("cpu"):
            item.add_marker(pytest.mark.skip(reason="about the CPU itself"))
