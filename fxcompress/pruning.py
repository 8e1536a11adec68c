"""Pruning a network as it stands: channels that are constant zero, or that nobody reads."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fxcompress.channels.prepare import NO_GRAPH, in_pieces_by_inputs, prepare, prepare_pieces
from fxcompress.errors import OptimizerError, UnsupportedModelError
from fxcompress.passes.cutting import Cut
from fxcompress.passes.history import set_own_code
from fxcompress.passes.own_code import no_code_to_keep, shell_of, shrink_with_own_code
from fxcompress.passes.pieces import prune_pieces
from fxcompress.passes.prune_channels import Pruned
from fxcompress.passes.prune_report import PruneReport, make_report
from fxcompress.passes.shrink import Narrow, check_narrow, shrink
from fxcompress.progress import progress
from fxcompress.trace.basics.precision import ordinary
from fxcompress.trace.inputs import ExampleInputs
from fxcompress.trace.model.skeleton import copy_tensors, without_compiled
from fxcompress.trace.model.state_dict_hooks import plain_weights
from fxcompress.trace.retrace.size_attributes import note_own_numbers
from fxcompress.trace.support import check_module
from fxcompress.trace.weights.computed import computed_weights
from fxcompress.trace.weights.norm import PlainWeight, has_weight_norm
from fxcompress.training.in_pieces import Compressed
from fxcompress.training.optimizer import Replacement, check_optimizers, prepare_resize


@dataclass(frozen=True, slots=True, repr=False)
class PruneResult:
    """The result of :func:`prune`; ``print(result)`` shows the report.

    Attributes:
        module: the rewritten network, with parameters of its own: a GraphModule or, with ``keep_code`` or where only
            pieces of the model could be traced, a module of the model's own class.
        report: what went, what stayed and why; printable.
    """

    module: nn.Module
    report: PruneReport

    def __repr__(self) -> str:
        return f"PruneResult of a {type(self.module).__name__}: {self.report}"


@ordinary
def prune(
    model: nn.Module,
    example_inputs: object = None,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    fold: bool = False,
    narrow: Narrow = False,
    keep_code: bool = False,
) -> PruneResult:
    """Remove every channel that is constant zero or unused; what the network computes does not change.

    A channel goes when, in evaluation and in training alike, it is zero wherever it is read, or all that reads it
    multiplies it by zero. Branches of a sum that are zero go as a whole.

    A model that reads the values of tensors, such as a detection network, has no graph as a whole. The modules of it
    that have one are pruned, each on its own; what they take and return stays. This needs ``example_inputs``, on which
    the model then runs.

    Args:
        model: any network that can be traced, or some modules of which can. It is left as it is.
        example_inputs: what the model can be called with: a tensor, a tuple of positional arguments or a dict of
            keyword arguments. Inferred from the first layer where it is left out.
        optimizer: of the model's parameters. It then holds those of the new network, and its state is cut with them.
            Not for a model with weight norm, in whose place the result has plain weights. Weights that the model
            computes in another way, such as standardised ones, go on being computed then, and keep their channels.
        fold: also remove channels that are constant, and not zero, in evaluation. What they add is folded into the
            layers that read them: into the bias, which a layer may get for that, or behind zero padding into one of
            the constant channels. Then only evaluation stays the same: in training, batch norm and dropout may make
            something else of a constant.
        narrow: also remove channels of one path into a sum that are zero there and alive in the sum; the sum then adds
            what is left of the path by ``index_add``. ``"measure"`` narrows those paths alone that make the network
            faster, timed on ``example_inputs`` in evaluation; True narrows all of them. Channels that go cannot come
            back in training, where a gradient may still reach them.
        keep_code: the result is of the model's own class and runs the model's own code, with all methods that it has.
            Only what leaves this code as it is goes: channels, but not those that a number in the code stands for, and
            no branches.

    Raises:
        ExampleInputError: the inputs are missing and cannot be inferred, or do not fit.
        TraceError, UnsupportedModelError: neither the model nor any module of it can be traced.
        OptimizerError: the optimizer holds other parameters and lacks some of the model's, or holds state that cannot
            be cut; or ``fold`` is asked for; or the model has weight norm.
        ValueError: ``narrow`` is something else, or asked for with ``keep_code``.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> with torch.no_grad():
    ...     _ = model[0].weight[2].zero_(), model[0].bias[2].zero_()
    >>> prune(model, torch.zeros(1, 3, 16, 16)).module.get_submodule("2").weight.shape
    torch.Size([4, 7, 3, 3])
    """
    check_narrow(narrow, keep_code=keep_code)
    check_module(model)
    model = without_compiled(model)
    _check(model, optimizer, fold=fold, narrow=narrow, keep_code=keep_code)
    with progress(f"pruning {type(model).__name__}"):
        if isinstance(model, Compressed):
            own = copy.deepcopy(model)
            return PruneResult(own, own.prune())
        result = _prune(model, example_inputs, optimizer, fold=fold, narrow=narrow, keep_code=keep_code)
    return PruneResult(result.module, _with_plain_weights(result, model))


def _with_plain_weights(result: PruneResult, model: nn.Module) -> PruneReport:
    """The report, with the weights that have become parameters in this run."""
    known = plain_weights(model)
    made = {name: hook for name, hook in plain_weights(result.module).items() if name not in known}
    return replace(
        result.report,
        plain_weights=tuple(name for name, hook in made.items() if isinstance(hook, PlainWeight)),
        computed_weights=computed_weights(result.module, model),
    )


def _prune(
    model: nn.Module,
    example_inputs: object,
    optimizer: torch.optim.Optimizer | None,
    *,
    fold: bool,
    narrow: Narrow,
    keep_code: bool,
) -> PruneResult:
    # An optimizer holds the parameters that weights are computed from, and their state; the model's code computes them.
    plain = optimizer is None and not keep_code
    try:
        analysis = prepare(model, example_inputs, plain=plain)
    except NO_GRAPH as error:
        if keep_code:
            raise no_code_to_keep(model, error) from error
        if example_inputs is None:
            raise in_pieces_by_inputs(error) from error
        pieces, analyses = prepare_pieces(model, ExampleInputs.of(example_inputs), error, plain=plain)
        pruned = prune_pieces(pieces, analyses, fold=fold, narrow=narrow)
        _own(pieces.model, pruned.module, list(pruned.removals.values()), optimizer)
        return PruneResult(pruned.module, pruned.report)
    set_own_code(analysis.module, analysis.inputs, stays=keep_code)
    decided = None
    if keep_code:
        note_own_numbers(analysis.module, model, analysis.inputs)
        shrunk, result, decided = shrink_with_own_code(
            shell_of(model), analysis.module, analysis.inputs, analysis, fold=fold
        )
    else:
        shrunk = shrink(analysis.module, analysis.inputs, analysis, fold=fold, narrow=narrow)
        result = shrunk.module
    report = make_report(model, *shrunk.removals, folded=shrunk.folded, narrowed=shrunk.narrowed)
    _own(analysis.module, result, [shrunk.removals], optimizer)
    return PruneResult(result, replace(report, sizes_decide=decided))


def _own(
    before: nn.Module,
    result: nn.Module,
    removals: list[tuple[Pruned, ...]],
    optimizer: torch.optim.Optimizer | None,
) -> None:
    """Give the result tensors of its own, in place, and let the optimizer hold them.

    Args:
        before: the network as it was.
        result: what is left.
        removals: what was removed of each part of it, in order.
        optimizer: of the parameters of ``before``.
    """
    cuts = [cut for steps in removals for cut in _whole_cuts(steps)]
    copies = copy_tensors(result, {id(cut.new) for cut in cuts})
    if optimizer is not None:
        left = {id(parameter) for parameter in result.parameters()}
        made = [cut for cut in cuts if id(cut.new) in left]
        prepare_resize(optimizer, _replacements(before.parameters(), made, copies)).commit()


def _whole_cuts(removals: tuple[Pruned, ...]) -> list[Cut]:
    """What was taken out of each tensor in all steps together."""
    found: dict[int, Cut] = {}
    for removal in removals:
        for cut in {id(cut): cut for cut in removal.cuts.values()}.values():
            earlier = found.pop(id(cut.old), None)
            found[id(cut.new)] = cut if earlier is None else _joined(earlier, cut)
    return list(found.values())


def _joined(first: Cut, second: Cut) -> Cut:
    """Two cuts of one tensor as one."""
    indices = dict(first.indices)
    for dim, index in second.indices.items():
        indices[dim] = first.indices[dim][index] if dim in first.indices else index
    return Cut(first.old, second.new, indices)


def _check(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, *, fold: bool, narrow: Narrow, keep_code: bool
) -> None:
    if fold and optimizer is not None:
        raise OptimizerError(
            "fold=True changes the weights and biases that read a constant, and the state that the optimizer holds for "
            "them would no longer fit: prune with fold=True and without the optimizer, and make a new one after that"
        )
    if isinstance(model, Compressed):
        _check_compressed(optimizer, fold=fold, narrow=narrow, keep_code=keep_code)
    elif optimizer is not None:
        if has_weight_norm(model):
            raise OptimizerError(
                "the optimizer holds the lengths and directions of weight norm, in whose place prune puts the weights "
                "themselves: prune without the optimizer, and make a new one for the result"
            )
        check_optimizers([optimizer], model.parameters())


def _check_compressed(optimizer: torch.optim.Optimizer | None, *, fold: bool, narrow: Narrow, keep_code: bool) -> None:
    if keep_code:
        raise UnsupportedModelError(
            "whether the model's code stays is said at the start: compress(..., keep_code=True)"
        )
    if fold:
        raise UnsupportedModelError(
            "constants are folded when the weights are fixed: call net.finalize(), which does so, or prune without fold"
        )
    if narrow:
        raise UnsupportedModelError(
            "paths into sums are narrowed when the weights are fixed: call net.finalize(narrow=...), or prune without"
        )
    if optimizer is not None:
        raise OptimizerError(
            "a network from compress() is pruned in place, together with its optimizer: call net.prune(optimizer)"
        )


def _replacements(
    parameters: Iterable[nn.Parameter], cuts: Iterable[Cut], copies: dict[int, Tensor]
) -> list[Replacement]:
    """What takes the place of each parameter of the original."""
    known = {id(cut.old): cut for cut in cuts}
    result = []
    for parameter in parameters:
        cut = known.get(id(parameter))
        new = copies.get(id(parameter)) if cut is None else cut.new
        assert new is None or isinstance(new, nn.Parameter)
        result.append(Replacement(parameter, new, {} if cut is None else cut.indices))
    return result
