"""What a constant rule asks for, so that a mode in which it would be told the same need not ask it again.

Evaluation and training differ in batch norm and dropout alone, and behind these in what they have made different. So
most rules would find in the second mode what they have found in the first.
"""

from dataclasses import dataclass

from torch import Tensor

from fxcompress.channels.rules.registry import Known, equal_along, unknown
from fxcompress.channels.values import Step, Value


@dataclass(frozen=True, slots=True)
class Answer:
    """What a rule has found at one step.

    Attributes:
        found: the map of each output; None where nothing is known.
        asked: what the rule was told, by the key of the value: its map, or None.
        private: the rule asked for the mode, or looked at the maps past :meth:`Known.held`.
    """

    found: list[Tensor | None]
    asked: dict[int, Tensor | None]
    private: bool

    def holds(self, known: Known) -> bool:
        """Whether the rule would be told the very same."""
        maps = known.maps
        return not self.private and all(maps.get(key) is told for key, told in self.asked.items())


class Noted(Known):
    """What is known in a mode; notes what it is asked for.

    Args:
        known: what it answers from.

    Attributes:
        asked: see :class:`Answer`, since :meth:`begin`.
        private: the same.
    """

    def __init__(self, known: Known) -> None:
        super().__init__(known.maps, known.patterns, known.shared, training=known.training)
        self.begin()

    def begin(self, step: Step | None = None) -> None:
        """Another rule asks, at a step."""
        self.asked: dict[int, Tensor | None] = {}
        self.private = False
        self._anywhere = step.anywhere if step is not None else frozenset[int]()
        self._read = step.call.args[0].key if step is not None and self._anywhere else None

    @property
    def training(self) -> bool | None:
        """As that of :class:`Known`."""
        self.private = True
        return self._training

    @property
    def maps(self) -> dict[int, Tensor]:
        """As that of :class:`Known`."""
        self.private = True
        return self._maps

    def held(self, value: Value) -> Tensor:
        """As that of :class:`Known`."""
        self.asked[value.key] = found = self._maps.get(value.key)
        if found is None:
            return unknown(value)
        return equal_along(found.cpu(), self._anywhere) if value.key == self._read else found
