"""The way in: from any model to one that compresses itself."""

import copy

from torch import nn

from fxcompress.channels.prepare import NO_GRAPH, prepare
from fxcompress.errors import UnsupportedModelError
from fxcompress.objectives import Objective, objective_of
from fxcompress.passes.history import started
from fxcompress.passes.inject_quantizers import inject_quantizers
from fxcompress.progress import progress
from fxcompress.provenance import attach
from fxcompress.quantizer import Quantizer
from fxcompress.trace.support import check_supported
from fxcompress.training.compressed import CompressedModule, new_compressed
from fxcompress.training.sized import Settings


def compress(
    model: nn.Module,
    example_inputs: object = None,
    *,
    bits: float = 8.0,
    objective: str | Objective = "eq5",
    bias_shrink: float = 0.01,
    death_limit: float = 1.0,
) -> CompressedModule:
    """Give every output channel of every weight a quantizer with a trained bit depth and exponent.

    Args:
        model: any network that can be traced. It is left as it is; the result has parameters of its own.
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

    Raises:
        ExampleInputError: the inputs are missing and cannot be inferred, or do not fit.
        TraceError: the model cannot be traced.
        UnsupportedModelError: the model is compressed already, has no trainable weight to quantize, or is in a state
            that cannot be analysed (NaN weights, meta tensors, hooks, parametrizations).
        ValueError: an argument is out of its range.

    >>> net = compress(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)))
    >>> net.size("eq4").item()
    8.0
    """
    objective_of(objective)  # raises where there is no such
    if not 0 < bits <= 24:
        raise ValueError(f"bits={bits} is out of range: more than 0, at most 24")
    if bias_shrink <= 0:
        raise ValueError(f"bias_shrink={bias_shrink} must be positive, or no biased channel could ever be removed")
    if not 0 < death_limit <= 1:
        raise ValueError(f"death_limit={death_limit} must be a share of the channels: above 0, at most 1")
    check_supported(model)
    if any(isinstance(module, Quantizer) for module in model.modules()):
        raise UnsupportedModelError(
            "the model is compressed already: go on training it, or call finalize() and compress the result"
        )
    try:
        with progress(f"analysing {type(model).__name__}"):
            analysis = prepare(model, example_inputs)
    except NO_GRAPH as error:
        raise type(error)(
            f"{error}\n  a network that trains itself smaller needs a graph of the whole; fxcompress.prune works on "
            "the modules of a model that can be traced on their own"
        ) from error
    traced = copy.deepcopy(analysis.module)
    quantized = inject_quantizers(traced, bits)
    weights = sum(traced.get_parameter(name).numel() for name in quantized)
    attach(traced, started(analysis.module, analysis.inputs, weights))
    return new_compressed(traced, Settings(analysis.inputs, objective, bias_shrink, death_limit))
