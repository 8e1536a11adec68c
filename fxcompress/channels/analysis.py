"""The raw result of the analysis: atoms, groups, contraction sites and constraints, as arrays."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor, fx
from torch.nn.modules.batchnorm import _NormBase

from fxcompress.channels.carried import Held, carried
from fxcompress.channels.interpret import Atoms, Interpreter, Trail, fresh_atoms
from fxcompress.channels.layers import support
from fxcompress.channels.ranks import note_ranks
from fxcompress.channels.rules.contraction import CONTRACTIONS, Site, site_of
from fxcompress.channels.rules.movement import LOOKUPS
from fxcompress.channels.rules.products import BATCHED, inner, product_of
from fxcompress.channels.rules.quantize import QUANTIZE
from fxcompress.channels.rules.sums import SUMS, summed, summed_products
from fxcompress.channels.segments import Segments, trace_segments
from fxcompress.channels.sites import (
    COLUMNS,
    Maker,
    PlainAtoms,
    ProductAtoms,
    SiteAtoms,
    SumAtoms,
    TableAtoms,
    along_dim,
    first_slice,
)  # fmt: skip
from fxcompress.channels.space import FIXED, Block, Space
from fxcompress.channels.units import find_units
from fxcompress.channels.values import Step, Value, find
from fxcompress.channels.worklist import Index
from fxcompress.quantizer import channel_dims
from fxcompress.trace.basics.garbage_collection import without_collections
from fxcompress.trace.graph.described import Place, place_of_node
from fxcompress.trace.inputs import ExampleInputs
from fxcompress.trace.traced import TracedModule


@dataclass(eq=False)
class Analysis:
    """What interpreting a traced module on labels has found.

    Attributes:
        module: the traced module.
        inputs: what it was interpreted on.
        space: atoms, couplings, pins.
        atoms: the labels of each parameter and buffer.
        counters: the tensors without labels that the network changes: nothing is known of what they hold.
        trails: the interpretation of each graph.
    """

    module: TracedModule
    inputs: ExampleInputs
    space: Space
    atoms: Atoms
    counters: frozenset[str] = frozenset()
    trails: dict[str, Trail] = field(default_factory=dict)
    _weights: dict[str, dict[int, Held]] = field(default_factory=dict, init=False)

    @cached_property
    def _nodes(self) -> dict[str, dict[str, fx.Node]]:
        return {mode: {node.name: node for node in graph.nodes} for mode, graph in self.module.graphs.items()}

    def place(self, mode: str, node: str) -> Place:
        """Where a node is, by its name in the graph of a mode."""
        found = self._nodes[mode].get(node)
        return Place(node) if found is None else place_of_node(found)

    @cached_property
    def component(self) -> np.ndarray:
        """For each atom the smallest atom that it goes together with, shape (atoms,)."""
        return self.space.components()

    @cached_property
    def members(self) -> Index:
        """The atoms of each component, by the component's smallest atom."""
        return Index(self.component, self.space.size)

    @cached_property
    def pinned(self) -> np.ndarray:
        """Which atoms must stay, bool (atoms,); whole components."""
        pins = [atoms for atoms, _ in self.space.pins]
        roots = np.zeros(self.space.size, dtype=bool)
        roots[FIXED] = True
        if pins:
            roots[self.component[np.concatenate(pins)]] = True
        has_parameter = np.zeros(self.space.size, dtype=bool)
        has_parameter[self.component[self._atoms_of(lambda block: block.is_parameter)]] = True
        for slots in self.space.slots:
            has_parameter[self.component[slots.atoms]] |= has_parameter[self.component[slots.members]].any(axis=1)
        pinned: np.ndarray = (roots | ~has_parameter)[self.component]
        return pinned

    def _atoms_of(self, chosen: Callable[[Block], bool]) -> np.ndarray:
        """Which atoms are in the chosen blocks, bool (atoms,). The blocks hold all atoms but FIXED, in order."""
        blocks = self.space.blocks
        return np.repeat([False, *map(chosen, blocks)], [1, *(block.size for block in blocks)])

    @cached_property
    def joints(self) -> list[np.ndarray]:
        """Layers with two or more labelled dims, squeezed: what is kept must be a product of rows and columns."""
        return [layer.squeeze().numpy() for layer in self.all_layers if layer.numel() > max(layer.shape, default=1)]

    @cached_property
    def units(self) -> np.ndarray:
        """Like ``component``, closed over joints and slots: the smallest sets that can go on their own, (atoms,)."""
        return find_units(self.component, self.joints, self.space.slots)

    @cached_property
    def unit_pinned(self) -> np.ndarray:
        """Which atoms belong to a unit with a pinned member, or to one of slots alone, bool (atoms,)."""
        roots = np.ones(self.space.size, dtype=bool)
        roots[self.units[self._atoms_of(lambda block: bool(block.name))]] = False
        roots[self.units[self.pinned]] = True
        pinned: np.ndarray = roots[self.units]
        return pinned

    @cached_property
    def sites(self) -> list[SiteAtoms]:
        """Every contraction of every graph."""
        result = []
        for mode, trail in self.trails.items():
            for step in trail.tape:
                site = site_of(step.call) if step.op in CONTRACTIONS else None
                if site is not None:
                    rows = along_dim(step.outputs[0], site.out_dim, site.rows)
                    entries = _entries(site)
                    held = self.weights(mode).get(site.weight.key)
                    name = "" if held is None or not self._has_channels(held, site) else held.name
                    place, out = self.place(mode, step.node), step.outputs[0]
                    sites = SiteAtoms(site, mode, place, entries, rows, name, step.call, out, held=held)
                    result.append(replace(sites, reads_columns=self._reads_columns(sites)))
        return result

    def _has_channels(self, held: Held, site: Site) -> bool:
        """Whether the channels of a parameter, if it has a quantizer, are the rows or the columns of a site.

        They are not where a reshape lays them beside other dims: ``x @ w.view(E, O * I)``, with bits for each O.
        """
        dim, atoms = self.channel_dims.get(held.name), self.atoms[held.name]
        if dim is None or held.name in {table.weight_name for table in self.tables}:
            return True
        dims = held.dims(atoms, site.weight.rank)
        return any(dims[own] == dim and not held.is_merged(own, atoms) for own in (site.row, site.column))

    def _reads_columns(self, sites: SiteAtoms) -> bool:
        """Whether a site contracts the dim of its weight that holds the channels; of one entry nobody can tell."""
        dim = self.channel_dims.get(sites.weight_name)
        if dim is None or max(sites.site.weight.shape) == 1:
            return False
        return sites.dims(self.atoms[sites.weight_name])[0] != dim

    @cached_property
    def channel_dims(self) -> dict[str, int]:
        """The dim that holds the channels, of the weights with a quantizer and of the tables."""
        result = {found.weight_name: COLUMNS for found in self.tables}
        for mode, trail in self.trails.items():
            for step in trail.tape:
                held = self.weights(mode).get(step.call.args[0].key) if step.op is QUANTIZE else None
                if held is not None:
                    result[held.name] = step.call.args[3]
        return result

    @cached_property
    def tables(self) -> list[TableAtoms]:
        """Every lookup of every graph in a parameter."""
        result = []
        for mode, trail in self.trails.items():
            for step in trail.tape:
                table = step.call.args[0] if step.op in LOOKUPS else None
                if isinstance(table, Value) and (held := self.weights(mode).get(table.key)) is not None:
                    out = step.outputs[0]
                    rows = along_dim(out, out.rank - 1, out.shape[-1])
                    result.append(TableAtoms(mode, step.node, table, rows, held.name, step.call, out))
        return result

    @cached_property
    def plain(self) -> list[PlainAtoms]:
        """Every quantized parameter that no contraction and no lookup reads, once for each graph."""
        others = {sites.weight_name for sites in self.sites} | {table.weight_name for table in self.tables}
        found: dict[tuple[str, str], PlainAtoms] = {}
        for mode, trail in self.trails.items():
            names = trail.names
            for step in trail.tape:
                name = names.get(step.call.args[0].key, "") if step.op is QUANTIZE else ""
                if name and name not in others and (mode, name) not in found:
                    weight, bits, _, dim, _, batch = step.call.args
                    rows, meets = along_dim(bits, 0, bits.shape[0]), tuple(self._met(mode, name))
                    dims = channel_dims(dim, batch)
                    found[mode, name] = PlainAtoms(
                        mode, self.place(mode, step.node), weight, dim, dims, rows, name, meets, step.call
                    )
        return list(found.values())

    def _met(self, mode: str, name: str) -> Iterator[tuple[Value, tuple[int, ...], float]]:
        """What entries of a parameter are multiplied with, in products that are summed and as what a layer reads."""
        trail = self.trails[mode]
        value = trail.parameters[name]
        start = {value.key: Held(name, value.layers, value.rank)}
        own = set(carried(trail.tape, start, {name}, picked=True))
        own |= {key for key, held in self.weights(mode).items() if held.name == name}
        products, whole = summed_products(trail.tape), value.meta.numel()
        for step in trail.tape:
            found = [(value, met, dims) for value, met, dims in _operands(step) if value.key in own]
            product = products.get(id(step))
            if product is not None:
                made = product.outputs[0]
                found += [(x, made, _repeated(x, made)) for x in find(Value, product.call.args) if x.key in own]
            yield from ((met, dims, value.meta.numel() / whole) for value, met, dims in found)

    @cached_property
    def makers(self) -> list[Maker]:
        """All that makes channels: the contractions, the lookups, and what is read as it is."""
        return [*self.sites, *self.tables, *self.plain]

    @cached_property
    def segments(self) -> dict[str, tuple[list[Maker], Segments]]:
        """Of each graph its makers, and the segments that they feed: the same whatever is removed or zero."""
        makers = {mode: [maker for maker in self.makers if maker.mode == mode] for mode in self.trails}
        return {mode: (own, trace_segments(self.trails[mode], own)) for mode, own in makers.items()}

    @cached_property
    def products(self) -> list[ProductAtoms]:
        """Every batched product with labels along the contracted dim, once for each operand that has other labels."""
        result = []
        for mode, trail in self.trails.items():
            for step in trail.tape:
                product = product_of(step.call) if step.op is BATCHED else None
                if product is None:
                    continue
                layers = [x.narrow(1, 0, 1) for x in inner(product) if x is not None]
                found = {support(x): x for x in layers}
                results = tuple(layer.numpy() for layer in step.outputs[0].layers)
                place = self.place(mode, step.node)
                result += [ProductAtoms(product, mode, place, x[:, 0].numpy(), results) for x in found.values()]
        return result

    @cached_property
    def sums(self) -> list[SumAtoms]:
        """Every sum and every norm with labels along the dims that are summed, once for each layer of labels."""
        return [
            SumAtoms(step.call.args[0], mode, self.place(mode, step.node), layer.numpy(), slots.numpy())
            for mode, trail in self.trails.items()
            for step in trail.tape
            if step.op in SUMS
            for layer, slots in summed(step)
        ]

    def without_empty_slots(self, alive: np.ndarray) -> np.ndarray:
        """What is left, bool (atoms,), once the slots whose members are all gone are gone as well.

        What factories make (zeros to add to) goes with the slots that it hangs together with.
        """
        slots = np.zeros(self.space.size, dtype=bool)
        for block in self.space.blocks:  # what factories make has no name either, and many entries
            slots[block.start : block.start + block.size] |= not block.name
        alive, before = alive.copy(), -1
        while int(alive.sum()) != before:
            before = int(alive.sum())
            for nested in self.space.slots:
                gone = ~alive[nested.members].any(axis=1) & slots[nested.atoms]
                alive[nested.atoms[gone]] = False
            lost = np.zeros_like(alive)
            lost[self.component[~alive & slots]] = True
            alive &= ~(slots & lost[self.component])
        return alive

    @cached_property
    def layers(self) -> list[np.ndarray]:
        """The layers of the results of all nodes, each once."""
        found = {id(x): x for trail in self.trails.values() for v in find(Value, trail.values) for x in v.layers}
        return [layer.numpy().reshape(-1) for layer in found.values()]

    def weights(self, mode: str) -> dict[int, Held]:
        """The parameter that each value holds, by its key: behind a quantizer too, a turn, a mask or a scale."""
        if mode not in self._weights:
            trail = self.trails[mode]
            start = {value.key: Held(name, value.layers, value.rank) for name, value in trail.parameters.items()}
            parameters = {name for name, _ in self.module.named_parameters(remove_duplicate=False)}
            self._weights[mode] = carried(trail.tape, start, parameters)
        return self._weights[mode]

    @cached_property
    def all_layers(self) -> list[Tensor]:
        """The layers of all values, those inside of nodes as well, each once."""
        values: list[Any] = []
        for trail in self.trails.values():
            values += find(Value, trail.values)
            values += [value for step in trail.tape for value in step.outputs]
        return list({id(layer): layer for value in values for layer in value.layers}.values())


@without_collections
def analyse(module: TracedModule, inputs: ExampleInputs) -> Analysis:
    """Interpret every graph of ``module`` on labels.

    Raises:
        ExampleInputError: the module does not run on ``inputs``.
    """
    counters = _counts_of_norms(module)
    note_ranks(module, inputs)
    while True:  # once more where the network counts: without what its counters hold at the moment
        space = Space()
        result = Analysis(module, inputs, space, fresh_atoms(module, space), counters)
        for mode, graph in module.graphs.items():
            result.trails[mode] = Interpreter(module, result.atoms, space, counters).run(graph, inputs)
        changed = counters.union(*(trail.counters for trail in result.trails.values()))
        if changed == counters:
            break
        counters = changed
    # By the labels, which all names of one tensor share.
    read = {name for trail in result.trails.values() for name in trail.parameters}
    visited = {id(result.atoms[name]) for name in read if name in result.atoms}
    for dims in result.atoms.values():
        if id(dims) not in visited:
            for atoms in dims.values():
                space.pin(atoms, "unused", "no node of the graph uses this tensor")
    return result


def _counts_of_norms(module: TracedModule) -> frozenset[str]:
    """The names of the tensors that norms count their batches in."""
    norms = ((name, norm) for name, norm in module.named_modules() if isinstance(norm, _NormBase))
    counting = (name for name, norm in norms if norm.num_batches_tracked is not None)
    return frozenset(f"{name}.num_batches_tracked" if name else "num_batches_tracked" for name in counting)


def _entries(site: Site) -> np.ndarray:
    """The atoms of what a site reads: of the source, or of the weight that it is coupled with."""
    places = [(site.source, site.source_dim), (site.weight, site.column)][: 2 if site.groups == 1 else 1]
    for atoms in (along_dim, first_slice):
        for value, dim in places:
            found = atoms(value, dim, site.entries)
            if found.any():
                return found
    return np.zeros(site.entries, dtype=np.int64)


def _operands(step: Step) -> Iterator[tuple[Value, Value, tuple[int, ...]]]:
    """The operands of a product that may be a parameter, each with the dims of what each entry meets in the other."""
    product = product_of(step.call) if step.op is BATCHED else None
    site = site_of(step.call) if step.op in CONTRACTIONS else None
    if product is not None:
        yield product.left, product.right, (2,)
        yield product.right, product.left, (1,)
    elif site is not None:
        yield site.source, site.weight, (site.row,)
        result, dim = (site.source, site.source_dim) if site.transposed else (step.outputs[0], site.out_dim)
        yield site.weight, result, tuple(d for d in range(result.rank) if d != dim)


def _repeated(value: Value, product: Value) -> tuple[int, ...]:
    """The dims of a product along which a factor is repeated."""
    missing = product.rank - value.rank
    return tuple(d for d in range(product.rank) if d < missing or value.shape[d - missing] == 1)
