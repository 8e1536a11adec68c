"""A rewritten network as a module of the model's own class, that runs the model's own code.

class Net(nn.Module):              fc1.weight (64, 8)           fc1.weight (40, 8)
    def forward(self, x): ...      fc2.weight (4, 64)     ->    fc2.weight (4, 40)
    def predict(self, x): ...      a Net                        a Net

Where provenance says so, passes cut nothing out of a network that would need another graph (see
:mod:`fxcompress.passes.code_changes`). So the code of the model computes the same with what is left of its tensors; to
be sure, it is traced again, and must give the same graph, or the same results.
"""

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor, nn

from fxcompress.channels.analysis import Analysis
from fxcompress.channels.space import Reason
from fxcompress.errors import FxCompressError, UnsupportedModelError
from fxcompress.passes.code_changes import attributes_changed
from fxcompress.passes.held import NOTHING, Held, all_of, joined
from fxcompress.passes.other_paths import PATH, Untraced
from fxcompress.passes.prune_report import SizesDecide
from fxcompress.passes.shrink import Shrunk, shrink
from fxcompress.provenance import Provenance, attach, provenance_of
from fxcompress.trace.fingerprint import same_graphs
from fxcompress.trace.inputs import ExampleInputs
from fxcompress.trace.model.lowering import UNLOWERED
from fxcompress.trace.model.skeleton import skeleton
from fxcompress.trace.pieces.graph_forward import take_over
from fxcompress.trace.retrace.other_sizes import OtherPaths
from fxcompress.trace.retrace.size_attributes import hold_numbers, set_own_numbers
from fxcompress.trace.traced import TracedModule
from fxcompress.trace.tracer import trace
from fxcompress.trace.verify import computes_the_same
from fxcompress.trace.weights.norm import with_plain_weights
from fxcompress.trace.weights.opened import forget_computed, renew_computed

_HINT = "leave out keep_code, and the result is a GraphModule that computes the same as the model"


def no_code_to_keep(model: nn.Module, why: FxCompressError) -> UnsupportedModelError:
    """The error for a model that has no graph as a whole, which says what its code computes."""
    return UnsupportedModelError(
        f"keep_code=True needs the graph of all of {type(model).__name__}, to know what its code computes: {why}\n"
        "  without it those of its modules that have a graph lose channels, each on its own; the model keeps its class "
        "and its other methods then as well"
    )


def shell_of(model: nn.Module) -> nn.Module:
    """A copy of a model without its tensors: its class, its attributes, its modules."""
    shell = skeleton(with_plain_weights(model))
    for module in shell.modules():
        for table in (module._parameters, module._buffers):
            table.update(dict.fromkeys(table))
    forget_computed(shell)
    return shell


def shrink_with_own_code(
    shell: nn.Module, module: TracedModule, inputs: ExampleInputs, analysis: Analysis | None = None, *, fold: bool
) -> tuple[Shrunk, nn.Module, SizesDecide | None]:
    """As :func:`fxcompress.passes.shrink.shrink`, with the module of the model's class that runs what is left.

    Where the code computes something else then, nothing is folded, as it may ask whether a layer has a bias. If it was
    not that, no attribute changes. Where sizes decide which way the code goes, the same is asked of the ways that the
    example inputs do not take, as far as they are found; what these need stays, and in the end all does.

    Returns:
        what went, the module, and what is known of the other ways; None for the last where there is nothing to say.

    Raises:
        UnsupportedModelError: see :func:`with_own_code`.
    """
    why, paths = None, untraced(shell, module, inputs)
    for shrunk in _ways(module, inputs, analysis, paths, fold=fold):
        try:
            own = with_own_code(shell, shrunk.module, inputs)
        except UnsupportedModelError as error:
            why = why or error
            continue
        cuts = any(removal.modified for removal in shrunk.removals)
        if not cuts or not paths.broken(own, folded=len(shrunk.removals) > 1):
            return shrunk, own, paths.told(changed=cuts)
    assert why is not None
    raise why


def untraced(
    shell: nn.Module, module: TracedModule, inputs: ExampleInputs, known: OtherPaths | None = None
) -> Untraced:
    """The paths through a model's code that a network does not take; the arguments are those of :class:`Untraced`."""
    own = on_tensors_of(module, shell)
    attach(own, replace(provenance_of(module) or Provenance({}), own_code=True))
    return Untraced(own, module, inputs, known)


def _ways(
    module: TracedModule, inputs: ExampleInputs, analysis: Analysis | None, paths: Untraced, *, fold: bool
) -> Iterator[Shrunk]:
    """What can be made of a network, the smallest first."""
    held, shrunk = _for_all(module, inputs, analysis, paths, fold=fold)
    yield shrunk
    if len(shrunk.removals) > 1:
        shrunk = _unfolded(shrunk)
        yield shrunk
    if attributes_changed(shrunk.removals[0].analysis.module, shrunk.module):
        hold_numbers(module)
        paths.hold_numbers()
        held, shrunk = _for_all(module, inputs, None, paths, fold=False)
        yield shrunk
    if paths:
        held = joined(held, all_of(shrunk.removals[0].cuts, OTHER_WAY))
        yield shrink(module, inputs, fold=False, held=held)


def _for_all(
    module: TracedModule, inputs: ExampleInputs, analysis: Analysis | None, paths: Untraced, *, fold: bool
) -> tuple[Held, Shrunk]:
    """What goes on all paths, and what some of them hold."""
    held = NOTHING
    shrunk = shrink(module, inputs, analysis, fold=fold)
    while paths and (more := paths.holds(shrunk.removals[0].cuts)):
        held = joined(held, more)
        shrunk = shrink(module, inputs, shrunk.removals[0].analysis, fold=fold, held=held)
    return held, shrunk


def runs_its_code(shell: nn.Module, traced: TracedModule, inputs: ExampleInputs) -> bool:
    """Whether :func:`with_own_code` has a result."""
    try:
        with_own_code(shell, traced, inputs)
    except UnsupportedModelError:
        return False
    return True


def _unfolded(shrunk: Shrunk) -> Shrunk:
    """What there was before anything was folded."""
    folded, first = shrunk.folded, shrunk.removals[0]
    assert folded is not None
    refused = dict.fromkeys(folded.channels, _OTHER_CODE) | folded.refused
    return Shrunk((first,), replace(folded, module=first.module, channels={}, biases=(), refused=refused))


OTHER_WAY = Reason(
    PATH, "on inputs of other sizes the model's code would compute something else without what has gone with it"
)
_OTHER_CODE = "the model's code would compute something else, as it may ask whether a layer has a bias"


def with_own_code(shell: nn.Module, traced: TracedModule, inputs: ExampleInputs) -> nn.Module:
    """A module of a model's class with the tensors of a network that was rewritten from it.

    Args:
        shell: of the model. It stays as it is.
        traced: the network, without quantizers. Its tensors become those of the result.
        inputs: that it runs on.

    Raises:
        UnsupportedModelError: the model's code would compute something else with them.
    """
    own = on_tensors_of(traced, shell)
    _check(own, traced, inputs)
    provenance = provenance_of(traced)
    if provenance is not None:
        attach(own, provenance)
    return own


def on_tensors_of(traced: TracedModule, shell: nn.Module) -> nn.Module:
    """A module of a model's class with the tensors of a network that was rewritten from it; nothing is checked."""
    own = skeleton(shell)
    _take_over(own, traced)
    set_own_numbers(own, traced)
    modes = {path: module.training for path, module in traced.named_modules(remove_duplicate=False)}
    for path, module in own.named_modules(remove_duplicate=False):
        module.training = modes.get(path, module.training)
    renew_computed(own)
    return own


def _take_over(own: nn.Module, traced: TracedModule) -> None:
    """Give ``own`` the tensors of ``traced``, and the numbers of its layers.

    Its other attributes stay: what they hold knows its modules, as do a method of it and a list with a parent.
    """
    kept = [(module, {key: v for key, v in vars(module).items() if not _is_cut(key, v)}) for module in own.modules()]
    take_over(own, traced)
    for module, attributes in kept:
        vars(module).update(attributes)
    for module in own.modules():
        module.__class__ = UNLOWERED.get(type(module), type(module))


def _is_cut(key: str, value: object) -> bool:
    """Whether an attribute of a module may be another one after a cut: a size, or what holds tensors."""
    items = value if isinstance(value, tuple | list) else [value]
    return key in _OF_EVERY_MODULE or key.startswith("_flat") or all(isinstance(v, _OF_CUTS) for v in items)


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_OF_CUTS = (int, Tensor, type(None))


def _check(own: nn.Module, traced: TracedModule, inputs: ExampleInputs) -> None:
    kind = type(own).__name__
    try:
        again = trace(own, inputs, plain=False)
    except FxCompressError as error:
        why = str(error).splitlines()[0]
        raise UnsupportedModelError(f"the code of {kind} does not run on what is left: {why}\n  {_HINT}") from error
    # The same layers may be traced in another way: a group norm with a single group left is a function.
    if not same_graphs(again, traced) and not computes_the_same(traced, own, inputs):
        raise UnsupportedModelError(f"the code of {kind} would compute something else on what is left\n  {_HINT}")
