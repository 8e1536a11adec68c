"""Whether a graph computes what its model does, asked where code could have taken another path without being seen."""

import io
from collections.abc import Callable
from contextlib import redirect_stderr

import torch
from torch import Tensor, nn

from fxcompress.trace.inputs import ExampleInputs
from fxcompress.trace.skeleton import own_tensors, skeleton
from fxcompress.trace.state import same_randomness
from fxcompress.trace.trees import tensors_in

_NEAR = {torch.float64: 1e-9, torch.float32: 1e-3}
"""How far apart two results may be, over the largest entry; attention is lowered, and rounds in another way."""


def computes_the_same(model: nn.Module, traced: nn.Module, inputs: ExampleInputs) -> bool:
    """Whether copies of both return the same in three calls, in evaluation and in training; neither is touched.

    The second call is on other values, so that what a call leaves behind for the next one shows, and then on the same
    ones, as the model may not take those. What cannot be
    compared, because the model itself does not run in that mode on these inputs, is taken for the same.

    Args:
        model: the original.
        traced: what was made of it.
        inputs: to run on.
    """
    for training, second in ((False, _others), (True, _others), (False, Tensor.clone), (True, Tensor.clone)):
        try:
            expected = _results(model, inputs, second, training=training)
        except Exception:  # noqa: BLE001, S112 - a batch of one in training, values that do not fit: not ours to judge
            continue
        try:
            with redirect_stderr(io.StringIO()):  # where torch.fx prints what fails in the code of a graph
                found = _results(traced, inputs, second, training=training)
        except Exception:  # noqa: BLE001 - it does not run where the model does
            return False
        if len(expected) != len(found) or not all(map(_same, expected, found)):
            return False
    return True


def _results(
    module: nn.Module, inputs: ExampleInputs, second: Callable[[Tensor], Tensor], *, training: bool
) -> list[Tensor]:
    own = skeleton(module)
    own_tensors(own, set())
    own.train(training)
    found: list[Tensor] = []
    with torch.no_grad(), same_randomness(allowed=True):
        torch.manual_seed(0)
        for values in (Tensor.clone, second, Tensor.clone):
            given = inputs.converted(values)
            found += tensors_in(own(*given.args, **given.kwargs))
    return found


def _others(tensor: Tensor) -> Tensor:
    """Another tensor of the same kind, with values that the model takes where it takes these."""
    return tensor.flip(list(range(tensor.ndim))) * (0.5 if tensor.is_floating_point() else 1)


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point() or not a.numel():
        return bool(torch.equal(a, b))
    if not torch.equal(a.isnan(), b.isnan()):
        return False
    scale = float(a.nan_to_num().abs().max())
    return float((a - b).nan_to_num().abs().max()) <= _NEAR.get(a.dtype, 0.1) * max(scale, 1e-6)
