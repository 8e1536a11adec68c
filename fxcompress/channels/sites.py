"""Where channels are made and read: contractions, tables, products and sums, each with its atoms as arrays."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fxcompress.channels.carried import Held
from fxcompress.channels.layers import along
from fxcompress.channels.rules.contraction import Site
from fxcompress.channels.rules.products import Product
from fxcompress.channels.space import FIXED
from fxcompress.channels.values import Call, Value
from fxcompress.trace.graph.described import Place

COLUMNS = 1
"""The dim of a table that holds its channels."""


def along_dim(value: Value, dim: int, size: int) -> np.ndarray:
    """The atoms of a value along one dim, FIXED where there are none, shape (size,)."""
    for layer in value.layers:
        if layer.numel() == layer.shape[dim] > 1:
            return layer.numpy().reshape(-1)
    return np.zeros(size, dtype=np.int64)


def first_slice(value: Value, dim: int, size: int) -> np.ndarray:
    """The same of what varies along other dims as well, where it goes with all of its slice: the atoms of the first."""
    layer = along(value.layers, dim)
    if layer is None:
        return np.zeros(size, dtype=np.int64)
    for other in range(layer.ndim):
        layer = layer if other == dim else layer.narrow(other, 0, 1)
    return layer.numpy().reshape(-1)


@dataclass(frozen=True, slots=True, eq=False)
class SiteAtoms:
    """A contraction site with the atoms of its entries and rows.

    Attributes:
        site: the contraction.
        mode: the graph that holds it.
        place: of the node that holds it.
        entries: (K,) what is read.
        rows: (R,) what is made.
        weight_name: the parameter behind the weight, or "" for a product of two activations.
        call: what runs.
        result: what is made.
        reads_columns: whether what is contracted are the channels of the weight: those of a table that the layer is
            tied to, or of another layer, which reads the weight the other way round (a tied autoencoder).
        held: what the weight holds of the parameter behind it.
    """

    site: Site
    mode: str
    place: Place
    entries: np.ndarray
    rows: np.ndarray
    weight_name: str
    call: Call
    result: Value
    reads_columns: bool = False
    held: Held | None = None

    @property
    def node(self) -> str:
        """The name of the node that holds it."""
        return self.place.node

    @property
    def has_bits(self) -> bool:
        """Whether the bits of its weight, if that has a quantizer, are those of what is made."""
        return not self.reads_columns

    def dims(self, atoms: dict[int, Tensor]) -> tuple[int, int]:
        """The dims of the parameter that hold rows and columns: a linear layer reads it transposed, ``x @ w`` does not.

        Args:
            atoms: of the parameter.
        """
        site = self.site
        if self.held is None:
            return site.row, site.column
        dims = self.held.dims(atoms, site.weight.rank)
        return dims[site.row], dims[site.column]


@dataclass(frozen=True, slots=True, eq=False)
class TableAtoms:
    """A lookup of rows in a table, with the atoms of the table's columns, which are the channels of the result.

    Attributes:
        mode: the graph that holds it.
        node: the node that holds it.
        table: the value that is looked up in, (V, D).
        rows: (D,) what is made.
        weight_name: the parameter behind the table.
        call: what runs.
        result: what is made; its last dim holds the channels.
    """

    mode: str
    node: str
    table: Value
    rows: np.ndarray
    weight_name: str
    call: Call
    result: Value

    @property
    def has_bits(self) -> bool:
        """Whether the bits of the table, if that has a quantizer, are those of what is made."""
        return True


@dataclass(frozen=True, slots=True, eq=False)
class PlainAtoms:
    """A quantized parameter that is no layer's weight and no table, with the atoms of its channels.

    As position embeddings are, which are added, and the weights of experts, which a batched product takes.

    Attributes:
        mode: the graph that holds it.
        place: of the node that quantizes it.
        weight: its value.
        dim: that holds the channels.
        dims: along which they differ: this one, and those of experts or heads, say.
        rows: (O,) the atoms of its bits.
        weight_name: the parameter.
        meets: what each entry is multiplied with, as the entries of values along some of their dims; with the share of
            the entries that are, as one of some matrices in it may be.
        call: what quantizes it.
    """

    mode: str
    place: Place
    weight: Value
    dim: int
    dims: tuple[int, ...]
    rows: np.ndarray
    weight_name: str
    meets: tuple[tuple[Value, tuple[int, ...], float], ...]
    call: Call

    @property
    def has_bits(self) -> bool:
        """Whether the bits are those of what is made."""
        return True

    def others(self, alive: np.ndarray) -> int:
        """How many entries a channel has.

        Args:
            alive: bool (atoms,), what is left.
        """
        count = 1
        for dim, size in enumerate(self.weight.shape):
            if dim not in self.dims:
                labels = along_dim(self.weight, dim, size)
                count *= int((alive[labels] | (labels == FIXED)).sum())
        return count


Maker = SiteAtoms | TableAtoms | PlainAtoms
"""What makes channels."""


@dataclass(frozen=True, slots=True, eq=False)
class ProductAtoms:
    """A batched product with the atoms of its entries and results.

    Attributes:
        product: the product.
        mode: the graph that holds it.
        place: of the node that holds it.
        entries: (N or 1, K), what is contracted.
        results: the layers of the result, each of the form (N or 1, L or 1, R or 1).
    """

    product: Product
    mode: str
    place: Place
    entries: np.ndarray
    results: tuple[np.ndarray, ...]

    @property
    def node(self) -> str:
        """The name of the node that holds it."""
        return self.place.node


@dataclass(frozen=True, slots=True, eq=False)
class SumAtoms:
    """A sum, or a norm, with the atoms of its entries.

    Attributes:
        source: what is summed.
        mode: the graph that holds it.
        place: of the node that holds it.
        entries: a layer of the source.
        slots: what each slice of it leaves behind, of a shape that broadcasts against ``entries``; empty for nothing.
    """

    source: Value
    mode: str
    place: Place
    entries: np.ndarray
    slots: np.ndarray

    @property
    def node(self) -> str:
        """The name of the node that holds it."""
        return self.place.node
