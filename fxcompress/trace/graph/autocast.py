"""Regions of a model's code in which autocast is on or off: ``with torch.autocast(...)`` inside ``forward``.

    with torch.autocast(x.device.type, enabled=False):     enter_autocast(device, None, False, None)
        h = self.norm(h.float())                           ...
                                                           exit_autocast(region)

In a graph such a region lies between two nodes that have no tensors: one that begins it, and one that ends it. Passes
keep both where they are, and what was traced inside stays inside.

Code may also ask whether autocast is on, often only to enter no region where none is needed. The answer that the trace
gives is checked (guards.py), unless the graphs of both answers are the same but for regions that are off.
"""

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.node import has_side_effect


class _Open(threading.local):
    """The regions of graphs that are running, the innermost one last."""

    def __init__(self) -> None:
        self.regions: list[torch.autocast] = []


_open = _Open()


@fx.wrap
@has_side_effect
def enter_autocast(
    device: torch.device | str,
    dtype: torch.dtype | None,
    enabled: bool,  # noqa: FBT001 - as they stand in the graph
    cache_enabled: bool | None,  # noqa: FBT001
) -> Any:  # noqa: ANN401 - torch.autocast has no types
    """Begin a region.

    Args:
        device: for whose ops autocast is switched; a device where the code has read the type off a tensor.
        dtype: of the region; None for the one that torch has for the device.
        enabled: whether it is on.
        cache_enabled: whether weights are cast once; None for as it is outside.

    Returns:
        what :func:`exit_autocast` takes; None where nothing is switched, as where autocast is off already: exporters
        need not know of a region that does nothing.
    """
    kind = device if isinstance(device, str) else device.type
    if kind == "meta" or not (enabled or torch.is_autocast_enabled(kind)):
        return None
    if torch.compiler.is_dynamo_compiling():  # which knows these functions
        return torch.amp.autocast_mode._enter_autocast(kind, dtype, enabled, cache_enabled)  # noqa: SLF001
    region = torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=cache_enabled)
    region.__enter__()
    _open.regions.append(region)
    return region


@fx.wrap
@has_side_effect
def exit_autocast(region: Any) -> None:  # noqa: ANN401
    """End a region."""
    if region is None:
        return
    if torch.compiler.is_dynamo_compiling():
        torch.amp.autocast_mode._exit_autocast(region)  # noqa: SLF001
        return
    _open.regions.remove(region)
    region.__exit__(None, None, None)


INFERRING = "inference mode"


@fx.wrap
def autocast_is_on(device: torch.device | str) -> bool:
    """Whether autocast is on for the ops of a device, which the code has asked."""
    kind = device if isinstance(device, str) else device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)


@fx.wrap
def inference_mode() -> str:
    """Whether inference mode is on, which the code has asked; in words, as other modes are not."""
    return INFERRING if torch.is_inference_mode_enabled() else "no inference mode"


def switches_autocast(node: fx.Node) -> bool:
    """Whether a node begins or ends a region."""
    return node.op == "call_function" and node.target in {enter_autocast, exit_autocast}


def closing(forward: Callable[..., Any], *graphs: fx.Graph | None) -> Callable[..., Any]:
    """``forward`` of graphs, in which an error ends the regions that have begun; itself where the graphs have none."""
    if not any(map(switches_autocast, (node for graph in graphs if graph is not None for node in graph.nodes))):
        return forward

    @functools.wraps(forward)
    def closed(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        if torch.compiler.is_dynamo_compiling():
            return forward(*args, **kwargs)
        before = len(_open.regions)
        try:
            return forward(*args, **kwargs)
        except BaseException:
            while len(_open.regions) > before:
                exit_autocast(_open.regions[-1])
            raise

    return closed
