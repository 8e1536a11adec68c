"""What modules remember of the shapes of their parameters."""

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from fxcompress.quantizer import Quantizer


def old_groups(module: nn.Module) -> int | None:
    """The number of groups of a convolution or quantizer; None for other modules."""
    return module.groups if isinstance(module, _ConvNd | Quantizer) else None


def update_attributes(module: nn.Module, old_channels: int | None) -> None:
    """Make the attributes of ``module`` agree with its tensors.

    Args:
        module: its parameters and buffers are cut already.
        old_channels: the size that its groups divided before: dim 0 of the weight of a convolution.
    """
    if isinstance(module, _ConvNd):
        _convolution(module, old_channels)
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, _NormBase):
        sized = next((t for t in (module.weight, module.running_mean) if t is not None), None)
        module.num_features = module.num_features if sized is None else sized.numel()
    elif isinstance(module, nn.PReLU):
        module.num_parameters = module.weight.numel()


def _convolution(module: _ConvNd, old_channels: int | None) -> None:
    first, second = module.weight.shape[:2]
    if module.groups > 1 and old_channels:
        module.groups = module.groups * first // old_channels
    if isinstance(module, _ConvTransposeNd):
        module.in_channels, module.out_channels = first, second * module.groups
    else:
        module.out_channels, module.in_channels = first, second * module.groups
