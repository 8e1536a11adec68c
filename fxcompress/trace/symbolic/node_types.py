"""What kind of thing a node of a graph returns, as far as that is known without running it."""

import functools
import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcompress.errors import TraceError
from fxcompress.trace.code.locations import place
from fxcompress.trace.graph.described import place_of_node
from fxcompress.trace.inputs import ExampleInputs

_ARITHMETIC = frozenset(
    {
        "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "neg", "pos", "abs", "invert", "and_",
        "or_", "xor", "lshift", "rshift", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand",
        "ior", "ixor", "ilshift", "irshift", "lt", "le", "gt", "ge", "eq", "ne",
    }
)  # fmt: skip
_SAME_KIND = frozenset({"T", "mT", "H", "mH", "data", "real", "imag"})


class NodeTypes:
    """Knows the class of what the nodes of a graph return.

    Args:
        root: the module that is traced.
        inputs: what the placeholders stand for; None for tensors.
    """

    def __init__(self, root: nn.Module, inputs: ExampleInputs | None) -> None:
        self.root = root
        self.inputs = inputs
        self._known: dict[fx.Node, type | None] = {}

    def of(self, node: fx.Node) -> type | None:
        """The class of what a node returns, that of an input included; None where it is not known."""
        if node not in self._known:
            self._known[node] = self._find(node)
        return self._known[node]

    def asked(self, node: fx.Node) -> type:
        """The class of what a node returns, for code that takes a decision on it.

        Raises:
            TraceError: it is not known, or that of an argument that is no tensor, as other calls may have another one.
        """
        found = self.of(node)
        if found is not None and node.op == "placeholder" and not issubclass(found, Tensor):
            raise TraceError(
                f"it looks at the type of its argument {node.target}{place()}, which is a {found.__name__} now, and "
                "may be something else in the next call"
            )
        if found is None:
            raise TraceError(
                f"it looks at the type of what {place_of_node(node)} returns{place()}, which torch.fx hides"
            )
        return found

    def _find(self, node: fx.Node) -> type | None:
        if node.op == "placeholder":
            return self._input(node)
        if node.op == "get_attr":
            path, _, leaf = str(node.target).rpartition(".")
            owner = self._module(path)  # getattr is torch.fx's own at the moment
            return type((owner._parameters | owner._buffers | vars(owner)).get(leaf))
        if node.op == "call_module":
            return Tensor if _says_tensor(type(self._module(str(node.target))).forward) else None
        if any(node.kwargs.get(name) for name in ("return_indices", "return_inverse", "return_counts")):
            return None
        tensor = node.args and isinstance(node.args[0], fx.Node) and self._is_tensor(node.args[0])
        if node.op == "call_method":
            return Tensor if tensor and _makes_one_tensor(str(node.target)) else None
        return self._called(node, tensor=bool(tensor))

    def _called(self, node: fx.Node, *, tensor: bool) -> type | None:
        function: Any = node.target
        name = getattr(function, "__name__", "")
        if function is getattr:
            return Tensor if tensor and node.args[1] in _SAME_KIND else None
        if function is operator.getitem:
            return Tensor if tensor else None
        if getattr(function, "__module__", "") == "_operator":
            operands = [a for a in node.args if isinstance(a, fx.Node)]
            return Tensor if name in _ARITHMETIC and any(map(self._is_tensor, operands)) else None
        if _of_torch(function) and (_says_tensor(function) or _makes_one_tensor(name)):
            return Tensor
        return None

    def _module(self, path: str) -> nn.Module:
        found: Any = self.root
        for name in path.split(".") if path else ():
            found = found._modules[name]
        return found  # type: ignore[no-any-return]

    def _is_tensor(self, node: fx.Node) -> bool:
        found = self.of(node)
        return found is not None and issubclass(found, Tensor)

    def _input(self, node: fx.Node) -> type | None:
        if str(node.target).startswith("*"):
            return None
        if self.inputs is None:
            return Tensor
        placeholders = [str(n.target) for n in node.graph.find_nodes(op="placeholder")]
        given = dict(zip(placeholders, self.inputs.args, strict=False)) | self.inputs.kwargs
        found = given.get(str(node.target))
        return None if found is None else type(found)


def _of_torch(function: object) -> bool:
    module = getattr(function, "__module__", None) or ""
    return module.partition(".")[0] == "torch" or type(function).__name__ == "builtin_function_or_method"


@functools.cache
def _says_tensor(function: Callable[..., Any]) -> bool:
    """Whether a function is annotated to return a tensor."""
    return getattr(inspect.unwrap(function), "__annotations__", {}).get("return") in (Tensor, "Tensor", "torch.Tensor")


@functools.cache
def _makes_one_tensor(name: str) -> bool:
    """Whether each overload of an op returns one tensor and nothing else."""
    packet = getattr(torch.ops.aten, name, None)
    if packet is None:
        return False
    returns = [getattr(packet, overload)._schema.returns for overload in packet.overloads()]
    return all(len(found) == 1 and str(found[0].type) == "Tensor" for found in returns)
