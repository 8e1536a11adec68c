"""``fxcompress.export_onnx``: a finalized network as an ONNX file that holds integers."""

import copy
import itertools
import logging
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxcompress.errors import ExampleInputError, ExportError
from fxcompress.export.integers import Integers, WeightCodes
from fxcompress.provenance import Provenance, provenance_of
from fxcompress.quantizer import Quantizer
from fxcompress.storage.arguments import check_arguments
from fxcompress.storage.atomic import write_atomically
from fxcompress.trace.inputs import ExampleInputs, recorded_inputs

__all__ = ["OnnxExport", "export_onnx"]

_LOG = logging.getLogger("fxcompress")
_LARGEST = 2**31 - 1
"""Bytes of a protobuf."""
_ALIKE = 1e-2
"""How far outputs may be from those of the network where all is in floats, relative to the largest."""
_BYTE = 8
"""Bits of a code that layers multiply in integers."""


@dataclass(frozen=True, slots=True)
class OnnxExport:
    """What :func:`export_onnx` wrote; ``print`` shows it.

    Attributes:
        path: of the file.
        bytes: its size.
        integers: bits of the stored codes (4, 8, 16; several where channels differ), by the names of the weights that
            the file holds as integers.
        floats: why it does not, for each other weight that has a number format.
        inputs: the sizes of each input, by its name in the file; a text is the name of a size that is free.
        outputs: names of the outputs.
        activations: whether layers compute in integers: with ``calibration``, where any of them can.
        difference: of the outputs from those of the network, relative to the largest entry, on the example inputs or on
            the first batch of the calibration.
    """

    path: Path
    bytes: int
    integers: dict[str, tuple[int, ...]] = field(repr=False)
    floats: dict[str, str] = field(repr=False)
    inputs: dict[str, tuple[int | str, ...]]
    outputs: tuple[str, ...]
    activations: bool
    difference: float

    def __str__(self) -> str:
        sizes = ", ".join(f"{name} ({', '.join(map(str, shape))})" for name, shape in self.inputs.items())
        known = len(self.integers) + len(self.floats)
        widths = sorted(Counter(self.integers.values()).items())
        counts = [f"{count} of {' and '.join(map(str, bits))} bits" for bits, count in widths]
        seen = "the first batch" if self.activations else "the example inputs"
        lines = [
            f"{self.path}: {self.bytes:,} bytes, takes {sizes}",
            f"{len(self.integers)} of {known} weights as integers" + (f": {', '.join(counts)}" if counts else ""),
            f"activations in {'8 bits' if self.activations else 'floats'}",
            f"outputs on {seen}: off by {self.difference:.1e} of the largest",
        ]
        wide = [name for name, bits in self.integers.items() if max(bits) > _BYTE] if self.activations else []
        lines += [f"  computed in floats: {name} (its codes have more than 8 bits)" for name in wide]
        return "\n".join(lines + [f"  in floats: {name} ({why})" for name, why in self.floats.items()])


def export_onnx(
    module: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: object = None,
    *,
    calibration: Iterable[Any] | None = None,
    dynamic_shapes: Any = None,  # noqa: ANN401 - as torch.onnx.export takes them
) -> OnnxExport:
    """Write a finalized network to an ONNX file, with its weights as integers.

    Each weight that ``finalize()`` put on a grid is stored as integers of 4, 8 or 16 bits, for each channel the fewest
    of these that hold its codes, and a scale for each; the file computes the weight from them when it is loaded. So it
    is a third of the usual size or less, and the network computes what it did.

    With ``calibration``, layers compute in integers of 8 bits. This is faster, and not exact: ONNX Runtime rounds the
    activations, to ranges that it takes from these inputs. Weights are not rounded again; those of more than 8 bits
    stay in floats.

    Args:
        module: what ``finalize()``, ``load()`` or ``prune()`` returned, on any device. It is left as it is.
        path: of the file, in an existing folder; written whole or not at all.
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments. By
            default numbers at random, and ones for whole numbers, of the shapes that the network was compressed with.
        calibration: inputs like those that the network will see, a few hundred samples: for each batch a tensor, a
            tuple of positional arguments, or a dict of keyword arguments. Of a tuple with more entries than the network
            takes, as batches of a ``DataLoader`` have targets, the first ones are taken.
        dynamic_shapes: which sizes of inputs are free, as ``torch.onnx.export`` takes it. By default the first dim of
            each input, as far as the network allows it.

    Raises:
        TypeError: the arguments are swapped, or of another kind.
        ExampleInputError: the inputs are not known, or the network does not run on them.
        ExportError: the network was not finalized, has parts that ONNX has not, or is not computed alike there.
        MissingPackageError: a package is missing that the extra ``onnx`` brings.
        OSError: the file cannot be written; what was there is still there.

    >>> import tempfile, fxcompress as fxc
    >>> final = fxc.compress(nn.Linear(64, 64), torch.zeros(1, 64)).finalize()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     written = fxc.export_onnx(final, f"{folder}/net.onnx")
    >>> written.integers, written.bytes < 4 * final.weight.numel() / 2
    ({'weight': (8,)}, True)
    """
    file = check_arguments("export_onnx(module, path)", path, module)
    from fxcompress.export.activations import has_integers, layer_weights, quantize_activations, stored_codes
    from fxcompress.export.graph import difference, exported, run
    from fxcompress.export.onnx_names import sizes
    from fxcompress.export.onnx_weights import constants_of, put_integers, strip

    provenance = _provenance(module)
    net = copy.deepcopy(module).cpu().eval()
    inputs = _inputs(net, provenance, example_inputs)
    run(net, inputs)
    graph = exported(net, inputs, dynamic_shapes)
    weights = WeightCodes(net.state_dict(), provenance.grids)
    found = {name: each for name, value in constants_of(graph.model).items() if (each := weights.of(name, value))}
    model, bits, probe = graph.model, dict[str, tuple[int, ...]](), graph.inputs
    if calibration is not None:
        layers = layer_weights(model, found)
        batches = map(graph.taken, _batches(calibration))
        seen = list(itertools.islice(batches, 1))
        if not seen:
            raise ExportError("activations cannot be quantized: calibration holds no batch")
        feeds = map(graph.feed, itertools.chain(seen, batches))
        model = quantize_activations(model, layers, found.keys() - layers.keys(), feeds)
        (probe,) = seen  # ranges were taken for inputs of their kind
        bits |= dict.fromkeys(stored_codes(model, layers), (8,))
    in_integers = has_integers(model)
    if calibration is not None and not in_integers:
        _LOG.warning(
            "fxcompress: no layer of %s computes in integers: ONNX Runtime has them for weights of 8 bits or fewer in "
            "networks of 32-bit floats; the file is what it would be without calibration", type(module).__name__,
        )  # fmt: skip
        probe = graph.inputs
    held = constants_of(model).keys()
    bits |= put_integers(model, {name: each for name, each in found.items() if name in held})
    strip(model)
    if model.ByteSize() > _LARGEST:
        raise ExportError(f"the graph takes {model.ByteSize():,} bytes; a single ONNX file holds {_LARGEST:,}")
    content = model.SerializeToString()
    off = difference(content, graph.feed(probe), run(net, probe))
    if not in_integers and not off < _ALIKE:
        hint = "" if example_inputs is not None else "; pass example_inputs=, for inputs that are like real ones"
        raise ExportError(f"ONNX Runtime computes something else: outputs are off by {off:.1e} of the largest{hint}")
    stored = {weight: bits[name] for name, each in found.items() if name in bits for weight in each.weights}
    return OnnxExport(
        file, write_atomically(file, lambda handle: handle.write(content)),
        {name: stored[name] for name in weights.grids if name in stored},
        {name: _why(name, weights, found) for name in weights.grids if name not in stored},
        {each.name: sizes(each) for each in model.graph.input}, tuple(each.name for each in model.graph.output),
        in_integers, off,
    )  # fmt: skip


def _provenance(module: nn.Module) -> Provenance:
    kind = type(module).__name__
    if any(isinstance(child, Quantizer) for child in module.modules()):
        raise ExportError(f"this {kind} has quantizers: export what net.finalize() returns")
    provenance = provenance_of(module)
    if provenance is None:
        raise ExportError(
            f"nothing is known of the weights of this {kind}: export what finalize(), load() or prune() returned, not "
            "a copy that was traced again; for any other network there is torch.onnx.export"
        )
    return provenance


def _inputs(net: nn.Module, provenance: Provenance, given: object) -> ExampleInputs:
    """What the user gave, on the CPU; else numbers at random of the shapes that are on record.

    Whole numbers are ones, which do as tokens, as a mask and as lengths; or zeros, where the network does not run on
    these: a mask of zeros leaves an attention nothing, of which runtimes make what they like.
    """
    if given is not None:
        return ExampleInputs.of(given).converted(lambda tensor: tensor.detach().cpu())
    if not provenance.inputs:
        raise ExampleInputError("what the network takes is not on record: pass example_inputs, for one small batch")
    generator = torch.Generator(device="cpu").manual_seed(0)

    def drawn(tensor: Tensor) -> Tensor:
        return tensor.normal_(generator=generator) if tensor.is_floating_point() else tensor

    from fxcompress.export.graph import run

    zeros = recorded_inputs(provenance.inputs, net).converted(drawn)
    ones = zeros.converted(lambda tensor: tensor if tensor.is_floating_point() else torch.ones_like(tensor))
    try:
        run(net, ones)
    except ExampleInputError:
        return zeros
    return ones


def _batches(calibration: Iterable[Any]) -> Iterable[Any]:
    if isinstance(calibration, Tensor) or not isinstance(calibration, Iterable):
        raise TypeError(
            f"calibration is a {type(calibration).__name__}; pass batches, each of what the network is called with: a "
            "list of tensors, or a DataLoader"
        )
    return calibration


def _why(name: str, weights: WeightCodes, found: dict[str, Integers]) -> str:
    """The reason that the file holds a weight in floats."""
    if name not in weights.coded:
        return "it is not on its grid any more"
    if not any(name in each.weights for each in found.values()):
        return "the exporter computes with it, or lays it out in another way"
    return "it has codes of more than 16 bits, or ONNX Runtime has rounded it again"
