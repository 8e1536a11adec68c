"""The way in: from any model to one that compresses itself."""

import copy
import logging
from dataclasses import replace
from typing import cast

from torch import fx, nn

from fxcompress.channels.analysis import Analysis
from fxcompress.channels.prepare import NO_GRAPH, in_pieces_by_inputs, prepare, prepare_pieces
from fxcompress.errors import FxCompressError, UnsupportedModelError, check_number
from fxcompress.objectives import Objective, objective_of
from fxcompress.passes.history import set_own_code, started
from fxcompress.passes.inject_quantizers import inject_at_reads, inject_quantizers
from fxcompress.passes.own_code import no_code_to_keep, shell_of
from fxcompress.passes.plain_weights import plain_weights
from fxcompress.passes.unquantized import coverage, left_out
from fxcompress.passes.weight_uses import is_quantizable
from fxcompress.progress import progress
from fxcompress.provenance import attach
from fxcompress.quantizer import Quantizer
from fxcompress.trace.basics.precision import ordinary
from fxcompress.trace.inputs import ExampleInputs
from fxcompress.trace.model.skeleton import copy_tensors, skeleton, without_compiled
from fxcompress.trace.retrace.size_attributes import note_own_numbers
from fxcompress.trace.support import check_module, check_supported
from fxcompress.trace.traced import TracedModule
from fxcompress.trace.weights.computed import computed_weights
from fxcompress.training.compressed import CompressedModule, new_compressed
from fxcompress.training.in_pieces import Compressed, CompressedPieces, Outside, become_pieces
from fxcompress.training.network import Settings
from fxcompress.training.piece import become_compressed, taken_name

_LOG = logging.getLogger("fxcompress")
BIAS_SHRINK = 0.01
"""What a step takes off a bias in front of which everything is zero."""
UNSAID = 0.1
"""The share of the weights that may go without a quantizer and without a warning."""


@ordinary
def compress(
    model: nn.Module,
    example_inputs: object = None,
    *,
    bits: float = 8.0,
    objective: str | Objective = "eq5",
    bias_shrink: float = BIAS_SHRINK,
    death_limit: float = 1.0,
    keep_range: bool = True,
    keep_code: bool = False,
) -> CompressedModule:
    """Give every output channel of every weight a quantizer with a trained bit depth and exponent.

    A model that reads the values of tensors, such as a detection network, has no graph as a whole. The modules of it
    that have one compress themselves, each on its own, in a copy of the model; what they take and return stays. This
    needs ``example_inputs``, on which the model then runs. The result is a :class:`CompressedPieces`; for all other
    models it is a :class:`CompressedModule`. Both are trained in the same way.

    Args:
        model: any network that can be traced, or some modules of which can. It is left as it is; the result has
            parameters of its own.
        example_inputs: what the model can be called with: a tensor, a tuple of positional arguments or a dict of
            keyword arguments. Inferred from the first layer where it is left out.
        bits: bit depth to start with.
        objective: what ``net.size()`` counts: ``"eq4"`` or ``"eq5"`` of the paper (arXiv 2301.13142), ``"macs"``,
            ``"activations"``, a :class:`fxcompress.LatencyTable`, or any function of (terms, bits) as
            :class:`fxcompress.objectives.Objective` describes it.
        bias_shrink: what each step takes off the absolute value of a bias in front of which everything is zero. It
            should be above the step that the optimizer makes, or the bias never lands on zero.
        death_limit: at most this share of the channels lose their last bit in one step; a guard against pressure that
            takes more away than the network can learn to do without. 1 sets no limit.
        keep_range: with more than two bits, a bit less makes the grid of a channel coarser and leaves its range as it
            is: each step moves the exponent by as much as the bits have fallen, or risen, and bits get the gradient of
            both. False leaves them to the optimizer as independent numbers, as the paper does: a bit less then halves
            the range, and clips the largest weights until the exponent has caught up.
        keep_code: ``finalize()`` returns a module of the model's own class, which runs the model's own code and has all
            of its methods. Then only what leaves this code as it is goes: channels, but not those that a number in the
            code stands for, and no branches. Weights that the model computes itself go on being computed.

    Raises:
        ExampleInputError: the inputs are missing and cannot be inferred, or do not fit.
        TraceError: neither the model nor any module of it can be traced.
        UnsupportedModelError: the model is compressed already, has no trainable weight to quantize, or is in a state
            that cannot be analysed (NaN weights, meta tensors, hooks, parametrizations).
        TypeError, ValueError: an argument is of another kind, or out of its range.

    >>> net = compress(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)))
    >>> net.size("eq4").item()
    8.0
    """
    objective_of(objective)  # raises where there is no such
    check_number(bits=bits, bias_shrink=bias_shrink, death_limit=death_limit)
    if not 0 < bits <= 24:
        raise ValueError(f"bits={bits} is out of range: more than 0, at most 24")
    if not bias_shrink > 0:
        raise ValueError(f"bias_shrink={bias_shrink} must be positive, or no biased channel could ever be removed")
    if not 0 < death_limit <= 1:
        raise ValueError(f"death_limit={death_limit} must be a share of the channels: above 0, at most 1")
    check_module(model)
    model = without_compiled(model)
    check_supported(model)
    if any(isinstance(module, Quantizer) for module in model.modules()):
        raise UnsupportedModelError(
            "the model is compressed already: go on training it, or call finalize() and compress the result"
        )
    settings = Settings(ExampleInputs(), objective, bias_shrink, death_limit, keep_range)
    try:
        with progress(f"analysing {type(model).__name__}"):
            analysis = prepare(model, example_inputs, plain=not keep_code)
    except NO_GRAPH as error:
        if keep_code:
            raise no_code_to_keep(model, error) from error
        if example_inputs is None:
            raise in_pieces_by_inputs(error) from error
        pieces = _in_pieces(model, replace(settings, inputs=ExampleInputs.of(example_inputs)), bits, error)
        # One type for both: they are trained by the same calls, and what only a graph has raises an error that says so.
        return cast("CompressedModule", pieces)
    set_own_code(analysis.module, analysis.inputs, stays=keep_code)
    if keep_code:
        note_own_numbers(analysis.module, model, analysis.inputs)
    settings.shell = shell_of(model) if keep_code else None
    traced = _quantized(analysis, bits)
    net = new_compressed(traced, replace(settings, inputs=analysis.inputs))
    _tell_of_plain_weights(model, net)
    _warn_of_the_rest(net)
    return net


def _tell_of_plain_weights(model: nn.Module, net: nn.Module) -> None:
    """Say which weights the model computes and the network trains: names and training are not what they were."""
    found = computed_weights(net, model)
    if found:
        name, sources = next(iter(found.items()))
        _LOG.warning(
            "fxcompress: %s computes %d of its weights from parameters (it standardises them, say). They are plain "
            "parameters of the copy from now on, and trained as such: %s, which was %s%s. A state_dict of the original "
            "still loads", type(model).__name__, len(found), name, ", ".join(sources),
            "" if len(found) == 1 else ", and so on",
        )  # fmt: skip


def _warn_of_the_rest(net: Compressed) -> None:
    """Say so where much of a network gets no quantizer: its sizes would mislead."""
    found = net.unquantized()
    rest = sum(item.elements for item in found)
    if rest > UNSAID * (rest + net.weights):
        _LOG.warning("fxcompress: %s: %s", type(net).__name__, coverage(found, net.weights))


def _quantized(analysis: Analysis, bits: float) -> TracedModule:
    """A copy of a traced network, with quantizers and tensors of its own."""
    traced = copy.deepcopy(analysis.module)
    quantized = inject_quantizers(traced, bits)
    quantized |= inject_at_reads(traced, bits, plain_weights(analysis, left_out(traced)))
    weights = sum(traced.get_parameter(name).numel() for name in quantized)
    attach(traced, started(analysis.module, analysis.inputs, weights))
    return traced


def _in_pieces(model: nn.Module, settings: Settings, bits: float, why: FxCompressError) -> CompressedPieces:
    """A copy of a model that has no graph as a whole; those modules of it that have one compress themselves."""
    taken = taken_name(model, CompressedPieces)
    if taken is not None or isinstance(model, fx.GraphModule):
        what = f"has a {taken} of its own, which is a name of a network in training" if taken else "is a GraphModule"
        raise UnsupportedModelError(
            f"{type(model).__name__} has no graph as a whole, so it can only be compressed in pieces, and it {what}: "
            "hold it in another module that calls it, and compress that"
        ) from why

    def check(path: str, traced: TracedModule) -> None:
        name = taken_name(model.get_submodule(path), CompressedModule)
        if name is not None:
            raise UnsupportedModelError(f"its {name} has the name of something that a network in training has")
        if not is_quantizable(traced):
            raise UnsupportedModelError("none of its weights can be quantized")

    with progress(f"analysing the modules of {type(model).__name__}"):
        found, analyses = prepare_pieces(model, settings.inputs, why, check=check, layers=1)
    outside = Outside(found.outside[""], found.parameters_outside())
    own = skeleton(found.model)
    copy_tensors(own, set())
    for path, analysis in analyses.items():
        traced = _quantized(analysis, bits)
        become_compressed(own.get_submodule(path), traced, replace(settings, inputs=analysis.inputs))
    net = become_pieces(own, tuple(analyses), settings, outside)
    _take_modes(net, model)
    _tell_of_plain_weights(model, net)
    _warn_of_the_rest(net)
    _LOG.warning(
        "fxcompress: %s has no graph as a whole (%s); what compresses itself is %s: %s",
        type(model).__name__, outside.why,
        "one module of it" if len(analyses) == 1 else f"{len(analyses)} modules of it, each on its own",
        ", ".join(analyses),
    )  # fmt: skip
    return net


def _take_modes(net: nn.Module, model: nn.Module) -> None:
    """Training or evaluation as in ``model``; what is new in ``net`` follows the module that it lies in."""
    modes = {path: module.training for path, module in model.named_modules(remove_duplicate=False)}
    for path, module in net.named_modules(remove_duplicate=False):
        known = path
        while known not in modes:
            known = known.rpartition(".")[0]
        module.training = modes[known]
