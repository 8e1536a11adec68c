"""One graph for several precisions: with autocast and without it, in single and in half.

    dtype = h.dtype                        float32, and bfloat16 under autocast
    h = h.float() ... h.to(dtype)          ``to(torch.float32)`` in the graph of a run in float32

A run shows Python a dtype, not where it comes from: what the code does with it later is a plain value in the graph. So
where a model asks for dtypes, or whether autocast is on, it runs once more in another precision, and the two graphs are
compared, op by op. Where they differ by nothing but what a dtype that was read says, as dtypes do and their limits
(``torch.finfo(h.dtype).min``), the graph reads it. So it is with casts to the dtype that a tensor has in the first run
(``if h.dtype != w.dtype: h = h.to(w.dtype)``), and with regions in which autocast is switched off, which code may enter
only where it is on: the graph has them always. A check that is left asks that all dtypes are together as in one run.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from fxcompress.errors import TraceError
from fxcompress.trace.basics.precision import Precision
from fxcompress.trace.basics.trees import tensors_in
from fxcompress.trace.concrete.run import RunSettings
from fxcompress.trace.graph.autocast import autocast_is_on
from fxcompress.trace.graph.guards import asks_for_autocast, check, check_dtypes, limit_of
from fxcompress.trace.paths.precision_match import (
    Match,
    asks_for_dtype,
    casts_of,
    differing,
    dtype_checks,
    dtype_of_cast,
    matched,
    source_of,
)


@dataclass(frozen=True, slots=True)
class Recording:
    """How a graph was recorded.

    Attributes:
        again: records it again, in another way: :func:`fxcompress.trace.concrete.run.run_model` on the same inputs.
        settings: with which it was recorded.
        decisions: that its run has taken, see :func:`decisions_of`.
    """

    again: Callable[[RunSettings, set[int], set[str]], fx.Graph]
    settings: RunSettings
    decisions: list[tuple[object, ...]]


def decisions_of(graph: fx.Graph) -> list[tuple[object, ...]]:
    """Outcome and place of each decision that the run of a graph has taken, but for those on its precision."""
    checks = graph.find_nodes(op="call_function", target=check)
    return [node.args[1::2] for node in checks if not (asks_for_dtype(node) or asks_for_autocast(node))]


def hold_in_other_precisions(
    graph: fx.Graph, recording: Recording, root: nn.Module, readers: set[int], kept: set[str]
) -> None:
    """Let ``graph`` stand for what the model does with autocast and without, as far as it takes the same path.

    Args:
        graph: recorded in the precision that is on; changed in place.
        recording: how.
        root: holds the tensors of the graph.
        readers: as for :func:`fxcompress.trace.concrete.run.run_model`.
        kept: as there.
    """
    checks = list(graph.find_nodes(op="call_function", target=check))
    if not any(asks_for_dtype(node) or asks_for_autocast(node) for node in checks):
        return
    found: list[Match] = []
    for precision in _others(root):
        if precision.switches_autocast and found and not found[0].differs:
            continue
        more, changed = set(readers), set(kept)
        try:
            other = recording.again(replace(recording.settings, precision=precision), more, changed)
        except TraceError:
            continue
        if decisions_of(other) != recording.decisions:
            continue
        match = matched(graph, other, root, found, switches=precision.switches_autocast)
        if match is not None:
            found.append(match)
            readers |= more
            kept |= changed
    if found:
        _rewrite(graph, found)


def _others(root: nn.Module) -> list[Precision]:
    """The precisions to try: both of autocast, and tensors in half; without autocast, where it is on."""
    device = next((t.device.type for m in root.modules() for t in tensors_in([m._parameters, m._buffers])), "cpu")
    if torch.is_autocast_enabled(device):
        return [Precision(partial(torch.autocast, device, enabled=False))]
    halves = (torch.bfloat16, torch.float16)
    under = [Precision(partial(torch.autocast, device, dtype=dtype, cache_enabled=False)) for dtype in halves]
    return under + [Precision(dtype=dtype) for dtype in halves]


def _rewrite(graph: fx.Graph, matches: list[Match]) -> None:
    """Let a graph do what all of the runs did."""
    for key in differing(matches):
        source = source_of(graph, key, matches)
        assert source is not None
        step, path = key
        (decision, *_), limit = source[0].args, source[1]
        if limit is not None:
            with graph.inserting_before(source[0]):
                decision = graph.call_function(limit_of, (decision, limit))
        args, kwargs = _put([step.args, step.kwargs], path, decision)
        step.args, step.kwargs = args, kwargs
    _add_casts(graph, matches)
    _add_regions(graph, matches)
    _join_checks(graph, matches)


def _add_casts(graph: fx.Graph, matches: list[Match]) -> None:
    """Write the casts that a graph lacks into it."""
    caster = next((match for match in matches if match.casts), None)
    made: dict[fx.Node, fx.Node] = {}
    for cast, follower in casts_of(matches):
        assert caster is not None
        dtype: Any = dtype_of_cast(graph, cast, follower, matches)
        with graph.inserting_before(follower):
            args = caster.casts[cast], dtype.args[0] if isinstance(dtype, fx.Node) else dtype
            made[cast] = graph.call_method("to", args)
    for (step, path), cast in caster.recast.items() if caster is not None else ():
        args, kwargs = _put([step.args, step.kwargs], path, made[cast])
        step.args, step.kwargs = args, kwargs


def _add_regions(graph: fx.Graph, matches: list[Match]) -> None:
    """Write the regions that a graph lacks into it."""
    match = next((match for match in matches if match.switches), matches[0])
    here = {there: own for own, there in match.steps.items()}

    def copied(node: fx.Node) -> fx.Node:
        if node not in here:
            here[node] = graph.node_copy(node, copied)
        return here[node]

    for there, follower in match.more:
        if there not in match.casts:
            with graph.inserting_before(follower):
                copied(there)


def _put(value: Any, path: tuple[Any, ...], new: object) -> Any:  # noqa: ANN401
    """A tree of arguments with something else at a place."""
    if not path:
        return new
    key, rest = path[0], path[1:]
    if isinstance(value, slice):
        return slice(*_put([value.start, value.stop, value.step], path, new))
    if isinstance(value, dict):
        return {**value, key: _put(value[key], rest, new)}
    items = [_put(item, rest, new) if i == key else item for i, item in enumerate(value)]
    return tuple(items) if isinstance(value, tuple) else items


def _join_checks(graph: fx.Graph, matches: list[Match]) -> None:
    """One check of all dtypes that are not the same in all runs, and none of autocast."""
    for node in graph.find_nodes(op="call_function", target=check):
        if asks_for_autocast(node) and any(match.switches for match in matches):
            graph.erase_node(node)
    for node in [n for n in graph.nodes if n.target is autocast_is_on and not n.users]:
        graph.erase_node(node)
    moving = [n for n in dtype_checks(graph) if any(match.dtypes[n] != n.args[1] for match in matches)]
    if not moving:
        return
    seen = tuple(n.args[1] for n in moving), *(tuple(match.dtypes[n] for n in moving) for match in matches)
    with graph.inserting_after(moving[-1]):
        args = tuple(n.args[0] for n in moving), seen, tuple(n.args[3] for n in moving)
        graph.call_function(check_dtypes, args)
    for node in moving:
        graph.erase_node(node)
