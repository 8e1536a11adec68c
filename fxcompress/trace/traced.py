"""The GraphModule that the whole project works on."""

import copy
import inspect
import warnings
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from fxcompress.errors import TraceError
from fxcompress.trace.graph.autocast import closing
from fxcompress.trace.graph.checkpoints import with_checkpoints
from fxcompress.trace.graph.lookups import readable
from fxcompress.trace.graph.names import any_names, compiled, hides, past_class
from fxcompress.trace.graph.pickling import PackedGraph, pack, unpack
from fxcompress.trace.graph.wrap_registry import noted_with
from fxcompress.trace.model.own_modes import Modes
from fxcompress.trace.model.skeleton import POSTPONE
from fxcompress.trace.model.state_dict_hooks import StateDictHook, hooks_of, pass_on_hooks

_Self = TypeVar("_Self", bound="TracedModule")
_FROM_COMPILING = ("_code", "_lineno_map", "_prologue_start")
_LOADING = "_load_state_dict_pre_hooks"
_OF_MODULE = frozenset(nn.Module().__dict__)
_NO_METHODS = (
    "this network runs the graph of the model's forward, and has its modules and parameters, but none of its other "
    "methods and attributes\n  call the network itself, or what finalize() returns after compress(..., "
    "keep_code=True), or prune(..., keep_code=True), which has them all (docs/own_code.md)"
)
_SKIP = _OF_MODULE | frozenset(dir(fx.GraphModule)) | {"_graph", "meta", "train_graph"}


class TracedModule(fx.GraphModule):
    """A GraphModule that keeps all of the model that it was traced from.

    Two things set it apart from a plain GraphModule. It keeps every child module, used or not, in the original order,
    so that ``state_dict`` has the same keys. And when the model computes something else in training than in
    evaluation (auxiliary heads, functional dropout, stochastic depth), it holds a second graph and takes the one that
    the modules which read ``self.training`` ask for, as the original did.

    What passes make on the way to their result is never called, and generating code takes as long as an analysis. So a
    module may be left without code (``compiled=False``) until somebody calls it or looks at its code.

    Attributes:
        graph: the graph of evaluation, and of training where that is the same.
        train_graph: the graph of training, or None when it is the same.
        mode_readers: names of the modules whose ``training`` the original's code reads; they choose the graph.
        other_modes: names of the modules that are in the other mode after ``eval()``, and after ``train()``.
    """

    __jit_unused_properties__ = [  # noqa: RUF012 - as torch.fx has it
        *fx.GraphModule.__jit_unused_properties__,
        "graphs",
        "is_compiled",
    ]
    __jit_ignored_attributes__ = ("train_graph", "mode_readers", "other_modes")
    train_graph: fx.Graph | None = None
    mode_readers: tuple[str, ...] = ("",)
    other_modes: Modes = ((), ())

    def __init__(
        self,
        root: nn.Module,
        graph: fx.Graph,
        train_graph: fx.Graph | None = None,
        class_name: str | None = None,
        *,
        compiled: bool = True,
    ) -> None:
        super().__init__(nn.Module(), fx.Graph(), class_name or _name(root))
        adopt(self, root)
        if compiled:
            self.set_graphs(graph, train_graph)
        else:
            self._graph, self.train_graph = graph, train_graph
            for own in self.graphs.values():
                own.owning_module = self
            type(self).forward = _CompiledWhenAsked(self)  # type: ignore[assignment]
            for name in _FROM_COMPILING:
                self.__dict__.pop(name, None)

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
        if not len(self.graph.nodes):  # of a module that torch.fx is about to make, which gets its graphs later
            return None
        with noted_with(self):
            return self._recompile()

    def _recompile(self) -> Any:  # noqa: ANN401
        with any_names(self):
            code = super().recompile()
        self._code = code.src = readable(code.src)
        evaluate = with_checkpoints(self, self.graph, "eval").get("forward", type(self).forward)
        if self.train_graph is None:
            type(self).forward = closing(evaluate, self.graph)
        else:
            train = compiled(self, self.train_graph)
            train = with_checkpoints(self, self.train_graph, "train").get("forward", train)
            # Not the module that it was compiled in, which holds copies: passes add children that it would not have.
            self.train_graph.owning_module = self

            def forward(self: TracedModule, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
                return (train if self.reads_training() else evaluate)(self, *args, **kwargs)

            type(self).forward = closing(called_like(forward, evaluate), self.graph, self.train_graph)
        return code

    @property
    def is_compiled(self) -> bool:
        """Whether there is code for the graphs; if not, it is made when it is first needed."""
        return "_code" in self.__dict__

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - as nn.Module has it
        """What torch.fx keeps of compiling, made when it is first asked for; else as ever.

        Where there is nothing of that name, say where the model's own methods are.
        """
        if name in _FROM_COMPILING and not self.is_compiled:
            self.recompile()
            return self.__dict__[name]
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            if name.startswith("_"):
                raise
            raise AttributeError(f"{error}: {_NO_METHODS}") from None

    def __setattr__(self, name: str, value: Any) -> None:  # noqa: ANN401 - as nn.Module has it
        """Set an attribute; one of torch.fx or of ours stays one where the model holds something of that name."""
        if hides(self, name) and not isinstance(value, nn.Module | Tensor):
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def get_submodule(self, target: str) -> nn.Module:
        """As of any module; what the model holds comes before an attribute of torch.fx, or of ours, of that name."""
        first, _, rest = target.partition(".")
        child = self._modules.get(first)
        if child is None or not hides(self, first):
            return super().get_submodule(target)
        return child.get_submodule(rest)

    def get_parameter(self, target: str) -> nn.Parameter:
        """The same for a parameter."""
        found = self._parameters.get(target)
        return super().get_parameter(target) if found is None else found

    def get_buffer(self, target: str) -> Tensor:
        """The same for a buffer."""
        found = self._buffers.get(target)
        return super().get_buffer(target) if found is None else found

    def __reduce__(self) -> Any:  # noqa: ANN401
        """By its graphs, node by node; torch.fx would trace its code again."""
        state = {key: value for key, value in self.__dict__.items() if key in _OF_MODULE or _is_own(key)}
        state.pop(_LOADING)  # its entries hold the module itself
        graphs = pack(self.graph), None if self.train_graph is None else pack(self.train_graph)
        return restored_module, (self.fxc_kind(), type(self).__name__, state, self.meta, *graphs, tuple(hooks_of(self)))

    @classmethod
    def fxc_kind(cls) -> Any:  # noqa: ANN401
        """What makes an object of this class, that pickle can find: torch.fx makes a class for each instance."""
        return next(kind for kind in cls.__mro__ if not kind.__qualname__.endswith("GraphModuleImpl"))

    def train(self: _Self, mode: bool = True) -> _Self:  # noqa: FBT001, FBT002, PYI019 - as nn.Module; 3.10 has no Self
        """Change the mode of what the original changes the mode of: it may leave some modules in the other one."""
        super().train(mode)
        other = frozenset(self.other_modes[mode])
        for path, module in self.named_modules() if other else ():
            if path in other:
                module.training = not mode
        return self

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

    def __deepcopy__(self, memo: dict[Any, Any]) -> "TracedModule":
        result: TracedModule = type(self).__new__(type(self))
        memo[id(self)] = result
        for buffer in self.buffers():
            if buffer.layout not in {torch.strided, torch.sparse_coo} and id(buffer) not in memo:
                memo[id(buffer)] = buffer.clone()  # which torch does not copy itself, by its memory
        state = nn.Module()
        state.__dict__.update({k: copy.deepcopy(v, memo) for k, v in self.__dict__.items() if not _is_transient(k)})
        train_graph = None if self.train_graph is None else copy_graph(self.train_graph)
        compiled = self.is_compiled and POSTPONE not in memo
        name = type(self).__name__
        TracedModule.__init__(result, state, copy_graph(self.graph), train_graph, name, compiled=compiled)
        result.meta = state.__dict__["meta"]
        return result


def restored_module(
    kind: Callable[[], type[TracedModule]] | type[TracedModule],
    name: str,
    state: dict[str, Any],
    meta: dict[str, Any],
    graph: PackedGraph,
    train_graph: PackedGraph | None,
    hooks: tuple[StateDictHook, ...] = (),
) -> TracedModule:
    """What was pickled, from its class, name, attributes, graphs and what it does to a state_dict."""
    held = nn.Module()
    held.__dict__.update(state)
    for hook in hooks:
        held.register_load_state_dict_pre_hook(hook)
    own: Any = kind if isinstance(kind, type) else kind()
    result: TracedModule = own.__new__(own)
    TracedModule.__init__(result, held, unpack(graph), None if train_graph is None else unpack(train_graph), name)
    result.meta = meta
    return result


class _CompiledWhenAsked:
    """The ``forward`` of a traced module that has no code yet: whoever looks at it finds the one that is compiled then.

    torch.fx makes a class for each module, so the class knows its module.
    """

    def __init__(self, module: TracedModule) -> None:
        self._module = weakref.ref(module)

    def __get__(self, instance: TracedModule | None, owner: type) -> Any:  # noqa: ANN401
        module = self._module() if instance is None else instance
        assert module is not None
        module.recompile()
        return getattr(owner if instance is None else instance, "forward")  # noqa: B009 - another one than before


def called_like(forward: Callable[..., Any], other: Callable[..., Any]) -> Callable[..., Any]:
    """``forward``, which takes anything, with the names of the arguments of another one for those who ask.

    Exporters do, and trainers that give a network the columns which it has names for. Nothing else of the other one is
    taken over: whoever compiles from source must not find the code of a single mode.
    """
    forward.__signature__ = inspect.signature(other)  # type: ignore[attr-defined]
    return forward


def _is_transient(name: str) -> bool:
    """Whether an attribute is a cache, or is copied in a way of its own."""
    return name in {"_graph", "train_graph", *_FROM_COMPILING} or name.startswith("_fxc_")


def _is_own(name: str) -> bool:
    """Whether an attribute is the model's, and neither torch's nor a cache."""
    return name not in _SKIP and not _is_transient(name)


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy with the same node names, targets and metadata."""
    new = fx.Graph()
    new.output(new.graph_copy(graph, {}))
    new.output_node().meta = copy.copy(graph.output_node().meta)
    new._codegen = copy.copy(graph._codegen)
    return new


def lint(graph: fx.Graph) -> None:
    """torch.fx's own check of a graph; older versions warn of what is read from plain attributes, which is no fault."""
    owner: Any = graph.owning_module
    try:
        view: Any = None if owner is None else past_class(owner)
        graph.owning_module = view
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r".*does not reference an nn\.Module")
            graph.lint()
    finally:
        graph.owning_module = owner


def adopt(module: fx.GraphModule, root: nn.Module) -> None:
    """Make the children, parameters, buffers, mode and plain attributes of ``root`` those of ``module``."""
    for field in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
        setattr(module, field, root.__dict__[field])
    module.training = root.training
    for name, value in root.__dict__.items():
        if _is_own(name):
            module.__dict__[name] = value
    pass_on_hooks(root, module)


def _name(root: nn.Module) -> str:
    return type(root).__name__
