"""Two graphs of one model, recorded in two precisions, op by op: where they differ by what a dtype says."""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from fxcompress.trace.concrete.recorded_nodes import is_number, steps_of
from fxcompress.trace.graph.autocast import enter_autocast, exit_autocast
from fxcompress.trace.graph.guards import check
from fxcompress.trace.paths.same_path import same_constant

_LIMITS = ("min", "max", "eps", "tiny")
Key = tuple[fx.Node, tuple[Any, ...]]
"""A step of a graph, and the place of an argument in its ``[args, kwargs]``."""


def asks_for_dtype(node: fx.Node) -> bool:
    """Whether a node checks the dtype of a tensor."""
    decision = node.args[0] if node.target is check else None
    return isinstance(decision, fx.Node) and decision.target is getattr and str(decision.args[1]) == "dtype"


@dataclass(eq=False, slots=True)
class Match:
    """What tells a graph of one precision from that of another.

    Attributes:
        steps: for each step of the graph, that of the other one.
        dtypes: the dtype that the other run has found for each check of one.
        values: for each plain argument that differs, by its step and its place there: the value in the other graph.
        more: nodes of the other graph that this one lacks and that would change nothing in it, each with the step that
            follows: such as begin and end a region without autocast, and casts.
        casts: for each of the casts among them, the node of this graph that it casts.
        recast: for each argument that the other graph takes from such a cast, the cast, by step and place.
        switches: whether autocast is in another mode in the other run.
    """

    steps: dict[fx.Node, fx.Node] = field(default_factory=dict)
    dtypes: dict[fx.Node, torch.dtype] = field(default_factory=dict)
    values: dict[Key, Any] = field(default_factory=dict)
    more: list[tuple[fx.Node, fx.Node]] = field(default_factory=list)
    casts: dict[fx.Node, fx.Node] = field(default_factory=dict)
    recast: dict[Key, fx.Node] = field(default_factory=dict)
    switches: bool = True

    @property
    def differs(self) -> bool:
        """Whether a dtype is another one."""
        return any(dtype != node.args[1] for node, dtype in self.dtypes.items())


def matched(graph: fx.Graph, other: fx.Graph, root: nn.Module, found: list[Match], *, switches: bool) -> Match | None:
    """How two graphs go together.

    Args:
        graph: recorded in one precision.
        other: recorded in another one.
        root: holds the tensors of both.
        found: how ``graph`` goes together with those of other precisions.
        switches: whether autocast is in another mode in the other run.

    Returns:
        None where ``graph`` cannot be made to stand for all of them.
    """
    match, theirs = Match(switches=switches), deque(steps_of(other))
    for node in steps_of(graph):
        while theirs and not _alike(node, theirs[0], match, root):
            more = theirs.popleft()
            if not (_is_off(more) or _is_idle(more, graph, match)):
                return None
            match.more.append((more, node))
        if not theirs:
            return None
        match.steps[node] = theirs.popleft()
    together = [*found, match]
    if theirs or not _matched_dtypes(graph, other, match) or not all(_add_the_same(each, match) for each in found):
        return None
    known = all(source_of(graph, key, together) for key in differing(together))
    return match if known and all(dtype_of_cast(graph, *each, together) for each in casts_of(together)) else None


def _add_the_same(a: Match, b: Match) -> bool:
    """Whether two graphs add the same; where autocast is as here, a region that is off does nothing."""
    added = [
        ([n for more, n in m.more if more not in m.casts], [n for more, n in m.more if more in m.casts]) for m in (a, b)
    ]
    (regions, casts), (others, other_casts) = added
    same_casts = casts == other_casts and a.recast.keys() == b.recast.keys()
    return (regions == others or a.switches != b.switches) and (same_casts or not casts or not other_casts)


def casts_of(matches: list[Match]) -> list[tuple[fx.Node, fx.Node]]:
    """The casts that a graph lacks, each with the step that follows."""
    caster = next((match for match in matches if match.casts), None)
    return [] if caster is None else [(more, node) for more, node in caster.more if more in caster.casts]


def dtype_of_cast(
    graph: fx.Graph, cast: fx.Node, follower: fx.Node, matches: list[Match]
) -> fx.Node | torch.dtype | None:
    """The check of a dtype that a cast may be to, so that it does nothing in the runs that lack it.

    Returns:
        the dtype itself, if no run lacks it and no check says it; None if there is none.
    """
    caster = next(match for match in matches if match.casts)
    own = next(node for node in dtype_checks(graph) if node.args[0].args[0] is caster.casts[cast])  # type: ignore[union-attr]
    for node in reversed([node for node in dtype_checks(graph) if node < follower]):
        wanted = [own.args[1] if match.casts else match.dtypes[own] for match in matches]
        if node.args[1] is own.args[1] and [match.dtypes[node] for match in matches] == wanted:
            return node
    return _cast_to(cast) if all(match.casts for match in matches) else None


def differing(matches: list[Match]) -> list[Key]:
    """The plain arguments that are not the same in all precisions."""
    return list(dict.fromkeys(key for match in matches for key in match.values))


def _matched_dtypes(graph: fx.Graph, other: fx.Graph, match: Match) -> bool:
    """Note what dtypes the other run has found; whether it has read those of the same tensors."""
    read = {node.args[0].args[0]: node.args[1] for node in dtype_checks(other)}  # type: ignore[union-attr]
    for node in dtype_checks(graph):
        decision: Any = node.args[0]
        dtype: Any = read.pop(match.steps.get(decision.args[0]), None)
        if dtype is None:
            return False
        match.dtypes[node] = dtype
    return not read


def dtype_checks(graph: fx.Graph) -> list[fx.Node]:
    """The checks of dtypes, in the order of the graph."""
    return [node for node in graph.find_nodes(op="call_function", target=check) if asks_for_dtype(node)]


def _is_off(node: fx.Node) -> bool:
    """Whether a node begins or ends a region without autocast, which changes nothing where there is none outside."""
    region = node.args[0] if node.target is exit_autocast else node
    return isinstance(region, fx.Node) and region.target is enter_autocast and region.args[2] is False


def _is_idle(cast: fx.Node, graph: fx.Graph, match: Match) -> bool:
    """Whether a step of the other graph casts a tensor to the dtype that it has in ``graph``, where it is read."""
    source, dtype = cast.args[0] if cast.args else None, _cast_to(cast)
    own = next((here for here, there in match.steps.items() if there is source), None)
    known = {node.args[0].args[0]: node.args[1] for node in dtype_checks(graph)}  # type: ignore[union-attr]
    if own is None or dtype is None or known.get(own) is not dtype:
        return False
    match.casts[cast] = own
    return True


def _cast_to(node: fx.Node) -> torch.dtype | None:
    """What a node casts a tensor to, if it does nothing else."""
    if node.op != "call_method" or node.kwargs or len(node.args) > 2:
        return None
    if node.target == "float" and len(node.args) == 1:
        return torch.float32
    dtype = node.args[1] if node.target == "to" and len(node.args) == 2 else None
    return dtype if isinstance(dtype, torch.dtype) else None


def _alike(a: fx.Node, b: fx.Node, match: Match, root: nn.Module) -> bool:
    """Whether two steps do the same, but for plain values and casts; these are noted if they do."""
    if a.op == b.op == "get_attr" and a.target != b.target:
        return same_constant(root, a, b)
    trial = Match(match.steps, casts=match.casts)
    if (a.op, a.target) != (b.op, b.target) or not _same([a.args, a.kwargs], [b.args, b.kwargs], a, (), trial):
        return False
    match.values |= trial.values
    match.recast |= trial.recast
    return True


def _same(a: Any, b: Any, step: fx.Node, path: tuple[Any, ...], match: Match) -> bool:  # noqa: ANN401
    """Whether two arguments are the same; values that may come from a dtype, and casts, are noted with their place."""
    if isinstance(a, fx.Node) or isinstance(b, fx.Node):
        if match.casts.get(b) is a:
            match.recast[step, path] = b
        return match.casts.get(b) is a or _same_node(a, b, match)
    if type(a) is type(b) and isinstance(a, slice | dict | list | tuple):
        x, y = _items(a), _items(b)
        return x.keys() == y.keys() and all(_same(x[key], y[key], step, (*path, key), match) for key in x)
    if type(a) is type(b) and isinstance(a, torch.dtype | float) and a != b and not (a != a and b != b):  # noqa: PLR0124 - NaN
        match.values[step, path] = b
        return True
    return type(a) is type(b) and (a is b or bool(a == b) or (a != a and b != b))  # noqa: PLR0124


def _items(value: Any) -> dict[Any, Any]:  # noqa: ANN401
    """The items of a container by what they are found with."""
    if isinstance(value, dict):
        return value
    return dict(enumerate([value.start, value.stop, value.step] if isinstance(value, slice) else value))


def _same_node(a: Any, b: Any, match: Match) -> bool:  # noqa: ANN401
    if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)):
        return False
    if a in match.steps:
        return match.steps[a] is b
    if not (is_number(a) and is_number(b)) or a.target is not b.target or len(a.args) != len(b.args):
        return False
    same = all(
        _same_node(x, y, match) if isinstance(x, fx.Node) else _same_number(x, y, match)
        for x, y in zip(a.args, b.args, strict=True)
    )
    if same:
        match.steps[a] = b
    return same


def _same_number(a: Any, b: Any, match: Match) -> bool:  # noqa: ANN401
    """Whether two arguments of numbers are the same."""
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(_same_number(x, y, match) for x, y in zip(a, b, strict=True))
    if isinstance(a, fx.Node):
        return _same_node(a, b, match)
    return not isinstance(b, fx.Node) and type(a) is type(b) and bool(a == b)


def source_of(graph: fx.Graph, key: Key, matches: list[Match]) -> tuple[fx.Node, str | None] | None:
    """The check of the dtype that says a plain argument in all precisions, and which limit of it the argument is."""
    step, path = key
    own = _at([step.args, step.kwargs], path)
    values = [own, *(match.values.get(key, own) for match in matches)]
    before = [node for node in dtype_checks(graph) if node < step]
    for node in reversed(before):  # the last one that was read is the likeliest
        dtypes: list[Any] = [node.args[1], *(match.dtypes[node] for match in matches)]
        if values == dtypes:
            return node, None
        if all(dtype.is_floating_point for dtype in dtypes):
            for name in _LIMITS:
                if values == [getattr(torch.finfo(dtype), name) for dtype in dtypes]:
                    return node, name
    return None


def _at(value: Any, path: tuple[Any, ...]) -> Any:  # noqa: ANN401
    for key in path:
        value = _items(value)[key]
    return value
