"""What a network is to end at: a share of its multiply-adds or latency, or in a search the least of one of them."""

from dataclasses import dataclass
from typing import Any, Literal

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


By = Literal["size", "macs", "latency"]
_ENDLESS = 10**9
"""Steps of a training that is none."""


@dataclass(slots=True)
class Goal:
    """What a search makes as small as it can.

    Attributes:
        by: the bits that are left, the multiply-adds, or the seconds.
        table: these seconds; of the network that the search begins with.
    """

    by: By
    table: LatencyTable | None = None

    @property
    def word(self) -> str:
        """What is counted."""
        return "bits" if self.by == "size" else WORDS[self.by]

    def begin(self, net: SizedNetwork, *, progress: bool) -> None:
        """Measure the seconds of the network that a search begins with, where they count and no table is given."""
        selection = self._selection(net)
        if selection is not None:
            selection.measure(progress=progress)
            self.table = selection.table

    def share(self, net: SizedNetwork) -> float:
        """How much of the original is left."""
        selection = self._selection(net)
        return net.fractional_size() if selection is None else selection.left()

    def floor(self, net: SizedNetwork) -> float:
        """The least that can be asked of a network."""
        selection = self._selection(net)
        return 0.0 if selection is None else selection.floor()

    def options(self, target: float) -> dict[str, Any]:
        """The arguments of :func:`fxcompress.fit` for a share."""
        more = {"latency_table": self.table} if self.by == "latency" else {}
        return {f"target_{self.by}": target} | more

    def _selection(self, net: SizedNetwork) -> Selection | None:
        return None if self.by == "size" else Selection(net, 0.5, _ENDLESS, self.by, self.table)
