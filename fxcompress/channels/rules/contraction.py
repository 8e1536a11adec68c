"""Convolutions and matrix products: sums over products along one dim.

The entries that are contracted are coupled. Each contraction is also a **site**: a place where channels are read, and
where a channel may be left out when what is read, or what it is multiplied with, is zero.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fxcompress.channels.computed_numbers import Computed
from fxcompress.channels.layers import Layers, along, support, vector
from fxcompress.channels.rules.patterns import Pattern, is_array, pattern
from fxcompress.channels.rules.pointwise import couple_aligned
from fxcompress.channels.rules.registry import Known, OpClass, nothing_known, register
from fxcompress.channels.space import Space
from fxcompress.channels.values import Call, Step, Value


@dataclass(frozen=True, slots=True)
class Site:
    """One contraction.

    Attributes:
        source: the left operand (an activation), read along ``source_dim``, K entries.
        weight: the right operand; its dim ``column`` meets the source, its dim ``row`` makes the R outputs.
        groups: G of a grouped convolution; entry k meets the rows of its group only.
        transposed: the groups divide the columns, not the rows.
        bias: what is added, or None.
        out_dim: the dim of the result that holds the R outputs (of all groups).
    """

    source: Value
    source_dim: int
    weight: Value
    row: int
    column: int
    groups: int
    transposed: bool
    bias: Value | None
    out_dim: int

    @property
    def entries(self) -> int:
        """K."""
        return self.source.shape[self.source_dim]

    @property
    def rows(self) -> int:
        """R, over all groups."""
        return self.weight.shape[self.row] * (self.groups if self.transposed else 1)


def site_of(call: Call) -> Site | None:
    """The site of a contraction; None where an operand is no labelled tensor."""
    name = call.func.overloadpacket.__name__
    bias, left, right = (None, *call.args[:2]) if name == "mm" else call.args[:3]
    if name == "convolution":
        left, right, bias = call.args[:3]
    if name == "deform_conv2d":
        left, right, bias = *call.args[:2], call.args[4]
    if not isinstance(left, Value) or not isinstance(right, Value):
        return None
    bias = bias if isinstance(bias, Value) else None
    if name == "deform_conv2d":
        return Site(left, 1, right, 0, 1, call.args[11], False, bias, 1)
    if name == "convolution":
        transposed = bool(call.args[6])
        return Site(left, 1, right, int(transposed), int(not transposed), call.args[8], transposed, bias, 1)
    return Site(left, 1, right, 1, 0, 1, False, bias, 1)


def take(value: Value, dim: int, space: Space) -> Tensor | None:
    """The atoms along ``dim``, shape (K,); what varies along other dims as well goes with all of its slice."""
    layer = along(value.layers, dim)
    if layer is not None and layer.numel() > layer.shape[dim]:
        layer = space.hold(
            layer, support(layer) - {dim}, "crossing", "a contraction reads a dim that is labelled together with others"
        )
    return layer if layer is None or layer.ndim == 1 else layer.reshape(-1)


def meet(a: Tensor | None, b: Tensor | None, space: Space) -> None:
    """Couple the entries of two operands; entries that meet a dim of fixed size stay."""
    if a is not None and b is not None:
        space.couple(a, b)
    for one, other in ((a, b), (b, a)):
        if one is not None and other is None:
            space.pin(one, "fixed-operand", "it meets a tensor whose size is fixed, such as an input of the network")


def _conv_labels(call: Call, space: Space) -> tuple[Layers, ...]:
    site = site_of(call)
    if site is None:
        return pin_all(call, space)
    rank = call.metas[0].ndim
    read, columns = take(site.source, 1, space), take(site.weight, site.column, space)
    rows = take(site.weight, site.row, space)
    through = _through_kernel(call, site, space)
    if site.groups == 1:
        meet(read, columns, space)
    else:
        rows = _grouped(site, read, columns, rows, space)
    result = [] if rows is None else [vector(rows, rank, 1)]
    result += [layer for layer in site.source.layers if support(layer) <= through]
    if site.bias is not None and site.bias.layers:
        bias = site.bias.layers[0].reshape(-1)
        meet(rows, bias, space)
    return (tuple(result),)


def _deformed_labels(call: Call, space: Space) -> tuple[Layers, ...]:
    """A convolution that reads at computed places; with groups, or groups of places, its channels stay."""
    for value in (a for a in call.args[2:4] if isinstance(a, Value)):
        for layer in value.layers:
            space.pin(layer, "window", "it says where a deformable convolution reads")
    groups, places = call.args[11], call.args[12]
    site = site_of(call)
    if site is not None and (groups, places) != (1, 1):
        for layer in (*site.source.layers, *site.weight.layers):
            space.pin(layer, "group-inner", "a deformable convolution has groups of channels")
    return _conv_labels(call, space)


def _through_kernel(call: Call, site: Site, space: Space) -> frozenset[int]:
    """Pin what a kernel slides over, and its positions; the dims of the source that pass through as they are.

    A kernel of one entry that moves by one entry reads nothing beside the entry that it stands on. (Of one channel
    alone nobody can tell whether what varies along other dims varies along the channels as well, before a removal.)
    """
    rank = site.source.rank
    through = {0}
    if call.func.overloadpacket is torch.ops.aten.convolution and site.entries > 1:
        stride, padding, _, _, output_padding = call.args[3:8]
        for d in range(2, rank):
            plain = all(sizes[min(d - 2, len(sizes) - 1)] == n for sizes, n in ((stride, 1), (padding, 0)))
            if site.weight.shape[d] == 1 and plain and not any(output_padding):
                through.add(d)
    for layer in site.weight.layers:
        if layer.shape[0] == layer.shape[1] == 1:
            space.pin(layer, "kernel", "it is a position of a convolution's kernel")
    for layer in site.source.layers:
        if layer.shape[1] == 1 and not support(layer) <= through:
            space.pin(layer, "window", "a convolution slides over this dim")
    return frozenset(through)


def _grouped(
    site: Site, read: Tensor | None, columns: Tensor | None, rows: Tensor | None, space: Space
) -> Tensor | None:
    """A group of a grouped convolution goes as a whole: all of its inputs and all of its outputs.

    Unless all groups read the same labels, as where each sample of a batch is a group with a weight of its own.
    (Those of a transposed layer stay: of fewer channels nobody could tell how many groups they make.)
    """
    inner = rows if site.transposed else columns
    outer = columns if site.transposed else rows
    alike = [labels is None or _is_shared(labels, site.groups) for labels in (read, outer)]
    if all(alike) or (alike[0] and read is not None and not site.transposed):
        return _alike(site, read, columns, rows, space)
    if inner is not None:
        space.pin(inner, "group-inner", "all groups of a grouped convolution share it")
    if read is None or outer is None:
        meet(read, outer, space)
        return None if site.transposed else outer
    members = read.reshape(site.groups, -1)
    space.couple(members, members[:, :1])
    space.couple(members[:, :1], outer.reshape(site.groups, -1))
    return members[:, :1].expand(site.groups, site.rows // site.groups).reshape(-1) if site.transposed else outer


def _is_shared(labels: Tensor, groups: int) -> bool:
    """Whether each group has the same labels, and more than one."""
    members = labels.reshape(groups, -1)
    return members.shape[1] > 1 and bool((members == members[:1]).all())


def _alike(site: Site, read: Tensor | None, columns: Tensor | None, rows: Tensor | None, space: Space) -> Tensor | None:
    """An entry that goes leaves each group, and the groups stay as many; so must what each of them makes.

    As of N samples (1, N * I, H, W), in N groups, with a weight (N * O, I, h, w).
    """
    if site.transposed:
        meet(read, columns, space)
        return None if rows is None else rows.repeat(site.groups)
    meet(None if read is None else read.reshape(site.groups, -1)[0], columns, space)
    if rows is not None and not _is_shared(rows, site.groups):
        space.pin(rows, "group-inner", "each group of a grouped convolution makes as many channels")
    return rows


def pin_all(call: Call, space: Space) -> tuple[Layers, ...]:
    """For an op one of whose operands is no labelled tensor: no label survives."""
    for value in (a for a in call.args if isinstance(a, Value)):
        for layer in value.layers:
            space.pin(layer, "fixed-operand", "it meets a tensor whose size is fixed")
    return tuple(() for _ in call.metas)


def _matmul_labels(call: Call, space: Space) -> tuple[Layers, ...]:
    site = site_of(call)
    if site is None:
        return pin_all(call, space)
    out = call.metas[0]
    meet(take(site.source, 1, space), take(site.weight, 0, space), space)
    kept: list[Tensor] = []
    for value, free in ((site.source, 0), (site.weight, 1)):
        if any(len(support(layer)) == 2 for layer in value.layers):
            continue  # labelled along both dims: what is contracted goes in all slices at once, and no slice as a whole
        atoms = take(value, free, space)
        if atoms is not None:
            kept.append(vector(atoms, 2, free))
    if site.bias is None:
        return (tuple(kept),)
    return (couple_aligned([(out.shape, tuple(kept)), (site.bias.shape, site.bias.layers)], 2, space),)


def pattern_of(site: Site, known: Known) -> Pattern:
    """Which weights may be other than zero: (R, K/G), or (O/G, K) where ``transposed`` with groups."""
    key = site.weight.key, site.row, site.column
    weight, shape = known.held(site.weight), site.weight.shape
    if key not in known.patterns:
        known.patterns[key] = known.once_in_memory(
            weight, (*key[1:], shape), lambda: pattern(weight, site.row, site.column, shape)
        )
    return known.patterns[key]


def may_read(site: Site, known: Known) -> np.ndarray:
    """Which entries of the source may be other than zero: bool (K,)."""
    source, dim, size = known.held(site.source), site.source_dim, site.entries
    found: np.ndarray = known.once(source, ("may read", dim, size), lambda: _nonzero_along(source, dim, size))
    return found


def _nonzero_along(source: Tensor, dim: int, size: int) -> np.ndarray:
    may = source.numpy() != 0 if is_array(source) else (source != 0).cpu().numpy()
    others = tuple(d for d, n in enumerate(may.shape) if n != 1 and d != dim)  # of a batch of none, all entries are 0
    entries = (may.any(axis=others) if others else may).reshape(-1)
    return entries if len(entries) == size else np.repeat(entries, size)


def live_rows(site: Site, known: Known) -> np.ndarray:
    """Which outputs may depend on the input: bool (R,)."""
    weights, read = pattern_of(site, known), may_read(site, known)
    g = site.groups
    if g == 1:
        rows: np.ndarray = known.once(weights, read.tobytes(), lambda: weights.rows_with(read))
        return rows
    may = weights.dense()
    if site.transposed:
        return np.asarray((may & read).reshape(-1, g, site.entries // g).any(-1).T.reshape(-1))
    return np.asarray((may.reshape(g, -1, may.shape[1]) & read.reshape(g, 1, -1)).any(-1).reshape(-1))


def _constants(step: Step, known: Known) -> list[Tensor]:
    """An output whose products are all zero is its bias; all of them, for what reads nothing but zeros."""
    site = site_of(step.call)
    out = step.outputs[0]
    factors = [step.call.kwargs.get(k, 1) for k in ("alpha", "beta")]
    scaled = any(isinstance(factor, Computed) or factor != 1 for factor in factors)
    if site is None or scaled or (site.bias is not None and site.bias.rank != 1):
        return nothing_known(step, known)
    bias = 0.0 if site.bias is None else known.small(site.bias)
    shape = [-1 if d == site.out_dim else 1 for d in range(out.rank)]
    value = torch.from_numpy(np.where(live_rows(site, known), np.nan, bias).reshape(shape))
    zeros = _reads_zeros(site, known)
    if zeros is None:
        return [value]
    return [torch.where(zeros, torch.from_numpy((np.zeros(site.rows) + bias).reshape(shape)), value)]


def _reads_zeros(site: Site, known: Known) -> Tensor | None:
    """Which samples, or rows of a matrix, are zeros throughout, bool (N, 1, ...): channels may lie there.

    As where a layer mixes tokens, or a filter is the same for all channels. None where all samples are known alike.
    """
    source = known.of(site.source)
    if source.shape[0] == 1:
        return None
    return (source == 0).flatten(1).all(1).view([-1, *[1] * (source.ndim - 1)])


CONVOLUTION = register(OpClass("convolution", _conv_labels, _constants), ["convolution"])
MATMUL = register(OpClass("matrix product", _matmul_labels, _constants), ["mm", "addmm"])
DEFORMED = OpClass("deformable convolution", _deformed_labels, _constants)
CONTRACTIONS = frozenset({CONVOLUTION, MATMUL, DEFORMED})
