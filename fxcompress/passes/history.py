"""Keeps the provenance of a network up to date with what passes cut out of it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fxcompress.passes.cutting import Cut
from fxcompress.passes.prune_channels import Pruned
from fxcompress.provenance import Grid, Provenance, attach, has_record, keeps_code, provenance_of
from fxcompress.quantizer import channel_dims, is_grouped
from fxcompress.trace.fingerprint import fingerprint
from fxcompress.trace.inputs import ExampleInputs
from fxcompress.trace.traced import TracedModule

Kept = dict[str, dict[int, tuple[int, ...]]]


def original_provenance(module: TracedModule, inputs: ExampleInputs) -> Provenance:
    """The provenance of a network that nothing was cut out of."""
    state = module.state_dict(keep_vars=True)
    shapes = {name: tuple(value.shape) for name, value in state.items() if isinstance(value, Tensor)}
    return Provenance(shapes, inputs=_described(inputs), graph=fingerprint(module))


def history_of(module: TracedModule, inputs: ExampleInputs) -> Provenance:
    """The provenance of a network with one graph; where it has none, the network as it is counts as the original.

    So it does where modules inside of it are results of earlier runs, a backbone under a new head: what is cut out from
    now on is not cut out of these alone. Their weights are on their grids all the same.
    """
    found = provenance_of(module)
    if has_record(module) and found is not None:
        return found
    original = original_provenance(module, inputs)
    return original if found is None else replace(original, grids=found.grids, weights=found.weights)


def started(module: TracedModule, inputs: ExampleInputs, weights: int) -> Provenance:
    """The provenance of a network that starts to compress itself, with all that was cut out of it before."""
    base = history_of(module, inputs)
    return replace(base, grids={}, weights=weights)


def set_own_code(module: TracedModule, inputs: ExampleInputs, *, stays: bool) -> None:
    """Whether from now on nothing goes from a network that the code of its model stands in the way of; in place."""
    if stays != keeps_code(module):
        attach(module, replace(history_of(module, inputs), own_code=stays))


def _described(inputs: ExampleInputs) -> tuple[tuple[str, tuple[int, ...], str], ...]:
    named = [*(("", value) for value in inputs.args), *inputs.kwargs.items()]
    if not all(isinstance(value, Tensor) for _, value in named):
        return ()
    return tuple((name, tuple(value.shape), str(value.dtype).removeprefix("torch.")) for name, value in named)


def extended(before: TracedModule, pruned: Pruned) -> Provenance:
    """The provenance of a pruned network, on top of what was cut out of it earlier.

    Args:
        before: the network as it was, with its provenance.
        pruned: what was done to it. Tensors that the original does not have (those of quantizers) are left out.
    """
    base = history_of(before, pruned.analysis.inputs)
    cuts = {name: cut for name, cut in pruned.cuts.items() if name in base.shapes}
    kept = kept_after({name: dims for name, dims in base.kept.items() if name not in pruned.gone}, cuts)
    grids = {name: grid for name, grid in base.grids.items() if name not in pruned.gone}
    for name, cut in cuts.items():
        if name in grids:
            grids[name] = _cut_grid(grids[name], cut.old.shape, cut.indices)
    biases = tuple(name for name in base.biases if name not in pruned.gone)
    places = {f"{mode}:{node.name}" for mode, graph in pruned.module.graphs.items() for node in graph.nodes}
    joins = tuple(join for join in base.joins if join.place in places)
    return replace(base, kept=kept, cuts=base.cuts + pruned.branches, grids=grids, biases=biases, joins=joins)


def kept_after(kept: Kept, cuts: Mapping[str, Cut]) -> Kept:
    """What stays of each tensor of the original (see :class:`Provenance`) once cuts follow those that are recorded."""
    result = {name: dict(dims) for name, dims in kept.items()}
    for name, cut in cuts.items():
        dims = result.setdefault(name, {})
        for dim, index in cut.indices.items():
            earlier = dims.get(dim)
            positions = index.tolist()
            dims[dim] = tuple(positions) if earlier is None else tuple(earlier[i] for i in positions)
    return result


def _cut_grid(grid: Grid, shape: Sequence[int], indices: dict[int, Tensor]) -> Grid:
    """The number format of the channels that are left of a weight that had ``shape``."""
    grouped = is_grouped(grid.channel_dim, grid.groups)
    if grid.batch_dims:
        return _cut_batch(grid, shape, indices)
    index = indices.get(0 if grouped else grid.channel_dim)
    if index is None:
        return grid
    groups = grid.groups
    if grouped:
        left = torch.unique(index // (shape[0] // groups))
        each = len(grid.bits) // groups
        index = (left[:, None] * each + torch.arange(each, device="cpu")).reshape(-1)
        groups = len(left)
    return _channels(replace(grid, groups=groups), index)


def _cut_batch(grid: Grid, shape: Sequence[int], indices: dict[int, Tensor]) -> Grid:
    """The same where each entry of some dims has channels of its own."""
    dims = channel_dims(grid.channel_dim, grid.batch_dims)
    left = torch.arange(len(grid.bits), device="cpu").reshape([shape[dim] for dim in dims])
    for position, dim in enumerate(dims):
        left = left.index_select(position, indices[dim]) if dim in indices else left
    return _channels(grid, left.reshape(-1))


def _channels(grid: Grid, index: Tensor) -> Grid:
    """The number format of some of the channels."""
    channels = index.tolist()
    bits, exponent = (tuple(values[c] for c in channels) for values in (grid.bits, grid.exponent))
    return replace(grid, bits=bits, exponent=exponent)
