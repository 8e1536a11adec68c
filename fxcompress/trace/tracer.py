"""From a model to its graph.

Tracing reads flags such as ``self.training`` once and bakes them in. So the model is traced in both modes; where the
two graphs differ, the traced module keeps both. There are two ways to trace: with symbols (symbolic/), and by running
on example inputs (concrete/).
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Protocol
from unittest.mock import patch

import torch
import torch.distributions
from torch import fx, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

from fxcompress.errors import TraceError
from fxcompress.provenance import attach, has_record, provenance_of
from fxcompress.trace.basics.garbage_collection import without_collections
from fxcompress.trace.basics.modules import modules_in
from fxcompress.trace.code.locations import place, short
from fxcompress.trace.concrete.intercept import wrapped_functions
from fxcompress.trace.concrete.leftovers import clean_caches
from fxcompress.trace.concrete.run import Way, check_runs
from fxcompress.trace.effects.attributes import carried_over
from fxcompress.trace.effects.global_state import Surroundings, restored_around
from fxcompress.trace.effects.randomness import same_randomness
from fxcompress.trace.effects.undo import unchanged_buffers
from fxcompress.trace.forward_hooks import hooked, hooks_of, remove_hooks
from fxcompress.trace.graph.calls import put_first
from fxcompress.trace.graph.checkpoints import copy_marks, marked_checkpoints
from fxcompress.trace.graph.extremes import call_extremes
from fxcompress.trace.graph.guards import asks_for_gradients
from fxcompress.trace.graph.same_graph import same_graph
from fxcompress.trace.graph.variances import call_variances
from fxcompress.trace.inputs import ExampleInputs
from fxcompress.trace.model.lowering import lower, sweep
from fxcompress.trace.model.mode_switches import switches, watched_switches
from fxcompress.trace.model.own_modes import forget_runs, own_modes
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
from fxcompress.trace.weights.norm import make_weights_plain, with_plain_weights
from fxcompress.trace.weights.opened import close, open_hooks


class GraphOf(Protocol):
    """A way to trace one mode."""

    def __call__(self, root: nn.Module, readers: set[int], *, training: bool) -> fx.Graph:
        """The graph of ``root`` in a mode; the ids of the modules whose code reads the mode go into ``readers``."""
        ...


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
        return _checked(model, inputs, lambda kept: _traced(model, run(kept)))
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
        return _traced(model, partial(symbolic_graph, inputs=inputs, symbols=True, kept=kept))
    except TraceError as error:
        first = error
    with unchanged_buffers(model) as written:
        result = _traced(model, partial(symbolic_graph, inputs=inputs, symbols=False, kept=kept))
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
        return _traced(model, run if training else partial(_in_evaluation, run))

    traced = _checked(model, inputs, make)
    if _hides_parameters(traced):
        traced = _checked(model, inputs, partial(make, open_wrapped=True))
    return _with_record(traced, model, plain=False)


def _in_evaluation(run: GraphOf, root: nn.Module, readers: set[int], *, training: bool) -> fx.Graph:
    return run(root, readers, training=False)


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
        return _traced(model, _by_running(inputs, kept, keep_sizes=keep_sizes))

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
        return run_paths(root, inputs, Way(training, is_leaf, keep_sizes, open_wrapped), readers, kept)

    return graph_of


def _traced(model: nn.Module, graph_of: GraphOf) -> TracedModule:
    root = skeleton(model)
    forget_runs(root)
    make_weights_plain(root)
    open_hooks(root)
    lower(root)
    modes = [(module, module.training) for module in modules_in(root)]
    train_graph = None

    def graph_in(*, training: bool) -> fx.Graph:
        graph = graph_of(root, readers, training=training)
        for tidy in (sweep, put_first, call_variances, call_extremes, _share_annotations):
            tidy(graph)
        return graph

    outside = (
        clean_caches(model), same_randomness(), marked_checkpoints(), _unchecked_distributions(), _no_hooks_on_saved(),
    )  # fmt: skip
    with ExitStack() as stack, watched_switches() as switched, _reads_of_mode() as readers:
        for context in outside:
            stack.enter_context(context)
        graph = graph_in(training=False)
        asked = any(map(asks_for_gradients, graph.nodes))
        if readers or asked or switched.found or any(_knows_its_mode(module) for module, _ in modes):
            train_graph = graph_in(training=True)
    for module, training in modes:
        module.training = training
    remove_hooks(root)  # what they do is in the graph
    close(root)
    if train_graph is not None and same_graph(graph, train_graph):
        copy_marks(train_graph, graph)
        train_graph = None
    traced = TracedModule(root, graph, train_graph, type(model).__name__, compiled=False)
    if readers:
        traced.mode_readers = tuple(name for name, module in root.named_modules() if id(module) in readers)
    if not isinstance(model, TracedModule):  # which has those that it was made with
        own = own_modes(model)
        traced.other_modes = switched.modes(own) if switched.found else own
    traced.meta = dict(model.meta) if isinstance(model, fx.GraphModule) else {}
    return traced


def _share_annotations(graph: fx.Graph) -> None:
    """Let inputs with equal annotations have the same one: older torch.fx writes no code of ``Tensor | None`` twice."""
    found: list[object] = []
    for node in graph.find_nodes(op="placeholder"):
        node.type = next((kind for kind in found if kind == node.type), node.type)
        found.append(node.type)


def _knows_its_mode(module: nn.Module) -> bool:
    """Whether a module may do something else in training though no code of it reads ``training``."""
    kind = type(module)
    own = kind.train is not nn.Module.train or kind.eval is not nn.Module.eval
    return own or (isinstance(module, TracedModule) and module.train_graph is not None)


@contextmanager
def _unchecked_distributions() -> Iterator[None]:
    """Within it, torch.distributions do not look at their values to see whether they are valid: a graph cannot."""
    with patch.object(torch.distributions.Distribution, "_validate_args", new=False):
        yield


@contextmanager
def _no_hooks_on_saved() -> Iterator[None]:
    """Within it, code must not change what autograd saves for the backward pass, as no graph does. It may move that."""
    enter = saved_tensors_hooks.__enter__

    def entered(self: saved_tensors_hooks) -> None:
        if not isinstance(self, save_on_cpu):
            raise TraceError(f"it has hooks on what autograd saves{place()}, which a graph does not have")
        enter(self)

    with patch.object(saved_tensors_hooks, "__enter__", entered):
        yield


@contextmanager
def _reads_of_mode() -> Iterator[set[int]]:
    """Collects the ids of the modules whose code reads ``self.training``.

    A property on nn.Module sees the reads; the flag itself stays where it is, in the ``__dict__`` of each module.
    """
    readers: set[int] = set()

    def read(self: nn.Module) -> object:
        readers.add(id(self))
        return self.__dict__["training"]

    def write(self: nn.Module, value: object) -> None:
        switches().wrote()
        self.__dict__["training"] = value

    with patch.object(nn.Module, "training", property(read, write), create=True):
        yield readers
