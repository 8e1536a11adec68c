"""Every error that fxcompress raises on purpose.

A message says what is wrong, where, and what to do about it. Whatever was raised, nothing of the caller's has
changed: not the model, not its gradients, not the optimizer.
"""

from collections.abc import Iterable
from typing import Any

__all__ = [
    "AverageError",
    "BatchError",
    "CheckpointError",
    "DistributedError",
    "DivergenceError",
    "ExampleInputError",
    "ExportError",
    "FxCompressError",
    "MissingPackageError",
    "OptimizerError",
    "PathError",
    "StorageError",
    "TraceError",
    "UnsupportedModelError",
    "ValueReadError",
    "check_number",
]


class FxCompressError(Exception):
    """The base class: ``except FxCompressError`` catches all of the ones below."""


class TraceError(FxCompressError):
    """The model could not be turned into a graph."""


class ExampleInputError(FxCompressError):
    """The example inputs are missing and cannot be inferred, or the model does not run on them."""


class PathError(ExampleInputError):
    """An input takes another path through the network than the one that was traced."""


class UnsupportedModelError(FxCompressError):
    """The model is in a state that cannot be compressed: NaN weights, meta tensors, already compressed, and so on."""


class ValueReadError(UnsupportedModelError):
    """A node of the graph reads a number out of a tensor, and what comes after may depend on it."""


class MissingPackageError(FxCompressError, ImportError):
    """A module was imported that needs a package of an extra."""


class OptimizerError(FxCompressError):
    """The optimizer does not belong to the network, or holds state that cannot be resized."""


class AverageError(FxCompressError):
    """A moving average of the network cannot follow when the network loses channels."""


class DistributedError(FxCompressError):
    """The processes of a distributed run disagree, one of them has died, or a wrapper cannot follow a removal."""


class _EndedError(FxCompressError):
    """A training has ended before a step, and what it has trained by then.

    Attributes:
        net: the network as it was before that step.
        history: records of the epochs that were finished.
    """

    def __init__(self, message: str, net: object = None, history: Iterable[Any] = ()) -> None:
        super().__init__(message)
        self.net = net
        self.history = list(history)


class DivergenceError(_EndedError, ArithmeticError):
    """A loss or a gradient was not finite. The step that would have used it was not made.

    Attributes:
        net: the network as it was before that step.
        history: records of the epochs that were finished.
    """


class BatchError(_EndedError, ValueError):
    """A batch that the network cannot be trained on: one sample for a batch norm. Its step was not made.

    Attributes:
        net: the network as it was before that step.
        history: records of the epochs that were finished.
    """


class StorageError(FxCompressError):
    """A file is damaged, of another version, or does not fit the model it is loaded into."""


class ExportError(FxCompressError, RuntimeError):
    """The network cannot be written for another runtime."""


class CheckpointError(FxCompressError, RuntimeError):
    """A checkpoint or state_dict does not fit the network it is loaded into, is damaged, or cannot be written.

    A RuntimeError as well, which is what torch raises for a state_dict that does not fit.
    """


def check_number(**named: object) -> None:
    """Check that arguments are numbers, so that what is said of their range makes sense.

    Raises:
        TypeError: one is none; it says which.

    >>> check_number(bits="8")
    Traceback (most recent call last):
    ...
    TypeError: bits='8' is a str; it must be a number
    """
    for name, value in named.items():
        try:
            if not isinstance(value, str):
                float(value)  # type: ignore[arg-type]
                continue
        except (TypeError, ValueError, RuntimeError):
            pass
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}; it must be a number")
