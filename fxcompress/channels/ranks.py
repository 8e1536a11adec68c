"""Tensors that have another number of dims for inputs of other sizes: ``squeeze`` takes a dim of one entry away.

h = pool(x).squeeze()        (C,) for one sample, (N, C) for more; h[0] is a channel, or a sample
fc(h), h.relu()              the same of both, as the channels are last in both
"""

from torch import fx, nn

from fxcompress.channels.layers import support
from fxcompress.channels.values import LabelTensor, leaves
from fxcompress.trace.graph.calls import function_name
from fxcompress.trace.inputs import ExampleInputs
from fxcompress.trace.retrace.other_shapes import shapes_elsewhere
from fxcompress.trace.traced import TracedModule

_KEY = "fxcompress_rank"
_LOOSE, _SCATTERED = "loose", "scattered"
_SAME = frozenset(
    {
        "linear", "add", "sub", "mul", "truediv", "div", "neg", "pow", "iadd", "isub", "imul", "relu", "relu_", "relu6",
        "sigmoid", "tanh", "gelu", "silu", "elu", "selu", "mish", "leaky_relu", "hardswish", "hardsigmoid", "hardtanh",
        "softplus", "logsigmoid", "dropout", "clamp", "exp", "log", "abs", "square", "sqrt", "rsqrt", "cos", "sin",
        "float", "double", "half", "to", "clone", "detach", "contiguous",
    }
)  # fmt: skip
"""What does the same to the last dim, however many there are before it."""
_BY_DIM = frozenset(
    {"softmax", "log_softmax", "sum", "mean", "amax", "amin", "norm", "normalize", "unsqueeze", "squeeze"}
)
"""The same where it takes a dim that is counted from the last one."""
_LAYERS = (
    nn.Linear, nn.Identity, nn.Dropout, nn.AlphaDropout, nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Tanh, nn.GELU, nn.SiLU,
    nn.ELU, nn.SELU, nn.Mish, nn.LeakyReLU, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softplus, nn.LayerNorm,
)  # fmt: skip


def note_ranks(module: TracedModule, inputs: ExampleInputs) -> None:
    """Note on the nodes of a network which results may have another number of dims; once, as no cut changes that.

    Args:
        module: the network.
        inputs: that it was traced on.
    """
    for mode, graph in module.graphs.items():
        squeezes = [node for node in graph.nodes if function_name(node) in {"squeeze", "squeeze_"}]
        if any(_KEY not in node.meta for node in squeezes):
            _note(module, inputs, mode)


def _note(module: TracedModule, inputs: ExampleInputs, mode: str) -> None:
    first, *others = list(shapes_elsewhere(module, inputs, mode)) or [{}]
    for node in module.graphs[mode].nodes:
        own = first.get(node.name)
        found = [shape for shapes in others if (shape := shapes.get(node.name)) is not None]
        if own is None or all(len(shape) == len(own) for shape in found):
            node.meta[_KEY] = ""
        else:
            node.meta[_KEY] = _LOOSE if all(shape[-1:] == own[-1:] for shape in found) else _SCATTERED


def is_misplaced(node: fx.Node, used: fx.Node, tensor: object, layer: nn.Module | None) -> bool:
    """Whether a node does something else to the channels of a tensor that has another number of dims.

    Args:
        node: a call.
        used: the node that makes the tensor.
        tensor: what that has returned.
        layer: that the node calls, if it does.
    """
    rank = used.meta.get(_KEY)
    if not rank or not isinstance(tensor, LabelTensor) or node.op == "output":
        return False
    last = {tensor.ndim - 1}
    return (
        rank == _SCATTERED or not _keeps_last(node, layer) or any(support(x) != last for x in tensor.fxc_value.layers)
    )


def _keeps_last(node: fx.Node, layer: nn.Module | None) -> bool:
    if node.op == "call_module":
        return isinstance(layer, _LAYERS)
    name = function_name(node)
    if name in _BY_DIM:
        dims = [n for n in leaves((node.args[1:], node.kwargs.get("dim"))) if type(n) is int]
        return bool(dims) and max(dims) < 0
    return name in _SAME
