"""Integer weights in an ONNX graph.

    weight (float) -> Conv          ->    codes (int8) -> Cast -> Mul -> Conv
                                                         scale (float) -^

ONNX Runtime computes the two nodes once, when it loads the file, and then has the network that it had before. It would
keep DequantizeLinear, for the sake of backends that look for it, and run it in each call.
"""

from collections.abc import Iterable

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from fxcompress.export.integers import Array, Integers

_TYPES = {4: TensorProto.INT4, 8: TensorProto.INT8, 16: TensorProto.INT16}
_INT4_SINCE = 21
"""The first version of the operators that has integers of 4 bits."""


def constants_of(model: ModelProto) -> dict[str, Array]:
    """The tensors that the graph holds, by name."""
    return {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}


def put_integers(model: ModelProto, found: dict[str, Integers]) -> dict[str, int]:
    """Store constants as integers, each in the smallest type that holds all of its codes; in place.

    Args:
        model: the graph.
        found: what its constants are, by name; those with codes of more than 16 bits are left in floats.

    Returns:
        how many bits a code of each takes.
    """
    version = next(each.version for each in model.opset_import if not each.domain)
    least = 4 if version >= _INT4_SINCE else 8
    bits = {
        name: width
        for name, integers in found.items()
        if (width := next((w for w in _TYPES if w >= least and integers.fits(w)), 0))
    }
    tensors, nodes = [], []
    for each in model.graph.initializer:
        if each.name in bits:
            parts, made = _as_integers(each, found[each.name], _TYPES[bits[each.name]])
            tensors += parts
            nodes += made
        else:
            tensors.append(each)
    _replace(model.graph.initializer, tensors)
    _replace(model.graph.node, [*nodes, *model.graph.node])
    _replace(model.graph.input, [each for each in model.graph.input if each.name not in bits])
    return bits


def _as_integers(constant: TensorProto, integers: Integers, kind: int) -> tuple[list[TensorProto], list[NodeProto]]:
    name = constant.name
    codes, scale, cast = f"{name}_codes", f"{name}_scale", f"{name}_cast"
    tensors = [
        helper.make_tensor(codes, kind, integers.codes.shape, _packed(integers.codes, kind), raw=True),
        numpy_helper.from_array(np.ascontiguousarray(integers.scale), scale),
    ]
    nodes = [
        helper.make_node("Cast", [codes], [cast], name=cast, to=constant.data_type),
        helper.make_node("Mul", [cast, scale], [name], name=f"{name}_mul"),
    ]
    return tensors, nodes


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
