"""Integer weights in an ONNX graph.

    weight (float) -> Conv          ->    codes (int8) -> Cast -> Mul -> Conv
                                                         scale (float) -^

Where channels of one weight need different widths, each width has codes of its own: they are cast, concatenated, and
put in order.

ONNX Runtime computes these nodes once, when it loads the file, and then has the network that it had before. It would
keep DequantizeLinear, for the sake of backends that look for it, and run it in each call.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fxcompress.errors import MissingPackageError
from fxcompress.export.graph import OPSET
from fxcompress.export.integers import Array, Integers, fits
from fxcompress.export.packages import NEEDED

try:
    from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
except ImportError as error:
    raise MissingPackageError(NEEDED) from error

_TYPES = {4: TensorProto.INT4, 8: TensorProto.INT8, 16: TensorProto.INT16}
_OVERHEAD = 512
"""Bytes that the nodes of another width take, about."""


def constants_of(model: ModelProto) -> dict[str, Array]:
    """The tensors that the graph holds, by name."""
    return {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}


def put_integers(model: ModelProto, found: dict[str, Integers]) -> dict[str, tuple[int, ...]]:
    """Store constants as integers, each channel in the smallest type that holds its codes; in place.

    Args:
        model: the graph.
        found: what its constants are, by name; those with codes of more than 16 bits are left in floats.

    Returns:
        how many bits the codes of each take, from the fewest to the most.
    """
    version = next(each.version for each in model.opset_import if not each.domain)
    types = {bits: kind for bits, kind in _TYPES.items() if bits > 4 or version >= OPSET}
    widths: dict[str, tuple[int, ...]] = {}
    tensors, nodes = [], []
    for each in model.graph.initializer:
        parts = _parts(found[each.name], list(types)) if each.name in found else []
        if parts:
            widths[each.name] = tuple(part.bits for part in parts)
            made = _as_integers(each, found[each.name], parts, types)
            tensors += made[0]
            nodes += made[1]
        else:
            tensors.append(each)
    _replace(model.graph.initializer, tensors)
    _replace(model.graph.node, [*nodes, *model.graph.node])
    _replace(model.graph.input, [each for each in model.graph.input if each.name not in widths])
    return widths


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """Codes of one width.

    Attributes:
        bits: that each takes.
        codes: of some channels, or of the whole constant.
        channels: which, along ``dim``; None for all of them.
        dim: of the channels.
    """

    bits: int
    codes: npt.NDArray[np.int64]
    channels: npt.NDArray[np.int64] | None = None
    dim: int = 0


def _parts(integers: Integers, widths: list[int]) -> list[_Part]:
    """How to store a constant: by channels where that saves more than it takes, else as a whole; [] if it cannot be."""
    whole = next((_Part(bits, integers.codes) for bits in widths if integers.fits(bits)), None)
    dim = int(np.argmax(integers.scale.shape))
    if whole is None or whole.bits == widths[0] or integers.along(dim) is None:
        return [] if whole is None else [whole]
    parts, left = [], np.arange(integers.codes.shape[dim])
    for bits in widths:
        rows = np.moveaxis(integers.codes.take(left, dim), dim, 0)
        fitting = fits(rows.reshape(len(left), -1), bits).all(1)
        if fitting.any():
            parts.append(_Part(bits, integers.codes.take(left[fitting], dim), left[fitting], dim))
        left = left[~fitting]
        if not len(left):
            break
    saved = sum((whole.bits - part.bits) * part.codes.size // 8 for part in parts)
    return parts if len(parts) > 1 and saved > _OVERHEAD + 8 * integers.codes.shape[dim] else [whole]


def _as_integers(
    constant: TensorProto, integers: Integers, parts: list[_Part], types: Mapping[int, int]
) -> tuple[list[TensorProto], list[NodeProto]]:
    name, tensors, nodes = constant.name, list[TensorProto](), list[NodeProto]()
    for part in parts:
        codes = f"{name}_codes{part.bits}"
        kind = types[part.bits]
        tensors.append(helper.make_tensor(codes, kind, part.codes.shape, _packed(part.codes, kind), raw=True))
        nodes.append(_node("Cast", [codes], f"{codes}_cast", to=constant.data_type))
    last = nodes[-1].output[0]
    if parts[0].channels is not None:
        order = np.argsort(np.concatenate([part.channels for part in parts if part.channels is not None]))
        tensors.append(numpy_helper.from_array(order, f"{name}_order"))
        nodes.append(_node("Concat", [node.output[0] for node in nodes], f"{name}_joined", axis=parts[0].dim))
        nodes.append(_node("Gather", [f"{name}_joined", f"{name}_order"], f"{name}_ordered", axis=parts[0].dim))
        last = f"{name}_ordered"
    tensors.append(numpy_helper.from_array(np.ascontiguousarray(integers.scale), f"{name}_scale"))
    return tensors, [*nodes, _node("Mul", [last, f"{name}_scale"], name)]


def _node(kind: str, inputs: list[str], output: str, **attributes: int) -> NodeProto:
    node = helper.make_node(kind, inputs, [output], name=f"{output}_{kind.lower()}")
    node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
    return node


def strip(model: ModelProto) -> None:
    """Take out what the exporter notes down about the code that a node comes from, and shapes that runtimes infer.

    Of a small network it is a fifth of the file, and it tells where the code lay.
    """
    del model.graph.value_info[:]
    held = (model, model.graph, *model.graph.node, *model.graph.initializer, *model.graph.input, *model.graph.output)
    for each in held:
        each.ClearField("doc_string")
        each.ClearField("metadata_props")


def _packed(codes: Array, kind: int) -> bytes:
    """As ONNX lays out raw data: little end first, and of two codes of 4 bits the first in the lower half."""
    if kind == TensorProto.INT4:
        halves = np.append(codes.reshape(-1), np.zeros(codes.size % 2, codes.dtype)).astype(np.uint8) & 0xF
        return (halves[::2] | halves[1::2] << 4).astype(np.uint8).tobytes()
    return codes.astype("<i1" if kind == TensorProto.INT8 else "<i2").tobytes()


def _replace(field: object, values: Iterable[object]) -> None:
    """Fill a repeated field of a protobuf anew."""
    kept = list(values)
    del field[:]  # type: ignore[attr-defined]
    field.extend(kept)  # type: ignore[attr-defined]
