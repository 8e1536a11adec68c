"""Networks of torchvision, and channels of them that are made dead."""

from typing import Any

import torch
from torch import Tensor, nn

import fxcompress as fxc

EXAMPLE = (1, 3, 224, 224)
CLASSES = 1000
_AUXILIARY = {"googlenet", "inception_v3"}  # built without their second heads, which nothing uses in evaluation


def network(name: str, seed: int) -> nn.Module:
    """A network of torchvision with random weights, in evaluation mode."""
    import torchvision

    torch.manual_seed(seed)
    options: dict[str, Any] = {"aux_logits": False, "init_weights": False} if name in _AUXILIARY else {}
    net: nn.Module = getattr(torchvision.models, name)(**options).eval()
    return net


def spread(size: int, share: float) -> list[int]:
    """``share`` of the indices below ``size``, evenly spaced: 1, 3, 5... for a half."""
    return [i for i in range(size) if int((i + 1) * share) > int(i * share)]


def zero_share(model: nn.Module, example: Tensor, share: float) -> int:
    """Make the same share of each layer's removable groups dead, by zeroing what makes them; never what reads them.

    That is: rows of weights, biases, the affine parameters of norms, position embeddings and the like.

    Returns:
        how many groups are dead now.
    """
    graph = fxc.ChannelGraph.of(model, example)
    analysis, parameters = graph.analysis, dict(model.named_parameters())
    rows = {s.weight_name: s.dims(analysis.atoms[s.weight_name])[0] for s in analysis.sites if s.weight_name}
    found: dict[tuple[str, int], set[int]] = {}
    count = 0
    for bundle in graph.bundles:
        if bundle.removable:
            for position in spread(len(bundle.groups), share):
                count += 1
                for name, dim, index in graph.groups[bundle.groups[position]].members:
                    if name in parameters and dim == rows.get(name, dim):
                        found.setdefault((name, dim), set()).add(index)
    with torch.no_grad():
        for (name, dim), indices in found.items():
            parameters[name].index_fill_(dim, torch.tensor(sorted(indices)), 0.0)
    return count


def randomise(model: nn.Module, seed: int) -> None:
    """Random statistics and affine parameters of batch norm, and in place of zeros: what is compared is not trivial."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if not bool(parameter.any()):  # a bias, or the head of a vision transformer
                parameter.normal_(std=0.02, generator=generator)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor, low, high in (
                    (module.weight, 0.5, 1.5),
                    (module.bias, -0.5, 0.5),
                    (module.running_mean, -0.5, 0.5),
                    (module.running_var, 0.5, 1.5),
                ):
                    assert tensor is not None
                    tensor.uniform_(low, high, generator=generator)


def difference(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest entry."""
    return float((a - b).abs().max() / a.abs().max())


def parameters_of(model: nn.Module) -> int:
    """How many numbers its parameters hold."""
    return sum(p.numel() for p in model.parameters())
