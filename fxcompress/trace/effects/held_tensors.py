"""Which tensors the modules of a model hold: code may put others in their place while it runs."""

from torch import Tensor, nn

from fxcompress.trace.basics.modules import modules_in


class HeldTensors:
    """The tensors that the modules of a model hold.

    Args:
        model: as it is before it runs.
    """

    def __init__(self, model: nn.Module) -> None:
        self._tensors = {id(module): tensors_of(module) for module in modules_in(model)}

    def others_in(self, module: nn.Module) -> bool:
        """Whether a module of the model now holds other tensors, in the place of its own."""
        return any(
            any(a is not b for a, b in zip(tensors_of(each), self._tensors[id(each)], strict=True))
            for each in modules_in(module)
            if id(each) in self._tensors
        )


def tensors_of(module: nn.Module) -> list[Tensor | None]:
    """The parameters and buffers of a module, without those of its children; None where one is left out."""
    return [*module._parameters.values(), *module._buffers.values()]
