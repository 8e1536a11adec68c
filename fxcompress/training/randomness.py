"""Where the random number generators stand: of torch, Python, numpy, the GPUs, and those of a data loader."""

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from fxcompress.trace.basics.generators import accelerator, set_states, states_of

_PLACES = ("generator", "sampler.generator", "batch_sampler.generator", "batch_sampler.sampler.generator")
"""Where a DataLoader and its samplers keep generators of their own."""


def random_states() -> dict[str, Any]:
    """The states of all global generators, as tensors and numbers; GPUs where any has been used.

    >>> states = random_states()
    >>> before = torch.rand(1), random.random()
    >>> restore_random(states)
    >>> before == (torch.rand(1), random.random())
    True
    """
    found: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    numpy: Any = np.random.get_state(legacy=False)  # noqa: NPY002 - the global one is what data sets use
    if numpy["bit_generator"] == "MT19937":
        key, position = numpy["state"]["key"], numpy["state"]["pos"]
        found["numpy"] = {
            "key": torch.from_numpy(key.astype(np.int64)), "pos": int(position),
            "has_gauss": int(numpy["has_gauss"]), "gauss": float(numpy["gauss"]),
        }  # fmt: skip
    name, device = accelerator()
    if states := states_of(device):
        found[name] = states
    return found


def restore_random(states: dict[str, Any]) -> None:
    """Set all generators that :func:`random_states` found; those of GPUs that are not there are passed over."""
    torch.set_rng_state(states["torch"])
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    numpy = states.get("numpy")
    if numpy is not None:
        state = {"key": numpy["key"].numpy().astype(np.uint32), "pos": numpy["pos"]}
        rest = {"has_gauss": numpy["has_gauss"], "gauss": numpy["gauss"]}
        np.random.set_state({"bit_generator": "MT19937", "state": state} | rest)  # noqa: NPY002
    name, device = accelerator()
    if device is not None:
        set_states(device, list(states.get(name, ())))


def loader_generators(loader: object) -> list[torch.Generator]:
    """The generators that a DataLoader and its samplers hold, each once."""
    found: list[torch.Generator] = []
    for place in _PLACES:
        value: Any = loader
        for name in place.split("."):
            value = getattr(value, name, None)
        if isinstance(value, torch.Generator) and not any(value is other for other in found):
            found.append(value)
    return found


def run_states(loader: Iterable[Any]) -> dict[str, Any]:
    """All of the above: what the rest of a run over ``loader`` depends on."""
    return {"global": random_states(), "loader": [g.get_state() for g in loader_generators(loader)]}


def restore_run(states: dict[str, Any], loader: Iterable[Any]) -> None:
    """Set what :func:`run_states` found; the loader must have as many generators as it had then."""
    for generator, state in zip(loader_generators(loader), states["loader"], strict=True):
        generator.set_state(state)
    restore_random(states["global"])
