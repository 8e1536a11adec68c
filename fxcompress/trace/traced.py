"""The GraphModule that the whole project works on."""

import copy
from typing import Any

from torch import fx, nn

from fxcompress.errors import TraceError
from fxcompress.trace.names import any_names

_SKIP = frozenset(nn.Module().__dict__) | frozenset(dir(fx.GraphModule)) | {"_graph", "meta", "train_graph"}


class TracedModule(fx.GraphModule):
    """A GraphModule that keeps all of the model that it was traced from.

    Two things set it apart from a plain GraphModule. It keeps every child module, used or not, in the original order,
    so that ``state_dict`` has the same keys. And when the model computes something else in training than in
    evaluation (auxiliary heads, functional dropout, stochastic depth), it holds a second graph and takes the one that
    the modules which read ``self.training`` ask for, as the original did.

    Attributes:
        graph: the graph of evaluation, and of training where that is the same.
        train_graph: the graph of training, or None when it is the same.
        mode_readers: names of the modules whose ``training`` the original's code reads; they choose the graph.
    """

    train_graph: fx.Graph | None = None
    mode_readers: tuple[str, ...] = ("",)

    def __init__(
        self, root: nn.Module, graph: fx.Graph, train_graph: fx.Graph | None = None, class_name: str | None = None
    ) -> None:
        super().__init__(nn.Module(), fx.Graph(), class_name or _name(root))
        adopt(self, root)
        self.set_graphs(graph, train_graph)

    def set_graphs(self, graph: fx.Graph, train_graph: fx.Graph | None) -> None:
        """Take over both graphs and compile them."""
        self.train_graph = train_graph
        self.graph = graph

    @property
    def graphs(self) -> dict[str, fx.Graph]:
        """Each graph by the mode that runs it; ``{"eval": graph}`` alone when training is the same."""
        return {"eval": self.graph} if self.train_graph is None else {"eval": self.graph, "train": self.train_graph}

    def recompile(self) -> Any:  # noqa: ANN401 - PythonCode is not public
        """Compile both graphs; ``forward`` takes the one of the module's mode."""
        with any_names():
            code = super().recompile()
        if self.train_graph is not None:
            evaluate = type(self).forward
            with any_names():
                train = type(fx.GraphModule(self, self.train_graph)).forward
            # Not the module that it was compiled in, which holds copies: passes add children that it would not have.
            self.train_graph.owning_module = self

            def forward(self: TracedModule, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
                return (train if self.reads_training() else evaluate)(self, *args, **kwargs)

            type(self).forward = forward
        return code

    def reads_training(self) -> bool:
        """Whether the modules that choose the graph are in training.

        Raises:
            TraceError: some are and some are not: the original would compute something that is in neither graph.
        """
        readers = frozenset(self.mode_readers)
        modes = {path: module.training for path, module in self.named_modules() if path in readers}
        training = next(iter(modes.values()), self.training)
        other = [path or "the network itself" for path, mode in modes.items() if mode != training]
        if other:
            this, that = ("training", "evaluation") if training else ("evaluation", "training")
            raise TraceError(
                f"{type(self).__name__} was traced in training and in evaluation, and is now in a mixture: "
                f"{next(iter(modes)) or 'the network itself'} is in {this}, {', '.join(other[:3])} in {that}\n"
                "  they compute something else in each mode, so they must share one: call train() or eval() on all of "
                "them. Modules that hold no such code (batch norm, dropout) may be in any mode"
            )
        return training

    def __deepcopy__(self, memo: dict[int, Any]) -> "TracedModule":
        result: TracedModule = type(self).__new__(type(self))
        memo[id(self)] = result
        state = nn.Module()
        state.__dict__.update({k: copy.deepcopy(v, memo) for k, v in self.__dict__.items() if not _is_transient(k)})
        train_graph = None if self.train_graph is None else copy_graph(self.train_graph)
        TracedModule.__init__(result, state, copy_graph(self.graph), train_graph, type(self).__name__)
        result.meta = state.__dict__["meta"]
        return result


def _is_transient(name: str) -> bool:
    """Whether an attribute is a cache, or is copied in a way of its own."""
    return name in {"_graph", "train_graph"} or name.startswith("_fxc_")


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy with the same node names, targets and metadata."""
    new = fx.Graph()
    new.output(new.graph_copy(graph, {}))
    new.output_node().meta = copy.copy(graph.output_node().meta)
    new._codegen = copy.copy(graph._codegen)
    return new


def adopt(module: fx.GraphModule, root: nn.Module) -> None:
    """Make the children, parameters, buffers, mode and plain attributes of ``root`` those of ``module``."""
    for field in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
        setattr(module, field, root.__dict__[field])
    module.training = root.training
    for name, value in root.__dict__.items():
        if name not in _SKIP and not _is_transient(name):
            module.__dict__[name] = value


def _name(root: nn.Module) -> str:
    return type(root).__name__
