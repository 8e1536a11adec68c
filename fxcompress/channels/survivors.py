"""What is left of shapes and labels once some atoms are gone."""

import numpy as np
import torch
from torch import Tensor

from fxcompress.channels.layers import Layers, compress, support
from fxcompress.channels.values import Value


def kept_masks(value: Value, alive: np.ndarray) -> dict[int, np.ndarray]:
    """For each labelled dim of a value, which of its entries stay anywhere: bool (size,)."""
    masks: dict[int, np.ndarray] = {}
    for layer in value.layers:
        stays = alive[layer.numpy()]
        for dim in support(layer):
            masks[dim] = _anywhere(stays, dim)
    return masks


def _anywhere(stays: np.ndarray, dim: int) -> np.ndarray:
    return np.asarray(stays.any(axis=tuple(d for d in range(stays.ndim) if d != dim)))


def ragged_dim(stays: np.ndarray) -> int | None:
    """The dim along which each slice keeps as many entries as the others, but not the same ones; None if there is none.

    Dims of heads are an example: each head may lose others, as long as it loses as many.

    Args:
        stays: which entries of a layer stay, bool, of any shape.
    """
    dims = [d for d, n in enumerate(stays.shape) if n > 1]
    if len(dims) < 2:
        return None
    whole = np.ones_like(stays)
    for dim in dims:
        whole &= np.moveaxis(_anywhere(stays, dim).reshape(-1, *[1] * (stays.ndim - 1)), 0, dim)
    if bool((whole == stays).all()):
        return None
    for dim in reversed(dims):
        counts = stays.sum(axis=dim, keepdims=True)
        slices = whole.any(axis=dim, keepdims=True)
        if len(np.unique(counts[slices])) == 1 and counts.max() > 0:
            return dim
    return None


def ragged_dims(value: Value, alive: np.ndarray) -> frozenset[int]:
    """The dims of a value along which its slices keep different entries."""
    found = (ragged_dim(alive[layer.numpy()]) for layer in value.layers if len(support(layer)) > 1)
    return frozenset(dim for dim in found if dim is not None)


def kept_shape(value: Value, alive: np.ndarray) -> tuple[int, ...]:
    """The shape that is left."""
    return Survivors(alive).shape(value)


def has_own_labels(value: Value, dim: int) -> bool:
    """Whether each entry along a dim has a label of its own; then its size is a matter of the network alone."""
    layer = next((layer for layer in value.layers if layer.shape[dim] > 1), None)
    if layer is None:
        return False
    labels = layer.movedim(dim, 0).reshape(layer.shape[dim], -1)[:, 0]
    return bool(labels.all()) and labels.unique().numel() == labels.numel()


class Survivors:
    """What is left of values. Many tensors carry the same layer, which is packed once.

    Args:
        alive: bool (atoms,).
    """

    def __init__(self, alive: np.ndarray) -> None:
        self.alive = alive
        self._packed: dict[int, tuple[Tensor, Tensor]] = {}  # beside each layer, which must outlive its id
        self._small: dict[int, tuple[Tensor, Tensor]] = {}
        self._sizes: dict[int, tuple[Tensor, list[tuple[int, int]]]] = {}

    def shape(self, value: Value) -> tuple[int, ...]:
        """The shape that is left."""
        shape = list(value.shape)
        for layer in value.layers:
            for dim, size in self._left_sizes(layer):
                shape[dim] = size
        return tuple(shape)

    def layers(self, value: Value) -> Layers:
        """The labels that are left, in canonical form."""
        return self.canonical([self._left(layer) for layer in value.layers])

    def canonical(self, layers: Layers | list[Tensor]) -> Layers:
        """Layers without those that no longer vary, in the order of their dims."""
        left = [small for layer in layers if (small := self._compressed(layer)).numel() > 1]
        return tuple(left if len(left) < 2 else sorted(left, key=lambda x: sorted(support(x))))

    def _left_sizes(self, layer: Tensor) -> list[tuple[int, int]]:
        """The dims along which a layer varies, and the size that is left of each."""
        if id(layer) not in self._sizes:
            sizes = zip(layer.shape, self._left(layer).shape, strict=True)
            self._sizes[id(layer)] = layer, [(d, new) for d, (old, new) in enumerate(sizes) if old > 1]
        return self._sizes[id(layer)][1]

    def _left(self, layer: Tensor) -> Tensor:
        if id(layer) not in self._packed:
            self._packed[id(layer)] = layer, _left_of(layer, self.alive)
        return self._packed[id(layer)][1]

    def _compressed(self, layer: Tensor) -> Tensor:
        if id(layer) not in self._small:
            self._small[id(layer)] = layer, compress(layer)
        return self._small[id(layer)][1]


def _left_of(layer: Tensor, alive: np.ndarray) -> Tensor:
    """What is left of a layer; most vary along one dim alone."""
    atoms = layer.numpy()
    stays = alive[atoms]
    if layer.numel() > max(layer.shape, default=1):
        return pack(layer, stays)
    left = atoms[stays]
    return (
        layer
        if left.size == atoms.size
        else torch.from_numpy(left.reshape([1 if n == 1 else left.size for n in layer.shape]))
    )


def pack(tensor: Tensor, stays: np.ndarray) -> Tensor:
    """What is left of a tensor.

    Args:
        tensor: of any shape that broadcasts against that of the layer; along dims of size 1 it does not vary.
        stays: which entries of the layer stay, bool, of the same rank.
    """
    ragged = ragged_dim(stays)
    mask = torch.from_numpy(stays)
    for dim in (d for d, n in enumerate(stays.shape) if n > 1 and d != ragged):
        here = _anywhere(stays, dim)
        if not here.all():
            index = torch.from_numpy(np.flatnonzero(here))
            mask = mask.index_select(dim, index)
            tensor = tensor if tensor.shape[dim] == 1 else tensor.index_select(dim, index)
    if ragged is None or tensor.shape[ragged] == 1:
        return tensor
    tensor, mask = (t.movedim(ragged, -1) for t in torch.broadcast_tensors(tensor, mask))
    return tensor[mask].reshape(*tensor.shape[:-1], -1).movedim(-1, ragged)
