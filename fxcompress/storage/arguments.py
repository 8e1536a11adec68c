"""Arguments of the calls that write and read files: errors that say which is which."""

import os
from pathlib import Path

from torch import nn

from fxcompress.trace.model.uncompiled import ORIGINAL, is_compiled


def check_arguments(call: str, path: object, module: object) -> Path:
    """The path, if it is one and the module is a module.

    Args:
        call: the user's, with its arguments in order.
        path: from the user.
        module: the same.

    Raises:
        TypeError: it is not, or what is to be saved is compiled.
        ValueError: the path is empty.
    """
    if call.startswith("save(") and isinstance(module, nn.Module) and is_compiled(module):
        raise TypeError(
            "the network is what torch.compile returned, which has other names in its state_dict: call it as "
            f"{call} with the module that it was made of (module.{ORIGINAL})"
        )
    if isinstance(path, str | os.PathLike) and isinstance(module, nn.Module):
        if not Path(path).name:
            raise ValueError(f"the path {os.fspath(path)!r} names no file: call it as {call}")
        return Path(path)
    kinds = f"the path is a {type(path).__name__} and the network a {type(module).__name__}"
    if isinstance(getattr(module, "module", None), nn.Module):
        raise TypeError(f"{kinds}: what fit() returns holds the network as its .module; call it as {call}")
    swapped = isinstance(path, nn.Module) and isinstance(module, str | os.PathLike)
    raise TypeError(f"{kinds}{'; they are swapped' if swapped else ''}: call it as {call}")
