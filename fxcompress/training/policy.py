"""When to remove what is dead: a removal costs time, and so does what is dead and still computed."""

from dataclasses import dataclass, field, replace
from numbers import Integral

from fxcompress.errors import check_number


@dataclass(slots=True)
class PrunePolicy:
    """Decides after each step whether to remove now.

    By default a removal waits until the steps since the last one have wasted as much as a removal costs. Whatever
    happens later, that costs at most twice what the best plan would (the rent-or-buy argument: R. Karp, "On-line
    algorithms versus off-line algorithms", 1992). Nothing is measured, so a run can be repeated, and all processes of
    a distributed one decide the same.

    Attributes:
        cost: of a removal, in steps of training. With ``torch.compile(net)`` it includes compiling anew: take 100.
        every: remove after so many steps instead.
        wasted: since the last removal, in steps.

    >>> policy = PrunePolicy(cost=2)
    >>> [policy.due(0.5) for _ in range(5)]
    [False, False, False, True, False]
    """

    cost: float = 3.0
    every: int | None = None
    wasted: float = field(default=0.0, repr=False)

    def __post_init__(self) -> None:
        check_number(cost=self.cost, every=1 if self.every is None else self.every)
        if not self.cost > 0:
            raise ValueError(f"cost={self.cost} must be positive: a removal takes about three steps of training")
        if self.every is not None and self.every < 1:
            raise ValueError(f"every={self.every} must be at least one step")

    def due(self, removable: float) -> bool:
        """Whether to remove after this step.

        Args:
            removable: share of the weights computed with in this step that could go.
        """
        self.wasted += removable if self.every is None else 1
        due = self.wasted >= (self.cost if self.every is None else self.every)
        if due:
            self.wasted = 0.0
        return due


def prune_policy(prune: "bool | int | PrunePolicy") -> PrunePolicy | None:
    """What the argument ``prune`` of :func:`fxcompress.fit` stands for; None where nothing is removed while training.

    Raises:
        TypeError: it is none of these.
        ValueError: a number of steps below 1.
    """
    _check_kind(prune)
    if isinstance(prune, PrunePolicy):
        return replace(prune)  # what it counts belongs to one run
    if prune is True:
        return PrunePolicy()
    return PrunePolicy(every=prune) if prune is not False else None


def _check_kind(prune: object) -> None:
    if not isinstance(prune, Integral | PrunePolicy):
        raise TypeError(f"prune={prune!r} is none of True, False, a whole number of steps and a PrunePolicy")
