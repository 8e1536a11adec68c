"""Names in an ONNX graph: of the size that is free, and of outputs that have names in the model."""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping

from fxcompress.errors import MissingPackageError
from fxcompress.export.packages import NEEDED
from fxcompress.trace.basics import trees

try:
    from onnx import GraphProto, ModelProto, NodeProto, ValueInfoProto
except ImportError as error:
    raise MissingPackageError(NEEDED) from error


def sizes(value: ValueInfoProto) -> tuple[int | str, ...]:
    """The shape of an input; a text is the name of a size that is free."""
    return tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)


def name_batch(model: ModelProto) -> None:
    """Call the one size that is free in all inputs ``batch``, in place of a number of torch's."""
    first = {size for each in model.graph.input for size in sizes(each) if isinstance(size, str)}
    if len(first) == 1:
        (symbol,) = first
        for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
            for dim in (dim for dim in value.type.tensor_type.shape.dim if dim.dim_param):
                dim.dim_param = re.sub(rf"\b{re.escape(symbol)}\b", "batch", dim.dim_param)


def name_outputs(model: ModelProto, returned: object) -> None:
    """Call outputs what they are called in what the network returns, where that is a dict or a named tuple."""
    names, old = _names(returned), [each.name for each in model.graph.output]
    given = {each.name for each in (*model.graph.input, *model.graph.initializer)}
    made = {name for node in _nodes(model.graph) for name in node.output}
    if len({*names}) != len(old) or len({*old}) != len(names) or given & {*names, *old} or not made >= {*old}:
        return
    new = dict(zip(old, names, strict=True))
    for name in (made & set(names)) - set(old):  # of a value within the graph
        new[name] = next(free for i in itertools.count() if (free := f"{name}_{i}") not in {*made, *given, *names})
    for node in _nodes(model.graph):
        node.input[:] = [new.get(name, name) for name in node.input]
        node.output[:] = [new.get(name, name) for name in node.output]
    for value in (*model.graph.output, *model.graph.value_info):
        value.name = new.get(value.name, value.name)


def _names(returned: object) -> list[str]:
    """A name for each tensor in what a network returns; none where it has no names."""
    fields = returned._asdict() if hasattr(returned, "_asdict") else returned
    found: list[str] = []
    for key, value in fields.items() if isinstance(fields, Mapping) else ():
        count = sum(1 for _ in trees.tensors_in(value))
        found += [str(key)] if count == 1 else [f"{key}.{i}" for i in range(count)]
    return found


def _nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """All nodes, those of branches and loops among them."""
    for node in graph.node:
        yield node
        for inner in _graphs(node):
            yield from _nodes(inner)


def _graphs(node: NodeProto) -> Iterable[GraphProto]:
    for attribute in node.attribute:
        yield from ((attribute.g,) if attribute.HasField("g") else ())
        yield from attribute.graphs
