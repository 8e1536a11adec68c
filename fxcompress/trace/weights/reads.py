"""The functions that multiply by a weight, and where among their arguments it stands."""

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

FUNCTIONS = {
    F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, F.linear,
    torch.conv1d, torch.conv2d, torch.conv3d,
}  # fmt: skip
"""The functions that take a weight as their second argument, or as ``weight``, and a bias as their third."""
PRODUCTS: dict[Any, int] = {
    torch.matmul: 1, torch.mm: 1, operator.matmul: 1, torch.addmm: 2,
    "matmul": 1, "mm": 1, "__matmul__": 1, "addmm": 2,
}  # fmt: skip
"""Matrix products, as functions and as methods, and the position of the weight (inputs, outputs)."""

LOOKUPS = {F.embedding, F.embedding_bag}
"""The functions that look up rows of a table, which is their second argument, or ``weight``."""


def weight_of(node: fx.Node) -> fx.Node | None:
    """The node that makes what a layer multiplies with; None where ``node`` is no layer."""
    found: Any = None
    if node.op == "call_function" and node.target in FUNCTIONS:
        found = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
    elif node.op in {"call_function", "call_method"} and len(node.args) > PRODUCTS.get(node.target, len(node.args)):
        found = node.args[PRODUCTS[node.target]]
    return found if isinstance(found, fx.Node) else None
