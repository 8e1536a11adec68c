"""From a model to its graph: which way to take, and whether the graph can be trusted.

There are two ways to trace: with symbols (symbolic/), and by running on example inputs (concrete/, paths/).
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import fx, nn

from fxcompress.errors import TraceError
from fxcompress.provenance import attach, has_record, provenance_of
from fxcompress.trace.basics.garbage_collection import without_collections
from fxcompress.trace.both_modes import GraphOf, in_both_modes, in_evaluation
from fxcompress.trace.code.locations import short
from fxcompress.trace.concrete.intercept import wrapped_functions
from fxcompress.trace.concrete.run import RunSettings, check_runs
from fxcompress.trace.effects.attributes import carried_over
from fxcompress.trace.effects.global_state import Surroundings, restored_around
from fxcompress.trace.effects.undo import unchanged_buffers
from fxcompress.trace.forward_hooks import hooked, hooks_of
from fxcompress.trace.inputs import ExampleInputs
from fxcompress.trace.model.scripted import opened_scripts
from fxcompress.trace.model.skeleton import skeleton
from fxcompress.trace.model.uncompiled import uncompiled
from fxcompress.trace.paths.run_paths import run_paths
from fxcompress.trace.support import check_supported
from fxcompress.trace.symbolic.graph import symbolic_graph
from fxcompress.trace.symbolic.questions import asking_type
from fxcompress.trace.symbolic.tracer import Tracer
from fxcompress.trace.traced import TracedModule
from fxcompress.trace.verify import computes_the_same
from fxcompress.trace.weights.computed import make_computed_plain
from fxcompress.trace.weights.norm import with_plain_weights


@without_collections
def trace(model: nn.Module, inputs: ExampleInputs | None = None, *, plain: bool = True) -> TracedModule:
    """Trace ``model`` in both modes; the model itself is not touched, and the result shares its tensors.

    Symbolic tracing comes first. Where it fails, and there are inputs, the model is traced by running it on them, see
    :mod:`fxcompress.trace.concrete.run`.

    Args:
        model: any module, a GraphModule among them.
        inputs: arguments of ``forward`` that have a default and are not given here keep that default.
        plain: put a parameter in the place of each weight that the model computes from parameters in a way that keeps
            its channels, see :mod:`fxcompress.trace.weights.computed`. A network that was rewritten without keeps them.

    Raises:
        TraceError: neither way works.
        UnsupportedModelError: see :func:`fxcompress.trace.support.check_supported`.
    """
    traced = _trace(model, inputs)
    return _with_record(traced, model, plain=plain)


def _trace(model: nn.Module, inputs: ExampleInputs | None) -> TracedModule:
    # Made when first asked for, and kept: functions that tracing puts in the place of torch's must not be among them.
    torch.overrides.get_overridable_functions()
    check_supported(model)
    _refuse_names(model)
    try:
        _refuse_hooks(model)
        traced = _checked(model, inputs, partial(_trace_symbolically, model, inputs))
    except TraceError as error:
        if inputs is None:
            way = "or pass" if "\n" in str(error) else "pass"  # other ways stand on lines of their own
            raise TraceError(f"{error}\n  {way} example_inputs: it is then traced by running it on them") from error
        return _trace_by_running(model, inputs, error)
    if inputs is None or not _hides_parameters(traced):
        return traced
    try:
        run = partial(_by_running, inputs, keep_sizes=True, open_wrapped=True)
        return _checked(model, inputs, lambda kept: in_both_modes(model, run(kept)))
    except TraceError:
        return traced


@uncompiled()
def _checked(model: nn.Module, inputs: ExampleInputs | None, make: Callable[[set[str]], TracedModule]) -> TracedModule:
    """What ``make`` returns; compared with the model where its code does what nobody can see while it is traced.

    That is to ask for the type of a value, as stand-ins and fake tensors have others, for which of two it is, or for
    the pattern that it matches, to call what ``torch.jit`` has compiled, and to keep something from one run for the
    next, in attributes whose names ``make`` puts into the set that it is given.

    Raises:
        TraceError: it does not compute the same, or there is nothing to compare it on.
    """
    kept: set[str] = set()
    around = Surroundings(model)
    try:
        with opened_scripts() as compiled:
            traced = make(kept)
        kept |= around.changed()
    finally:
        around.restore()
    asking = asking_type(model)
    if asking is None and not kept and (inputs is None or not compiled):
        return traced
    try:
        if inputs is not None and computes_the_same(with_plain_weights(model), traced, inputs):
            return traced
    finally:
        around.restore()
    if kept:
        raise carried_over(min(kept))
    if asking is None:
        raise TraceError(
            f"{compiled[0]} is compiled by torch.jit, and computes something else than the code that it was made of\n"
            "  call the code itself"
        )
    code = asking.__code__
    raise TraceError(
        f"{asking.__name__} asks for the type of a value (type(x), x.__class__, x is y, match or tree_map), or how it "
        f"runs (is_grad_enabled), in the function at {short(code.co_filename)}:{code.co_firstlineno}, and the graph "
        + ("cannot be compared with the model without inputs" if inputs is None else "computes something else")
        + "\n  ask isinstance(x, ...) or x == y instead"
    )


def _refuse_hooks(model: nn.Module) -> None:
    if hooked(model):
        raise TraceError(f"{type(model).__name__} has forward hooks of its own, which torch.fx does not look into")


def _refuse_names(model: nn.Module) -> None:
    """What hangs on a model under a name that torch.fx keeps something of its own under, on the traced model."""
    own = {name for name in fx.GraphModule(nn.Module(), fx.Graph()).__dict__ if name.startswith("_")}
    taken = sorted({*model._parameters, *model._buffers, *model._modules} & own - vars(nn.Module()).keys())
    if taken:
        raise TraceError(
            f"{type(model).__name__}.{taken[0]} has the name of an attribute of torch.fx.GraphModule, which the traced "
            "model is: give it another name"
        )


def _hides_parameters(traced: TracedModule) -> bool:
    """Whether a function marked by torch.fx.wrap takes parameters: what it does with them is not in the graph."""
    functions = {id(scope[name]) for scope, name in wrapped_functions() if not _is_ours(scope[name])}
    return any(
        id(node.target) in functions and any(used.op == "get_attr" for used in node.all_input_nodes)
        for graph in traced.graphs.values()
        for node in graph.nodes
    )


def _is_ours(function: object) -> bool:
    return getattr(function, "__module__", "").startswith("fxcompress.")


def _trace_symbolically(model: nn.Module, inputs: ExampleInputs | None, kept: set[str]) -> TracedModule:
    """Trace with buffers as symbols; where the model takes decisions on one, with those that it has now."""
    try:
        return in_both_modes(model, partial(symbolic_graph, inputs=inputs, symbols=True, kept=kept))
    except TraceError as error:
        first = error
    with unchanged_buffers(model) as written:
        result = in_both_modes(model, partial(symbolic_graph, inputs=inputs, symbols=False, kept=kept))
    if written or any("_tensor_constant" in str(node.target) for node in result.graph.find_nodes(op="get_attr")):
        raise first  # a buffer that is written to, or computed with, must not be a constant
    return result


@without_collections
def trace_by_running(model: nn.Module, inputs: ExampleInputs, why: TraceError, *, plain: bool = True) -> TracedModule:
    """Trace ``model`` by running it on ``inputs``, first with arithmetic on sizes, then with each size as it is.

    Args:
        model: as for :func:`trace`.
        inputs: to run on.
        why: symbolic tracing has failed.
        plain: as for :func:`trace`.

    Raises:
        TraceError: with both reasons.
        ExampleInputError: the model does not run on them, traced or not.
    """
    return _with_record(_trace_by_running(model, inputs, why), model, plain=plain)


@without_collections
def trace_path(model: nn.Module, inputs: ExampleInputs, *, training: bool = True) -> TracedModule:
    """Trace ``model`` by running it on ``inputs``, with arithmetic on sizes and with the weights that it has.

    Args:
        model: as for :func:`trace`. It takes decisions on sizes, so there are no symbols.
        inputs: to run on.
        training: whether it runs on them in training as well; its graph is one of evaluation otherwise.

    Raises:
        TraceError, UnsupportedModelError: as :func:`trace` does.
    """
    check_supported(model)
    _refuse_names(model)

    def make(kept: set[str], *, open_wrapped: bool = False) -> TracedModule:
        run = _by_running(inputs, kept, keep_sizes=True, open_wrapped=open_wrapped)
        return in_both_modes(model, run if training else partial(in_evaluation, run))

    traced = _checked(model, inputs, make)
    if _hides_parameters(traced):
        traced = _checked(model, inputs, partial(make, open_wrapped=True))
    return _with_record(traced, model, plain=False)


def _with_record(traced: TracedModule, model: nn.Module, *, plain: bool) -> TracedModule:
    """A traced model with plain weights, if it is to have them, and with the record of what was cut out of it."""
    if plain and not has_record(model):
        make_computed_plain(traced)
    provenance = provenance_of(model)
    if provenance is not None and provenance.own_code:
        attach(traced, provenance)
    return traced


def _trace_by_running(model: nn.Module, inputs: ExampleInputs, why: TraceError) -> TracedModule:
    def make(kept: set[str], *, keep_sizes: bool) -> TracedModule:
        return in_both_modes(model, _by_running(inputs, kept, keep_sizes=keep_sizes))

    try:
        return _checked(model, inputs, partial(make, keep_sizes=True))
    except TraceError as error:
        first = error
    try:
        return _checked(model, inputs, partial(make, keep_sizes=False))
    except TraceError:
        with restored_around(model):
            check_runs(skeleton(model), inputs)
        raise TraceError(f"{why}\nNor can it be traced by running it on the example inputs: {first}") from first


def _by_running(inputs: ExampleInputs, kept: set[str], *, keep_sizes: bool, open_wrapped: bool = False) -> GraphOf:
    torchs = Tracer().is_leaf_module

    def is_leaf(module: nn.Module, path: str) -> bool:
        return torchs(module, path) and not hooks_of(module)

    def graph_of(root: nn.Module, readers: set[int], *, training: bool) -> fx.Graph:
        return run_paths(root, inputs, RunSettings(training, is_leaf, keep_sizes, open_wrapped), readers, kept)

    return graph_of
