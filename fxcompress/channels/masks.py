"""Buffers of flags that scale or choose entries, and pick none: they lose entries with what they lie on.

weight (O, I) * mask (O, I) -> F.linear                the mask has labels, as a mask of floats has
h[:, mask]                                             its values say which channels are read, and must stay known
"""

from collections.abc import Iterable

import torch
from torch import Tensor, fx

from fxcompress.trace.graph.calls import function_name
from fxcompress.trace.traced import TracedModule

_CHOICES = frozenset({
    "mul", "mul_", "multiply", "imul", "where", "masked_fill", "masked_fill_", "float", "double", "half", "bfloat16",
    "type_as",
})  # fmt: skip
"""What makes numbers of flags, or takes them for a choice between two numbers."""
_FORMS = frozenset({
    "invert", "logical_not", "bitwise_not", "and_", "or_", "xor", "logical_and", "logical_or", "logical_xor", "view",
    "reshape", "unsqueeze", "squeeze", "expand", "expand_as", "repeat", "t", "transpose", "permute", "detach", "clone",
    "contiguous", "to",
})  # fmt: skip
"""What makes flags of flags; ``to`` may make numbers as well."""


_LARGEST = 1 << 22
"""Flags of a mask that is looked at: those of 4,096 positions that see each other are no matter of channels."""


def masks_of(module: TracedModule) -> set[str]:
    """The names of the buffers of flags that no node takes for an index, or reads in a way that is not known here."""
    named = module.named_buffers(remove_duplicate=False)
    flags = {n: b for n, b in named if b.dtype is torch.bool and 1 < b.numel() <= _LARGEST}
    reads = [
        (str(node.target), node)
        for graph in (module.graphs.values() if flags else ())
        for node in graph.find_nodes(op="get_attr")
    ]
    used = {id(flags[name]) for name, node in reads if name in flags and not _is_mask(node)}
    held = {id(buffer) for buffer in _of_layers(module, {id(b) for b in flags.values()})}
    return {name for name, buffer in flags.items() if id(buffer) not in used | held}


def _of_layers(module: TracedModule, flags: set[int]) -> Iterable[Tensor]:
    """Those that a layer holds which is a node: what it does with them is not in the graph."""
    for graph in module.graphs.values() if flags else ():
        for node in graph.find_nodes(op="call_module"):
            yield from (b for b in module.get_submodule(str(node.target)).buffers() if id(b) in flags)


def _is_mask(node: fx.Node) -> bool:
    """Whether all that reads flags takes them for a mask."""
    return all(_reads_mask(user, node) for user in node.users)


def _reads_mask(user: fx.Node, flags: fx.Node) -> bool:
    name = function_name(user)
    if name in _CHOICES:
        return name != "where" or len(user.args) + len(user.kwargs) > 1  # alone it returns the places of the flags
    if name == "to" and _names_floats([*user.args[1:], *user.kwargs.values()]):
        return True
    if name == "getitem":  # a part of the mask, not what it picks
        return user.args[0] is flags and flags not in user.all_input_nodes[1:] and _is_mask(user)
    return name in _FORMS and _is_mask(user)


def _names_floats(arguments: Iterable[object]) -> bool:
    """Whether one of the arguments is a floating type, or the type of another tensor."""
    return any(
        (isinstance(a, torch.dtype) and a.is_floating_point)
        or (isinstance(a, fx.Node) and a.target is getattr and a.args[1] == "dtype")
        for a in arguments
    )
