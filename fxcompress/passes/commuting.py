"""Nodes whose result on what is left need not be run to be known, as their rule commutes with a cut.

What the check of a rewrite asks of every node is

    labels(op(what is left of x)) == what is left of labels(op(x))

For a convolution, a linear layer, a batch norm, an activation, a sum or product of two tensors and a ``cat``, labels
along one dim go in and labels along one dim come out, entry by entry; all else that the rule does is to couple entries.
So the two sides are equal for every cut that keeps or removes what is coupled together, provided that no dim loses so
much that it has no label any more. That is looked up here, and torch is asked for the shape. All other nodes, and these
where something is special, are run.
"""

import operator
from typing import Any

import torch
from torch import fx, nn

from fxcompress.channels.analysis import Analysis
from fxcompress.channels.direct import aten_call
from fxcompress.channels.dispatch import Dispatch
from fxcompress.channels.layers import Layers, same_layers
from fxcompress.channels.rules.contraction import CONVOLUTION
from fxcompress.channels.rules.movement import CAT
from fxcompress.channels.rules.norms import BATCH_NORM
from fxcompress.channels.rules.overwritten import OVERWRITTEN
from fxcompress.channels.rules.pointwise import MULTIPLY, POINTWISE
from fxcompress.channels.shapes import like
from fxcompress.channels.survivors import Survivors
from fxcompress.channels.values import LabelTensor, Step, Value, find

_AT = torch.ops.aten
_COMMUTE = frozenset({CONVOLUTION, BATCH_NORM, POINTWISE, MULTIPLY, CAT})
_FUNCTIONS = {
    operator.add: _AT.add.Tensor,
    operator.iadd: _AT.add_.Tensor,
    operator.mul: _AT.mul.Tensor,
    operator.imul: _AT.mul_.Tensor,
    torch.add: _AT.add.Tensor,
    torch.mul: _AT.mul.Tensor,
    torch.cat: _AT.cat.default,
}
"""The op that each of these functions of tensors calls."""


_GROUPS = 8
"""Where a convolution is told how many groups it has."""


class Commuting:
    """Finds the results of such nodes in a cut graph.

    Args:
        analysis: of the network before the cut.
        mode: which graph.
        steps: of the original tape, by the name of the node.
        left: of the cut.
        dispatch: makes the tensors.
    """

    def __init__(
        self, analysis: Analysis, mode: str, steps: dict[str, list[Step]], left: Survivors, dispatch: Dispatch
    ) -> None:
        self.values, self.args = analysis.trails[mode].values, analysis.trails[mode].args
        self.steps = steps
        self.left = left
        self.dispatch = dispatch
        self.whole = bool((left.alive == left.alive[analysis.component]).all())
        # What a linear layer makes on its way is memory of its result too, and an op in place writes to all of it.
        self.linear = not any(step.op is OVERWRITTEN for step in analysis.trails[mode].tape)

    def result(self, node: fx.Node, module: nn.Module | None, args: tuple[Any, ...]) -> LabelTensor | None:
        """What a node returns on what is left; None where it must be run.

        Args:
            node: of the cut graph; it has no keyword arguments.
            module: of the cut network, where the node calls one.
            args: what it is called with.
        """
        if not self.whole:
            return None
        if type(module) is nn.Linear:
            return self._linear(node, module, args[0]) if self.linear else None
        steps = self.steps.get(node.name, [])
        commutes = len(steps) == 1 and steps[0].op in _COMMUTE
        return self._step(node, module, args, steps[0]) if commutes else None

    def _step(self, node: fx.Node, module: nn.Module | None, args: tuple[Any, ...], before: Step) -> LabelTensor | None:
        """The same for a node that is a single step, given as it was."""
        expected = before.outputs[0]
        called = _function(node, args) if module is None else _layer(module, args)
        if called is None or self.values[node.name] is not expected:  # written to memory that others share, perhaps
            return None
        func, given, first = called
        if before.op is CONVOLUTION and (given[_GROUPS] == 1) != (before.call.args[_GROUPS] == 1):
            return None  # with one group left it is another layer
        if not self._agree(before, [value.layers for value in find(Value, given if module is None else given[:1])]):
            return None
        try:
            target, meta = self.dispatch.shape_of(func, given)
        except RuntimeError:  # it does not run on what is left
            return None
        if target is not before.call.func or meta.shape != self.left.shape(expected):
            return None
        return self.dispatch.returned(func, first, Value(meta, self.left.layers(expected)))

    def _linear(self, node: fx.Node, layer: nn.Linear, x: Any) -> LabelTensor | None:  # noqa: ANN401 - an argument
        """What a linear layer returns: several steps, which fold all dims but the last one, and unfold them again."""
        source, expected = self.args[node.name][0], self.values[node.name]
        if not isinstance(x, LabelTensor) or not isinstance(source, Value) or not isinstance(expected, Value):
            return None
        alone = all(value.layers == () or _along_last(value) for value in (source, expected))
        if not alone or not all(map(self.left.are_vectors, (source, expected))) or not expected.meta.is_contiguous():
            return None
        shape = (*x.shape[:-1], layer.out_features)
        if x.shape[-1] != layer.in_features or shape != self.left.shape(expected):
            return None
        if not same_layers(self.left.layers(source), x.fxc_value.layers):
            return None
        meta = torch.empty(shape, dtype=expected.meta.dtype, device="meta")
        return LabelTensor(Value(meta, self.left.layers(expected)), self.dispatch, x.device)

    def _agree(self, before: Step, found: list[Layers]) -> bool:
        """Whether the labels of a step run along one dim each, and still do; and those that go in are what is left.

        Those of the parameters of a layer need no look: each is coupled with one of the input or of the result, or
        pinned.

        Args:
            before: the step, as it was.
            found: the labels of its first arguments, as they are now.
        """
        sources = find(Value, before.call.args)[: len(found)]
        if len(sources) != len(found) or not all(map(self.left.are_vectors, (*sources, before.outputs[0]))):
            return False
        return all(map(same_layers, map(self.left.layers, sources), found))


def _along_last(value: Value) -> bool:
    """Whether all labels run along the last dim alone."""
    return all(layer.numel() == layer.shape[-1] for layer in value.layers)


_Called = tuple[Any, tuple[Any, ...], LabelTensor]
"""An op, its arguments with Values in place of tensors, and the tensor that it writes to if to any."""


def _layer(module: nn.Module, args: tuple[Any, ...]) -> _Called | None:
    """The op that a layer calls; None where it is not known."""
    known = aten_call(module, args, {}, lambda name: _unlabelled(module, name))
    return None if known is None or known[0] is None else (known[0], (args[0].fxc_value, *known[1]), args[0])


def _function(node: fx.Node, args: tuple[Any, ...]) -> _Called | None:
    """The op that a function of tensors calls; None where it is not known."""
    func = _FUNCTIONS.get(node.target)  # type: ignore[arg-type]
    if func is None or not args:
        return None
    tensors, rest = (args[0], node.args[1:]) if func is _AT.cat.default else (args, ())
    if not all(type(x) is LabelTensor for x in tensors) or not all(type(x) is int for x in rest):
        return None
    values = [x.fxc_value for x in tensors]
    return func, (values, *rest) if func is _AT.cat.default else tuple(values), tensors[0]


def _unlabelled(module: nn.Module, name: str) -> Value | None:
    """The shape of a parameter or buffer of a layer."""
    own = module._parameters.get(name)
    tensor = module._buffers.get(name) if own is None else own
    return None if tensor is None else Value(like(tensor))
