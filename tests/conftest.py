"""What every test starts from: fixed seeds, one thread, Ctrl-C, hypothesis profiles, which of many cases run in CI."""

import os
import random
import signal
import zlib
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

# One thread: how a float sum is split over threads changes its last bits, and with them what a test sees.
torch.set_num_threads(1)

# A shell starts background jobs with Ctrl-C ignored, and so would be the Ctrl-C that tests press.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("default", deadline=None, print_blob=True, derandomize="CI" in os.environ)
settings.register_profile(
    "fuzz",
    deadline=None,
    print_blob=True,
    derandomize=False,
    max_examples=20_000,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("fuzz" if os.environ.get("FXCOMPRESS_FUZZ") == "1" else "default")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out cases of large families where CI runs: see the marker ``sampled`` in pyproject.toml."""
    if "CI" not in os.environ:
        return
    left_out = [item for item in items if any(_is_left_out(item, *m.args) for m in item.iter_markers("sampled"))]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]


def _is_left_out(item: pytest.Item, one_in: int) -> bool:
    return zlib.crc32(item.name.encode()) % one_in != 0


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """The same random numbers for a test, alone or after others, in whichever worker."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(name="double")
def _double() -> Iterator[None]:
    """What a test makes is in float64, unless it says otherwise."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
