"""Functions that ``torch.jit.script`` has compiled: they are traced in the Python code that they are made of.

torch keeps that code for its own compiler. A function that ``torch.jit.trace`` has made holds it as well, and may do
something else than it; so the graph is compared with the model where one was called.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final
from unittest.mock import patch

import torch

_CALL: Final[Callable[..., Any]] = torch.jit.ScriptFunction.__call__
_CODE: Final = "_torchdynamo_inline"


@contextmanager
def opened_scripts() -> Iterator[list[str]]:
    """Within it, compiled functions run the code that they were made of; the list gets the names of those called."""
    names: list[str] = []

    def called(function: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        code = getattr(function, _CODE, None)
        if code is None:
            return _CALL(function, *args, **kwargs)
        names.append(str(function.name))
        return code(*args, **kwargs)

    with patch.object(torch.jit.ScriptFunction, "__call__", called):
        yield names
