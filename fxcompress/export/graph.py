"""A network as an ONNX graph in memory, by torch's exporter; what it is fed with, and what comes out."""

import contextlib
import inspect
import io
import itertools
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import NoneType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fxcompress.errors import ExampleInputError, ExportError, MissingPackageError
from fxcompress.export.onnx_names import name_batch, name_outputs
from fxcompress.export.packages import NEEDED
from fxcompress.trace.basics import trees
from fxcompress.trace.inputs import ExampleInputs

try:
    import onnxscript  # noqa: F401 - torch's exporter needs it
    from onnx import ModelProto
    from onnxruntime import InferenceSession, SessionOptions
except ImportError as error:
    raise MissingPackageError(NEEDED) from error

_TRIALS = 16
"""How many ways are tried to tell the samples of the inputs from other dims."""
Feed = dict[str, npt.NDArray[Any]]
"""What a session is run with: the array of each input."""

OPSET = 21
"""The first version of ONNX's operators that has integers of 4 bits."""


@dataclass(frozen=True, slots=True)
class ExportedGraph:
    """What the exporter made of a network.

    Attributes:
        model: the graph, with its weights in floats.
        inputs: that it was made with.
    """

    model: ModelProto
    inputs: ExampleInputs

    @property
    def names(self) -> list[str]:
        """Of the inputs, in the order of the tensors in the arguments."""
        held = {each.name for each in self.model.graph.initializer}
        return [each.name for each in self.model.graph.input if each.name not in held]

    def taken(self, batch: object) -> ExampleInputs:
        """One batch as the network is called with it; of a tuple of more entries than it takes, the first ones.

        Raises:
            ExampleInputError: it has fewer tensors than the graph.
        """
        given = ExampleInputs.of(batch).converted(lambda tensor: tensor.detach().cpu())
        kwargs = {key: value for key, value in given.kwargs.items() if key in self.inputs.kwargs or given.args}
        args = given.args[: len(self.inputs.args)] if self.inputs.args else given.args
        taken = replace(given, args=args, kwargs=kwargs)
        count = len(list(_tensors(taken)))
        if count != len(self.names):
            raise ExampleInputError(
                f"a batch holds {count} tensors, and the network takes {len(self.names)} "
                f"({', '.join(self.names)}): pass them as example_inputs has them"
            )
        return taken

    def feed(self, inputs: ExampleInputs) -> Feed:
        """The same as a session takes it.

        Raises:
            ExportError: NumPy has no such numbers, and a session takes no others.
        """
        try:
            return {name: tensor.numpy() for name, tensor in zip(self.names, _tensors(inputs), strict=True)}
        except TypeError as error:
            raise ExportError(
                f"ONNX Runtime cannot be called with {inputs}: {error}; export a copy in 32-bit floats, "
                "copy.deepcopy(module).float()"
            ) from error


def exported(net: nn.Module, inputs: ExampleInputs, dynamic_shapes: Any = None) -> ExportedGraph:  # noqa: ANN401
    """The graph of a network in evaluation mode, on the CPU.

    Args:
        net: the network.
        inputs: that it runs on. Where all tensors are batches of one, batches of two are taken, if they work: torch
            takes a size of one for a constant.
        dynamic_shapes: which sizes are free; by default the number of samples, or none where that cannot be.

    Raises:
        ExportError: torch cannot export it.
    """
    dims = _batch_dims(net, inputs)
    given = _doubled(net, inputs, dims)
    shapes = dynamic_shapes if dynamic_shapes is not None else _free(net, given, dims)
    try:
        model = _model(net, given, shapes)
    except Exception as error:
        if dynamic_shapes is not None:
            raise ExportError(_refusal(net, given, error)) from error
    else:
        if dynamic_shapes is None:
            name_batch(model)
        return ExportedGraph(model, given)
    try:
        return ExportedGraph(_model(net, given, None), given)
    except Exception as error:
        raise ExportError(_refusal(net, given, error)) from error


def _refusal(net: nn.Module, inputs: ExampleInputs, error: Exception) -> str:
    reason = f"torch.onnx cannot export this {type(net).__name__}: {first_line(error)}"
    with torch.no_grad():
        leaves = tree_leaves(net(*inputs.args, **inputs.kwargs))  # as torch finds them
    others = dict.fromkeys(type(leaf).__name__ for leaf in leaves if not isinstance(leaf, Tensor | NoneType))
    hint = f"\n  it returns {', '.join(others)} beside tensors, which a graph of ONNX does not"
    return f"{reason}{hint if others else ''}"


def first_line(error: Exception) -> str:
    """What it says, or what caused it, for another message."""
    while error.__cause__ is not None:
        error = error.__cause__  # type: ignore[assignment]
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _model(net: nn.Module, inputs: ExampleInputs, shapes: Any) -> ModelProto:  # noqa: ANN401
    args = inputs.args
    if not inputs.kwargs and args and isinstance(args[-1], dict):
        args = (*args, {})  # torch takes a dict in the last place for keyword arguments
    with quiet():
        program = torch.onnx.export(
            net, args, kwargs=inputs.kwargs or None, dynamo=True, verbose=False, opset_version=OPSET,
            dynamic_shapes=shapes,
        )  # fmt: skip
    assert program is not None
    model = program.model_proto
    with torch.no_grad():
        name_outputs(model, net(*inputs.args, **inputs.kwargs))
    return model


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what torch and ONNX Runtime say about their own work."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _batch_dims(net: nn.Module, inputs: ExampleInputs) -> list[int]:
    """The dim of each tensor along which samples lie: those that the network takes twice as many of.

    It is the first one as a rule, and another one of a recurrent layer's state (layers, samples, units).
    """
    tensors = list(_tensors(inputs))
    samples = next((tensor.shape[0] for tensor in tensors if tensor.dim()), 0)
    candidates = [[d for d, n in enumerate(tensor.shape) if n == samples] or [0] for tensor in tensors]
    for dims in itertools.islice(itertools.product(*candidates), _TRIALS):
        has_samples = (d < t.dim() and t.shape[d] == samples for t, d in zip(tensors, dims, strict=True))
        along = [d if has else -1 for d, has in zip(dims, has_samples, strict=True)]
        with contextlib.suppress(ExampleInputError):
            run(net, _twice(inputs, along))
            return list(dims)
    return [0] * len(tensors)


def _twice(inputs: ExampleInputs, dims: list[int]) -> ExampleInputs:
    """Inputs with each tensor twice as long along its dim; -1 for one that stays."""
    left = iter(dims)

    def longer(tensor: Tensor) -> Tensor:
        dim = next(left)
        return tensor if dim < 0 else torch.cat([tensor, tensor], dim)

    return inputs.converted(longer)


def _doubled(net: nn.Module, inputs: ExampleInputs, dims: list[int]) -> ExampleInputs:
    tensors = list(_tensors(inputs))
    if not tensors or any(not t.dim() or t.shape[d] != 1 for t, d in zip(tensors, dims, strict=True)):
        return inputs
    doubled = _twice(inputs, dims)
    try:
        run(net, doubled)
    except ExampleInputError:
        return inputs
    return doubled


def _free(net: nn.Module, inputs: ExampleInputs, dims: list[int]) -> Any:  # noqa: ANN401
    """That these dims, one of each tensor, are free, laid out like the arguments."""
    chosen = iter(dims)

    def leaf(value: object) -> object:
        if not isinstance(value, Tensor):
            return None
        dim = next(chosen)
        return {dim: torch.export.Dim.AUTO} if value.dim() else None

    def of(tree: object) -> Any:  # noqa: ANN401
        return trees.rebuild(leaf, tree)

    if not inputs.kwargs:
        return tuple(of(each) for each in inputs.args)
    names = list(inspect.signature(net.forward).parameters)
    return {name: of(value) for name, value in zip(names, inputs.args, strict=False)} | of(dict(inputs.kwargs))


def _tensors(inputs: ExampleInputs) -> Iterator[Tensor]:
    return trees.tensors_in([inputs.args, inputs.kwargs])


def run(net: nn.Module, inputs: ExampleInputs) -> list[Tensor]:
    """The tensors that a network returns.

    Raises:
        ExampleInputError: it does not run on these inputs.
    """
    try:
        with torch.no_grad():
            return list(trees.tensors_in(net(*inputs.args, **inputs.kwargs)))
    except Exception as error:
        raise ExampleInputError(f"the network does not run on ({inputs}): {error}") from error


def difference(content: bytes, feed: Feed, expected: list[Tensor]) -> float:
    """How far ONNX Runtime is from ``expected``, relative to the largest entry of each output; NaN beside NaN is none.

    Raises:
        ExportError: it cannot run the graph, or returns something else.
    """
    options = SessionOptions()
    options.log_severity_level = 3
    try:
        session = InferenceSession(content, options, providers=["CPUExecutionProvider"])
        found = session.run(None, feed)
    except Exception as error:
        raise ExportError(f"ONNX Runtime cannot run the graph: {first_line(error)}") from error
    shapes = [tuple(each.shape) for each in found], [tuple(each.shape) for each in expected]
    if shapes[0] != shapes[1]:
        raise ExportError(f"the graph returns outputs of sizes {shapes[0]}, the network of {shapes[1]}")
    return max((_off(np.asarray(a), b.numpy()) for a, b in zip(found, expected, strict=True)), default=0.0)


def _off(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    if not expected.size or np.array_equal(found, expected):
        return 0.0
    a, b = found.astype(np.float64), expected.astype(np.float64)
    a, b = np.where(np.isnan(a) & np.isnan(b), 0, a), np.where(np.isnan(a) & np.isnan(b), 0, b)
    return float(np.abs(a - b).max() / (np.abs(b).max() or 1))
