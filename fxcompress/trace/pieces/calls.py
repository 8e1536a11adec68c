"""The calls that a model makes to a piece: the graph must take each of them, and return what the module does."""

from collections import OrderedDict
from contextlib import suppress
from typing import Any

from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode

from fxcompress.errors import ExampleInputError, TraceError
from fxcompress.trace.basics.trees import replace
from fxcompress.trace.inputs import ExampleInputs
from fxcompress.trace.pieces.observed import structure_of
from fxcompress.trace.traced import TracedModule


def refuse_nested(tensor: Tensor) -> Tensor:
    """A tensor as it is; raises where it holds tensors of several lengths, of which no labels are known."""
    if tensor.is_nested:
        raise TraceError("it is given a nested tensor, the lengths of which a graph does not know")
    return tensor


def without_empty(module: nn.Module, call: ExampleInputs) -> ExampleInputs:
    """A call with entries where a tensor had none, such as the boxes of an image without objects.

    Nothing can be learnt from ops on empty tensors.

    Raises:
        TraceError: the module does not run on it.
    """
    filled = ExampleInputs(*replace(_filled, (call.args, call.kwargs)))
    if structure_of((filled.args, filled.kwargs)) == structure_of((call.args, call.kwargs)):
        return call
    try:
        _result(module, filled)
    except Exception as error:
        raise TraceError(f"it is called on empty tensors, and cannot be on others: {error}") from error
    return filled


def _filled(tensor: Tensor) -> Tensor:
    return tensor if tensor.numel() else tensor.new_zeros([size or 2 for size in tensor.shape])


def check_call(module: nn.Module, traced: TracedModule, call: ExampleInputs) -> None:
    """Raise unless the graph takes a call that the model made, and returns what the module does, in the same form."""
    expected = _result(module, call)
    found = _result(traced, call)
    if type(expected) is OrderedDict and type(found) is dict:
        for graph in traced.graphs.values():
            _return_ordered(graph)
        traced.recompile()
        found = _result(traced, call)
    if structure_of(found) != structure_of(expected):
        raise TraceError(f"its graph returns a {type(found).__name__} of another form than it does itself")


def _result(module: nn.Module, call: ExampleInputs) -> Any:  # noqa: ANN401 - whatever it returns
    """What a module returns, computed without values where that is possible.

    Raises:
        TraceError: another path than the traced one is taken, or it cannot be called again: what it was given may have
            been good for the time of ``vmap`` only.
    """
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        args, kwargs = replace(mode.from_tensor, (call.args, call.kwargs))
        with suppress(Exception):
            return module(*args, **kwargs)
    try:
        return module(*call.args, **call.kwargs)
    except ExampleInputError as error:
        raise TraceError(f"its calls take different paths through it: {error}") from error
    except Exception as error:
        raise TraceError(f"it cannot be called again with what it was given: {error}") from error


def _return_ordered(graph: fx.Graph) -> None:
    """Return an OrderedDict; torch.fx makes a dict of it."""
    node = graph.output_node()
    with graph.inserting_before(node):
        node.args = (graph.call_function(OrderedDict, (node.args[0],)),)
