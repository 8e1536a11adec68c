"""The generators of torch, of the CPU and of GPUs, which a caller must find as they were.

``torch.manual_seed`` and ``torch.random.fork_rng`` will not do: the one seeds GPUs as well, also those that are used
later, and the other saves those alone that it is told of. Where there is no GPU, each seeding notes down the stack for
every kind of them besides, which takes longer than the analysis of a small network.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def accelerator() -> tuple[str, Any]:
    """The kind of GPUs of this machine and torch's module for them ("cuda" and ``torch.cuda``); or "" and None."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return ("", None) if found is None else (found.type, torch.get_device_module(found))


def states_of(module: Any) -> list[Tensor]:  # noqa: ANN401 - torch.cuda and the like
    """The state of the generator of each GPU of a kind; none where no GPU has been used yet."""
    if module is None or not getattr(module, "is_initialized", lambda: True)():
        return []
    several = getattr(module, "get_rng_state_all", None)  # MPS is one alone
    return [module.get_rng_state()] if several is None else list(several())


def set_states(module: Any, states: list[Tensor]) -> None:  # noqa: ANN401 - torch.cuda and the like
    """Set what :func:`states_of` found; those of GPUs that are not there are passed over."""
    several = hasattr(module, "set_rng_state_all")
    for index, state in enumerate(states[: module.device_count()]):
        module.set_rng_state(state, *([index] if several else []))


@contextmanager
def generators_kept(seed: int | None = None) -> Iterator[None]:
    """Leave the generators of torch as they were.

    Args:
        seed: what they start from within; where they stand, without one.

    >>> before = torch.get_rng_state()
    >>> with generators_kept(seed=0):
    ...     drawn = torch.rand(2)
    >>> torch.equal(before, torch.get_rng_state())
    True
    """
    _, module = accelerator()
    own = torch.default_generator.get_state()
    others = states_of(module)
    if seed is not None:
        torch.default_generator.manual_seed(seed)
        if others:
            (module.manual_seed_all if hasattr(module, "manual_seed_all") else module.manual_seed)(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(own)
        if others:
            set_states(module, others)
