"""A module that runs graphs in place of its own ``forward``, and is otherwise what it was.

A piece of a model that cannot be traced as a whole must go on being what the code around it knows: of the same class,
with the same methods. Only ``forward`` is another, that of the rewritten graphs.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import fx, nn

from fxcompress.trace.graph.autocast import closing
from fxcompress.trace.graph.checkpoints import with_checkpoints
from fxcompress.trace.graph.names import compiled
from fxcompress.trace.model.chosen_forward import rebound
from fxcompress.trace.model.skeleton import skeleton
from fxcompress.trace.model.state_dict_hooks import pass_on_hooks
from fxcompress.trace.traced import TracedModule, called_like, copy_graph

_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)
_OF_EVERY_GRAPH = (
    frozenset(fx.GraphModule(nn.Module(), fx.Graph()).__dict__)
    | frozenset(dir(fx.GraphModule))
    | {"train_graph", "mode_readers", "other_modes"}
)


class GraphForward(nn.Module):
    """Mark of such a module; the other base of its class is the class that it had.

    Attributes:
        fxc_graphs: the graphs of evaluation and, where that differs, of training.
        fxc_meta: what was the ``meta`` of the module with these graphs.
        mode_readers: see :class:`fxcompress.trace.traced.TracedModule`.
    """

    fxc_graphs: tuple[fx.Graph, fx.Graph | None]
    fxc_meta: Mapping[str, Any]
    mode_readers: tuple[str, ...]


def install(module: nn.Module, traced: TracedModule) -> None:
    """Let ``module`` compute what ``traced`` does, with its tensors and child modules, in place.

    Args:
        module: the piece, or a copy of it; child modules that stay keep their identity.
        traced: made from that piece by tracing and rewriting.
    """
    take_over(module, traced)
    own = own_class(module)
    methods = _methods(traced, traced.graph, "eval")
    evaluate = train = methods.pop("forward")
    if traced.train_graph is not None:
        methods |= _methods(traced, traced.train_graph, "train")
        train = methods.pop("forward")
    one = train is evaluate

    def forward(self: TracedModule, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        chosen = evaluate if one or not TracedModule.reads_training(self) else train
        return chosen(self, *args, **kwargs)

    members = {
        **methods,
        "forward": closing(called_like(forward, evaluate), traced.graph, traced.train_graph),
        "fxc_graphs": (traced.graph, traced.train_graph),
        "fxc_meta": dict(traced.meta),
        "mode_readers": traced.mode_readers,
        "__module__": own.__module__,
        "__qualname__": own.__qualname__,
        "__doc__": own.__doc__,
    }
    module.__dict__.pop("forward", None)  # which the graph is made from
    module.__class__ = type(own.__name__, (GraphForward, own), members)


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before graphs were installed."""
    kind = type(module)
    return next(base for base in kind.__bases__ if base is not GraphForward) if issubclass(kind, GraphForward) else kind


def traced_of(module: nn.Module) -> TracedModule:
    """A module with installed graphs as a traced one; it shares the tensors."""
    assert isinstance(module, GraphForward)
    graph, train_graph = module.fxc_graphs
    traced = TracedModule(
        skeleton(module),
        copy_graph(graph),
        None if train_graph is None else copy_graph(train_graph),
        own_class(module).__name__,
    )
    traced.mode_readers = module.mode_readers
    traced.meta = dict(module.fxc_meta)
    return traced


def _methods(traced: TracedModule, graph: fx.Graph, mode: str) -> dict[str, Callable[..., Any]]:
    return with_checkpoints(traced, graph, mode) or {"forward": compiled(traced, copy_graph(graph))}


def take_over(old: nn.Module, new: nn.Module) -> None:
    """Give ``old`` the tensors, attributes and children of ``new``, its counterpart; children keep their identity."""
    for table in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
        old.__dict__[table] = new.__dict__[table]
    torchs = _OF_EVERY_GRAPH if isinstance(new, fx.GraphModule) else _OF_EVERY_MODULE  # the mode among them
    old.__dict__.update({key: rebound(value, new, old) for key, value in new.__dict__.items() if key not in torchs})
    pass_on_hooks(new, old)
    known = dict(old._modules)
    old._modules.clear()
    for name, child in new._modules.items():
        own = known.get(name)
        if own is not None and child is not None and type(child) in {type(own), nn.Module}:  # it may have been closed
            take_over(own, child)
            old._modules[name] = own
        else:
            old._modules[name] = child
