"""Arguments of the calls that write and read files: errors that say which is which."""

import os
from pathlib import Path

from torch import nn


def check_arguments(call: str, path: object, module: object) -> Path:
    """The path, if it is one and the module is a module.

    Args:
        call: the user's, with its arguments in order.
        path: from the user.
        module: the same.

    Raises:
        TypeError: it is not.
        ValueError: the path is empty.
    """
    if isinstance(path, str | os.PathLike) and isinstance(module, nn.Module):
        if not Path(path).name:
            raise ValueError(f"the path {os.fspath(path)!r} names no file: call it as {call}")
        return Path(path)
    kinds = f"the path is a {type(path).__name__} and the network a {type(module).__name__}"
    if isinstance(getattr(module, "module", None), nn.Module):
        raise TypeError(f"{kinds}: what fit() returns holds the network as its .module; call it as {call}")
    swapped = isinstance(path, nn.Module) and isinstance(module, str | os.PathLike)
    raise TypeError(f"{kinds}{'; they are swapped' if swapped else ''}: call it as {call}")
