"""Values that can be written into a graph as they are."""

from typing import Any

import torch

from fxcompress.errors import TraceError
from fxcompress.trace.code.locations import place
from fxcompress.trace.graph.attribute_number import OwnNumber

PLAIN = (
    bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip


def is_plain(value: object) -> bool:
    """Whether a value can be written into a graph as it is."""
    return type(value) in PLAIN or value is Ellipsis or type(value) is OwnNumber


def with_plain_keys(tree: Any) -> Any:  # noqa: ANN401
    """A tree as it is.

    Raises:
        TraceError: a key of a dict in it is of a kind that cannot be written into a graph.
    """
    if isinstance(tree, dict):
        for key in tree:
            if not is_plain(key) and not isinstance(key, tuple):
                raise TraceError(
                    f"a dict{place()} has a key that is a {type(key).__name__}, which a graph cannot hold\n"
                    "  take a string or a number as the key"
                )
    for item in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, tuple | list) else ():
        with_plain_keys(item)
    return tree
