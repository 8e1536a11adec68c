"""What modules remember of the shapes of their parameters."""

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm

from fxcompress.quantizer import Quantizer, is_grouped
from fxcompress.trace.weights.computed import SUFFIX


def update_attributes(module: nn.Module, original: nn.Module) -> None:
    """Make the attributes of ``module`` agree with its tensors, which are cut already.

    Args:
        module: a part of the cut network.
        original: the same part of the network as it was.
    """
    if isinstance(module, _ConvNd | nn.Linear):
        weight, before = _weight(module), _weight(original)
        if weight is not None and before is not None:
            _layer(module, weight, before)
    elif isinstance(module, Quantizer):
        _quantizer(module, original)
    elif isinstance(module, _NormBase):
        sized = next((t for t in (module.weight, module.running_mean) if t is not None), None)
        module.num_features = module.num_features if sized is None else sized.numel()
    elif isinstance(module, nn.GroupNorm):
        module.num_groups = max(1, module.num_groups * module.weight.numel() // module.num_channels)
        module.num_channels = module.weight.numel()
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm) and module.elementwise_affine:
        module.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
        module.num_embeddings, module.embedding_dim = module.weight.shape
    elif isinstance(module, nn.PReLU):
        module.num_parameters = module.weight.numel()
    elif isinstance(module, nn.RNNBase | nn.RNNCellBase):
        _recurrent(module, original)


def fit_to_input(module: nn.Module, args: tuple[object, ...]) -> None:
    """Let a module without tensors of its own, which warns of inputs of another width, expect what it gets now.

    Args:
        module: a part of the cut network.
        args: that it is called with.
    """
    if isinstance(module, _InstanceNorm) and not module.affine and not module.track_running_stats:
        for x in args[:1]:
            if isinstance(x, Tensor):
                module.num_features = x.shape[x.dim() - module._get_no_batch_dim()]


def _quantizer(module: Quantizer, original: nn.Module) -> None:
    if is_grouped(module.channel_dim, module.groups):
        module.groups = module.groups * module.bits.numel() // original.get_parameter("bits").numel()


def _recurrent(module: nn.RNNBase | nn.RNNCellBase, original: nn.Module) -> None:
    """All layers of a recurrent module have one hidden size; its list of weights renews itself at the next call."""
    if isinstance(module, nn.RNNCellBase):
        module.input_size, module.hidden_size = module.weight_ih.shape[1], module.weight_hh.shape[1]
        return
    rows, columns = module.get_parameter("weight_hh_l0").shape
    before = original.get_parameter("weight_hh_l0").shape[0]
    module.input_size = module.get_parameter("weight_ih_l0").shape[1]
    module.hidden_size = module.hidden_size * rows // before
    module.proj_size = columns if module.proj_size else 0


def _weight(layer: nn.Module) -> Tensor | None:
    """That of a layer, whose own code may have computed it; None where it goes by a name that only that code knew."""
    found = getattr(layer, "weight", None)
    found = getattr(layer, f"weight{SUFFIX}", None) if found is None else found
    return found if isinstance(found, Tensor) else None


def _layer(module: _ConvNd | nn.Linear, weight: Tensor, before: Tensor) -> None:
    first, second = weight.shape[:2]
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = first, second
        return
    if module.groups > 1:
        module.groups = module.groups * first // before.shape[0]
    if isinstance(module, _ConvTransposeNd):
        module.in_channels, module.out_channels = first, second * module.groups
    else:
        module.out_channels, module.in_channels = first, second * module.groups
