"""Activations in 8 bits, by ONNX Runtime's own static quantization; weights keep their codes."""

import tempfile
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fxcompress.errors import ExportError, FxCompressError, MissingPackageError
from fxcompress.export.graph import Feed, first_line, quiet
from fxcompress.export.integers import Array, Integers
from fxcompress.export.packages import NEEDED

try:
    import onnx
    from onnx import ModelProto, NodeProto, numpy_helper
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
except ImportError as error:
    raise MissingPackageError(NEEDED) from error

_BITS = 8
_SAFE = 64
"""The largest code that all processors multiply rightly as a signed one. Those without an instruction for dot products
of bytes (VNNI) add two products in 16 signed bits: 2 * 255 * 64 fits, 2 * 255 * 65 does not."""
_OFFSET = 128


@dataclass(frozen=True, slots=True, eq=False)
class LayerWeight:
    """The weight of layers that multiply in integers.

    Attributes:
        codes: integers that fit 8 signed bits, of the weight's shape.
        scale: of each entry of ``axis``, above zero.
        axis: the dim of the layers' output channels.
    """

    codes: Array
    scale: Array
    axis: int

    @property
    def signed(self) -> bool:
        """Whether the codes are stored with a sign, or from 128 up: that is slower, but right on all processors."""
        return int(np.abs(self.codes).max()) <= _SAFE

    @property
    def stored(self) -> Array:
        """The codes as they are stored."""
        return self.codes.astype(np.int8) if self.signed else (self.codes + _OFFSET).astype(np.uint8)


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, feeds: Iterable[Feed]) -> None:
        self._feeds: Iterator[Feed] = iter(feeds)

    def get_next(self) -> Feed | None:
        return next(self._feeds, None)


def layer_weights(model: ModelProto, found: dict[str, Integers]) -> dict[str, LayerWeight]:
    """The constants that layers can multiply with in 8 bits: a scale for each of the layers' output channels.

    A batch norm that scales by a negative number makes 128 of a code of -128; it becomes 127.
    """
    readers: defaultdict[str, list[NodeProto]] = defaultdict(list)
    for node in model.graph.node:
        for name in node.input:
            readers[name].append(node)
    weights = {}
    for name, integers in found.items():
        axes = {_channel_axis(node, name, integers.codes.ndim) for node in readers[name]}
        axis = axes.pop() if len(axes) == 1 else None
        scale = None if axis is None or not integers.fits(_BITS) else integers.clipped(_BITS).along(axis)
        if axis is not None and scale is not None:
            weights[name] = LayerWeight(integers.clipped(_BITS).codes, scale, axis)
    return weights


def _channel_axis(node: NodeProto, weight: str, rank: int) -> int | None:
    """The dim of the output channels in the weight of a node; None of a node that ONNX Runtime cannot quantize so."""
    if list(node.input)[1:2] != [weight] or list(node.input).count(weight) > 1:
        return None
    attributes = {each.name: each.i for each in node.attribute}
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1 if attributes.get("group", 1) == 1 else None
    if node.op_type == "MatMul":
        return 1 if rank == 2 else None
    return (0 if attributes.get("transB") else 1) if node.op_type == "Gemm" else None


def quantize_activations(
    model: ModelProto, weights: dict[str, LayerWeight], floats: Collection[str], feeds: Iterable[Feed]
) -> ModelProto:
    """The graph with integers between its layers, and integers of weights in those layers.

    Args:
        model: with weights in floats; it is left as it is.
        weights: its constants that layers multiply with in integers.
        floats: constants that are read in floats.
        feeds: inputs, from which the range of each activation is taken.

    Raises:
        ExportError: ONNX Runtime cannot do it.
    """
    excluded = [node.name for node in model.graph.node if set(floats) & set(node.input)]
    options = {"TensorQuantOverrides": {name: _override(each) for name, each in weights.items()}}
    with tempfile.TemporaryDirectory() as folder, quiet():
        path = Path(folder, "quantized.onnx")
        try:
            quantize_static(
                model, str(path), _Reader(feeds), quant_format=QuantFormat.QDQ, per_channel=True,
                activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, nodes_to_exclude=excluded,
                extra_options=options,
            )  # fmt: skip
        except FxCompressError:
            raise
        except Exception as error:
            raise ExportError(f"activations cannot be quantized: {first_line(error)}") from error
        return onnx.load(path)


def has_integers(model: ModelProto) -> bool:
    """Whether anything between the layers of a graph is rounded to integers."""
    return any(node.op_type == "QuantizeLinear" for node in model.graph.node)


def _override(weight: LayerWeight) -> list[dict[str, Any]]:
    """The format of a weight, channel by channel, in the words of ONNX Runtime."""
    kind, zero = (QuantType.QInt8, np.int8(0)) if weight.signed else (QuantType.QUInt8, np.uint8(_OFFSET))
    return [
        {"quant_type": kind, "axis": weight.axis, "scale": scale, "zero_point": np.array(zero)}
        for scale in weight.scale
    ]


def stored_codes(model: ModelProto, weights: dict[str, LayerWeight]) -> frozenset[str]:
    """The constants that a quantized graph holds with exactly these codes and scales."""
    held = {each.name: each for each in model.graph.initializer}

    def same(name: str, weight: LayerWeight) -> bool:
        parts = [held.get(f"{name}_{part}") for part in ("quantized", "scale")]
        codes, scale = (None if part is None else numpy_helper.to_array(part) for part in parts)
        if codes is None or scale is None:
            return False
        return np.array_equal(codes, weight.stored) and np.array_equal(scale.reshape(-1), weight.scale)

    return frozenset(name for name, weight in weights.items() if same(name, weight))
