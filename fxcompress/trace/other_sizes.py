"""Inputs of other sizes that take another way through a model than the one that was traced.

    if x.shape[0] == 1: ...              traced with two rows: one row goes the other way
    if x.shape[1] > self.window: ...     traced with ten words: as many as the window has, and one more, do

A graph that was traced by running checks each decision on sizes. So it can be asked, without the model and without any
values, which sizes take its own path. Sizes to ask for are few and small, and those that decisions compare with.
"""

import operator
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from dataclasses import replace as replace_fields
from functools import cached_property, partial
from itertools import combinations, product
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcompress.errors import FxCompressError, PathError
from fxcompress.trace.autocast import switches_autocast
from fxcompress.trace.concrete import runs
from fxcompress.trace.guards import asks_for_mode, check
from fxcompress.trace.inputs import ExampleInputs
from fxcompress.trace.names import past_class
from fxcompress.trace.same_path import is_number
from fxcompress.trace.skeleton import skeleton
from fxcompress.trace.state import same_randomness
from fxcompress.trace.traced import TracedModule
from fxcompress.trace.tracer import trace_path
from fxcompress.trace.trees import tensors_in
from fxcompress.trace.weights.flat import renew_weights

MOST, ALIKE = 6, 2
"""How many other paths are looked at in all, and how many that part from the known ones at the same number.

Where what decides is no number, but whether something holds, one is enough.
"""
_EFFORT = 15_000
"""How many nodes are run in all, to find them."""
_LARGEST = 1 << 24
"""Inputs have no more entries than this."""
_FIRST = 3
"""Where a model takes none of so many other sizes, it takes one size alone."""


@dataclass(frozen=True, slots=True, eq=False)
class OtherPath:
    """A path through a model that its graph does not take.

    Attributes:
        inputs: that take it.
        traced: the model as it was traced on these; None where it cannot be.
        training: whether that stands for training as well.
    """

    inputs: ExampleInputs
    traced: TracedModule | None
    training: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class OtherPaths:
    """What sizes decide in a model.

    Attributes:
        found: paths that were found, besides the one of the graph.
        lines: of the model, where decisions come out in another way on them.
        open: lines of the model where others decide on sizes of the inputs, and came out the same each time.
        more: whether there are more paths of the same kind.
    """

    found: tuple[OtherPath, ...] = ()
    lines: tuple[str, ...] = ()
    open: tuple[str, ...] = ()
    more: bool = False


def other_paths(model: nn.Module, traced: TracedModule, inputs: ExampleInputs) -> OtherPaths:
    """Find inputs that take other paths; nothing is looked for where no size decides anything.

    Args:
        model: stays as it is.
        traced: the model as it was traced.
        inputs: that it was traced on.
    """
    if not sizes_decide(traced):
        return OtherPaths()
    first = _Probe(traced)
    if first.parts_at(inputs) is not True:  # an op that needs values, say
        return OtherPaths(open=tuple(dict.fromkeys(str(node.args[3]) for node in first.checks)), more=True)
    search = _Search(model, [first])
    search.around(inputs)
    for path in search.found:  # what decisions there are on these, and so on
        search.around(path.inputs)
    lines = dict.fromkeys(line for key in search.parted for line, _ in key)
    own = [str(node.args[3]) for node in first.checks] if search.is_spent else []
    undecided = dict.fromkeys(line for probe in search.probes for line in (*probe.undecided, *own) if line not in lines)
    return OtherPaths(tuple(search.found), tuple(lines), tuple(undecided), search.more)


def sizes_decide(traced: TracedModule) -> bool:
    """Whether code has taken decisions on sizes in the trace of a network."""
    return any(_on_sizes(n) for g in traced.graphs.values() for n in g.find_nodes(op="call_function", target=check))


def again(model: nn.Module, known: OtherPaths) -> OtherPaths:
    """The paths that were found, of the same model with other tensors."""
    paths = (_traced_on(model, path.inputs) for path in known.found)
    return replace_fields(known, found=tuple(path for path in paths if path is not None))


def without_graphs(known: OtherPaths) -> OtherPaths:
    """What :func:`again` needs, without the tensors of the model."""
    return replace_fields(known, found=tuple(replace_fields(path, traced=None) for path in known.found))


@dataclass(slots=True, eq=False)
class _Search:
    model: nn.Module
    probes: "list[_Probe]"
    found: list[OtherPath] = field(default_factory=list)
    parted: Counter[tuple[tuple[str, str], ...]] = field(default_factory=Counter)
    seen: set[tuple[Any, ...]] = field(default_factory=set)
    more: bool = False

    @property
    def is_spent(self) -> bool:
        """Whether enough has been tried."""
        return sum(probe.effort for probe in self.probes) > _EFFORT

    def around(self, inputs: ExampleInputs) -> None:
        """Look at inputs that differ from these in one size, wherever it stands."""
        self._look_at(inputs)
        fit = [(chosen, size) for chosen, size in _dims(inputs) if self._takes_others(inputs, chosen, size)]
        for first, second in combinations([chosen for chosen, _ in fit], 2):
            small = _resized(inputs, first, 1)
            self._look_at(small and _resized(small, second, 1))
        for chosen, _ in fit:
            for other in _named(self.probes[0].compared_with):
                self._look_at(_resized(inputs, chosen, other))

    def _takes_others(self, inputs: ExampleInputs, chosen: "_Chosen", size: int) -> bool:
        """Look at a few inputs of other sizes; whether the model takes some of the first of them."""
        fails = 0
        for other in _few(size):
            fails += not self._look_at(_resized(inputs, chosen, other))
            if fails == _FIRST:
                return False
        return True

    def _look_at(self, inputs: ExampleInputs | None) -> bool:
        """Whether the model may run on such inputs; where they take a new path, that is noted."""
        if inputs is None or (shapes := _shapes(inputs)) in self.seen:
            return inputs is not None
        if self.is_spent:
            self.more = True
            return True
        self.seen.add(shapes)
        parted = []
        for probe in self.probes:
            end = probe.parts_at(inputs)
            if not isinstance(end, fx.Node):
                return end
            parted.append(end)
        key = tuple(dict.fromkeys(map(_decision, parted)))
        alike = 1 if all(type(node.args[1]) is bool for node in parted) else ALIKE
        if self.parted[key] >= alike or len(self.found) >= MOST:
            self.more = True
            return True
        path = _traced_on(self.model, inputs)
        if path is None:
            return False
        self.parted[key] += 1
        self.found.append(path)
        if path.traced is not None:
            self.probes.append(_Probe(path.traced))
        return True


def _traced_on(model: nn.Module, inputs: ExampleInputs) -> OtherPath | None:
    """The path that inputs take; None where the model does not take them."""
    try:
        return OtherPath(inputs, trace_path(model, inputs))
    except FxCompressError:
        pass
    if not runs(model, inputs):
        return None
    trains = runs(model, inputs, training=True)
    try:  # one row in training, say, of which a batch norm has no variance
        return OtherPath(inputs, trace_path(model, inputs, training=False), training=not trains)
    except FxCompressError:
        return OtherPath(inputs, None, training=False)


class _Probe:
    """Asks the graphs of a network which inputs take its path, on tensors without values.

    Attributes:
        checks: on sizes, in all graphs.
        effort: how many nodes it has run.
    """

    def __init__(self, traced: TracedModule) -> None:
        graphs = traced.graphs.values()
        self.checks = [n for g in graphs for n in g.find_nodes(op="call_function", target=check) if _on_sizes(n)]
        self.effort = 0
        self._traced = traced
        self._sizes: dict[fx.Node, set[tuple[Any, ...]]] = {node: set() for node in self.checks}

    @cached_property
    def _meta(self) -> TracedModule:
        return without_values(self._traced)

    def parts_at(self, inputs: ExampleInputs) -> fx.Node | bool:
        """The check at which inputs part from the path; else whether they can take it at all."""
        ends = [self._end(mode, inputs) for mode in self._traced.graphs]
        return next((end for end in ends if isinstance(end, fx.Node)), any(ends))

    def _end(self, mode: str, inputs: ExampleInputs) -> fx.Node | bool:
        run = _Run(self._meta.train(mode == "train"), self._traced.graphs[mode])
        try:
            with torch.device("meta"), torch.no_grad(), same_randomness(allowed=True):
                run.run(*inputs.converted(empty).in_order(run.graph))
        except PathError:
            return run.at if run.at is not None and _on_sizes(run.at) else False
        except Exception:  # noqa: BLE001 - inputs that do not fit: any failure is what was asked for
            return False
        finally:
            self.effort += run.effort
        for node, sizes in run.sizes.items():
            if node in self._sizes:
                self._sizes[node].add(sizes)
        return True

    @property
    def undecided(self) -> list[str]:
        """The lines of decisions that came out the same on different sizes."""
        return [str(node.args[3]) for node, sizes in self._sizes.items() if len(sizes) > 1]

    @property
    def compared_with(self) -> set[int]:
        """The numbers that decisions are made with that came out the same on different sizes."""
        nodes = [node for node, sizes in self._sizes.items() if len(sizes) > 1]
        sizes = {size for node in nodes for size in set.intersection(*map(set, self._sizes[node]))}
        for node in nodes:  # t // 8 > 16 as well
            own = list(_numbers(node))
            sizes |= {*own, *(a * b for a, b in combinations(own, 2))}
        return sizes


class _Run(fx.Interpreter):
    """Runs a graph up to a check that comes out in another way.

    Attributes:
        at: the last check that was made.
        sizes: what each check was made on.
        effort: how many nodes it has run.
    """

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        super().__init__(past_class(module), graph=graph)
        self.at: fx.Node | None = None
        self.sizes: dict[fx.Node, tuple[Any, ...]] = {}
        self.effort = 0

    def run_node(self, n: fx.Node) -> Any:  # noqa: ANN401 - whatever it returns
        """What a node returns."""
        self.effort += 1
        if n.target is check:
            self.at = n
            sizes: Any = n.args[2]
            self.sizes[n] = fx.node.map_arg(sizes, lambda used: self.env[used])
        return None if asks_for_mode(n) or switches_autocast(n) else super().run_node(n)


def _decision(node: fx.Node) -> tuple[str, str]:
    """The line of a decision, and what kind it is of: several may stand in a line."""
    decision: Any = node.args[0]
    return str(node.args[3]), getattr(getattr(decision, "target", None), "__name__", "")


def without_values(traced: TracedModule) -> TracedModule:
    """A copy of a network the tensors of which have shapes and nothing else."""
    copy = skeleton(traced, compiled=False)
    for module in copy.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, module.__dict__)
        for table in tables:
            table.update({key: empty(tensor) for key, tensor in table.items() if isinstance(tensor, Tensor)})
        renew_weights(module)
    return copy


def empty(tensor: Tensor) -> Tensor:
    """A tensor like another one, without values."""
    bare = tensor.detach().to("meta").requires_grad_(tensor.requires_grad)
    return nn.Parameter(bare, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else bare


def _on_sizes(node: fx.Node) -> bool:
    return bool(node.args[2]) and not asks_for_mode(node)


def _numbers(node: fx.Node) -> Iterator[int]:
    """The numbers that are written in a decision."""
    open_: list[Any] = [node.args[0]]
    for value in open_:
        if isinstance(value, fx.Node) and value.target is operator.getitem:
            continue  # which size of a shape
        if isinstance(value, fx.Node) and is_number(value):
            open_ += [item for item in value.args if item not in open_]
        elif type(value) in {int, float} and value == int(value):
            yield int(value)


def resized(inputs: ExampleInputs) -> Iterator[ExampleInputs]:
    """Inputs that differ from these in one size, wherever it stands: one entry, one more, and twice as many.

    One entry becomes as many as there are anywhere as well: it may be one that meets them all. And many become one
    where one becomes many, as they may meet each other.
    """
    every = {size for shape in _shapes(inputs) for size in shape if size}
    dims = _dims(inputs)
    for chosen, size in dims:
        for other in sorted(({1, size + 1, 2 * size} | (every if size == 1 else set())) - {size}):
            if (found := _resized(inputs, chosen, other)) is not None:
                yield found
    for one, many in product((d for d, n in dims if n == 1), (d for d, n in dims if n > 1)):
        wide = _resized(inputs, one, max(every) + 1)
        if wide is not None and (found := _resized(wide, many, 1)) is not None:
            yield found


def _few(size: int) -> tuple[int, ...]:
    """Sizes that decisions are about when nothing is known of them."""
    return tuple(dict.fromkeys((1, size + 1, 2 * size, 3, 2, 5)))


def _named(numbers: set[int]) -> list[int]:
    """Sizes on both sides of numbers, and on them."""
    return sorted({size for n in numbers for size in (n - 1, n, n + 1) if size > 0})


_Chosen = Callable[[int, int, int], bool]
"""Whether a dim is to have another size: which tensor of the inputs, which dim, and its size."""


def _dims(inputs: ExampleInputs) -> list[tuple[_Chosen, int]]:
    """What inputs can have another size of, and what it is: of a dim in all tensors, wherever it is, or of one dim."""
    shapes = _shapes(inputs)
    every = [(i, d, size) for i, shape in enumerate(shapes) for d, size in enumerate(shape) if size]
    by_dim = dict.fromkeys((d, size) for _, d, size in every)
    by_size = [size for size in dict.fromkeys(size for _, _, size in every) if sum(s == size for _, s in by_dim) > 1]
    of_dim = Counter((d, size) for _, d, size in every)
    alone = [(i, d, size) for i, d, size in every if of_dim[d, size] > 1]
    found: list[tuple[_Chosen, int]] = [(partial(_is_dim, key), key[1]) for key in by_dim]
    found += [(partial(_is_size, size), size) for size in by_size]
    return found + [(partial(_is_place, (i, d)), size) for i, d, size in alone]


def _is_dim(key: tuple[int, int], _: int, dim: int, size: int) -> bool:
    return key == (dim, size)


def _is_size(key: int, _: int, __: int, size: int) -> bool:
    return key == size


def _is_place(key: tuple[int, int], tensor: int, dim: int, _: int) -> bool:
    return key == (tensor, dim)


def _shapes(inputs: ExampleInputs) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(tensor.shape) for tensor in tensors_in([inputs.args, inputs.kwargs]))


def _places(inputs: ExampleInputs, chosen: _Chosen) -> Iterator[tuple[Tensor, list[int]]]:
    """Each tensor with the dims of it that are chosen."""
    for i, tensor in enumerate(tensors_in([inputs.args, inputs.kwargs])):
        yield tensor, [d for d, size in enumerate(tensor.shape) if chosen(i, d, size)]


def _resized(inputs: ExampleInputs, chosen: _Chosen, size: int) -> ExampleInputs | None:
    """Inputs that have another size, with the same values over again; None where they would be too large."""
    tensors = list(_places(inputs, chosen))
    if any(t.layout != torch.strided or _entries(t, dims, size) > _LARGEST for t, dims in tensors):
        return None
    left = iter(tensors)

    def resized(tensor: Tensor) -> Tensor:
        new = tensor.detach()
        for dim in next(left)[1]:
            index = torch.arange(size, device=tensor.device) % tensor.shape[dim]
            new = new.index_select(dim, index)
        return new.clone().requires_grad_(tensor.requires_grad)

    return inputs.converted(resized)


def _entries(tensor: Tensor, dims: list[int], size: int) -> int:
    entries = 1
    for dim, own in enumerate(tensor.shape):
        entries *= size if dim in dims else own
    return entries
