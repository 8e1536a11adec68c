"""What ``torch.compile`` has compiled: a model runs it as the Python code that it is made of.

What comes out of the compiler is hidden from torch.fx and from function modes alike. Nor has anything to be compiled
for a run that only compares.
"""

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fxcompress.trace.model.lowering import Lowered

_COMPILED = ("torch._dynamo.eval_frame", "OptimizedModule")
_OF_MODULE = frozenset(nn.Module().__dict__)

ORIGINAL = "_orig_mod"
"""The name of the module of which it was made, in what ``torch.compile`` returns."""


@contextmanager
def uncompiled() -> Iterator[None]:
    """Within it, or in what it decorates, ``torch.compile`` does nothing; what has been compiled stays for later."""
    config = importlib.import_module("torch._dynamo").config
    with torch.compiler.set_stance("force_eager"), config.patch(error_on_nested_fx_trace=False):
        yield


class Uncompiled(Lowered):
    """In a copy of a model, what ``torch.compile`` has made of a module: it calls the module, under the same name.

    ``body._orig_mod.conv.weight`` is called so in the copy as well. Attributes are those of the module.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401, D102 - the signature of any module
        return self._orig_mod(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - as nn.Module has it
        """The module itself, or what hangs on it; not how that is copied (``__deepcopy__``)."""
        module = self.__dict__.get("_modules", {}).get(ORIGINAL)
        if name == ORIGINAL and module is not None:
            return module
        return super().__getattr__(name) if name.startswith("__") else getattr(module, name)

    def __setattr__(self, name: str, value: Any) -> None:  # noqa: ANN401
        """Set what hangs on the module, but for what every module has."""
        if name in self.__dict__ or hasattr(type(self), name):
            super().__setattr__(name, value)
        else:
            setattr(self._orig_mod, name, value)

    def __len__(self) -> int:
        """How many items the module has."""
        return len(self._orig_mod)


@functools.cache
def _is_compiled(kind: Any) -> bool:  # noqa: ANN401 - a class of modules
    """Whether it is what ``torch.compile`` makes of a module; its class takes more than a second to import."""
    return any((base.__module__, base.__name__) == _COMPILED for base in kind.__mro__)


def is_compiled(module: nn.Module) -> bool:
    """Whether it is what ``torch.compile`` makes of a module."""
    kind: Any = type(module)
    return _is_compiled(kind)


def state_of_compiled(module: nn.Module) -> dict[str, Any]:
    """The attributes of what ``torch.compile`` makes of a module, without those of the compiler."""
    own = {name: value for name, value in vars(module).items() if name in _OF_MODULE}
    return {**own, "training": module.training}
