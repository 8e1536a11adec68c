"""What is left of shapes and labels once some atoms are gone."""

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fxcompress.channels.layers import Layers, compress, support
from fxcompress.channels.values import Value


def kept_masks(value: Value, alive: np.ndarray) -> dict[int, np.ndarray]:
    """For each labelled dim of a value, which of its entries stay anywhere: bool (size,)."""
    return Survivors(alive).masks(value)


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
        found = counts[slices]
        if found.size and found.min() == found.max() > 0:
            return dim
    return None


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


class _Left:
    """What is left of one layer, which it keeps.

    Args:
        layer: of any shape.
        alive: bool (atoms,).

    Attributes:
        stays: which entries of the layer stay, bool, of its shape.
    """

    def __init__(self, layer: Tensor, alive: np.ndarray) -> None:
        self.layer = layer
        self.stays: np.ndarray = alive[layer.numpy()]

    @cached_property
    def masks(self) -> dict[int, np.ndarray]:
        """For each dim along which the layer varies, which of its entries stay anywhere: bool (size,)."""
        dims = [d for d, n in enumerate(self.layer.shape) if n > 1]
        if len(dims) == 1:
            return {dims[0]: self.stays.reshape(-1)}
        return {d: _anywhere(self.stays, d) for d in dims}

    @cached_property
    def ragged(self) -> int | None:
        """See :func:`ragged_dim`."""
        return ragged_dim(self.stays)

    @cached_property
    def packed(self) -> Tensor:
        """The labels that are left; most layers vary along one dim alone."""
        if self.layer.numel() > max(self.layer.shape, default=1):
            return self.pack(self.layer)
        atoms = self.layer.numpy()
        left = atoms[self.stays]
        if left.size == atoms.size:
            return self.layer
        return torch.from_numpy(left.reshape([1 if n == 1 else left.size for n in self.layer.shape]))

    @cached_property
    def canonical(self) -> Tensor:
        """The same, of size 1 where they do not vary any more."""
        return compress(self.packed)

    @cached_property
    def sizes(self) -> dict[int, int]:
        """The size that is left of each dim along which the layer varies."""
        sizes = zip(self.layer.shape, self.packed.shape, strict=True)
        return {d: new for d, (old, new) in enumerate(sizes) if old > 1}

    @cached_property
    def is_vector(self) -> bool:
        """Whether the layer varies along one dim alone, and what is left of it still does."""
        return len(self.masks) == 1 and self.canonical.numel() > 1

    @cached_property
    def _indices(self) -> dict[int, Tensor]:
        """What stays along each dim that loses whole slices."""
        cut = {d: mask for d, mask in self.masks.items() if d != self.ragged and not mask.all()}
        return {d: torch.from_numpy(np.flatnonzero(mask)) for d, mask in cut.items()}

    def _without_slices(self, tensor: Tensor) -> Tensor:
        for dim, index in self._indices.items():
            tensor = tensor if tensor.shape[dim] == 1 else tensor.index_select(dim, index)
        return tensor

    @cached_property
    def _mask(self) -> Tensor:
        return self._without_slices(torch.from_numpy(self.stays))

    def pack(self, tensor: Tensor) -> Tensor:
        """What is left of a tensor.

        Args:
            tensor: of any shape that broadcasts against that of the layer; along dims of size 1 it does not vary.
        """
        tensor, ragged = self._without_slices(tensor), self.ragged
        if ragged is None or tensor.shape[ragged] == 1:
            return tensor
        tensor, mask = (t.movedim(ragged, -1) for t in torch.broadcast_tensors(tensor, self._mask))
        return tensor[mask].reshape(*tensor.shape[:-1], -1).movedim(-1, ragged)


class Survivors:
    """What is left of values. Many tensors carry the same layer, which is looked at once.

    Args:
        alive: bool (atoms,).
    """

    def __init__(self, alive: np.ndarray) -> None:
        self.alive = alive
        self._left: dict[int, _Left] = {}
        self._small: dict[int, tuple[Tensor, Tensor]] = {}  # beside each layer, which must outlive its id

    def shape(self, value: Value) -> tuple[int, ...]:
        """The shape that is left."""
        shape = list(value.shape)
        for layer in value.layers:
            for dim, size in self._of(layer).sizes.items():
                shape[dim] = size
        return tuple(shape)

    def masks(self, value: Value) -> dict[int, np.ndarray]:
        """For each labelled dim of a value, which of its entries stay anywhere: bool (size,)."""
        return {dim: mask for layer in value.layers for dim, mask in self._of(layer).masks.items()}

    def ragged(self, value: Value) -> frozenset[int]:
        """The dims of a value along which its slices keep different entries."""
        found = (self._of(layer).ragged for layer in value.layers)
        return frozenset(dim for dim in found if dim is not None)

    def are_vectors(self, value: Value) -> bool:
        """Whether each label of a value varies along one dim alone, also after the cut."""
        return all(self._of(layer).is_vector for layer in value.layers)

    def pack(self, tensor: Tensor, value: Value) -> Tensor:
        """What is left of a tensor, whose shape broadcasts against that of the value."""
        for layer in value.layers:
            tensor = self._of(layer).pack(tensor)
        return tensor

    def layers(self, value: Value) -> Layers:
        """The labels that are left, in canonical form."""
        return _in_order([self._of(layer).canonical for layer in value.layers])

    def canonical(self, layers: Layers) -> Layers:
        """Layers without those that no longer vary, in the order of their dims."""
        return _in_order([self._compressed(layer) for layer in layers])

    def _of(self, layer: Tensor) -> _Left:
        found = self._left.get(id(layer))
        if found is None:
            found = self._left[id(layer)] = _Left(layer, self.alive)
        return found

    def _compressed(self, layer: Tensor) -> Tensor:
        if id(layer) not in self._small:
            self._small[id(layer)] = layer, compress(layer)
        return self._small[id(layer)][1]


def _in_order(layers: list[Tensor]) -> Layers:
    """Those layers that vary, in the order of their dims."""
    left = [layer for layer in layers if layer.numel() > 1]
    return tuple(left if len(left) < 2 else sorted(left, key=lambda x: sorted(support(x))))
