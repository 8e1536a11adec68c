"""From a model and what the user gave as inputs to a traced module and inputs that it runs on."""

from collections.abc import Callable

from torch import nn

from fxcompress.channels.analysis import Analysis, analyse
from fxcompress.errors import ExampleInputError, FxCompressError, TraceError, ValueReadError
from fxcompress.progress import stage
from fxcompress.trace.concrete.run import runs
from fxcompress.trace.inputs import ExampleInputs, infer_inputs
from fxcompress.trace.model.skeleton import without_compiled
from fxcompress.trace.pieces.find import Pieces, find_pieces
from fxcompress.trace.support import check_module, check_supported
from fxcompress.trace.traced import TracedModule
from fxcompress.trace.tracer import trace, trace_by_running
from fxcompress.trace.weights.norm import check_plain_weights, has_weight_norm

NO_GRAPH = (TraceError, ValueReadError)
"""What :func:`prepare` raises for a model that has no graph as a whole, and may have pieces that do."""


def prepare(model: nn.Module, example_inputs: object = None, *, plain: bool = True) -> Analysis:
    """Trace and analyse a model, inferring its inputs where none are given.

    Args:
        model: any network that can be traced.
        example_inputs: a tensor, a tuple of positional arguments, a dict of keyword arguments, or None.
        plain: as for :func:`fxcompress.trace.tracer.trace`.

    Raises:
        ExampleInputError: the inputs do not fit, or are missing and cannot be inferred.
        TraceError, UnsupportedModelError: the model cannot be traced, or computes something else without weight norm.
    """
    stage("trace")
    check_module(model)
    model = without_compiled(model)
    if example_inputs is not None:
        inputs = ExampleInputs.of(example_inputs)
        if has_weight_norm(model):
            check_supported(model)  # before it is run
            check_plain_weights(model, inputs)
        return _analysed(model, inputs, plain=plain)
    found: list[Analysis] = []
    try:
        traced = trace(model, plain=plain)
    except TraceError as error:
        why, traced = error, None

    def works(guess: ExampleInputs) -> bool:
        try:
            found.append(analyse(traced or _traced_on(model, guess, why, plain=plain), guess))
        except ExampleInputError:
            return False
        return True

    try:
        inputs = infer_inputs(model, works)
    except ExampleInputError as error:
        if traced is None:
            raise why from error
        raise
    check_plain_weights(model, inputs)
    return found[-1]


def _analysed(model: nn.Module, inputs: ExampleInputs, *, plain: bool) -> Analysis:
    """Trace and analyse a model on inputs that were given."""
    traced = trace(model, inputs, plain=plain)
    try:
        return analyse(traced, inputs)
    except ExampleInputError as error:
        if not all(runs(model, inputs, training=mode) for mode in (False, True)):
            raise
        what = " ".join(str(error).removeprefix("the model does not run on the example inputs: ").split())
        why = TraceError(f"it runs on the example inputs, and not on tensors without values: {what}")
        why.__cause__ = error
    try:  # a graph of symbols may have gone where the model does not
        return analyse(trace_by_running(model, inputs, why, plain=plain), inputs)
    except FxCompressError:
        raise why from why.__cause__


def _traced_on(model: nn.Module, guess: ExampleInputs, why: TraceError, *, plain: bool) -> TracedModule:
    """Trace a model on inputs, which could not be traced without any."""
    try:
        return trace(model, guess, plain=plain)
    except TraceError:
        return trace_by_running(model, guess, why, plain=plain)


def in_pieces_by_inputs(error: FxCompressError) -> FxCompressError:
    """What :func:`prepare` has raised for a model without inputs, with the way that there is besides."""
    hint = "with example_inputs, on which it runs, those modules of it that have a graph are taken, each on its own"
    if str(error).endswith("it is then traced by running it on them"):
        hint = "where it has no graph even then, those of its modules that have one are taken, each on its own"
    return type(error)(f"{error}\n  {hint}")


def prepare_pieces(
    model: nn.Module,
    inputs: ExampleInputs,
    why: FxCompressError,
    *,
    check: Callable[[str, TracedModule], None] = lambda _path, _traced: None,
    layers: int = 2,
    plain: bool = True,
) -> tuple[Pieces, dict[str, Analysis]]:
    """Trace and analyse the pieces of a model that has no graph as a whole; the analyses by the names of the pieces.

    Args:
        model: any network.
        inputs: that it runs on.
        why: :func:`prepare` has failed.
        check: raises an FxCompressError for what is no use as a piece, from its name and its graphs.
        layers: that a piece must hold at least. Between two of them something can be removed.
        plain: as for :func:`prepare`.

    Raises:
        ExampleInputError: the model does not run on the inputs.
        TraceError: no module of it that holds so many layers can be traced and analysed.
    """
    analyses: dict[str, Analysis] = {}

    def accept(path: str, traced: TracedModule, call: ExampleInputs) -> None:
        check(path, traced)
        analyses[path] = analyse(traced, call)

    found = find_pieces(without_compiled(model), inputs, why, accept, layers=layers, plain=plain)
    return found, {piece.path: analyses[piece.path] for piece in found.pieces}
