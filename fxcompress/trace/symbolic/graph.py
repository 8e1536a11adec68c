"""Tracing with symbols, by torch.fx: right for inputs of any size, where the model takes no decision on them."""

import inspect
import linecache
from collections.abc import Callable
from functools import partial
from traceback import walk_tb
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcompress.errors import TraceError
from fxcompress.trace.basics.modules import modules_in
from fxcompress.trace.code.frames import is_users
from fxcompress.trace.code.locations import short
from fxcompress.trace.effects.attributes import PlainAttributes, refuse_layers_set, unset
from fxcompress.trace.effects.held_tensors import HeldTensors
from fxcompress.trace.graph.calls import autograd_by, autograd_call, function_name, writes_in_place
from fxcompress.trace.graph.guards import check_given, check_left_out
from fxcompress.trace.inputs import ExampleInputs
from fxcompress.trace.model.chosen_forward import chosen_forward
from fxcompress.trace.model.mode_switches import switches
from fxcompress.trace.symbolic.node_types import NodeTypes
from fxcompress.trace.symbolic.plain_arguments import refuse_plain_reads
from fxcompress.trace.symbolic.questions import answered
from fxcompress.trace.symbolic.tracer import WHOLE, Tracer
from fxcompress.trace.symbolic.unproxied import GradientFlags, UnproxiedOps
from fxcompress.trace.traced import TracedModule, copy_graph


def symbolic_graph(
    root: nn.Module,
    readers: set[int],
    *,
    training: bool,
    inputs: ExampleInputs | None,
    symbols: bool,
    kept: set[str],
) -> fx.Graph:
    """The graph of ``root`` in one mode.

    Args:
        root: a skeleton of the model, a GraphModule perhaps.
        readers: filled by whoever watches the mode.
        training: the mode.
        inputs: arguments of ``forward`` that have a default and are not given here keep that default.
        symbols: buffers are symbols, like parameters; otherwise their values are at hand while tracing.
        kept: filled with the attributes that the code sets and may read in the next run.

    Raises:
        TraceError: torch.fx cannot do it.
    """
    constants = _defaults(root, inputs)
    if isinstance(root, fx.GraphModule) and not constants:
        train_graph = root.train_graph if isinstance(root, TracedModule) and training else None
        return copy_graph(train_graph or root.graph)
    root.train(training)
    before = [(module, dict(module._buffers)) for module in modules_in(root)]
    attributes = PlainAttributes(root)
    go = partial(_go, root, constants or None, inputs, symbols=symbols, training=training)
    graph, changed = go(), attributes.changed()
    attributes.restore()
    refuse_layers_set(changed, graph)
    counts = {name for name, value in changed.items() if isinstance(value, int | float) and not isinstance(value, bool)}
    if counts:  # is anything computed from them?
        unset(root.train(training), frozenset(counts))
        go()
        attributes.restore()
    kept |= changed.keys() - counts
    _refuse_assigned(before)
    _refuse_frozen(root, graph)
    _refuse_written(root, graph)
    _restore_names(graph, constants)
    _say_what_is_left_out(graph, constants)
    if inputs is not None:
        refuse_plain_reads(graph, inputs)
        _check_what_may_be_none(graph, root, inputs)
    for node in (n for f in WHOLE for n in graph.find_nodes(op="call_function", target=f)):
        node.meta.pop("is_wrapped", None)  # or the code of the graph would have torch.fx wrap a name with dots
    return graph


def _go(
    root: nn.Module, constants: dict[str, Any] | None, inputs: ExampleInputs | None, *, symbols: bool, training: bool
) -> fx.Graph:
    tracer = Tracer()
    tracer.traced_func_name = chosen_forward(root) or "forward"
    tracer.proxy_buffer_attributes = symbols
    tracer.kinds, tracer.held = NodeTypes(root, inputs), HeldTensors(root)
    whole = autograd_by(_autograd(tracer))
    unseen, flags = UnproxiedOps(root, buffers=symbols), GradientFlags()
    try:
        with (
            torch.enable_grad(), answered(tracer.kinds), whole, unseen, flags, switches().run(training=training),
            tracer.regions.watched(lambda: False),
        ):  # fmt: skip
            graph = tracer.trace(root, concrete_args=constants)
    except TraceError:
        raise
    except Exception as error:
        raise unseen.refusal or flags.refusal or TraceError(_trace_message(root, error)) from error
    refusal = unseen.refusal or flags.refusal
    if refusal is not None:  # the model has caught it, and gone another way
        raise refusal
    if tracer.refusal is not None:
        raise TraceError(_trace_message(root, tracer.refusal)) from tracer.refusal
    return graph


def _autograd(tracer: Tracer) -> Callable[..., Any]:
    """``apply`` of an autograd function, which becomes one node: its backward is not what its forward would give."""

    def called(kind: Any, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        if any(isinstance(arg, fx.Proxy) for arg in (*args, *kwargs.values())):
            return tracer.create_proxy("call_function", autograd_call(kind), args, kwargs)
        return own(*args, **kwargs)

    return called


def _refuse_assigned(before: list[tuple[nn.Module, dict[str, Tensor | None]]]) -> None:
    """A buffer that code puts another tensor in the place of: the graph would not do it. Puts the buffers back."""
    changed = [name for module, old in before for name in old if module._buffers.get(name) is not old[name]]
    for module, old in before:
        module._buffers.update(old)
    if changed:
        raise TraceError(
            f"forward puts a new tensor in the place of the buffer {changed[0]!r}, which a graph does not do: write to "
            f"it in place, as in self.{changed[0]}.copy_(...)"
        )


def _refuse_frozen(root: nn.Module, graph: fx.Graph) -> None:
    """What was computed from a parameter, past torch.fx, would stay what it is when the parameter changes."""
    for node in graph.find_nodes(op="get_attr"):
        value = root.__dict__.get(str(node.target))
        if isinstance(value, Tensor) and value.grad_fn is not None:
            raise TraceError(
                f"{type(root).__name__} computes with a parameter in a way that torch.fx does not see (a tensor of "
                f"shape {tuple(value.shape)}); read parameters as attributes of their module"
            )


_SPECIALIZED = " has been specialized to have value "
"""How torch.fx says that an argument has another value than the one that it was traced with."""
_SAME_MEMORY = frozenset(
    {
        "to", "type_as", "float", "double", "contiguous", "detach", "view", "view_as", "reshape", "flatten",
        "unflatten", "expand", "expand_as", "squeeze", "unsqueeze", "t", "transpose", "permute", "select", "narrow",
        "getitem",
    }
)  # fmt: skip


def _refuse_written(root: nn.Module, graph: fx.Graph) -> None:
    """A tensor that forward makes anew in each run is one tensor in the graph: what is written to it would add up."""
    open_ = [n for n in graph.find_nodes(op="get_attr") if str(n.target).startswith("_tensor_constant")]
    open_ = [n for n in open_ if isinstance(root.__dict__.get(str(n.target)), Tensor)]
    for node in open_:
        for user in (u for u in node.users if u.args and u.args[0] is node):
            name = function_name(user)
            if writes_in_place(user):
                raise TraceError(
                    f"{type(root).__name__} makes a tensor and writes to it ({name}), and torch.fx would make it once "
                    "and for all; compute it without writing in place"
                )
            open_ += [user] if user.op != "call_module" and name in _SAME_MEMORY else []


def _trace_message(root: nn.Module, error: Exception) -> str:
    kind = type(root).__name__
    if "co_varnames" in str(error):  # how torch.fx fails to call it
        return f"torch.fx cannot trace {kind}: its forward is wrapped by a decorator, which takes any arguments"
    where = ""
    user = [(frame, number) for frame, number in walk_tb(error.__traceback__) if is_users(frame)]
    if user:
        frame, number = user[-1]
        file = frame.f_code.co_filename
        # There is none where torch.fx has patched the code of a function with *args; so inspect would fail.
        number = number or frame.f_code.co_firstlineno
        line = linecache.getline(file, number, frame.f_globals).strip()
        where = f" at {short(file)}:{number}" + (f"\n    {line}" if line else "")
    return (
        f"torch.fx cannot trace {kind}: {error}{where}\n"
        "  control flow that depends on values or shapes cannot become a graph: move it into a function marked with "
        "torch.fx.wrap, or out of the model"
    )


def _defaults(root: nn.Module, inputs: ExampleInputs | None) -> dict[str, Any]:
    """Arguments of forward that keep their default value: those with one that the example inputs leave out."""
    if isinstance(root, fx.GraphModule):
        return {}
    parameters = list(inspect.signature(root.forward).parameters.values())
    given = inputs.names([p.name for p in parameters]) if inputs is not None else frozenset()
    skip = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    return {
        p.name: p.default
        for p in parameters
        if p.kind not in skip and p.default is not inspect.Parameter.empty and p.name not in given
    }


def _restore_names(graph: fx.Graph, constants: dict[str, Any]) -> None:
    """concrete_args renames the placeholders that it fixes (``mask`` to ``mask_1``); calls by keyword need the name."""
    for node in graph.find_nodes(op="placeholder"):
        name = node.target.rpartition("_")[0]
        if name in constants:
            node.target = name


def _check_what_may_be_none(graph: fx.Graph, root: nn.Module, inputs: ExampleInputs) -> None:
    """Let a graph check that what is given now, and may be None by the signature of forward, is given later as well."""
    parameters = inspect.signature(root.forward).parameters
    given = inputs.names(list(parameters))
    nodes = graph.find_nodes(op="placeholder")
    with graph.inserting_after(nodes[-1] if nodes else None):
        for node in reversed(nodes):
            own = parameters.get(str(node.target))
            if own is not None and own.name in given and (own.default is None or "None" in str(own.annotation)):
                graph.call_function(check_given, (node, own.name))


def _say_what_is_left_out(graph: fx.Graph, constants: dict[str, Any]) -> None:
    """Let the checks that torch.fx writes for concrete_args tell the user what to do."""
    for node in graph.nodes:
        told = node.args[1] if node.op == "call_function" and len(node.args) == 2 else None
        name = told.partition(_SPECIALIZED)[0] if isinstance(told, str) and _SPECIALIZED in told else ""
        if name not in constants:
            continue
        if constants[name] is None:
            node.target, node.args = check_left_out, (node.args[0], name)
        else:
            node.update_arg(1, (
                f"forward was traced with {name}={constants[name]!r}, its default, as the example inputs leave it out, "
                "and is called with another value: pass example_inputs that hold it"
            ))  # fmt: skip
