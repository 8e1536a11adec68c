"""Where a rewritten network came from: enough to cut a freshly built original to the same shape.

Stored in ``module.meta["fxcompress"]`` by the passes, read by the storage layer and the reports.
"""

from dataclasses import dataclass, field

from torch import fx

_KEY = "fxcompress"


@dataclass(frozen=True, slots=True)
class Grid:
    """The number format of a finalized weight: ``weight = code * 2**exponent`` for each channel.

    Attributes:
        bits: real-valued bit depth of each output channel, length O.
        exponent: real-valued exponent of each output channel, length O.
        channel_dim: the dim of the weight that holds the output channels (1 for transposed convs, else 0).
        groups: with ``channel_dim == 1``, the number of groups that dim 0 is split into; the O output channels are
            then the (groups, O / groups) pairs in order.
    """

    bits: tuple[float, ...]
    exponent: tuple[float, ...]
    channel_dim: int = 0
    groups: int = 1


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
class Provenance:
    """What was cut out of the original network.

    Attributes:
        shapes: the original shape of every parameter and buffer, by its name in the state_dict.
        kept: for each tensor that was cut, the original indices that stay along each cut dim.
        cuts: graph nodes that were replaced by one of their operands, in order: ``("mode:node", operand)``.
        grids: the number format of each quantized weight, by its name in the state_dict.
        weights: N of the paper, the quantized weights of the starting network; 0 when nothing was quantized.
        inputs: what the network was analysed on: (keyword or "", shape, dtype) of each tensor; empty where an input
            was no tensor.
        biases: weights whose layers the original has without a bias, and which got one when constants were folded.
        joins: sums that a path narrower than the sum leads to. Which channels the path has lost follows from ``kept``.
    """

    shapes: dict[str, tuple[int, ...]]
    kept: dict[str, dict[int, tuple[int, ...]]] = field(default_factory=dict)
    cuts: tuple[tuple[str, str], ...] = ()
    grids: dict[str, Grid] = field(default_factory=dict)
    weights: int = 0
    inputs: tuple[tuple[str, tuple[int, ...], str], ...] = ()
    biases: tuple[str, ...] = ()
    joins: tuple[Narrowing, ...] = ()


def attach(module: fx.GraphModule, provenance: Provenance) -> None:
    """Record ``provenance`` on ``module``, in place of what was there."""
    module.meta[_KEY] = provenance


def provenance_of(module: fx.GraphModule) -> Provenance | None:
    """The provenance of ``module``; None for a network that fxcompress has not written."""
    found = module.meta.get(_KEY)
    return found if isinstance(found, Provenance) else None
