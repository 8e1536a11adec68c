"""Names of modules that are no words of Python: keys of a ModuleDict such as "for", "a b" or 'say "a"'.

torch.fx writes Python code, in which it quotes what is no identifier; keywords, quotes and backslashes it forgets.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from keyword import iskeyword
from unittest.mock import patch

import torch.fx.graph


def attribute(base: str, target: str) -> str:
    """The expression that reads an attribute, whatever its name.

    >>> attribute("self", "layers.for.weight")
    "getattr(self.layers, 'for').weight"
    """
    for name in target.split("."):
        plain = name.isidentifier() and not iskeyword(name)
        base = f"{base}.{name}" if plain else f"getattr({base}, {name!r})"
    return base


@contextmanager
def any_names() -> Iterator[None]:
    """Within it, torch.fx writes code that is right for any name."""
    with patch.object(torch.fx.graph, "_format_target", attribute):
        yield
