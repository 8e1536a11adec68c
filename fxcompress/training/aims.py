"""What a network is to end at besides a size: a share of its multiply-adds, or of its latency."""

from dataclasses import dataclass

from fxcompress.errors import check_number
from fxcompress.objectives import LatencyTable
from fxcompress.training.network import SizedNetwork
from fxcompress.training.selection import WORDS, Selection


@dataclass(frozen=True, slots=True)
class Aims:
    """What the user asked for.

    Attributes:
        macs, latency: shares to end at; one of them at most.
        table: the seconds of the layers, for ``latency``.

    Raises:
        TypeError: one is of another kind.
        ValueError: both are given, a table without the latency, or a value that is no share.
    """

    macs: float | None = None
    latency: float | None = None
    table: LatencyTable | None = None

    def __post_init__(self) -> None:
        if self.macs is not None and self.latency is not None:
            raise ValueError("pass either target_macs= or target_latency=: one of them says which channels go")
        if self.table is not None and self.latency is None:
            raise ValueError("latency_table= is for target_latency=, the share of its seconds to end at")
        if self.table is not None and not isinstance(self.table, LatencyTable):
            raise TypeError(
                f"latency_table= is a {type(self.table).__name__}; pass LatencyTable.measure(model, example_inputs)"
            )
        for kind, share in (("macs", self.macs), ("latency", self.latency)):
            if share is not None:
                check_number(**{f"target_{kind}": share})
                if not 0 < share < 1:
                    raise ValueError(f"target_{kind}={share} must be a share of the {WORDS[kind]}, between 0 and 1")

    def __bool__(self) -> bool:
        return self.macs is not None or self.latency is not None

    def selection(self, net: SizedNetwork, steps: int) -> Selection | None:
        """What leads a network there in so many steps; None where nothing was asked for."""
        if self.macs is not None:
            return Selection(net, self.macs, steps)
        return None if self.latency is None else Selection(net, self.latency, steps, "latency", self.table)
