"""Layers of torch.nn whose ATen call is known, so that labels need not go through their code.

What such a layer does is one ATen op on its input and its parameters. It goes to the dispatcher of labels at once; by
way of the module's call, the functions of torch.nn and torch's own dispatcher the same op would arrive there, later. A
layer that is used in another way than its op allows (other dims, sizes, types) takes the long way; so do subclasses.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fxcompress.channels.values import LabelTensor, Value

Own = Callable[[str], Value | None]
"""From the name of a parameter or buffer of the layer to what it holds."""
AtenCall = tuple[Any, tuple[Any, ...]]
"""An op, or None for what returns its input, and its arguments after the input."""
_AT = torch.ops.aten


def aten_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], own: Own) -> AtenCall | None:
    """The op that a layer calls in evaluation, and its arguments; None where it is not known.

    Args:
        module: the layer.
        args: what it is given.
        kwargs: the same.
        own: its parameters and buffers.
    """
    rule = KNOWN.get(type(module))
    if rule is None or kwargs or len(args) != 1 or type(args[0]) is not LabelTensor:
        return None
    x = args[0].fxc_value
    known = rule(module, x, own)
    mixed = known is not None and any(isinstance(a, Value) and a.meta.dtype != x.meta.dtype for a in known[1])
    return None if mixed else known


def _convolution(module: Any, x: Value, own: Own) -> AtenCall | None:  # noqa: ANN401 - a convolution
    spatial = len(module.kernel_size)
    if module.padding_mode != "zeros" or isinstance(module.padding, str) or x.rank != spatial + 2:
        return None
    layout = list(module.stride), list(module.padding), list(module.dilation), False, [0] * spatial, module.groups
    return _AT.convolution.default, (own("weight"), own("bias"), *layout)


def _batch_norm(dims: tuple[int, ...]) -> Callable[[Any, Value, Own], AtenCall | None]:
    def call(module: Any, x: Value, own: Own) -> AtenCall | None:  # noqa: ANN401 - a batch norm
        held = [own(name) for name in ("weight", "bias", "running_mean", "running_var")]
        sizes = {tensor.shape[0] for tensor in held if tensor is not None}
        if held[2] is None or held[3] is None or x.rank not in dims or sizes != {x.shape[1]}:
            return None
        momentum = 0.0 if module.momentum is None else module.momentum
        return _AT.native_batch_norm.default, (*held, False, momentum, module.eps)

    return call


def _pointwise(op: Any, *names: str) -> Callable[[Any, Value, Own], AtenCall | None]:  # noqa: ANN401 - a packet
    written = getattr(_AT, f"{op.__name__}_")

    def call(module: Any, x: Value, own: Own) -> AtenCall | None:  # noqa: ANN401 - an activation
        func = written if getattr(module, "inplace", False) else op
        return func.default, tuple(getattr(module, name) for name in names)

    return call


def _same(module: nn.Module, x: Value, own: Own) -> AtenCall:
    return None, ()


KNOWN: dict[type[nn.Module], Callable[[Any, Value, Own], AtenCall | None]] = {
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _convolution),
    nn.BatchNorm1d: _batch_norm((2, 3)),
    nn.BatchNorm2d: _batch_norm((4,)),
    nn.BatchNorm3d: _batch_norm((5,)),
    nn.ReLU: _pointwise(_AT.relu),
    nn.ReLU6: _pointwise(_AT.hardtanh, "min_val", "max_val"),
    nn.Hardtanh: _pointwise(_AT.hardtanh, "min_val", "max_val"),
    nn.SiLU: _pointwise(_AT.silu),
    nn.Sigmoid: _pointwise(_AT.sigmoid),
    nn.Tanh: _pointwise(_AT.tanh),
    nn.Hardswish: _pointwise(_AT.hardswish),
    nn.Hardsigmoid: _pointwise(_AT.hardsigmoid),
    **dict.fromkeys((nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), _same),
}
"""How a layer of exactly one of these classes is called."""
