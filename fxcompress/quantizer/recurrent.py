"""Recurrent layers that are called with their weights, so that these may come from quantizers."""

import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

__all__ = [
    "PLAIN", "QUANTIZED", "QuantizedGRU", "QuantizedGRUCell", "QuantizedLSTM", "QuantizedLSTMCell", "QuantizedRNN",
    "QuantizedRNNCell", "weight_names",
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


class _GivenCell(nn.RNNCellBase):
    """One step of a recurrent layer, the same way."""

    def forward(self, *args: Any, weights: Sequence[Tensor], **kwargs: Any) -> Any:  # noqa: ANN401 - as torch.nn has it
        """What the cell returns with these tensors in the place of its parameters, which stand in the same order."""
        cell = object.__new__(type(self))
        cell.__dict__.update(self.__dict__)
        cell.__dict__["_parameters"] = self._parameters | dict(zip(weight_names(self), weights, strict=True))
        return super(_GivenCell, cell).forward(*args, **kwargs)


class QuantizedLSTM(_Given, nn.LSTM):  # type: ignore[misc]
    """An ``nn.LSTM`` that is called with its weights."""


class QuantizedGRU(_Given, nn.GRU):  # type: ignore[misc]
    """An ``nn.GRU`` that is called with its weights."""


class QuantizedRNN(_Given, nn.RNN):  # type: ignore[misc]
    """An ``nn.RNN`` that is called with its weights."""


class QuantizedLSTMCell(_GivenCell, nn.LSTMCell):  # type: ignore[misc]
    """An ``nn.LSTMCell`` that is called with its weights."""


class QuantizedGRUCell(_GivenCell, nn.GRUCell):  # type: ignore[misc]
    """An ``nn.GRUCell`` that is called with its weights."""


class QuantizedRNNCell(_GivenCell, nn.RNNCell):  # type: ignore[misc]
    """An ``nn.RNNCell`` that is called with its weights."""


QUANTIZED: dict[type[nn.Module], type[nn.Module]] = {
    nn.LSTM: QuantizedLSTM, nn.GRU: QuantizedGRU, nn.RNN: QuantizedRNN,
    nn.LSTMCell: QuantizedLSTMCell, nn.GRUCell: QuantizedGRUCell, nn.RNNCell: QuantizedRNNCell,
}  # fmt: skip
"""For each recurrent layer of torch.nn, and each cell, the one that is called with its weights."""
PLAIN: dict[type[nn.Module], type[nn.Module]] = {made: plain for plain, made in QUANTIZED.items()}
"""The other way round."""


def weight_names(layer: nn.Module) -> list[str]:
    """The parameters of a recurrent layer or cell, in the order in which it is given them."""
    if isinstance(layer, nn.RNNBase):
        return list(layer._flat_weights_names)
    return [name for name, parameter in layer._parameters.items() if parameter is not None]
