"""What code does with the tensors of a model past the stand-ins that torch.fx puts in the place of attributes.

Code that reads ``self.weight`` gets a stand-in. Code that goes through ``self.parameters()`` gets the parameter itself:
what it computes from it would be a constant of the graph, and what it writes to it, as a moving average does, would be
done once, to the model that is only to be looked at. So it is with what the code writes to any other tensor that is
there before it runs, and with random numbers in a shape that no stand-in says: the graph would hold one draw for good.
And code that puts another tensor in the place of a layer's weight
for one call (``torch.func.functional_call``) would get a graph that calls the layer with the weight that it has.
"""

import inspect
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode

from fxcompress.errors import TraceError
from fxcompress.trace.basics.op_watch import OpWatch, memory_of, only_views, written_to
from fxcompress.trace.basics.trees import tensors_in
from fxcompress.trace.code.locations import place

_REQUIRES_GRAD = inspect.getattr_static(Tensor, "requires_grad")


class UnproxiedOps(OpWatch):
    """Refuses what reads the values of parameters, what writes to tensors that are no results, and what draws numbers.

    Shapes may be read. Where buffers are no symbols, their values may be, but for those that a norm moves in training.

    Args:
        root: the model.
        buffers: whether buffers are symbols as well.

    Attributes:
        refusal: the first thing that was refused; it counts even where the model catches the error.
    """

    def __init__(self, root: nn.Module, *, buffers: bool) -> None:
        super().__init__()
        self.refusal: TraceError | None = None
        self._parameters = {memory: name for name, p in root.named_parameters() for memory in memory_of(p)}
        named = {memory: name for name, b in root.named_buffers() for memory in memory_of(b)}
        self._written = self._parameters | (named if buffers else {})
        self._moved = {} if buffers else {m: n for m, n in named.items() if _is_moved(root, n)}
        self._buffers = named

    def before(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ANN401 - an op
        """Refuse an op.

        Raises:
            TraceError: it is one of those.
        """
        changed = written_to(func, args, kwargs)
        self._refuse("writes to a parameter or buffer", self._written, changed)
        for memory in (memory for tensor in changed for memory in memory_of(tensor)):
            if memory not in self.made and memory not in self._buffers:
                self._raise("writes to a tensor that is there before it runs", "", "in a buffer of its module")
        if not (only_views(func._schema) or _only_shapes(func)):
            self._refuse("computes with a parameter", self._parameters, [args, kwargs])
            self._refuse("computes with what a norm averages or counts", self._moved, [args, kwargs])
        if torch.Tag.nondeterministic_seeded in func.tags:
            self._raise("draws random numbers", "", "in a shape that the sizes of its inputs say (torch.randn_like)")

    def _refuse(self, does: str, names: dict[int, str], tree: list[Any]) -> None:
        found = [names[memory] for tensor in tensors_in(tree) for memory in memory_of(tensor) if memory in names]
        if found:
            self._raise(does, found[0], "by reading parameters and buffers as attributes of their module")

    def _raise(self, does: str, what: str, instead: str) -> NoReturn:
        where = f"{what}{place()}".strip()
        error = TraceError(f"it {does} in a way that torch.fx does not see ({where}); do so {instead}")
        self.refusal = self.refusal or error
        raise error


def _is_moved(root: nn.Module, name: str) -> bool:
    """Whether a buffer is one that a norm writes to while it runs in training."""
    return isinstance(root.get_submodule(name.rpartition(".")[0]), _NormBase)


def _only_shapes(func: Any) -> bool:  # noqa: ANN401
    name: str = func.overloadpacket.__name__
    return name.startswith("new_") or name.endswith("_like")


class GradientFlags(TorchFunctionMode):
    """Refuses code that switches the gradients of a parameter on or off, for the calls that follow.

    Attributes:
        refusal: as of :class:`UnproxiedOps`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.refusal: TraceError | None = None

    def __torch_function__(
        self,
        func: Any,  # noqa: ANN401
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        kwargs = kwargs or {}
        sets = func is Tensor.requires_grad_ or getattr(func, "__self__", None) is _REQUIRES_GRAD
        if sets and isinstance(args[0], nn.Parameter) and getattr(func, "__name__", "") != "__get__":
            wanted = kwargs.get("requires_grad", args[1] if len(args) > 1 else True)
            if wanted is not args[0].requires_grad:
                error = TraceError(
                    f"it switches the gradients of a parameter{place()} in a way that torch.fx does not see"
                )
                self.refusal = self.refusal or error
                raise error
        return func(*args, **kwargs)
