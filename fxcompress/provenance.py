"""Where a rewritten network came from: enough to cut a freshly built original to the same shape.

Stored in ``module.meta["fxcompress"]`` by the passes (for a piece that runs graphs in place of its own ``forward``, in
``fxc_meta`` of its class; for a network with the model's own code, in an attribute of that name), read by the storage
layer and the reports.
"""

from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor, fx, nn

_KEY = "fxcompress"
_ATTRIBUTE = "fxc_meta"
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Grid:
    """The number format of a finalized weight: ``weight = code * 2**exponent`` for each channel.

    Attributes:
        bits: real-valued bit depth of each output channel, length O.
        exponent: real-valued exponent of each output channel, length O.
        channel_dim: the dim of the weight that holds the output channels (1 for transposed convs, else 0).
        groups: with ``channel_dim == 1``, the number of groups that dim 0 is split into; the O output channels are
            then the (groups, O / groups) pairs in order.
        batch_dims: dims beside ``channel_dim`` along which each entry has channels of its own, as each expert of a
            weight (E, I, O) has; the channels are then the (E, O) pairs in the order of the dims.
    """

    bits: tuple[float, ...]
    exponent: tuple[float, ...]
    channel_dim: int = 0
    groups: int = 1
    batch_dims: tuple[int, ...] = ()


Cuts = tuple[tuple[str, str], ...]
"""Graph nodes that were replaced by one of their operands, in order: ``("mode:node", operand)``."""
Inputs = tuple[tuple[str, tuple[int, ...], str], ...]
"""(keyword or "", shape, dtype) of each input; empty where an input was no tensor."""


@dataclass(frozen=True, slots=True)
class Narrowing:
    """A sum one path of which has lost channels that the sum still has.

    Attributes:
        place: ``"mode:node"``, the node that adds.
        operand: which of its two operands is the narrow path, 0 or 1.
        dim: of the channels, from the left.
    """

    place: str
    operand: int
    dim: int


@dataclass(frozen=True, slots=True)
class PieceRecord:
    """What is recorded of a piece besides its tensors; see :class:`Provenance`."""

    cuts: Cuts = ()
    weights: int = 0
    inputs: Inputs = ()
    joins: tuple[Narrowing, ...] = ()
    graph: str = ""


@dataclass(frozen=True, slots=True)
class Provenance:
    """What was cut out of the original network.

    Attributes:
        shapes: the original shape of every parameter and buffer, by its name in the state_dict.
        kept: for each tensor that was cut, the original indices that stay along each cut dim.
        cuts: see :data:`Cuts`.
        grids: the number format of each quantized weight, by its name in the state_dict.
        weights: N of the paper, the quantized weights of the starting network; 0 when nothing was quantized.
        inputs: what the network was analysed on.
        biases: weights whose layers the original has without a bias, and which got one when constants were folded.
        joins: sums that a path narrower than the sum leads to. Which channels the path has lost follows from ``kept``.
        pieces: by their paths, for a network that was rewritten in pieces; its own ``cuts``, ``inputs``, ``joins`` and
            ``graph`` are empty.
        graph: :func:`~fxcompress.trace.fingerprint.fingerprint` of the original's graph; empty where it is not known.
        own_code: only what leaves the model's code as it is was cut out, and will be.
    """

    shapes: dict[str, tuple[int, ...]]
    kept: dict[str, dict[int, tuple[int, ...]]] = field(default_factory=dict)
    cuts: Cuts = ()
    grids: dict[str, Grid] = field(default_factory=dict)
    weights: int = 0
    inputs: Inputs = ()
    biases: tuple[str, ...] = ()
    joins: tuple[Narrowing, ...] = ()
    pieces: dict[str, PieceRecord] = field(default_factory=dict)
    graph: str = ""
    own_code: bool = False

    def of_piece(self, path: str) -> "Provenance":
        """What was cut out of one piece, with the names that its tensors have in it."""
        prefix = f"{path}."

        def own(table: dict[str, _T]) -> dict[str, _T]:
            return {name.removeprefix(prefix): value for name, value in table.items() if name.startswith(prefix)}

        piece, biases = self.pieces[path], tuple(own(dict.fromkeys(self.biases)))
        tables = own(self.shapes), own(self.kept), piece.cuts, own(self.grids)
        return Provenance(*tables, piece.weights, piece.inputs, biases, piece.joins, graph=piece.graph)


def attach(module: nn.Module, provenance: Provenance) -> None:
    """Record ``provenance`` on ``module``, in place of what was there."""
    if isinstance(module, fx.GraphModule):
        module.meta[_KEY] = provenance
    else:
        module.__dict__[_ATTRIBUTE] = {_KEY: provenance}


def provenance_of(module: nn.Module) -> Provenance | None:
    """The provenance of ``module``, of all its pieces together where they have one; None where there is none."""
    own = _recorded(module)
    if own is not None:
        return own
    pieces = {path: found for path, child in module.named_modules() if path and (found := _recorded(child)) is not None}
    return _joined(module, pieces) if pieces else None


def keeps_code(module: nn.Module) -> bool:
    """Whether rewrites of ``module`` must leave the code of the model as it is."""
    found = _recorded(module)
    return found is not None and found.own_code


def has_record(module: nn.Module) -> bool:
    """Whether ``module`` itself, and not only a part of it, was made by a rewrite."""
    return _recorded(module) is not None


def _recorded(module: nn.Module) -> Provenance | None:
    if isinstance(module, fx.GraphModule):
        meta = module.meta
    else:
        meta = module.__dict__.get(_ATTRIBUTE) or getattr(type(module), _ATTRIBUTE, {})
    found = meta.get(_KEY)
    return found if isinstance(found, Provenance) else None


def _joined(module: nn.Module, pieces: dict[str, Provenance]) -> Provenance:
    """What was cut out of all pieces, with the names of the whole."""
    inside = tuple(f"{path}." for path in pieces)
    state = module.state_dict(keep_vars=True)
    shapes = {n: tuple(v.shape) for n, v in state.items() if isinstance(v, Tensor) and not n.startswith(inside)}

    def named(tables: dict[str, dict[str, _T]]) -> dict[str, _T]:
        return {f"{path}.{name}": value for path, table in tables.items() for name, value in table.items()}

    return Provenance(
        shapes=shapes | named({path: one.shapes for path, one in pieces.items()}),
        kept=named({path: one.kept for path, one in pieces.items()}),
        grids=named({path: one.grids for path, one in pieces.items()}),
        weights=sum(one.weights for one in pieces.values()),
        biases=tuple(f"{path}.{name}" for path, one in pieces.items() for name in one.biases),
        pieces={
            path: PieceRecord(one.cuts, one.weights, one.inputs, one.joins, one.graph) for path, one in pieces.items()
        },
    )
