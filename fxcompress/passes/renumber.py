"""Joins after a cut: where the channels that they add are now.

full (6, ...)   channels 1 and 4 go       full (4, ...)
part (3, ...)   channel 0 goes            part (2, ...)
index 1, 2, 5                        ->   index 1, 3
"""

import numpy as np
import torch
from torch import Tensor, fx

from fxcompress.channels.analysis import Analysis
from fxcompress.channels.plan import Plan
from fxcompress.channels.space import Reason
from fxcompress.channels.survivors import kept_masks
from fxcompress.channels.values import Value
from fxcompress.passes.join import Join, joins_of
from fxcompress.passes.replay import MismatchError
from fxcompress.trace.graph.described import place_of_node
from fxcompress.trace.traced import TracedModule

Numbers = tuple[Tensor, Tensor]


def renumber_joins(module: TracedModule, analysis: Analysis, plan: Plan) -> None:
    """Let the joins of a cut module add the channels that are left, in place.

    Args:
        module: cut already, with joins of its own that share their buffers with the original's.
        analysis: of the original.
        plan: that was carried out.

    Raises:
        MismatchError: a channel has lost the one that it is added to, or the calls of one join have lost others.
    """
    found: dict[str, Numbers] = {}
    for mode, node, join in joins_of(module):
        full, part = analysis.trails[mode].args[node.name]
        new = _numbers(join, _mask(full, join.dim, plan.alive), _mask(part, join.dim, plan.alive))
        if new is None or not all(map(torch.equal, found.setdefault(str(node.target), new), new)):
            raise _mismatch(node, full, part)
    for path, (taken, index) in found.items():
        own = module.get_submodule(path)
        assert isinstance(own, Join)
        own.taken = None if own.taken is None else taken
        own.index = index


def _mask(value: Value, dim: int, alive: np.ndarray) -> np.ndarray:
    """Which entries stay along ``dim``, bool (size,)."""
    return kept_masks(value, alive).get(dim, np.ones(value.shape[dim], dtype=bool))


def _numbers(join: Join, full: np.ndarray, part: np.ndarray) -> Numbers | None:
    """What is taken, and where it goes, by the numbers after the cut; None where one end only is left of an entry."""
    taken, index = join.of(len(part)).cpu().numpy(), join.index.cpu().numpy()
    stays = part[taken]
    if not np.array_equal(stays, full[index]):
        return None
    new = (np.cumsum(mask) - 1 for mask in (part, full))
    left = (numbers[old[stays]] for numbers, old in zip(new, (taken, index), strict=True))
    first, second = (torch.from_numpy(numbers).to(join.index.device) for numbers in left)
    return first, second


def _mismatch(node: fx.Node, full: Value, part: Value) -> MismatchError:
    layers = [layer.reshape(-1).numpy() for value in (full, part) for layer in value.layers]
    atoms = np.concatenate(layers) if layers else np.zeros(0, dtype=np.int64)
    place = place_of_node(node)
    text = f"{place} cannot be rewritten for fewer channels: it would add them to others"
    return MismatchError(atoms, Reason("rewrite", text, place))
