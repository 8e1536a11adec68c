"""Layers that are called with their weights, so that these may come from quantizers.

They are those that no function of torch computes: recurrent layers, and transposed convolutions that are told the size
of their result, from which they find a padding.
"""

import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

__all__ = [
    "PLAIN", "QUANTIZED", "SIZED", "QuantizedConvTranspose1d", "QuantizedConvTranspose2d", "QuantizedConvTranspose3d",
    "QuantizedGRU", "QuantizedGRUCell", "QuantizedLSTM", "QuantizedLSTMCell", "QuantizedRNN", "QuantizedRNNCell",
    "weight_names",
]  # fmt: skip


class _Given(nn.RNNBase):
    """A recurrent layer of torch.nn whose weights are an argument: for each of its parameters a tensor of its shape."""

    def forward(self, *args: Any, weights: Sequence[Tensor], **kwargs: Any) -> Any:  # noqa: ANN401 - as torch.nn has it
        """What the layer returns with these tensors in the place of its parameters, which stand in the same order."""
        # A copy that shares everything else: whoever calls the layer at the same time must not see these.
        layer = object.__new__(type(self))
        layer.__dict__.update(self.__dict__)
        layer.__dict__["_parameters"] = dict(zip(self._flat_weights_names, weights, strict=True))
        layer.__dict__["_flat_weights"] = list(weights)
        layer.__dict__["_flat_weight_refs"] = [weakref.ref(weight) for weight in weights]
        return super(_Given, layer).forward(*args, **kwargs)


class _GivenOnce(nn.Module):
    """One step of a recurrent layer, or a convolution, the same way."""

    def forward(self, *args: Any, weights: Sequence[Tensor], **kwargs: Any) -> Any:  # noqa: ANN401 - as torch.nn has it
        """What the layer returns with these tensors in the place of its parameters, which stand in the same order."""
        layer = object.__new__(type(self))
        layer.__dict__.update(self.__dict__)
        layer.__dict__["_parameters"] = self._parameters | dict(zip(weight_names(self), weights, strict=True))
        return super(_GivenOnce, layer).forward(*args, **kwargs)


class QuantizedLSTM(_Given, nn.LSTM):  # type: ignore[misc]
    """An ``nn.LSTM`` that is called with its weights."""


class QuantizedGRU(_Given, nn.GRU):  # type: ignore[misc]
    """An ``nn.GRU`` that is called with its weights."""


class QuantizedRNN(_Given, nn.RNN):  # type: ignore[misc]
    """An ``nn.RNN`` that is called with its weights."""


class QuantizedLSTMCell(_GivenOnce, nn.LSTMCell):  # type: ignore[misc]
    """An ``nn.LSTMCell`` that is called with its weights."""


class QuantizedGRUCell(_GivenOnce, nn.GRUCell):  # type: ignore[misc]
    """An ``nn.GRUCell`` that is called with its weights."""


class QuantizedRNNCell(_GivenOnce, nn.RNNCell):  # type: ignore[misc]
    """An ``nn.RNNCell`` that is called with its weights."""


class QuantizedConvTranspose1d(_GivenOnce, nn.ConvTranspose1d):  # type: ignore[misc]
    """An ``nn.ConvTranspose1d`` that is called with its weight and bias, and perhaps a size."""


class QuantizedConvTranspose2d(_GivenOnce, nn.ConvTranspose2d):  # type: ignore[misc]
    """An ``nn.ConvTranspose2d`` that is called with its weight and bias, and perhaps a size."""


class QuantizedConvTranspose3d(_GivenOnce, nn.ConvTranspose3d):  # type: ignore[misc]
    """An ``nn.ConvTranspose3d`` that is called with its weight and bias, and perhaps a size."""


QUANTIZED: dict[type[nn.Module], type[nn.Module]] = {
    nn.LSTM: QuantizedLSTM, nn.GRU: QuantizedGRU, nn.RNN: QuantizedRNN,
    nn.LSTMCell: QuantizedLSTMCell, nn.GRUCell: QuantizedGRUCell, nn.RNNCell: QuantizedRNNCell,
}  # fmt: skip
"""For each recurrent layer of torch.nn, and each cell, the one that is called with its weights."""
SIZED: dict[type[nn.Module], type[nn.Module]] = {
    nn.ConvTranspose1d: QuantizedConvTranspose1d, nn.ConvTranspose2d: QuantizedConvTranspose2d,
    nn.ConvTranspose3d: QuantizedConvTranspose3d,
}  # fmt: skip
"""The same for layers that need it only where they are told the size of their result."""
PLAIN: dict[type[nn.Module], type[nn.Module]] = {made: plain for plain, made in (QUANTIZED | SIZED).items()}
"""The other way round."""


def weight_names(layer: nn.Module) -> list[str]:
    """The parameters of such a layer, in the order in which it is given them."""
    if isinstance(layer, nn.RNNBase):
        return list(layer._flat_weights_names)
    return [name for name, parameter in layer._parameters.items() if parameter is not None]
