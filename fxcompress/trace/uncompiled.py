"""Functions that ``torch.compile`` has compiled: a model runs them as the Python code that they are made of.

What comes out of the compiler is hidden from torch.fx and from function modes alike. Nor has anything to be compiled
for a run that only compares.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def uncompiled() -> Iterator[None]:
    """Within it, or in what it decorates, ``torch.compile`` does nothing; what has been compiled stays for later."""
    config = importlib.import_module("torch._dynamo").config
    with torch.compiler.set_stance("force_eager"), config.patch(error_on_nested_fx_trace=False):
        yield
