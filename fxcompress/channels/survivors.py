"""What is left of shapes and labels once some atoms are gone."""

import numpy as np
import torch
from torch import Tensor

from fxcompress.channels.layers import Layers, compress, support
from fxcompress.channels.values import Value


def kept_masks(value: Value, alive: np.ndarray) -> dict[int, np.ndarray]:
    """For each labelled dim of a value, which of its entries stay: bool (size,)."""
    masks: dict[int, np.ndarray] = {}
    for layer in value.layers:
        stays = alive[layer.numpy()]
        for dim in support(layer):
            masks[dim] = stays.any(axis=tuple(d for d in range(stays.ndim) if d != dim))
    return masks


def kept_shape(value: Value, alive: np.ndarray) -> tuple[int, ...]:
    """The shape that is left."""
    masks = kept_masks(value, alive)
    return tuple(int(masks[d].sum()) if d in masks else n for d, n in enumerate(value.shape))


def kept_layers(value: Value, alive: np.ndarray) -> Layers:
    """The labels that are left, in canonical form."""
    masks = kept_masks(value, alive)
    result = []
    for layer in value.layers:
        rest = layer
        for dim in support(layer):
            if not masks[dim].all():
                rest = rest.index_select(dim, torch.from_numpy(np.flatnonzero(masks[dim])))
        result.append(rest)
    return canonical(result)


def canonical(layers: Layers | list[Tensor]) -> Layers:
    """Layers without those that no longer vary, in the order of their dims."""
    small = [compress(layer) for layer in layers]
    return tuple(sorted((layer for layer in small if layer.numel() > 1), key=lambda layer: sorted(support(layer))))
