"""Names that mean something else for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_MISSING = object()


@contextmanager
def patched(space: dict[str, Any], names: dict[str, Any]) -> Iterator[None]:
    """Within it, some names of a scope have other values; what code does to all others there is left alone.

    ``unittest.mock.patch.dict`` puts the whole dict back, and with it what the code of a model counts in a global.

    >>> scope = {"f": 1}
    >>> with patched(scope, {"f": 2}):
    ...     scope["g"] = scope["f"]
    >>> scope
    {'f': 1, 'g': 2}
    """
    before = {name: space.get(name, _MISSING) for name in names}
    space.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is _MISSING:
                space.pop(name, None)
            else:
                space[name] = value
