"""How the code of a graph finds the modules that it calls.

torch.fx writes ``getattr(self.layers, '0').conv``. In each call Python looks for all of these names in the wrong
places first, as ``torch.nn`` keeps children in a table of their own: a tenth of the time of a small network on a CPU.
What runs asks the tables themselves; what people read, and what TorchScript compiles, stays as torch.fx writes it.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch.fx.graph_module
from torch import nn

_NAME = "_fxc_module_at"
_QUICK, _READ, _END = "\x01", "\x02", "\x03"
_PAIR = re.compile(f"{_QUICK}([^{_READ}]*){_READ}([^{_END}]*){_END}")


def module_at(root: nn.Module, names: tuple[str, ...]) -> Any:  # noqa: ANN401 - a module
    """What a path of names leads to; where a child stands behind a wrapper that hands names on, that is asked.

    >>> module_at(nn.Sequential(nn.Sequential(nn.ReLU())), ("0", "0"))
    ReLU()
    """
    found: Any = root
    for name in names:
        child = found._modules.get(name)
        found = getattr(found, name) if child is None else child
    return found


def twofold(root: nn.Module, target: str, read: str) -> str:
    """An expression of ``self`` both ways, the readable and the quick one; one way where that is as quick.

    Args:
        root: what ``self`` will be.
        target: a path of names in it.
        read: the expression that reads it, as it is shown.
    """
    names = target.split(".")
    path: list[str] = []
    module = root
    while len(path) < len(names) and (child := module._modules.get(names[len(path)])) is not None:
        path.append(names[len(path)])
        module = child
    if len(path) < 2 or not target.isprintable():
        return read
    quick = f"{_NAME}(self, {tuple(path)!r})"
    for name in names[len(path) :]:
        quick = f"getattr({quick}, {name!r})"
    return f"{_QUICK}{quick}{_READ}{read}{_END}"


def readable(code: str) -> str:
    """The code as it is shown."""
    return _PAIR.sub(r"\2", code)


@contextmanager
def quick_code() -> Iterator[None]:
    """Within it, torch.fx compiles the quick way of what is there both ways, and shows the other one in tracebacks."""
    module: Any = torch.fx.graph_module

    def execute(source: str, names: dict[str, Any], fields: dict[str, Any] | None = None) -> None:
        file = module._loader.cache(readable(source), names, fields)  # noqa: SLF001 - the cache of linecache
        names[_NAME] = module_at
        exec(compile(_PAIR.sub(r"\1", source), file, "exec", dont_inherit=True), names)  # noqa: S102 - as torch.fx does

    with patch.object(module, "_exec_with_source", execute):
        yield
