"""``fxcompress.load``: a file and a freshly built original give the compressed network back."""

import contextlib
import os
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from fxcompress.channels.analysis import Analysis
from fxcompress.channels.prepare import prepare, prepare_pieces
from fxcompress.errors import ExampleInputError, FxCompressError, StorageError, TraceError
from fxcompress.passes.own_code import shell_of, with_own_code
from fxcompress.passes.readers import add_biases
from fxcompress.passes.recut import ShapeError, recut
from fxcompress.progress import progress, stage
from fxcompress.provenance import Provenance, attach
from fxcompress.quantizer import Quantizer
from fxcompress.storage.arguments import check_arguments
from fxcompress.storage.file import SavedNetwork, read
from fxcompress.storage.meta import with_values
from fxcompress.trace.basics.precision import ordinary
from fxcompress.trace.fingerprint import fingerprint
from fxcompress.trace.inputs import ExampleInputs, recorded_inputs
from fxcompress.trace.model.skeleton import skeleton, without_compiled
from fxcompress.trace.pieces.graph_forward import install
from fxcompress.trace.retrace.size_attributes import note_own_numbers
from fxcompress.trace.traced import TracedModule
from fxcompress.trace.weights.computed import SUFFIX
from fxcompress.trace.weights.norm import with_plain_weights


@ordinary
def load(path: str | os.PathLike[str], model: nn.Module, example_inputs: Any = None) -> nn.Module:  # noqa: ANN401
    """Cut a freshly built original to the shape of a saved network, and fill in the saved values, bit for bit.

    Args:
        path: of a file that :func:`fxcompress.save` wrote.
        model: the original network, built by the same code as the one that was compressed; its values do not matter.
            It is left as it is. It may be on the meta device (``with torch.device("meta"): ...``), if all that has
            values there is in its state_dict; the network is on the CPU then.
        example_inputs: only where the saved network took inputs that are no tensors, or is in pieces.

    Returns:
        the network in evaluation mode, on the device of ``model``: a GraphModule or, where it was saved in pieces or
        with the model's own code, a module of the model's own class.

    Raises:
        TypeError: the arguments are swapped, or of another kind.
        StorageError: the file is no such file, is damaged, or does not fit ``model``.
        TraceError, UnsupportedModelError: the model cannot be traced.

    >>> import tempfile, torch, fxcompress as fxc
    >>> build = lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> final = fxc.compress(build(), torch.zeros(1, 8)).finalize().eval()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = fxc.save(final, f"{folder}/net.fxc")
    ...     loaded = fxc.load(f"{folder}/net.fxc", build())
    >>> torch.equal(loaded(torch.ones(1, 8)), final(torch.ones(1, 8)))
    True
    """
    check_arguments("load(path, model)", path, model)
    model = without_compiled(model)
    with progress(f"loading a network into {type(model).__name__}"):
        result, known = _loaded(path, model, example_inputs)
    if not known:
        warnings.warn(
            f"{path} was saved from a network of the same shapes as this {type(model).__name__}, but the graph that it "
            "was made from has other operations, arguments or settings of layers: it may compute something else. Build "
            "the model with the code and arguments that it was built with, by the same versions of its libraries, or "
            "compare outputs",
            stacklevel=3,  # the decorator lies between
        )
    return result.eval()


def _loaded(path: str | os.PathLike[str], model: nn.Module, example_inputs: Any) -> tuple[nn.Module, bool]:  # noqa: ANN401
    """The network, and whether its graph is that of the network that was saved."""
    stage("read")
    saved = read(path)
    model = with_plain_weights(with_values(model, saved.tensors, path))
    provenance = saved.provenance
    plain = _has_computed_weights(model, provenance) and not provenance.own_code
    if not plain:
        _check_shapes(model, provenance, path)
    try:
        if provenance.pieces:
            result, known = _in_pieces(model, example_inputs, provenance, path, plain=plain)
        else:
            inputs = example_inputs if example_inputs is not None else _inputs(provenance, model, path)
            analysis = prepare(model, inputs, plain=plain)
            if plain:
                _check_shapes(analysis.module, provenance, path)
            if provenance.own_code:
                note_own_numbers(analysis.module, model, analysis.inputs)
            result, known, inputs = _cut(analysis, provenance, path), _is_known(analysis, provenance), analysis.inputs
    except ExampleInputError as error:
        raise StorageError(f"{path} does not fit the model: {error}") from error
    _fill(result, saved, path)
    if isinstance(result, TracedModule) and provenance.own_code:
        result = with_own_code(shell_of(model), result, _as_saved(inputs, model, saved))
    return result, known


def _as_saved(inputs: ExampleInputs, model: nn.Module, saved: SavedNetwork) -> ExampleInputs:
    """Inputs for what is in the file, which may have been converted to another precision after it was finalized."""
    into: dict[torch.dtype, set[torch.dtype]] = {}
    for name, own in model.state_dict().items():
        if name in saved.tensors and own.is_floating_point():
            into.setdefault(own.dtype, set()).add(saved.tensors[name].dtype)
    one = {own: others.pop() for own, others in into.items() if len(others) == 1}
    return inputs.converted(lambda tensor: tensor.to(one.get(tensor.dtype, tensor.dtype)))


def _has_computed_weights(model: nn.Module, provenance: Provenance) -> bool:
    """Whether the saved network holds a weight that the model computes; not where it was pruned with its optimizer."""
    own = model.state_dict(keep_vars=True)
    return any(SUFFIX in name and name not in own for name in provenance.shapes)


def _in_pieces(
    model: nn.Module, example_inputs: object, provenance: Provenance, path: object, *, plain: bool
) -> tuple[nn.Module, bool]:
    """A copy of a model without a graph as a whole, the pieces of which are cut as they were in the saved network.

    And whether all pieces have the graphs that they had.
    """
    wanted = provenance.pieces.keys()
    if example_inputs is None:
        raise StorageError(
            f"{path} holds a network in pieces ({', '.join(wanted)}), which are found by running the original: pass "
            "example_inputs, those that it was compressed or pruned with"
        )

    def check(name: str, traced: TracedModule) -> None:
        if name not in wanted:
            raise TraceError("it is not saved as a piece")

    why = TraceError(f"no piece of {path} was found in the model; pass the example inputs that it was made with")
    try:
        _, analyses = prepare_pieces(model, ExampleInputs.of(example_inputs), why, check=check, layers=1, plain=plain)
    except TraceError:
        analyses = _alone(model, provenance, plain=plain)
        if wanted - analyses.keys():
            raise
    missing = wanted - analyses.keys()
    if missing:
        raise StorageError(
            f"{path} does not fit the model: {min(missing)} is a piece there, and none on these example inputs; pass "
            "those that it was made with"
        )
    result = skeleton(model)
    for name, analysis in analyses.items():
        if plain:
            _check_shapes(analysis.module, provenance.of_piece(name), path)
        install(result.get_submodule(name), _cut(analysis, provenance.of_piece(name), path))
    return result, all(_is_known(analysis, provenance.of_piece(name)) for name, analysis in analyses.items())


def _alone(model: nn.Module, provenance: Provenance, *, plain: bool) -> dict[str, Analysis]:
    """The pieces that have, each on its own, the graphs which they had: networks that were results on their own."""
    found = {}
    for path, piece in provenance.pieces.items():
        with contextlib.suppress(AttributeError, FxCompressError):
            part = model.get_submodule(path)
            analysis = prepare(part, recorded_inputs(piece.inputs, part), plain=plain)
            if piece.inputs and piece.graph == fingerprint(analysis.module):
                found[path] = analysis
    return found


def _is_known(analysis: Analysis, provenance: Provenance) -> bool:
    """Whether the graph is that of the network that was compressed or pruned, as far as the file can tell."""
    return provenance.graph in {"", fingerprint(analysis.module)}


def _check_shapes(model: nn.Module, provenance: Provenance, path: object) -> None:
    if any(isinstance(module, Quantizer) for module in model.modules()):
        raise StorageError(
            f"{path} is of a finalized network: load it into the original model, not into a compressed one"
        )
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, shape in provenance.shapes.items():
        if own.get(name) != shape:
            found = f"has {own[name]}" if name in own else "has no such tensor"
            kind = type(model).__name__
            raise StorageError(
                f"{path} was saved from another network: its original had {name} of shape {shape}, {kind} {found}; "
                "build the model with the arguments that it was built with"
            )
    extra = [name for name in own if name not in provenance.shapes]
    if extra:
        raise StorageError(
            f"{path} was saved from another network: its original had no {extra[0]}; "
            "build the model with the arguments that it was built with"
        )


def _inputs(provenance: Provenance, model: nn.Module, path: object) -> ExampleInputs:
    """Zeros of the shapes that the network was analysed on.

    Raises:
        StorageError: they are not known. A guess would leave out what the model has a default for, such as a mask, and
            the graph would be another one than that of the network that was saved.
    """
    if not provenance.inputs:
        raise StorageError(
            f"{path} cannot say what the network took, as not all of its inputs were tensors: pass example_inputs, "
            "those that it was compressed or pruned with"
        )
    return recorded_inputs(provenance.inputs, model)


def _cut(analysis: Analysis, provenance: Provenance, path: object) -> TracedModule:
    """Take out the branches and channels that the saved network lacks, and add the biases that it has got."""
    try:
        result = recut(analysis, Provenance(provenance.shapes), provenance).module
    except ShapeError as error:
        raise StorageError(f"{path} does not fit the model: {error}") from error
    for weight in provenance.biases:
        add_biases(result, weight)
    attach(result, provenance)
    return result


def _fill(module: nn.Module, saved: SavedNetwork, path: object) -> None:
    """Give the module the saved tensors, its own parameters and buffers from now on."""
    missing = set(module.state_dict()) ^ set(saved.tensors)
    if missing:
        raise StorageError(f"{path} does not fit the model: {min(missing)} is on one side only")
    made: dict[int, Tensor] = {}
    for prefix, owner in module.named_modules():
        for table in (owner._parameters, owner._buffers):
            for leaf, old in table.items():
                name = f"{prefix}.{leaf}" if prefix else leaf
                if old is not None:
                    made.setdefault(id(old), _filled(old, saved.tensors.get(name), name, path))
                    table[leaf] = made[id(old)]


def _filled(old: Tensor, value: Tensor | None, name: str, path: object) -> Tensor:
    if value is None:
        data = old.detach().clone()
    elif value.shape != old.shape:
        raise StorageError(f"{path} does not fit the model: {name} is {tuple(value.shape)}, not {tuple(old.shape)}")
    elif old.requires_grad and not (value.is_floating_point() or value.is_complex()):
        raise StorageError(f"{path} does not fit the model: {name} is of whole numbers there, and trained here")
    else:
        data = torch.empty_like(old, dtype=value.dtype).copy_(value)  # laid out as it was: kernels may depend on that
    return nn.Parameter(data, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else data
