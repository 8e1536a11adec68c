"""What torch.fx notes of the code of a graph, gone when the graph is.

Code that calls functions marked by torch.fx.wrap marks them anew where it stands, and torch.fx keeps a list of all such
places, which every trace goes through. So each copy and each pruning of a network would make all that follows slower.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.fx import _symbolic_trace

_KEY = "_fxc_wrapped"
_PLACES = _symbolic_trace._wrapped_fns_to_patch  # noqa: SLF001


@contextmanager
def noted_with(module: nn.Module) -> Iterator[None]:
    """Within it, code of ``module`` is made: what was noted of older code goes, of this one when the module does."""
    earlier = module.__dict__.pop(_KEY, None)
    if earlier is not None:
        earlier()
    before = set(_PLACES)
    try:
        yield
    finally:
        fresh = [place for place in list(_PLACES) if place not in before]
        if fresh:
            module.__dict__[_KEY] = weakref.finalize(module, _forget, fresh)


def _forget(places: Iterable[tuple[int, str]]) -> None:
    for place in places:
        _PLACES.pop(place, None)
