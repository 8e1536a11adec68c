"""Which entries of which tensors are known to be constant: the second domain, run over the tape of the first.

Labels prove that shapes agree after a removal; constants prove that the output does.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor

from fxcompress.channels.analysis import Analysis
from fxcompress.channels.computed_numbers import marked
from fxcompress.channels.interpret import Trail
from fxcompress.channels.layers import compress
from fxcompress.channels.noted import Answer, Noted
from fxcompress.channels.rules.movement import MOVEMENT
from fxcompress.channels.rules.registry import Known, Shared, unknown
from fxcompress.channels.running_stats import read_by_others
from fxcompress.channels.survivors import has_own_labels
from fxcompress.channels.values import Step, Value, find
from fxcompress.trace.basics.garbage_collection import without_collections
from fxcompress.trace.graph.names import fetch_attr
from fxcompress.trace.traced import TracedModule

Seeds = Callable[[TracedModule, Trail], dict[int, Tensor]]
"""What is known of the parameters at the start: from a module and its trail to the maps of the values."""


def values_known(module: TracedModule, trail: Trail) -> dict[int, Tensor]:
    """The seeds of a network as it stands: the value of every parameter and buffer is known, but for sparse ones."""
    tensors = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    tensors |= {name: fetch_attr(module, name) for name in trail.parameters if name not in tensors}
    read = ((value, tensors[name].detach()) for name, value in trail.parameters.items())
    return {value.key: _numbers(tensor) for value, tensor in read if tensor.layout == torch.strided}


def _numbers(tensor: Tensor) -> Tensor:
    """A tensor as it stands; that of a mask as zeros and ones."""
    return tensor.cpu().float() if tensor.dtype is torch.bool else tensor


def knowns_of(
    analysis: Analysis, seeds: Seeds, modes: tuple[bool | None, ...] = (False, True)
) -> dict[str, list[Known]]:
    """What is known in each graph, for batch norm in evaluation (False) and in training (True).

    Each graph may meet both: batch norm is often in another mode than the rest of the network. None stands for what
    is the same in both.

    Of a buffer that the network writes to, as a moving average, we know the entries that no run of any graph changes:
    they are found by running with all that it holds at the start, and then with ever less, until nothing changes.
    """
    moved = read_by_others(analysis)
    lasting = {  # by the labels, which all names of a tensor share
        id(analysis.atoms[name]): torch.full(
            (1,) * analysis.module.get_buffer(name).ndim, torch.nan, device="cpu"
        ).double()
        for name in moved
    }
    shared: Shared = {}
    while True:
        known_in = partial(_knowns, analysis, seeds=seeds, modes=modes, lasting=lasting, shared=shared)
        knowns = {mode: known_in(trail) for mode, trail in analysis.trails.items()}
        changed = False
        for mode, trail in analysis.trails.items():
            for name, last in trail.written.items():
                tensor = id(analysis.atoms[name])
                for known in knowns[mode]:
                    before = lasting.get(tensor, known.of(trail.parameters[name]).double())
                    after = known.maps.get(last, torch.full_like(before, torch.nan))
                    lasting[tensor] = torch.where(before == after, before, torch.nan)
                    changed |= bool((lasting[tensor].isnan() & ~before.isnan()).any())
        if not changed:
            return knowns


def _knowns(
    analysis: Analysis,
    trail: Trail,
    seeds: Seeds,
    modes: tuple[bool | None, ...],
    lasting: dict[int, Tensor],
    shared: Shared,
) -> list[Known]:
    maps = seeds(analysis.module, trail)
    for name, value in trail.parameters.items():
        if id(analysis.atoms.get(name)) in lasting:
            maps[value.key] = lasting[id(analysis.atoms[name])]
    found, answers = [], list[Answer]()
    for training in modes:
        found.append(Known(dict(maps), shared=shared, training=training))
        answers = _propagate(trail, found[-1], answers)
    return found


def propagate(trail: Trail, maps: dict[int, Tensor], *, training: bool | None) -> Known:
    """Run the constant rules over a tape.

    Args:
        trail: the interpretation of one graph.
        maps: what is known at the start, by the key of each value; see :class:`Known`.
        training: batch norm takes the statistics of the batch.
    """
    known = Known(dict(maps), training=training)
    _propagate(trail, known, [])
    return known


class Propagation:
    """:func:`propagate` over one tape, again and again: only rules that would be told something else are asked anew."""

    def __init__(self, trail: Trail, *, training: bool | None) -> None:
        self.trail = trail
        self.training = training
        self._maps: dict[int, Tensor] = {}
        self._answers: list[Answer] = []

    def run(self, maps: dict[int, Tensor]) -> Known:
        """What is known where ``maps`` is known at the start."""
        last = self._maps
        self._maps = {key: last[key] if _same(map_, last.get(key)) else map_ for key, map_ in maps.items()}
        known = Known(dict(self._maps), training=self.training)
        self._answers = _propagate(self.trail, known, self._answers)
        return known


@without_collections
def _propagate(trail: Trail, known: Known, earlier: list[Answer]) -> list[Answer]:
    """Enter in ``known`` what is known of each value.

    Args:
        trail: the interpretation of one graph.
        known: at the start.
        earlier: for each step what was found in another mode, or in another run; or nothing.

    Returns:
        for each step what was found.
    """
    answers, noted = [], Noted(known)
    with torch.no_grad():
        for step, before in zip_longest(trail.tape, earlier):
            answer = before if before is not None and before.holds(known) else _ask(step, noted, before)
            answers.append(answer)
            for value, found in zip(step.outputs, answer.found, strict=True):
                if found is not None:
                    known.maps[value.key] = found
    return answers


def _ask(step: Step, noted: Noted, before: Answer | None) -> Answer:
    """What a rule finds; a map that is as it was in the other mode is that one, so that the rules behind see so."""
    noted.begin(step)
    told = zip(step.outputs, step.op.constants(marked(step), noted), strict=True)
    found = [None if x is unknown(value) or _says_nothing(x) else _compact(x) for value, x in told]
    found = [None if x is not None and not x.numel() and not _is_without_entries(step, noted) else x for x in found]
    if before is not None:
        found = [old if _same(new, old) else new for new, old in zip(found, before.found, strict=True)]
    return Answer(found, noted.asked, noted.private)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two maps are the same, bit by bit."""
    if a is b or a is None or b is None:
        return a is b
    plain = a.dtype is b.dtype is torch.float64 and a.is_cpu and b.is_cpu  # others are parameters as they stand
    return plain and a.shape == b.shape and torch.equal(a.view(torch.int64), b.view(torch.int64))


def _says_nothing(found: Tensor) -> bool:
    """Whether all entries of a map vary. What such a map meets later would have to be as large as it."""
    if found.dtype is not torch.float64 or not found.is_cpu or not found.numel():
        return False  # a parameter as it stands, or one without entries
    array = found.numpy()
    return math.isnan(array.item(0)) and bool(np.isnan(array).all())


def _is_without_entries(step: Step, known: Known) -> bool:
    """Whether there are no entries for other inputs either: none of its channels were picked, or there were none."""
    for value in find(Value, step.call.args):
        empty = [d for d, n in enumerate(step.outputs[0].shape) if not n and d < value.rank and d not in step.anywhere]
        if not known.of(value).numel() or (step.op is MOVEMENT and any(has_own_labels(value, d) for d in empty)):
            return True
    return False


def _compact(found: Tensor) -> Tensor:
    """A map without the dims along which it does not vary any more, as they come from position embeddings."""
    if found.numel() < _LARGE or found.dtype is not torch.float64 or not found.is_cpu:
        return found
    if sum(size > 1 for size in found.shape) < 2:
        return found
    return compress(found.view(torch.int64)).view(torch.float64)


_LARGE = 1 << 14
"""Entries of a map which it pays to look at once more."""
