"""Folds constants other than zero into what reads them, so that their channels can go.

In evaluation, channels 2 and 5 are constant where conv2 reads them: c2 and c5, neither of them zero.

no padding    conv2.bias            b             ->   b + the sum of c2 W2 + c5 W5 over the kernel
              conv2.weight[:, 2]    W2                 0
              conv2.weight[:, 5]    W5                 0

zero padding  conv2.weight[:, 2]    W2            ->   W2 + c5 / c2 W5
              conv2.weight[:, 5]    W5                 0

Where conv2 has no bias and batch norm alone reads it, the running mean takes the sum, with the opposite sign.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from fxcompress.channels.analysis import Analysis, analyse
from fxcompress.channels.constants import knowns_of, values_known
from fxcompress.passes.base import Pass, PassResult, traced
from fxcompress.passes.fold_plan import Fold, FoldPlan
from fxcompress.passes.fold_sites import Foldable
from fxcompress.passes.history import history_of
from fxcompress.passes.readers import add_biases, readers
from fxcompress.provenance import attach
from fxcompress.trace.inputs import ExampleInputs
from fxcompress.trace.model.skeleton import skeleton
from fxcompress.trace.traced import TracedModule


@dataclass(frozen=True, slots=True)
class Folded:
    """The result of :func:`fold_constants`.

    Attributes:
        module: the network; tensors that are as they were are shared with the original.
        analysis: of it.
        channels: how many constants were folded into each weight, by its name.
        biases: weights whose layers got a bias.
        refused: weights that read constants other than zero which were not folded, with the reason.
    """

    module: TracedModule
    analysis: Analysis
    channels: dict[str, int] = field(default_factory=dict)
    biases: tuple[str, ...] = ()
    refused: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FoldConstants(Pass):
    """Fold constants whose channels can go then; see the picture above. The channels are left to PruneChannels.

    What the network computes in evaluation stays the same, up to rounding. In training it does not where batch norm or
    dropout make something else of a constant. Weights on a grid (of a finalized network) stay on it.

    Attributes:
        inputs: that the network runs on.
    """

    inputs: ExampleInputs

    def __call__(self, module: fx.GraphModule) -> PassResult:
        """A network whose channels are unused where they were constant."""
        folded = fold_constants(traced(module), self.inputs)
        if not folded.channels:
            return PassResult(skeleton(folded.module), modified=False)
        return PassResult(folded.module, modified=True)


def fold_constants(module: TracedModule, inputs: ExampleInputs) -> Folded:
    """Fold until nothing is left to fold: what was folded may make the next layer constant. ``module`` stays as it is.

    Args:
        module: a traced network.
        inputs: that it runs on.
    """
    channels: dict[str, int] = {}
    biases: list[str] = []
    with torch.no_grad():
        while True:
            analysis = analyse(module, inputs)
            provenance = history_of(module, inputs)
            # After ``eval()`` some layers may still be in training, where the model or its user says so.
            evaluation = None if module.other_modes[False] or _trains_in_part(module) else False
            plan = FoldPlan(analysis, knowns_of(analysis, values_known, (evaluation, True)), provenance.grids)
            done = _Folding(module)
            for fold in plan.folds:
                if done.fold(fold):
                    channels[fold.layer.weight] = channels.get(fold.layer.weight, 0) + len(fold.entries)
            if not done.changed:
                refused = {weight: reason for weight, reason in plan.refused.items() if weight not in channels}
                return Folded(module, analysis, channels, tuple(biases), refused)
            biases += done.biases
            if done.biases:
                attach(done.module, replace(provenance, biases=(*provenance.biases, *done.biases)))
            module = done.module


def _trains_in_part(module: nn.Module) -> bool:
    """Whether a network in evaluation has a batch norm or a dropout that was left in training."""
    moved = (m for m in module.modules() if isinstance(m, _BatchNorm | _DropoutNd))
    return not module.training and any(m.training for m in moved)


class _Folding:
    """Folds, one after the other, on a copy of a module that shares its tensors."""

    def __init__(self, module: TracedModule) -> None:
        self.module = skeleton(module)
        self.biases: list[str] = []
        self.changed = False

    def fold(self, fold: Fold) -> bool:
        """Fold at one weight, and say whether that was possible: not where numbers would become too large."""
        layer, weight = fold.layer, self.module.get_parameter(fold.layer.weight)
        new = weight.detach().to("cpu", copy=True)  # there, as not every device has float64
        columns = new.movedim(layer.column, 0)
        entries, constants = torch.from_numpy(fold.entries), torch.from_numpy(layer.constants[fold.entries])
        moved = torch.tensordot(constants, columns[entries].double(), dims=1)
        columns[entries] = 0
        if fold.target is None:
            possible = not bool((moved != 0).any()) or self._shift(layer, moved.reshape(len(moved), -1).sum(dim=1))
        else:
            merged = columns[fold.target].double() + moved / float(layer.constants[fold.target])
            columns[fold.target] = merged.to(new.dtype)
            possible = bool(columns[fold.target].isfinite().all())
        if possible:
            self._replace(weight, new.to(weight.device))
            self.changed = True
        return possible

    def _shift(self, layer: Foldable, by: Tensor) -> bool:
        """Add to the biases of the layers that read a weight, or take off the means after them; if that is finite."""
        if layer.lacks_bias:
            add_biases(self.module, layer.weight)
            self.biases.append(layer.weight)
        biases: list[Tensor] = [self.module.get_parameter(r.bias) for r in readers(self.module, layer.weight) if r.bias]
        changes = {id(bias): (bias, _sum(bias, by)) for bias in biases}
        means = [self.module.get_buffer(name) for name in layer.means]
        changes |= {id(mean): (mean, _sum(mean, -by)) for mean in means}
        possible = all(bool(new.isfinite().all()) for _, new in changes.values())
        for old, new in changes.values() if possible else ():
            self._replace(old, new)
        return possible

    def _replace(self, old: Tensor, data: Tensor) -> None:
        """Every name of a parameter or buffer gets the same new one."""
        new = nn.Parameter(data, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else data
        for owner in self.module.modules():
            for table in (owner._parameters, owner._buffers):
                for leaf in [leaf for leaf, tensor in table.items() if tensor is old]:
                    table[leaf] = new  # type: ignore[assignment]


def _sum(tensor: Tensor, by: Tensor) -> Tensor:
    return (tensor.detach().cpu().double() + by).to(tensor)
