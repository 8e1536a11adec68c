"""Whether a graph computes what its model does, asked where code could have taken another path without being seen."""

import io
from contextlib import redirect_stderr
from itertools import groupby

import torch
from torch import Tensor, nn

from fxcompress.trace.basics.generators import generators_kept
from fxcompress.trace.basics.trees import tensors_in
from fxcompress.trace.effects.randomness import same_randomness
from fxcompress.trace.inputs import ExampleInputs
from fxcompress.trace.model.flat_weights import renew_weights
from fxcompress.trace.model.own_modes import forget_runs
from fxcompress.trace.model.skeleton import copy_tensors, skeleton
from fxcompress.trace.model.uncompiled import uncompiled

_NEAR = {torch.float64: 1e-9, torch.float32: 1e-3}
"""How far apart two results may be, over the largest entry; attention is lowered, and rounds in another way."""


def computes_the_same(model: nn.Module, traced: nn.Module, inputs: ExampleInputs) -> bool:
    """Whether copies of both with stirred parameters agree; neither is touched.

    Args:
        model: the original.
        traced: what was made of it, with the same parameters.
        inputs: to run on.
    """
    copies: dict[int, Tensor] = {}
    return agree(stirred(model, copies), stirred(traced, copies), inputs)


@uncompiled()
def agree(model: nn.Module, other: nn.Module, inputs: ExampleInputs, modes: tuple[bool, ...] = (False, True)) -> bool:
    """Whether copies of both return the same in three calls, in evaluation and in training; neither is touched.

    The second call is on other values, so that what a call leaves behind for the next one shows, or on the same ones
    where the model does not take those. What cannot be compared, because the model itself does not run in that mode on
    these inputs, is taken for the same.

    Args:
        model: the original.
        other: what was made of it.
        inputs: to run on.
        modes: evaluation (False), training (True), or both.
    """
    return all(_agree(model, other, inputs, training=training) for training in modes)


def stirred(module: nn.Module, copies: dict[int, Tensor] | None = None) -> nn.Module:
    """A copy whose floating-point parameters have a little added to them, the same for parameters of the same shape.

    To compare two networks that share their parameters: where these are zero, as in a branch that starts as nothing,
    what is done beside them does not show. What was computed from parameters and kept is thrown away.

    Args:
        module: any network.
        copies: of the tensors of another network that was stirred before, by the id of the original; those of this one
            are put there. What both share is copied once.
    """
    own, copies = skeleton(module), {} if copies is None else copies
    known = {id(copy) for copy in copies.values()}
    copy_tensors(own, set(), copies)
    fresh = [p for p in own.parameters() if p.is_floating_point() and id(p) not in known]
    with torch.no_grad():
        for _, alike in groupby(sorted(fresh, key=_kind), key=_kind):
            first, *others = alike
            noise = _noise(first)
            for parameter in (first, *others):
                parameter.add_(noise)
    for each in own.modules():
        renew_weights(each)
    forget_runs(own)
    return own


def _kind(parameter: Tensor) -> tuple[object, ...]:
    """What noise depends on; sortable."""
    return tuple(parameter.shape), str(parameter.dtype), str(parameter.device)


def _noise(parameter: Tensor) -> Tensor:
    """Scales and biases grow by up to 0.1; matrices change by what adds a tenth to the variance of a layer's output."""
    flat = torch.linspace(0, 1, parameter.numel(), device=parameter.device, dtype=torch.float32)
    if parameter.ndim < 2:
        return flat.mul_(0.1).view_as(parameter).to(parameter.dtype)
    flat.mul_(parameter.numel()).sin_().mul_((0.2 / max(parameter[0].numel(), 1)) ** 0.5)  # in place: it may be large
    return flat.view(parameter.shape).to(parameter.dtype)


def _agree(model: nn.Module, other: nn.Module, inputs: ExampleInputs, *, training: bool) -> bool:
    """Whether both return the same in a mode."""
    for second in (inputs.converted(_others), inputs):
        calls = (inputs, second, inputs)
        try:
            expected = _results(model, calls, training=training)
        except Exception:  # noqa: BLE001, S112 - a batch of one in training, values that do not fit: not ours to judge
            continue
        try:
            with redirect_stderr(io.StringIO()):  # where torch.fx prints what fails in the code of a graph
                found = _results(other, calls, training=training)
        except Exception:  # noqa: BLE001 - it does not run where the model does
            return False
        return len(expected) == len(found) and all(map(_same, expected, found))
    return True


def _results(module: nn.Module, calls: tuple[ExampleInputs, ...], *, training: bool) -> list[Tensor]:
    own = skeleton(module)
    copy_tensors(own, set(), lent=True)
    own.train(training)
    found: list[Tensor] = []
    with torch.no_grad(), same_randomness(allowed=True), generators_kept(seed=0):
        for inputs in calls:
            given = inputs.converted(Tensor.clone)
            found += tensors_in(own(*given.args, **given.kwargs))
    return found


def _others(tensor: Tensor) -> Tensor:
    """Another tensor of the same kind, with values that the model takes where it takes these.

    Floats that are all the same, zeros as a rule, stand for any: on them a layer without a bias shows nothing.
    """
    if tensor.layout is not torch.strided:  # its entries stay where they are
        return tensor * 0.5 if tensor.is_floating_point() else tensor
    if not tensor.is_floating_point():
        return tensor.flip(list(range(tensor.ndim)))
    if tensor.numel() and bool((tensor == tensor.flatten()[0]).all()):
        ramp = torch.linspace(0.1, 0.9, tensor.numel(), device=tensor.device).view(tensor.shape).to(tensor.dtype)
        return ramp * tensor if bool(tensor.flatten()[0]) else ramp
    return tensor.flip(list(range(tensor.ndim))) * 0.5


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype or a.layout is not b.layout:
        return False
    a, b = (tensor if tensor.layout is torch.strided else tensor.to_dense() for tensor in (a, b))
    a, b = (torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor for tensor in (a, b))
    if not a.is_floating_point() or not a.numel():
        return bool(torch.equal(a, b))
    if not torch.equal(a.isnan(), b.isnan()):
        return False
    scale = float(a.nan_to_num().abs().max())
    return float((a - b).nan_to_num().abs().max()) <= _NEAR.get(a.dtype, 0.1) * max(scale, 1e-6)
