"""Reshapes that state a size of the inputs as a number: what is left of it goes elsewhere for inputs of other sizes.

``h.reshape(2, 16, -1)`` of two samples is (N, C, pixels). Four samples are two rows for it, and the rest of them goes
behind the channels. Whether the network takes inputs for which that happens, its shapes tell.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile

from torch import fx, nn

from fxcompress.channels.given_sizes import GivenSize
from fxcompress.trace.inputs import ExampleInputs
from fxcompress.trace.retrace.other_shapes import shapes_elsewhere
from fxcompress.trace.traced import TracedModule

_KEY = "fxcompress_layouts"
Block = tuple[list[int], list[int]]
"""Dims that a reshape turns into others."""
Pair = tuple[Sequence[int], Sequence[int]]
"""The shapes of what is reshaped, and of what it becomes."""
Elsewhere = Callable[[fx.Node], list[Pair]]


def elsewhere(module: nn.Module, graph: fx.Graph, inputs: ExampleInputs) -> Elsewhere:
    """What gives the shapes before and behind a node on the example and on inputs of other sizes.

    The graph is run for them when a node is first asked for, and once: no cut changes what lies where.
    """

    def look(node: fx.Node) -> list[Pair]:
        mode = next((mode for mode, own in getattr(module, "graphs", {}).items() if own is graph), None)
        if _KEY not in node.meta and mode is not None and isinstance(module, TracedModule):
            _note(module, graph, inputs, mode)
        found: list[Pair] = node.meta.get(_KEY, [])
        return found

    return look


def _note(module: TracedModule, graph: fx.Graph, inputs: ExampleInputs, mode: str) -> None:
    nodes = [node for node in graph.nodes if node.args and isinstance(node.args[0], fx.Node)]
    pairs: dict[fx.Node, list[Pair]] = {node: [] for node in nodes}
    for shapes in shapes_elsewhere(module, inputs, mode):
        for node in nodes:
            source: fx.Node = node.args[0]
            if source.name in shapes and node.name in shapes:
                pairs[node].append((shapes[source.name], shapes[node.name]))
    for node in nodes:
        node.meta[_KEY] = pairs[node]


def is_doubtful(split: list[Block], own: Block, free: Sequence[bool], given: Sequence[GivenSize]) -> bool:
    """Whether sizes of the inputs on one side of some channels are stated, and what is on the other takes what is left.

    Or whether such a size may go from one side to the other, as ``(T, C, N)`` of one sample becomes ``(N, T, C)``.

    Args:
        split: all that a reshape does.
        own: those of the channels.
        free: of each dim of what is reshaped, whether other inputs may have another size.
        given: what it is given as the size of each dim of the result.
    """
    at = split.index(own)
    before, behind = split[:at], split[at + 1 :]
    for side, rest in ((before, [own, *behind]), (behind, [*before, own])):
        takes = any(given[d].follows is not False for _, new in rest for d in new)
        if takes and any(_is_stated(block, free, given) for block in side):
            return True
    channels = [d for d in own[0] if not free[d]]
    first, last, start, stop = min(channels), max(channels), min(own[1]), max(own[1])
    is_open = [size.follows is not False for size in given]
    more_before = sum(is_open[:start]) - sum(free[:first])
    more_behind = sum(is_open[stop + 1 :]) - sum(free[last + 1 :])
    return more_before * more_behind < 0


def _is_stated(block: Block, free: Sequence[bool], given: Sequence[GivenSize]) -> bool:
    old, new = block
    return bool(old and new) and all(free[d] for d in old) and all(given[d].stated is not None for d in new)


def stays(own: Block, example: Pair, pairs: list[Pair]) -> bool:
    """Whether as much lies before and behind the channels in what a reshape makes as in what it is given.

    Args:
        own: the dims of the channels, and what they become.
        example: the shapes for which that holds.
        pairs: those on other inputs.
    """
    old, new = own
    for pair in pairs:
        if any(len(a) != len(b) for a, b in zip(pair, example, strict=True)):
            continue
        before = {math.prod(pair[0][:i]) for i in _starts(example[0], old)} & {
            math.prod(pair[1][:i]) for i in _starts(example[1], new)
        }
        behind = {math.prod(pair[0][i:]) for i in _ends(example[0], old)} & {
            math.prod(pair[1][i:]) for i in _ends(example[1], new)
        }
        if not before or not behind:
            return False
    return True


def _starts(shape: Sequence[int], dims: list[int]) -> Iterator[int]:
    """Where some dims begin: dims of one entry around that may be theirs, or not."""
    first = min(dims)
    while first and shape[first - 1] == 1:
        first -= 1
    yield from range(first, min(dims) + 1)
    yield from takewhile(lambda at: shape[at - 1] == 1, range(min(dims) + 1, max(dims) + 1))


def _ends(shape: Sequence[int], dims: list[int]) -> Iterator[int]:
    last = max(dims) + 1
    while last < len(shape) and shape[last] == 1:
        last += 1
    yield from range(max(dims) + 1, last + 1)
    yield from takewhile(lambda at: shape[at] == 1, range(max(dims), min(dims), -1))
