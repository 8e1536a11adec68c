"""torch.utils.checkpoint while a model is traced: the code inside is traced as if it were called directly.

A checkpoint saves memory and computes the same: it forgets activations, and runs its code again when gradients are
needed. A graph has no such regions, so what is traced keeps its activations. Without this, the reentrant kind, which
runs its code with gradients off, would leave the traced network without the gradients of that code.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch.utils.checkpoint

from fxcompress.trace.places import place

_GENERATORS = {"_checkpoint_without_reentrant_generator", "_checkpoint_without_reentrant_generator_impl"}
"""What torch takes for the other kind; the name depends on its version."""


@contextmanager
def plain_checkpoints() -> Iterator[list[str]]:
    """Within it, checkpoints call their functions and do nothing else.

    Yields:
        a list that gets the place of each checkpoint in the user's code, `` at file:line``.
    """
    places: list[str] = []

    class Reentrant:
        """In place of the autograd function."""

        @staticmethod
        def apply(function: Callable[..., Any], _preserve: bool, *args: Any) -> Any:  # noqa: ANN401, FBT001
            places.append(place())
            return function(*args)

    def around(*_args: object, **_options: object) -> Iterator[None]:
        """In place of the generator that runs until the function is called, and then goes on."""
        places.append(place())
        yield

    module = torch.utils.checkpoint
    with ExitStack() as stack:
        stack.enter_context(patch.object(module, "CheckpointFunction", Reentrant))
        for name in _GENERATORS & set(dir(module)):
            stack.enter_context(patch.object(module, name, around))
        yield places
