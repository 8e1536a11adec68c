"""Which parameters can take a quantizer though no layer multiplies with them, and where their channels are.

pos_embed (1, N, C) -> add                 a bit depth for each of the C channels, which the sum has as well
in_proj (3 * D, D)  -> slices -> F.linear  one for each row, of which each matrix has a third
experts (E, I, O)   -> torch.bmm           one for each of the O channels of each expert
bias_table (V, H)   -> index -> add        one for each of the H heads

What is read of such a parameter must be linear in it: then an error of its values is one of the same size in what is
made. Behind an exponential or a softmax it would be any, and those stay floats.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from fxcompress.channels.analysis import Analysis
from fxcompress.channels.carried import Held, carried
from fxcompress.channels.dim_places import op_name
from fxcompress.channels.factories import SPREAD
from fxcompress.channels.interpret import Trail
from fxcompress.channels.layers import along
from fxcompress.channels.rules.contraction import CONTRACTIONS, MATMUL, site_of
from fxcompress.channels.rules.indexing import picked_dims
from fxcompress.channels.rules.movement import MOVEMENT
from fxcompress.channels.rules.products import BATCHED, product_of
from fxcompress.channels.rules.reductions import reduced_dims
from fxcompress.channels.rules.sums import SUM, is_sum, summed_products
from fxcompress.channels.sites import COLUMNS
from fxcompress.channels.values import Step, Value, find
from fxcompress.passes.weight_steps import asks_for_kind
from fxcompress.passes.weight_uses import Layout
from fxcompress.trace.graph.calls import writes_in_place
from fxcompress.trace.traced import TracedModule

_MOVES = frozenset({
    "anywhere", "movement", "diagonal", "reshape", "permute", "cat", "pad", "restride", "index", "gather",
    "same values", "dropout", "noise", "embedding", "window 1d", "window 2d", "window 3d", "complex as real",
    "real as complex",
})  # fmt: skip
"""Classes of ops each entry of whose results is a sum of entries of what they are given, each times a number."""
_SUMS = frozenset({"add", "sub", "neg", "mul", "mean", "where", "masked_fill", "index_add", "lerp", "complex"})
_BOTH = frozenset({"add", "sub", "where", "complex"})
"""Linear in all operands at once."""
_PRODUCTS = frozenset({"bmm", "baddbmm", "mm", "addmm", "convolution"})
_ADDS = frozenset({"add", "sub"})
_NONE = -1
_TURNS = frozenset({"T", "mT"})
_IN_THE_FIRST = frozenset({"div", "grid_sampler_2d", "grid_sampler_3d", "_fft_r2c", "_fft_c2c", "_fft_c2r"})
"""Linear in what is divided, sampled from or transformed."""


@dataclass(slots=True)
class _Readings:
    """What is made of one parameter in a network.

    Attributes:
        linear: whether all of it is linear in the parameter.
        rows: dims of the parameter that are those of what products make.
        contracted: dims that products sum over.
        batches: dims that are those of the batch of a product, or of which the network picks some (experts).
        layers: whether layers multiply with all of it (a matrix that is expanded to the batch, say).
        merged: whether the rows of such a layer are some of its dims, one behind the other.
    """

    linear: bool = True
    rows: set[int] = field(default_factory=set)
    contracted: set[int] = field(default_factory=set)
    batches: set[int] = field(default_factory=set)
    layers: bool = False
    merged: bool = False


def plain_weights(analysis: Analysis, names: Iterable[str]) -> dict[str, Layout]:
    """Where the channels are of those parameters that can take a quantizer behind each read.

    Args:
        analysis: of a network.
        names: of parameters that no quantizer is in front of as yet.
    """
    found, module = dict[str, Layout](), analysis.module
    for name in names:
        parameter = module.get_parameter(name)
        if not parameter.requires_grad or not parameter.is_floating_point():
            continue
        aliases = {other for other, p in module.named_parameters(remove_duplicate=False) if p is parameter}
        if not _only_read(module, aliases):
            continue
        readings = _Readings()
        for mode, trail in analysis.trails.items():
            whole = {key: held for key, held in analysis.weights(mode).items() if held.name in aliases}
            for value in {v.key: v for n, v in trail.parameters.items() if n in aliases}.values():
                start = {value.key: Held(name, value.layers, value.rank)}
                held = carried(trail.tape, start, {name}, picked=True) | whole
                _follow(trail, value, _Own(held, whole.keys(), analysis.atoms[name]), readings)
        layout = _layout(analysis, name, readings) if readings.linear else None
        if layout is not None:
            found[name] = layout
    return found


def _only_read(module: TracedModule, aliases: Collection[str]) -> bool:
    """Whether nodes of the graphs read a parameter, none writes to it, and no module has it for itself."""
    held = {id(module.get_parameter(name)) for name in aliases}
    read = False
    for graph in module.graphs.values():
        own: set[fx.Node] = set()
        for node in graph.nodes:
            if node.op == "get_attr" and str(node.target) in aliases:
                own.add(node)
            elif node.op == "call_module" and any(
                id(p) in held for p in module.get_submodule(str(node.target)).parameters()
            ):
                return False
            elif own.intersection(node.all_input_nodes) and not asks_for_kind(node):
                if (
                    writes_in_place(node)
                    or node.op == "output"
                    or (node.target is getattr and node.args[1] not in _TURNS)
                ):
                    return False
                read = True
                if all(used.op == "get_attr" or used in own for used in node.all_input_nodes):
                    own.add(node)
    return read


@dataclass(frozen=True, slots=True)
class _Own:
    """Where the entries of one parameter are in a graph.

    Attributes:
        held: what the values hold of it, by their keys; some of its entries, perhaps.
        whole: the keys of those values that are a weight of this parameter to the analysis.
        atoms: its labels, by its dims.
    """

    held: Mapping[int, Held]
    whole: Collection[int]
    atoms: Mapping[int, Tensor]

    def places(self, value: Value) -> dict[int, int]:
        """For the dims of a value that are dims of the parameter, or a part of them, which ones they are."""
        held = self.held.get(value.key)
        if held is None:
            return {}
        is_part = value.key not in self.whole
        found = {d: along(held.layers, d) for d in range(value.rank)}
        return {
            d: own
            for own, labels in self.atoms.items()
            for d, layer in found.items()
            if layer is not None and _lies(layer.reshape(-1), labels, is_part=is_part)
        }


def _lies(layer: Tensor, labels: Tensor, *, is_part: bool) -> bool:
    """Whether what lies along a dim of a value is a dim of a parameter, by its labels, or else a part of one."""
    if is_part:
        return len(layer) <= len(labels) and bool(torch.isin(layer, labels).all())
    return torch.equal(layer, labels)


def _follow(trail: Trail, start: Value, own: _Own, readings: _Readings) -> None:
    """Note what the steps of a graph do with a parameter, until it meets what is computed from inputs."""
    fixed, made, added = {value.key for value in trail.parameters.values()}, {start.key}, set[int]()
    products = summed_products(trail.tape)
    for step in trail.tape:
        values = find(Value, (step.call.args, step.call.kwargs))
        read, outputs = [value for value in values if value.key in made], [value.key for value in step.outputs]
        is_fixed = fixed.issuperset(value.key for value in values)
        if is_fixed and not _is_input(step, read):
            fixed.update(outputs)
        product = products.get(id(step))
        if product is not None and product.outputs[0].key not in made:  # a product by hand, or an einsum
            _note_sum(step, product, made, own, readings)
        if not read:
            continue
        if not _is_linear(step, read) or any(value.key in added for value in _weights_of(step)):
            readings.linear = False
            return
        _note_product(step, read, own, readings, is_fixed=is_fixed)
        _note_batches(step, read, own, readings)
        if _moves(step) or (is_fixed and not _is_input(step, read)):
            made.update(outputs)
            if (op_name(step.call) in _ADDS and len(values) > 1) or added.intersection(v.key for v in read):
                added.update(outputs)


def _note_sum(step: Step, product: Step, made: Collection[int], own: _Own, readings: _Readings) -> None:
    """Note the dims of a parameter along which its product with something else is summed."""
    whole: Value = step.call.args[0]
    for factor in (value for value in find(Value, product.call.args) if value.key in made):
        missing, there = whole.rank - factor.rank, own.places(factor)
        readings.contracted |= {there[d - missing] for d in reduced_dims(step.call) if d - missing in there}


def _note_batches(step: Step, read: list[Value], own: _Own, readings: _Readings) -> None:
    """Note the dims of a parameter of which a step picks entries, or of which each goes another way."""
    for value in read:
        there = own.places(value)
        readings.batches |= {there[dim] for dim in picked_dims(step) if dim in there}
        if step.op is MOVEMENT:
            left = {d for out in step.outputs for d in own.places(out).values()}
            readings.batches |= set(there.values()) - left


def _is_linear(step: Step, read: list[Value]) -> bool:
    """Whether a step makes something linear of what it reads."""
    name = op_name(step.call)
    if len(read) > 1 and not _moves(step) and name not in _BOTH:
        return False  # it may be a product with itself
    if step.op in CONTRACTIONS or step.op is BATCHED:
        site = site_of(step.call) if step.op in CONTRACTIONS else None
        kernel = site is not None and step.op is not MATMUL and any(value is site.weight for value in read)
        bias = site is not None and any(value is site.bias for value in read)
        return name in _PRODUCTS and not bias and (not kernel or _is_plain(step))
    if name in _IN_THE_FIRST:
        return all(value is step.call.args[0] for value in read)
    return _moves(step) or name in _SUMS


def _note_product(step: Step, read: list[Value], own: _Own, readings: _Readings, *, is_fixed: bool) -> None:
    """Note where the dims of a parameter are in a product; of parameters alone, the second one reads the first."""
    for place, (value, batch, row, contracted, is_layer) in enumerate(_operands(step)):
        if not any(value is other for other in read):
            continue
        there, sums = own.places(value), [readings.rows, readings.contracted]
        rows, summed = sums[::-1] if is_fixed and place == 0 else sums
        for dims, dim in ((readings.batches, batch), (rows, row), (summed, contracted)):
            dims.update([there[dim]] if dim in there else [])
        if is_layer and value.key in own.whole:
            readings.layers = True
            readings.merged |= row not in there
            readings.linear &= not own.held[value.key].is_shuffled(row, own.atoms)


def _is_input(step: Step, read: list[Value]) -> bool:
    """Whether a layer takes what it reads as its input, as learned queries are; what it makes are features then."""
    site = site_of(step.call) if step.op in CONTRACTIONS else None
    return site is not None and any(value is site.source for value in read)


def _weights_of(step: Step) -> Iterator[Value]:
    """What a layer multiplies with."""
    return (value for value, *_, is_layer in _operands(step) if is_layer)


def _operands(step: Step) -> Iterator[tuple[Value, int, int, int, bool]]:
    """The operands of a product: dims of its batch, of what it makes, of the sum; whether it is a layer's weight."""
    product = product_of(step.call) if step.op is BATCHED else None
    site = site_of(step.call) if _is_plain(step) else None
    if product is not None:
        yield product.left, 0, 1, 2, False
        yield product.right, 0, 2, 1, False
    elif site is not None:
        if step.op is MATMUL:
            yield site.source, _NONE, 0, site.source_dim, False
        yield site.weight, _NONE, site.row, site.column, True


def _is_plain(step: Step) -> bool:
    """Whether a step is the product of a linear layer, or a convolution with one group."""
    site = site_of(step.call) if step.op in CONTRACTIONS else None
    return site is not None and (step.op is MATMUL or site.groups == 1)


def _layout(analysis: Analysis, name: str, readings: _Readings) -> Layout | None:
    """Where the channels of a parameter are.

    With products, along each dim that is not summed over, as in a linear layer; they go along the one that is made.
    Otherwise, and where a layer makes several dims at once, along the dim most of which could go.
    """
    labels = analysis.atoms[name]
    free = {dim: int((~analysis.unit_pinned[own.numpy()]).sum()) for dim, own in labels.items()}
    dims, batch = set(labels), set[int]()
    if readings.merged:
        dims = set() if readings.rows else dims - readings.contracted
    elif readings.rows:
        dims, batch = readings.rows, readings.batches
    elif readings.contracted:
        dims = batch = dims - readings.contracted
    if not dims or (readings.rows and (len(dims) > 1 or dims & readings.contracted)) or (readings.layers and batch):
        return None
    channel = max(dims, key=lambda dim: (free[dim], dim))
    if (channel != COLUMNS or batch) and any(table.weight_name == name for table in analysis.tables):
        return None  # it is looked up in as well
    return Layout(channel, 1, tuple(sorted(batch - {channel})))


def _moves(step: Step) -> bool:
    return step.op is SPREAD or step.op.name in _MOVES or (step.op is SUM and is_sum(step))
